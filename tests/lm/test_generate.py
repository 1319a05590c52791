import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import lm
from saejax.base.errors import HookpointError, LMError
from saejax.lm.generate import Sampling, _nucleus, generate

PROMPTS = [[5, 9, 2, 41, 7, 30, 11, 8, 19, 20, 21], [3], [17, 4, 44, 1, 0, 52]]
FAMILIES = ("gpt2", "gpt_neox", "llama3", "mistral", "gemma2", "gemma3", "smollm3", "olmo2")
NEW = 12


def by_full_forwards(model, prompt, new, taps=None):
    """Greedy continuation, each token from a forward pass over everything before it (padded to one length on the right)."""
    forward, ids = jax.jit(lambda m, t: m(t, taps=taps)), list(prompt)
    for _ in range(new):
        padded = np.zeros((1, len(prompt) + new), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(forward(model, padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "label",
    [pytest.param(label, marks=() if label in ("gpt2", "gemma3") else pytest.mark.slow) for label in FAMILIES],
)
def test_greedy_equals_full_forwards(family_model, label):
    """Rows of one batch, padded on the left, past the window of the sliding families (8 to 10 tokens)."""
    model = family_model(label)
    found = generate(model, PROMPTS, NEW)
    assert found == [by_full_forwards(model, prompt, NEW) for prompt in PROMPTS]
    assert len({tuple(row) for row in found}) == 3


def test_taps_steer_every_step(family_model):
    model, name = family_model("mistral"), "blocks.1.hook_resid_post"
    push = 6.0 * np.random.default_rng(0).standard_normal(40).astype(np.float32)

    def steer(x, positions):
        return x + jnp.where((positions >= 3)[..., None], push, 0.0)

    found = generate(model, PROMPTS[:1], NEW, taps={name: steer})
    assert found == [by_full_forwards(model, PROMPTS[0], NEW, {name: steer})]
    assert found != generate(model, PROMPTS[:1], NEW)
    assert generate(model, PROMPTS[:1], NEW, taps={name: lambda x: x}) == generate(model, PROMPTS[:1], NEW)


@pytest.mark.parametrize("name", ["hook_embed", "ln_final.hook_normalized", "blocks.2.attn.hook_z"])
def test_taps_at_both_ends(family_model, name):
    model = family_model("gpt2")
    taps = {name: lambda x: 0.5 * x + 0.1}
    assert generate(model, [[3, 8]], 6, taps=taps) == [by_full_forwards(model, [3, 8], 6, taps)]


def test_longrope_goes_by_prompt_and_new_tokens(family_model):
    """Original context 32: 20 + 12 tokens take the short factors, whatever the prompt is padded to, 20 + 13 the long ones."""
    model, prompt = family_model("phi3"), np.random.default_rng(5).integers(0, 53, 20).tolist()
    short, long = (generate(model, [prompt], new)[0] for new in (12, 13))
    assert short == by_full_forwards(model, prompt, 12) and long == by_full_forwards(model, prompt, 13)
    assert short != long[:12]
    assert generate(model, [prompt, prompt[:3]], 12)[0] == short


def test_a_tap_needs_no_hash_and_is_not_kept(family_model):
    class Push:
        __hash__ = None

        def __call__(self, x):
            return jnp.flip(x, -1)

    model, name, tap = family_model("gpt2"), "blocks.1.hook_resid_post", Push()
    found = generate(model, [[3, 8]], 6, taps={name: tap})
    kept = weakref.ref(tap)
    del tap
    gc.collect()
    assert kept() is None
    assert found == [by_full_forwards(model, [3, 8], 6, {name: Push()})] != generate(model, [[3, 8]], 6)


def test_seed_temperature_and_top_p(family_model):
    model = family_model("gemma2")

    def draw(seed, **options):
        return generate(model, PROMPTS, NEW, sampling=Sampling(**options), seed=seed)

    assert draw(1, temperature=1.0) == draw(1, temperature=1.0) != draw(2, temperature=1.0)
    assert draw(1, temperature=1.0, top_p=1e-6) == generate(model, PROMPTS, NEW)
    assert draw(1, temperature=1e-4) == generate(model, PROMPTS, NEW)


def test_sampled_frequencies_are_those_of_the_softmax(family_model):
    model, prompt = family_model("llama3"), [3, 8, 2]
    wanted = jax.nn.softmax(model(jnp.asarray([prompt]))[0, -1] / 0.7)
    drawn = generate(model, [prompt] * 4000, 1, sampling=Sampling(temperature=0.7), seed=5)
    share = np.bincount(np.ravel(drawn), minlength=53) / 4000
    assert np.abs(share - wanted).max() < 4 * np.sqrt(0.25 / 4000)


def test_nucleus_keeps_the_fewest_tokens_that_reach_top_p():
    probs = jnp.asarray([[0.1, 0.5, 0.05, 0.35]])
    for top_p, kept in ((0.4, {1}), (0.5, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (0.99, {0, 1, 2, 3})):
        assert set(np.flatnonzero(np.isfinite(_nucleus(jnp.log(probs), top_p))[0])) == kept


def test_stop_ids_end_a_row(family_model):
    model = family_model("llama3")
    plain = generate(model, PROMPTS, NEW)
    stop = plain[0][4]
    found = generate(model, PROMPTS, NEW, stop_ids=[stop])
    for row, full in zip(found, plain, strict=True):
        assert row == (full[: full.index(stop) + 1] if stop in full else full)


def test_what_cannot_be_generated(family_model):
    model = family_model("llama3")
    for call, part in (
        (lambda: generate(model, [], 3), "at least one token"),
        (lambda: generate(model, [[1], []], 3), "at least one token"),
        (lambda: generate(model, [[53]], 3), r"\[53\] are outside"),
        (lambda: generate(model, [[1] * 60], 5), "60 prompt tokens and 5 new ones do not fit the context of 64"),
        (lambda: Sampling(temperature=-1.0), "temperature=-1.0"),
        (lambda: Sampling(top_p=0.0), "top_p=0.0"),
    ):
        with pytest.raises(LMError, match=part):
            call()
    with pytest.raises(HookpointError):
        generate(model, [[1]], 3, taps={"blocks.9.hook_resid_post": lambda x: x})
    assert generate(model, [[1] * 60], 4) and generate(model, [[1]], 0) == [[]]


def test_smollm2_continues_sensibly(smollm2):
    tokenizer = smollm2.tokenizer
    prompt = tokenizer.encode("The capital of France is")
    assert tokenizer.decode(lm.generate(smollm2.model, [prompt], 4)[0]).strip().startswith("Paris")
