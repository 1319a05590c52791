import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saejax import lm
from saejax.base.errors import LMError, TokenizerError
from saejax.lm.load import _HUB_FILES, _NOT_HUB_FILES
from tests.lm import families, tiny_llama
from tests.lm.test_weights import old_names


def write_tokenizer(folder, words: int, added: str | None = None) -> None:
    """A word-level tokenizer with ids 0..words-1, the specials <s> and </s>, and one more id for the special `added`."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if added:
        fast.add_special_tokens({"additional_special_tokens": [added]})
    fast.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    made = tiny_llama.write(tmp_path / "tiny")
    write_tokenizer(made, 97)
    return made


def test_local_directory(folder, tiny, tokens_BT):
    found = lm.load(str(folder))
    assert (found.name, found.revision, found.cfg) == ("tiny", None, tiny.cfg)
    np.testing.assert_array_equal(found.model(tokens_BT), tiny(tokens_BT))
    tokenizer = found.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, None, 97)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.encode("w5 w96 what") == [5, 96, 0] and tokenizer.token_strings([5, 96]) == ["w5", " w96"]


def test_digest_depends_on_bytes_and_config_only(folder, tmp_path):
    digest = lm.load(str(folder)).digest
    copy = tiny_llama.write(tmp_path / "copy")
    write_tokenizer(copy, 97)
    assert lm.load(str(copy)).digest == digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    other_config = lm.load(str(copy)).digest
    weights = tiny_llama.tensors()
    weights["model.norm.weight"][3] += 1e-3
    changed = tiny_llama.write(tmp_path / "changed", weights=weights)
    write_tokenizer(changed, 97)
    assert len({digest, other_config, lm.load(str(changed)).digest}) == 3


def test_token_without_an_embedding(folder):
    """Gemma 3 270M and 1B: the tokenizer has an id for images, the model no embedding for it: a text that gives it is refused."""
    write_tokenizer(folder, 97, "<image_soft_token>")
    found = lm.load(str(folder))
    assert (found.tokenizer.vocab_size, found.tokenizer.rows) == (98, 97)
    assert found.tokens("w5 w96").tolist() == [1, 5, 96]
    for refused in (found, found.tokens, lambda text: found.tokenizer.encode_batch(["w5", text])):
        with pytest.raises(TokenizerError, match="token id 97 .*<image_soft_token>.* rows 0 to 96"):
            refused("w5 <image_soft_token>")
    assert 97 not in found.tokenizer.encode_batch(["w5 <image_soft_token>"], special=False)[0]
    write_tokenizer(folder, 96, "<image_soft_token>")
    kept = lm.load(str(folder)).tokenizer
    assert kept.encode("<image_soft_token> w5") == [96, 5] and 96 in kept.special_ids


def test_text_part_of_a_multimodal_checkpoint(tmp_path):
    """Loaded whole: config, weights under the hub's names, and a tokenizer with an id for images that fits."""
    config, tokens = families.CONFIGS["gemma3_multimodal"], jnp.asarray(families.TOKENS)
    folder = families.write(tmp_path / "gemma", config, old_names(families.tensors(config)))
    write_tokenizer(folder, 52, "<image_soft_token>")
    found = lm.load(str(folder))
    golden = np.load(Path(__file__).parent / "golden" / "families" / "gemma3_multimodal.npz")
    np.testing.assert_allclose(np.asarray(found.model(tokens))[:, ::3], golden["logits"], atol=1e-3)
    assert (found.tokenizer.vocab_size, found.cfg.vocab_size) == (53, 53)


def test_directory_without_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="no usable tokenizer"):
        lm.load(str(tiny_llama.write(tmp_path / "tiny")))


def test_a_config_that_transformers_refuses_is_one_line(tmp_path):
    tiny_llama.write(tmp_path, {**tiny_llama.CONFIG, "hidden_size": 256})  # for 6 heads, as it thinks
    write_tokenizer(tmp_path, 97)
    with pytest.raises(TokenizerError, match="no usable tokenizer .*256.* is not a multiple") as error:
        lm.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_chat_template_in_a_file_of_its_own(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    assert lm.load(str(folder)).tokenizer.chat([{"role": "user", "content": "w5 w9"}]) == [5, 9]


def test_what_is_downloaded_of_a_hub_repository():
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
              "tokenizer.model", "chat_template.jinja"]
    others = ["consolidated.safetensors", "original/consolidated.00.pth", "onnx/model.safetensors", "fp16/config.json",
              "pytorch_model.bin", "README.md"]
    found = filter_repo_objects(wanted + others, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HUB_FILES)
    assert list(found) == wanted


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_unreadable_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LMError, match="config.json"):
        lm.load(str(tmp_path))


@pytest.mark.parametrize(
    "model, options, part",
    [
        ("gpt5", {}, "smollm2-135m"),
        ("gone.gguf", {}, "no such GGUF file"),
        ("smollm2-135m", {"dtype": "float16"}, "float32, bfloat16"),
        ("nobody/nothing", {}, "use a local directory"),
        ("", {}, "not a preset"),
        ("../../etc/passwd", {}, "not a preset"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, monkeypatch, model, options, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LMError) as caught:
        lm.load(model, **options)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_preset(smollm2):
    assert smollm2.name == "smollm2-135m"
    assert smollm2.digest == "22621d40590b00a1ef9e216951a9acf8037fea22176ae068f402d85c763d3bbe"
