"""What sets of prompts are held against: exact where all ways are few, right on random sets, strong for a planted feature."""

import itertools

import numpy as np
import pytest

from benchmarks import concept_null as campaign
from saejax.base.errors import FeatureIndexError
from saejax.features.search import sets
from saejax.features.search.null import DRAWS, Null, check_sizes, of_sets

EIGHT = 2.0**-8


def test_p_counts_the_draws_and_the_bound_is_the_last_that_does_not_pass():
    null = Null(np.arange(999) / 999)
    assert null.p(998 / 999) == 2 / 1000 and null.p(2.0) == 1 / 1000 and null.p(-1.0) == 1
    assert null.bound == 949 / 999 and not null.above(null.bound) and null.above(950 / 999)
    few = Null(np.zeros(9))
    assert few.bound == np.inf and not few.above(1.0), "ten draws cannot reach 0.05"


def test_swapped_pairs_against_all_ways_to_swap():
    rng = np.random.default_rng(1)
    on, off = rng.random((8, 50)) < 0.5, rng.random((8, 50)) < 0.3
    difference = on.astype(int) - off
    highest = [max(0, (np.array(side)[:, None] * difference).mean(0).max()) for side in itertools.product((1, -1), repeat=8)]
    score = difference.mean(0).max()
    exact = np.mean(np.array(highest) >= score)
    assert of_sets(on, off, draws=20_000).p(score) == pytest.approx(exact, abs=0.01) and EIGHT <= exact < 0.9


def test_unequal_sets_are_dealt_anew():
    rng = np.random.default_rng(2)
    on, off = rng.random((3, 20)) < 0.6, rng.random((5, 20)) < 0.4
    both, highest = np.concatenate([on, off]), []
    for chosen in itertools.combinations(range(8), 3):
        side = np.isin(np.arange(8), chosen)
        highest.append((both[side].mean(0) - both[~side].mean(0)).max())
    score = (on.mean(0) - off.mean(0)).max()
    assert of_sets(on, off, draws=20_000).p(score) == pytest.approx(np.mean(np.array(highest) >= score - 1e-9), abs=0.01)


def test_sentences_in_other_orders():
    """A feature that follows the meaning stands above chance; one of a language, one always on, and noise do not."""
    rng = np.random.default_rng(0)
    noise = rng.random((5, 36, 40)) < 0.3
    noise[:, :, 0], noise[:, :, 1] = np.arange(5)[:, None] == 1, True
    null = sets.shuffled_meaning(noise)
    assert not null.above(sets.multilingual_score(noise).max()) and len(null.highest_D) == DRAWS
    noise[:, :, 2] = rng.random(36) < 0.3
    scores, null = sets.multilingual_score(noise), sets.shuffled_meaning(noise)
    assert [f for f in range(40) if null.above(scores[f])] == [2]


def test_nothing_is_on_anywhere():
    tested = sets.told_apart(np.zeros((6, 9)), np.zeros((6, 9)))
    assert (tested.found, tested.best, tested.bound, tested.p) == ([], 0, 0, 1)
    assert sets.shuffled_meaning(np.zeros((5, 12, 3), bool)).p(0.0) == 1


@pytest.mark.parametrize("positives, negatives, enough", [(5, 5, True), (4, 4, False), (1, 1, False), (3, 4, True), (2, 4, False),
                                                          (1, 19, True), (1, 18, False), (3, 0, False)])
def test_how_many_prompts_it_takes(positives, negatives, enough):
    if enough:
        return check_sizes(positives, negatives)
    with pytest.raises(FeatureIndexError, match="give at least 5 pairs") as error:
        check_sizes(positives, negatives)
    assert "\n" not in str(error.value)


def test_random_sets_and_a_planted_feature():
    """One small trial of benchmarks/concept_null.py, which has the figures of the documents."""
    assert campaign.random_trials(60, 256, seed=0) <= 0.1
    assert campaign.planted_trials(10, 256, seed=0) == 1
