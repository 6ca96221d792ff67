"""`Samples`: what the model under training says at each evaluation, and how often it gives the expected answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jft.generation import generate
from jft.generation.prompts import encode, ends
from jft.generation.text import check_rows
from jft.models.core import is_jft_model
from jft.models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Samples:
    """Options. prompts: texts to continue at each evaluation, as a user's messages with ``chat``. exact_match: so many
    examples of the evaluation data are answered, greedily, and ``exact_match`` is the share of answers that are the expected
    one, spaces at their ends aside. max_tokens: of an answer. tokenizer: of the data.
    """

    prompts: tuple[str, ...] = ()
    exact_match: int = 0
    max_tokens: int = 64
    chat: bool = False
    tokenizer: Any = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.exact_match < 0 or self.max_tokens < 1:
            raise ValueError(
                f"eval.exact_match is {self.exact_match} and eval.max_tokens {self.max_tokens}; they must be at least 0 and 1"
            )

    def __bool__(self) -> bool:
        return bool(self.prompts or self.exact_match)

    def check(self, model: Any, eval_data: Any) -> None:
        """``ValueError`` for what would fail at the first evaluation."""
        if is_jft_model(model) and not isinstance(model.config, DecoderConfig):
            raise ValueError(
                f"eval.samples and eval.exact_match are of decoders, and {type(model.config).__name__} is none"
            )
        if jax.process_count() > 1:
            raise ValueError("eval.samples and eval.exact_match are for runs of one process; leave them out here")
        if self.tokenizer is None:
            raise ValueError("eval.samples and eval.exact_match need a tokenizer, and the data has none")
        if self.exact_match and eval_data is None:
            raise ValueError("eval.exact_match answers examples of the evaluation data, and there is none")
        check_rows(model, [encode(prompt, self.tokenizer, self.chat) for prompt in self.prompts], self.max_tokens)

    def texts(self, model: Any, params: Any) -> list[str]:
        """The continuations of the prompts."""
        options = {"tokenizer": self.tokenizer, "chat": self.chat, "max_tokens": self.max_tokens}
        return generate(model, params, self.prompts, **options) if self.prompts else []

    def scores(self, model: Any, params: Any, batches: Iterable) -> dict[str, float]:
        """``{"exact_match": share}`` over the first examples of ``batches``."""
        if not self.exact_match:
            return {}
        pairs = [pair for pair, _ in zip(questions(batches), range(self.exact_match), strict=False)]
        if not pairs:
            raise ValueError("eval.exact_match: no example has tokens before its first target, to be answered")
        # Of a chat also the token that ends a turn, which ids alone do not tell.
        end, prompts = ends(model, self.tokenizer, self.chat), [q for q, _ in pairs]
        answers = generate(model, params, prompts, tokenizer=self.tokenizer, max_tokens=self.max_tokens, eos=end)
        decode = lambda ids: self.tokenizer.core.decode(ids.tolist(), skip_special_tokens=True)
        right = [answer.strip() == decode(ids).strip() for answer, (_, ids) in zip(answers, pairs, strict=True)]
        return {"exact_match": float(np.mean(right))}


def questions(batches: Iterable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``(prompt, answer)`` ids of each sequence in batches of tokens: what stands before its first targets, and those.

    Sequences packed into one row are apart; of several turns the first counts, which needs no answer of the model's.
    """
    for batch in batches:
        if not hasattr(batch, "keys") or "loss_mask" not in batch:
            raise ValueError(
                "eval.exact_match needs batches with a loss_mask, which says what is the answer: task sft has one"
            )
        tokens = np.asarray(batch["tokens"])
        mask = np.asarray(batch["loss_mask"]) > 0
        segments = np.asarray(batch["segments"]) if "segments" in batch else np.ones_like(tokens)
        valid = np.asarray(batch["valid"]) if "valid" in batch else np.ones(len(tokens), bool)
        for row in np.flatnonzero(valid):
            for segment in range(1, int(segments[row].max(initial=0)) + 1):
                here = segments[row] == segment
                ids, targets = tokens[row][here], mask[row][here]
                first = int(np.argmax(targets)) if targets.any() else 0
                if first:
                    end = first + int(np.argmin(np.append(targets[first:], False)))
                    yield ids[:first], ids[first:end]


def write(workdir: Path | None, step: int, prompts: Iterable[str], texts: Iterable[str]) -> None:
    """Append a row for each text to ``samples.jsonl`` of a run that has a folder."""
    if workdir is None:
        return
    with (workdir / "samples.jsonl").open("a", encoding="utf-8") as file:
        for prompt, text in zip(prompts, texts, strict=True):
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
