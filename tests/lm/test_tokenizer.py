import dataclasses
import json
from pathlib import Path

import gguf
import pytest

from saejax.base.errors import TokenizerError
from saejax.lm import tokenizer
from saejax.lm.gguf_file import GGUFFile

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: ascii(case["text"][:20]))
def test_equals_transformers(smollm2, case):
    assert smollm2.tokenizer.encode(case["text"]) == case["ids"]
    assert smollm2.tokenizer.decode(case["ids"]) == case["text"]


def test_batch_equals_single(smollm2):
    texts = [case["text"] for case in GOLDEN]
    assert smollm2.tokenizer.encode_batch(texts) == [case["ids"] for case in GOLDEN]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("  1", ["  ", "1"]),
        (" 2024", [" ", "2", "0", "2", "4"]),
        ("a  b", ["a", " ", " b"]),
        ("x=12", ["x", "=", "1", "2"]),
    ],
)
def test_every_digit_stands_alone(smollm2, text, pieces):
    """SmolLM's split, which the GGUF file names `smollm`; GPT-2's split would make "  1" into " ", " 1"."""
    assert smollm2.tokenizer.token_strings(smollm2.tokenizer.encode(text)) == pieces


def test_specials(smollm2):
    found = smollm2.tokenizer
    assert (found.bos_id, found.eos_id, found.pad_id, found.vocab_size) == (1, 2, 2, 49152)
    assert found.special_ids == frozenset(range(17))
    assert found.token_strings([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert len(found.digest) == 64


@pytest.mark.parametrize(
    "kind, pre, tokens, part",
    [
        ("gpt2", "smollm", None, "no tokenizer.ggml.tokens"),
        ("gpt2", "made-up", ["a", "b"], "pre='made-up' is not known"),
        ("rwkv", "default", ["a", "b"], "cannot be rebuilt"),
    ],
)
def test_tokenizers_that_would_be_guessed_are_refused(tmp_path, kind, pre, tokens, part):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    if tokens:
        writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(TokenizerError, match=part):
        tokenizer.from_gguf(GGUFFile(tmp_path / "model.gguf"))


def test_chat_template(smollm2):
    tokenizer = smollm2.tokenizer
    ids = tokenizer.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    wanted = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == wanted and ids == tokenizer.encode(wanted)
    open_end = tokenizer.chat([{"role": "user", "content": "Hi"}], answer=False)
    assert tokenizer.decode(open_end).endswith("Hi<|im_end|>\n")


@pytest.mark.parametrize(
    "template, part",
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "the chat template refuses"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_chat_templates_that_fail(smollm2, template, part):
    tokenizer = dataclasses.replace(smollm2.tokenizer, chat_template=template)
    with pytest.raises(TokenizerError, match=part) as caught:
        tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(caught.value)
