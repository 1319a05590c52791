"""A judge that runs here: a language model of `saejax.lm`."""

import json
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from saejax import lm
from saejax.base.errors import JudgeError, LMError, TokenizerError
from saejax.judging.questions import LEVELS, Question, Reply
from saejax.lm import LM

NEW_TOKENS = {"explain": 80}
_NEW, _BATCH, _ROUND = 16, 8, 128
_TOKENS = 4096  # of a batch: bounds the KV cache


class LocalJudge:
    """Greedy answers of a model, in its chat template where it has one. Simulations are read from the probabilities of digits:
    level of a token = sum over digits of digit x p(digit), in one pass over all lines, none of which shows an answer
    (after Bills et al. 2023, all tokens at once).
    """

    retries = True

    def __init__(self, lm_: LM):
        self.name, self._lm = lm_.name, lm_
        self._digits = np.array([_single(lm_, str(i)) for i in range(LEVELS)], np.int32)

    def describe(self) -> dict:
        return {"kind": "local", "model": self._lm.name, "digest": self._lm.digest}

    def ask(self, questions: Iterable[Question]) -> Iterator[tuple[Question, Reply]]:
        prompts = sorted(((self._ids(question), question) for question in questions), key=lambda p: (p[1].task, len(p[0])))
        batch = []
        for ids, question in prompts:
            new = 0 if question.task == "simulate" else NEW_TOKENS.get(question.task, _NEW)
            longest = self._lm.cfg.max_context - new
            lines = self._lines(question) if question.task == "simulate" else []
            length = len(ids) + sum(map(len, lines))
            if length > longest:
                yield question, Reply(None, f"the prompt has {length} tokens, the judge's context has room for {longest}")
            elif question.task == "simulate":
                yield question, Reply(json.dumps(self._simulated(ids, lines)))
            else:
                full = len(batch) == _BATCH or (len(batch) + 1) * (length + new) > _TOKENS
                if batch and (full or batch[0][1].task != question.task):
                    yield from self._generated(batch)
                    batch = []
                batch.append((ids, question))
        if batch:
            yield from self._generated(batch)

    def _ids(self, question: Question) -> list[int]:
        tokenizer = self._lm.tokenizer
        if tokenizer.chat_template is not None:
            try:
                return tokenizer.chat([{"role": "user", "content": question.prompt}])
            except TokenizerError as error:
                raise JudgeError(f"judge=local:{self.name}: {error}") from error
        bos = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        return [*bos, *tokenizer.encode(f"{question.prompt}\n\nAnswer: ")]

    def _generated(self, batch: list[tuple[list[int], Question]]) -> Iterator[tuple[Question, Reply]]:
        new = NEW_TOKENS.get(batch[0][1].task, _NEW)
        prompts = [ids for ids, _ in batch]
        prompts += prompts[-1:] * ((1 << (len(prompts) - 1).bit_length()) - len(prompts))  # few shapes, few compilations
        eos = self._lm.tokenizer.eos_id
        stop = () if eos is None else (eos,)
        try:
            answers = lm.generate(self._lm.model, prompts, new, stop_ids=stop)
        except LMError as error:
            raise JudgeError(f"judge=local:{self.name}: {error}") from error
        for (_, question), ids in zip(batch, answers, strict=False):
            yield question, Reply(self._lm.tokenizer.decode([i for i in ids if i not in stop]))

    def _lines(self, question: Question) -> list[list[int]]:
        encode = self._lm.tokenizer.encode
        return [encode(f"{'' if i == 0 else '?' + chr(10)}{token} = ") for i, token in enumerate(question.tokens)]

    def _simulated(self, ids: list[int], lines: list[list[int]]) -> list[float]:
        ends = len(ids) + np.cumsum([len(line) for line in lines]) - 1
        tokens = np.array([*ids, *(t for line in lines for t in line)], np.int32)
        size = min(-(-len(tokens) // _ROUND) * _ROUND, self._lm.cfg.max_context)
        places = np.pad(ends.astype(np.int32), (0, -len(ends) % 32), mode="edge")
        levels = _expected(self._lm.model, np.pad(tokens, (0, size - len(tokens)))[None], places, self._digits)
        return [round(float(v), 4) for v in np.asarray(levels)[:len(ends)]]


@jax.jit
def _expected(model, tokens_1T, places_P, digits):
    """[P] sum over digits of digit x softmax over the ten digits' logits, at these places."""
    logits_PC = model(tokens_1T)[0][places_P][:, digits].astype(jnp.float32)
    return jax.nn.softmax(logits_PC, axis=-1) @ jnp.arange(len(digits), dtype=jnp.float32)


def _single(lm_: LM, text: str) -> int:
    """The token that this digit is at the end of a text."""
    ids = lm_.tokenizer.encode(f"a {text}")
    if lm_.tokenizer.decode(ids[-1:]).strip() != text:
        raise JudgeError(f"judge=local:{lm_.name}: its tokenizer has no token of its own for {text!r}; use another model")
    return ids[-1]
