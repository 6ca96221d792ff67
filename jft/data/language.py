"""Tasks over text: language modelling, prompt-response and chat fine-tuning, sequence to sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jft.data.chat import LOSSES, ChatTemplate, check_messages
from jft.data.errors import DataError, choose, shorten
from jft.data.source import Source, field_of
from jft.data.tasks import Example, Task, check_length, fit, padded
from jft.data.tokenizer import Tokenizer


def _without_end(ids: np.ndarray, end: int | None) -> np.ndarray:
    """Ids without the final eos that some post-processors add."""
    return ids[:-1] if end is not None and len(ids) and ids[-1] == end else ids


def _with_end(ids: np.ndarray, end: int | None) -> np.ndarray:
    return ids if end is None else np.append(_without_end(ids, end), np.int32(end)).astype(np.int32)


def row(ids: np.ndarray, mask: np.ndarray) -> Example:
    """Tokens with their targets; the first token has no context, so it never is one."""
    mask = mask.astype(np.float32)
    mask[:1] = 0
    return {"tokens": ids.astype(np.int32), "loss_mask": mask}


class LanguageModelling(Task):
    """Every token of a text, and the eos after it, as targets.

    text: a field or pattern. The tokenizer's own bos is added where its post-processor does so. With ``pack: "concat"``
    texts run on over rows and none is too long. Texts of fewer than two tokens have no target and are left out.
    """

    packs = True
    drops = True

    def __init__(self, source: Source, tokenizer: Tokenizer, text: str = "text", max_length: int = 512,
                 too_long: str = "error", pack: Any = False):  # fmt: skip
        super().__init__(source)
        check_length(max_length, too_long)
        self.tokenizer, self.field, self.max_length, self.too_long = tokenizer, text, max_length, too_long
        self.splits, self.longest = pack == "concat", (max_length,)

    def encode(self, index: int, record: Mapping[str, Any], rng: np.random.Generator | None) -> Example | None:
        ids = self.tokenizer.encode(self.text(index, record, self.field), special=True).ids
        ids = _with_end(ids, self.tokenizer.eos_id)
        if len(ids) < 2:
            return None
        if not self.splits:
            if not fit(ids, self.max_length, self.too_long, "set pack: 'concat', raise max_length"):
                return None
            self.truncated += len(ids) > self.max_length
            ids = ids[: self.max_length]
        return row(ids, np.ones(len(ids)))


# The prompts of Alpaca (Taori et al. 2023), with and without an input.
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# Fields by which data sets are known where a config names none, first match first.
_MESSAGES = ("messages", "conversations")
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("input", "output"))


class PromptResponse(Task):
    """Supervised fine-tuning: the response is the target, the prompt is context.

    Either ``prompt`` and ``response`` (fields, or patterns with braces), tokenised apart so that the border between
    them is exact, ending in eos; or ``messages``, a field of ``[{"role", "content"}, ...]`` rendered with the
    tokenizer's chat template (``chat_template`` overrides it: Jinja text). ``chat: true`` makes messages of prompt and
    response; system: a first message. tools: a field of tool descriptions. date: today's date for templates.
    loss: "responses" (default), "last" (the last response only) or "all" (every token).
    too_long: "error" (default), "truncate" (the end is cut) or "drop".
    Where neither is named, the first record tells: ``messages`` or ``conversations``; Alpaca's ``instruction``, ``input`` and
    ``output``, with its prompt (with ``chat``, instruction and input are the user's message); ``prompt`` and ``response`` or
    ``completion``, ``question`` and ``answer``, ``input`` and ``output``. Messages may be ShareGPT's ``{"from", "value"}``.

    Raises :class:`DataError`, with the example's place and decoded text, where no token, or every token, would be a
    target with a loss other than "all".
    """

    packs = True

    def __init__(self, source: Source, tokenizer: Tokenizer, prompt: str | None = None, response: str | None = None,
                 messages: str | None = None, chat: bool = False, system: str | None = None, tools: str | None = None,
                 chat_template: str | None = None, date: str | None = None, loss: str = "responses",
                 max_length: int = 512, too_long: str = "error", pack: Any = False):  # fmt: skip
        super().__init__(source)
        check_length(max_length, too_long)
        choose(loss, LOSSES, "loss")
        self.alpaca = False
        if messages is None and prompt is None and response is None:
            messages, prompt, response, self.alpaca = _fields(source)
        if (messages is None) != (prompt is not None and response is not None) or (messages and (prompt or response)):
            raise DataError("sft: give prompt and response, or messages; not both, and not one of the pair")
        self.tokenizer, self.max_length, self.too_long, self.loss = tokenizer, max_length, too_long, loss
        self.prompt, self.response, self.messages = prompt, response, messages
        self.system, self.tools, self.splits = system, tools, pack == "concat"
        self.drops, self.longest = too_long == "drop", (max_length,)
        self.template: ChatTemplate | None = None
        if messages is not None or chat:
            text = chat_template or tokenizer.chat_template
            if text is None:
                raise DataError(f"{tokenizer.name} has no chat template; set chat_template, or use prompt and response")
            self.template = ChatTemplate(text, tokenizer.specials, date)
        elif system is not None or tools is not None or chat_template is not None:
            raise DataError("sft: system, tools and chat_template need messages, or chat: true")

    def encode(self, index: int, record: Mapping[str, Any], rng: np.random.Generator | None) -> Example | None:
        ids, mask = self._chat(index, record) if self.template is not None else self._plain(index, record)
        self._check(ids, mask)
        if self.splits:
            return row(ids, mask)
        if not fit(ids, self.max_length, self.too_long):
            return None
        self.truncated += len(ids) > self.max_length
        # The first token is never a target.
        if not mask[1 : self.max_length].any():
            raise DataError(
                f"cut to max_length={self.max_length}, no token of the response is left ({len(ids)} tokens); raise"
                " max_length, or set too_long: 'drop'"
            )
        return row(ids[: self.max_length], mask[: self.max_length])

    def _texts(self, index: int, record: Mapping[str, Any]) -> tuple[str, str]:
        """(prompt, response) of a record."""
        response = self.text(index, record, self.response or "")
        if not self.alpaca:
            return self.text(index, record, self.prompt or ""), response
        instruction = self.text(index, record, "instruction")
        context = self.text(index, record, "input") if record.get("input") else ""
        if self.template is not None:
            return f"{instruction}\n\n{context}" if context else instruction, response
        # Not `self.text`, in which braces of the record would be fields.
        form = _ALPACA_INPUT if context else _ALPACA
        return form.format(instruction=instruction, input=context), response

    def _plain(self, index: int, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        prompt, response = self._texts(index, record)
        if not response.strip():
            raise DataError(f"the response ({self.response!r}) is empty")
        # Some post-processors end every text, but the prompt goes on with the response.
        before = _without_end(self.tokenizer.encode(prompt, special=True).ids, self.tokenizer.eos_id)
        after = _with_end(self.tokenizer.encode(response).ids, self.tokenizer.eos_id)
        ids = np.concatenate([before, after]).astype(np.int32)
        mask = np.arange(len(ids)) >= len(before)
        return ids, np.ones_like(mask) if self.loss == "all" else mask

    def _conversation(self, index: int, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        if self.messages is not None:
            messages = check_messages(field_of(self.source, index, self.messages, record))
        else:
            prompt, response = self._texts(index, record)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]

    def _chat(self, index: int, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        template = self.template
        if template is None:
            raise TypeError("no chat template")
        tools = None if self.tools is None else field_of(self.source, index, self.tools, record)
        text, spans = template.spans(self._conversation(index, record), self.loss, tools)
        encoding = self.tokenizer.encode(text)
        # A token of no width, a part of a character, counts where it starts.
        start, stop = encoding.offsets[:, 0], np.maximum(encoding.offsets[:, 1], encoding.offsets[:, 0] + 1)
        mask = np.zeros(len(encoding.ids), bool)
        for first, last in spans:
            # Overlap is enough: tokens need not end where turns do.
            mask |= (stop > first) & (start < last)
        return encoding.ids, mask

    def _check(self, ids: np.ndarray, mask: np.ndarray) -> None:
        if self.loss == "all":
            return
        state = "no token is" if not mask.any() else "every token is" if mask.all() else ""
        if state:
            decoded = shorten(self.tokenizer.decode(ids[:200]), 300)
            raise DataError(
                f"{state} a target although loss is {self.loss!r}; check the fields and the chat template"
                f" (loss: 'all' trains on every token). Decoded: {decoded}"
            )


def _fields(source: Source) -> tuple[str | None, str | None, str | None, bool]:
    """``(messages, prompt, response, whether it is Alpaca's)``: the fields of the first record that hold them."""
    record = source[0]
    for name in _MESSAGES:
        if name in record:
            return name, None, None, False
    if "instruction" in record and "output" in record:
        return None, "instruction", "output", True
    pair = next((pair for pair in _PAIRS if all(name in record for name in pair)), _PAIRS[0])
    return None, *pair, False


class SequenceToSequence(Task):
    """Encoder-decoder examples: ``tokens``, ``segments`` [T]; ``decoder_tokens``, ``decoder_segments``, ``loss_mask`` [U].

    ``decoder_tokens`` is the start token, the response, eos: token t is predicted from those before it, so that
    ``loss_mask`` is 0 at the start token and on padding. The prompt carries the special tokens of the tokenizer.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, prompt: str = "prompt", response: str = "response",
                 max_length: int = 512, max_target_length: int = 128, too_long: str = "error"):  # fmt: skip
        super().__init__(source)
        check_length(max_length, too_long)
        check_length(max_target_length, too_long, "max_target_length")
        self.tokenizer, self.prompt, self.response, self.too_long = tokenizer, prompt, response, too_long
        self.longest, self.drops = (max_length, max_target_length), too_long == "drop"

    def encode(self, index: int, record: Mapping[str, Any], rng: np.random.Generator | None) -> Example | None:
        tokenizer = self.tokenizer
        source = tokenizer.encode(self.text(index, record, self.prompt), special=True).ids
        response = _with_end(tokenizer.encode(self.text(index, record, self.response)).ids, tokenizer.eos_id)
        start = tokenizer.start_id if tokenizer.start_id is not None else tokenizer.pad
        target = np.concatenate([[start], response]).astype(np.int32)
        longest, longest_target = self.longest
        if not len(source) or len(target) < 2:
            raise DataError("the prompt or the response has no tokens")
        keep = fit(source, longest, self.too_long) and fit(
            target, longest_target, self.too_long, "raise max_target_length"
        )
        if not keep:
            return None
        self.truncated += len(source) > longest or len(target) > longest_target
        segments = padded(np.ones(len(target), np.int32), longest_target)
        mask = segments.astype(np.float32)
        mask[0] = 0
        return {
            "tokens": padded(source, longest, tokenizer.pad),
            "segments": padded(np.ones(len(source), np.int32), longest),
            "decoder_tokens": padded(target, longest_target, tokenizer.pad),
            "decoder_segments": segments,
            "loss_mask": mask,
        }
