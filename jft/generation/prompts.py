"""Prompts as token ids, and where an answer ends."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jft.data.chat import ChatTemplate, check_messages
from jft.data.tokenizer import Tokenizer
from jft.data.tokenizer import load as load_tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | np.ndarray


def tokenizer_of(tokenizer: Any) -> Tokenizer | None:
    """A :class:`Tokenizer` from itself, or from the directory or file that holds it; None for None."""
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer


def template_of(tokenizer: Tokenizer | None) -> ChatTemplate:
    """The tokenizer's chat template; ``ValueError`` where there is none."""
    if tokenizer is None or tokenizer.chat_template is None:
        name = "no tokenizer is given" if tokenizer is None else f"{tokenizer.name} has no chat template"
        raise ValueError(f"messages need a chat template, and {name}; give the prompts as text, with chat=False")
    return ChatTemplate(tokenizer.chat_template, tokenizer.specials)


def encode(prompt: Prompt, tokenizer: Tokenizer | None, chat: bool = False, system: str | None = None) -> np.ndarray:
    """Ids int32 ``[T]`` of a prompt: text, messages, or the ids themselves.

    chat: text is what a user says, in the model's chat template. system: a message before it. Raises ``ValueError`` for a
    prompt without a token, and for text without a tokenizer.
    """
    if isinstance(prompt, np.ndarray) or (not isinstance(prompt, str) and all(isinstance(x, int) for x in prompt)):
        ids = np.asarray(prompt, None if len(prompt) else np.int32)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"a prompt of ids is one row of integers; got {ids.dtype} of shape {ids.shape}")
    else:
        ids = _encode_text(prompt, tokenizer, chat, system)
    if not len(ids):
        raise ValueError("a prompt has no token; begin it with text, or with the model's bos token")
    return ids.astype(np.int32)


def _encode_text(prompt: Any, tokenizer: Tokenizer | None, chat: bool, system: str | None) -> np.ndarray:
    if tokenizer is None:
        raise ValueError("text needs a tokenizer; give tokenizer=DIR (of the model), or prompts as lists of ids")
    if isinstance(prompt, str) and not chat:
        if system is not None:
            raise ValueError("system is a message of a chat; set chat=True, or put it into the prompt")
        ids = tokenizer.encode(prompt, special=True).ids
        # Some post-processors end every text, but this one goes on.
        return ids[:-1] if len(ids) and ids[-1] == tokenizer.eos_id else ids
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.encode(template_of(tokenizer).render(messages, prompt=True)).ids


def ends(model: Any, tokenizer: Tokenizer | None, chat: bool) -> tuple[int, ...]:
    """The ids that end a text: the model's eos, the tokenizer's, and in a chat the token that ends an assistant's turn."""
    found = dict(getattr(getattr(model, "config", None), "special_tokens", ())).get("eos_token_id", ())
    ids = list(found) if isinstance(found, Iterable) else [found]
    if tokenizer is not None and tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    if tokenizer is not None and chat and (end := _turn_end(tokenizer)) is not None:
        ids.append(end)
    return tuple(dict.fromkeys(ids))


def _turn_end(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts behind an answer."""
    answer = "4"
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}]
    rest = template_of(tokenizer).render(messages).rpartition(answer)[2]
    ids = tokenizer.encode(rest).ids
    special = tokenizer.core.get_added_tokens_decoder()
    return int(ids[0]) if len(ids) and int(ids[0]) in special else None
