import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import lm
from saejax.errors import HookpointError, LMError
from saejax.lm import weights
from saejax.lm.generate import Sampling, _nucleus, generate
from saejax.lm.hf_config import from_hf
from tests.lm import families

PROMPTS = [[5, 9, 2, 41, 7, 30, 11, 8, 19, 20, 21], [3], [17, 4, 44, 1, 0, 52]]
FAMILIES = ("gpt2", "gpt_neox", "llama3", "mistral", "gemma2", "gemma3", "smollm3", "olmo2")
NEW = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")

    def load(label):
        config = families.CONFIGS[label]
        return weights.from_safetensors(from_hf(config), families.write(root / label, config), dtype=jnp.float32)

    return {label: load(label) for label in FAMILIES}


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
    [pytest.param(label, marks=() if label in ("gpt2", "gemma3", "smollm3") else pytest.mark.slow) for label in FAMILIES],
)
def test_greedy_equals_full_forwards(models, label):
    """Rows of one batch, padded on the left, past the window of the sliding families (8 to 10 tokens)."""
    model = models[label]
    found = generate(model, PROMPTS, NEW)
    assert found == [by_full_forwards(model, prompt, NEW) for prompt in PROMPTS]
    assert len({tuple(row) for row in found}) == 3


def test_taps_steer_every_step(models):
    model, name = models["mistral"], "blocks.1.hook_resid_post"
    push = 6.0 * np.random.default_rng(0).standard_normal(40).astype(np.float32)

    def steer(x, positions):
        return x + jnp.where((positions >= 3)[..., None], push, 0.0)

    found = generate(model, PROMPTS[:1], NEW, taps={name: steer})
    assert found == [by_full_forwards(model, PROMPTS[0], NEW, {name: steer})]
    assert found != generate(model, PROMPTS[:1], NEW)
    assert generate(model, PROMPTS[:1], NEW, taps={name: lambda x: x}) == generate(model, PROMPTS[:1], NEW)


@pytest.mark.parametrize("name", ["hook_embed", "ln_final.hook_normalized", "blocks.2.attn.hook_z"])
def test_taps_at_both_ends(models, name):
    model = models["gpt2"]
    taps = {name: lambda x: 0.5 * x + 0.1}
    assert generate(model, [[3, 8]], 6, taps=taps) == [by_full_forwards(model, [3, 8], 6, taps)]


def test_seed_temperature_and_top_p(models):
    model = models["gemma2"]

    def draw(seed, **options):
        return generate(model, PROMPTS, NEW, sampling=Sampling(**options), seed=seed)

    assert draw(1, temperature=1.0) == draw(1, temperature=1.0) != draw(2, temperature=1.0)
    assert draw(1, temperature=1.0, top_p=1e-6) == generate(model, PROMPTS, NEW)
    assert draw(1, temperature=1e-4) == generate(model, PROMPTS, NEW)


def test_sampled_frequencies_are_those_of_the_softmax(models):
    model, prompt = models["llama3"], [3, 8, 2]
    wanted = jax.nn.softmax(model(jnp.asarray([prompt]))[0, -1] / 0.7)
    drawn = generate(model, [prompt] * 4000, 1, sampling=Sampling(temperature=0.7), seed=5)
    share = np.bincount(np.ravel(drawn), minlength=53) / 4000
    assert np.abs(share - wanted).max() < 4 * np.sqrt(0.25 / 4000)


def test_nucleus_keeps_the_fewest_tokens_that_reach_top_p():
    probs = jnp.asarray([[0.1, 0.5, 0.05, 0.35]])
    for top_p, kept in ((0.4, {1}), (0.5, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (0.99, {0, 1, 2, 3})):
        assert set(np.flatnonzero(np.isfinite(_nucleus(jnp.log(probs), top_p))[0])) == kept


def test_stop_ids_end_a_row(models):
    model = models["llama3"]
    plain = generate(model, PROMPTS, NEW)
    stop = plain[0][4]
    found = generate(model, PROMPTS, NEW, stop_ids=[stop])
    for row, full in zip(found, plain, strict=True):
        assert row == (full[: full.index(stop) + 1] if stop in full else full)


def test_what_cannot_be_generated(models):
    model = models["llama3"]
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
