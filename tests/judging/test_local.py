"""The judge that runs here, a tiny random model: what it says is what the model says."""

import json
import string

import jax
import numpy as np
import pytest

from saejax import lm
from saejax.base.errors import JudgeError
from saejax.judging.local import LocalJudge
from saejax.judging.questions import Question, understood
from tests.lm import tiny_llama


def write_tokenizer(folder, letters: str) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    vocabulary = ["<unk>", "<s>", "</s>", *letters]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}')


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tiny_llama.write(tmp_path_factory.mktemp("judge") / "model", tiny_llama.CONFIG | {"max_position_embeddings": 256})
    write_tokenizer(folder, string.ascii_letters + string.digits + " .?=-\n")
    return LocalJudge(lm.load(str(folder)))


def greedy(judge: LocalJudge, prompt: str, new: int) -> str:
    tokenizer = judge._lm.tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode(f"{prompt}\n\nAnswer: ")]
    [found] = lm.generate(judge._lm.model, [ids], new, stop_ids=(tokenizer.eos_id,))
    return tokenizer.decode([i for i in found if i != tokenizer.eos_id])


def test_answers_are_greedy_whatever_the_batch(judge):
    questions = [Question(f"q{i}", "rubric", i, f"How well does it fit {'so ' * i}") for i in range(9)]
    found = {question.id: reply.text for question, reply in judge.ask(questions)}
    assert found == {q.id: greedy(judge, q.prompt, 16) for q in questions} and len(set(found.values())) > 1


def test_levels_are_expectations_over_digits(judge):
    """Against a pass of its own for each line, over what stands before its level."""
    question = Question("s", "simulate", 0, "Predict", tokens=("the", " cat", "z"))
    [(_, reply)] = judge.ask([question])
    levels = understood(question, reply.text)
    encode = judge._lm.tokenizer.encode
    ids = [judge._lm.tokenizer.bos_id, *encode("Predict\n\nAnswer: ")]
    digits = [encode(d)[-1] for d in string.digits]
    forward = jax.jit(lambda model, tokens: model(tokens)[0])
    for i, token in enumerate(question.tokens):
        ids += encode(f"{token} = ") if i == 0 else encode(f"?\n{token} = ")
        logits = np.asarray(forward(judge._lm.model, np.pad(ids, (0, 128 - len(ids)))[None]), np.float64)[len(ids) - 1, digits]
        p = np.exp(logits - logits.max())
        assert levels[i] == pytest.approx(p @ np.arange(10) / p.sum(), abs=1e-3)
    assert len(set(levels)) == 3 and json.loads(reply.text) == levels


def test_prompts_that_do_not_fit_are_unscored(judge):
    asked = [Question("long", "rubric", 0, "x " * 200), Question("s", "simulate", 0, "x " * 110, tokens=("a",) * 9),
             Question("short", "detect", 0, "x")]
    found = {question.id: reply for question, reply in judge.ask(asked)}
    assert found["long"].text is None and "room for 240" in found["long"].trouble
    assert found["s"].text is None and "room for 256" in found["s"].trouble and found["short"].text is not None


def test_a_tokenizer_without_digits_is_refused(model_and_text):
    with pytest.raises(JudgeError, match="no token of its own for '0'"):
        LocalJudge(lm.load(str(model_and_text[0])))


@pytest.mark.slow
def test_smollm2_answers(tmp_path):
    """A real model: answers of the right form to some questions, and simulations that are not all the same."""
    judge = LocalJudge(lm.load("smollm2-135m"))
    asked = [Question(f"d{i}", "detect", 0, f"Is this an English word: {word}? Answer with one word alone: yes or no.")
             for i, word in enumerate(("house", "xqzvt", "river"))]
    asked += [Question("s", "simulate", 0, "A unit is active on names of animals. Predict how active it is, 0 to 9, at each.",
                       tokens=(" the", " dog", " and", " the", " cat"))]
    found = {question.id: (question, reply) for question, reply in judge.ask(asked)}
    assert any(understood(question, reply.text) is not None for question, reply in found.values() if question.task == "detect")
    levels = understood(*[found["s"][0], found["s"][1].text])
    assert len(levels) == 5 and len(set(levels)) > 1
