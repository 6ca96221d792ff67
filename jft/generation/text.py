"""`generate`: prompts continued by a model, as texts or token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jft import parallel, tree
from jft.data.tokenizer import Tokenizer
from jft.generation.programs import Programs, State, programs
from jft.generation.prompts import Prompt, encode, ends, tokenizer_of
from jft.generation.sampling import Sampling
from jft.models import decoding
from jft.models.core import is_jft_model
from jft.models.decoder import DecoderConfig

# New tokens between two looks of the host, which shows them and finds stop strings.
STRIDE = 8


def generate(
    model: Any,
    params: Any,
    prompts: str | Sequence[Prompt],
    *,
    tokenizer: Tokenizer | str | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: str | Sequence[str] = (),
    eos: int | Sequence[int] | None = None,
    chat: bool = False,
    system: str | None = None,
    batch_size: int = 0,
    seed: int = 0,
    mesh: Any = None,
    show: Callable[[int, str], None] | None = None,
) -> list[Any]:
    """The continuation of each prompt: texts, or int32 ids where there is no tokenizer.

    model: a jft decoder, which keeps keys and values in a cache; or any causal ``apply(params, batch) -> logits [B, T, V]``
    of ``{"tokens", "segments", "positions"}`` int32 ``[B, T]``, right-padded, which reads all tokens again at every step.
    params may hold structured weights. prompts: texts, lists of messages ``{"role", "content"}``, or lists of ids; one text
    counts as a list of one. tokenizer: of :mod:`jft.data`, or the directory or file of the model. max_tokens: new ones, at
    most. temperature, top_k, top_p, min_p: see :class:`Sampling`; the default is greedy. stop: strings before which a text
    ends. eos: ids that end a row (not part of it); default those of the model and its tokenizer. chat: texts are what a
    user says, in the model's chat template; system: a message before them. batch_size: prompts at a time; 0 for all.
    seed: of the draws. mesh: default that of the parameters. show: called with the index of a prompt and new text of it.

    Raises ``ValueError`` for a model that is no decoder, more tokens than it has positions, and ids beyond its vocabulary.
    """
    _check_model(model)
    if max_tokens < 1 or batch_size < 0:
        raise ValueError(f"max_tokens is {max_tokens} and batch_size {batch_size}; they must be at least 1 and 0")
    sampling = Sampling(temperature, top_k, top_p, min_p)
    tokenizer = tokenizer_of(tokenizer)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if tokenizer is None and (stop or show):
        raise ValueError("stop and show are about text, and no tokenizer is given; give tokenizer=DIR (of the model)")
    if "" in stop:
        raise ValueError("a stop string is empty, which would end every text before it begins")
    in_chat = chat or any(not isinstance(p, str | np.ndarray) and isinstance(p[0], dict) for p in prompts if len(p))
    if eos is None:
        eos = ends(model, tokenizer, in_chat)
    rows = [encode(prompt, tokenizer, chat, system) for prompt in prompts]
    check_rows(model, rows, max_tokens)
    mesh = mesh if mesh is not None else _mesh_of(params)
    out: list[Any] = []
    for first in range(0, len(rows), batch_size or len(rows) or 1):
        batch = rows[first : first + (batch_size or len(rows))]
        view = _View(tokenizer, len(batch), tuple(np.atleast_1d(eos).tolist()), stop, first, show)
        out += _generate(model, params, batch, sampling, max_tokens, seed + first, mesh, view, batch_size)
    return out


def _check_model(model: Any) -> None:
    config = getattr(model, "config", None)
    if is_jft_model(model) and not isinstance(config, DecoderConfig):
        raise ValueError(
            f"{type(config).__name__} ({getattr(config, 'family', 'no family')}) is no decoder; only decoders generate text"
        )


def check_rows(model: Any, rows: list[np.ndarray], max_tokens: int) -> None:
    """``ValueError`` for ids beyond the vocabulary of a decoder, and for more tokens than it has positions."""
    config = getattr(model, "config", None)
    if not isinstance(config, DecoderConfig):
        return
    for i, row in enumerate(rows):
        if row.min() < 0 or row.max() >= config.vocab:
            raise ValueError(
                f"prompt {i} holds id {row.max() if row.min() >= 0 else row.min()}, and the model knows 0 to "
                f"{config.vocab - 1}; use the tokenizer of this model"
            )
        if config.longest is not None and len(row) + max_tokens > config.longest:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens, and with max_tokens={max_tokens} more than the {config.longest} positions "
                "of the model; shorten it, or lower max_tokens"
            )


def _mesh_of(params: Any) -> Any:
    for x in jax.tree.leaves(params):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def rounded(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96 ...: programs are compiled for these lengths alone."""
    power = 16
    while power < length:
        if length <= power + power // 2:
            return power + power // 2
        power *= 2
    return power


class _View:
    """The host's view of a batch: texts so far, and which rows have ended. first: the index of its first prompt."""

    def __init__(
        self, tokenizer: Tokenizer | None, rows: int, eos: tuple[int, ...], stop: tuple[str, ...], first: int, show: Any
    ):
        self.tokenizer, self.eos, self.stop, self.first, self.show = tokenizer, eos, stop, first, show
        self.ids: list[np.ndarray] = [np.zeros(0, np.int32)] * rows
        self.texts, self.shown, self.done = [""] * rows, [0] * rows, np.zeros(rows, bool)

    @property
    def stride(self) -> int | None:
        """Tokens after which to look; None where nothing is to be seen before the end."""
        return STRIDE if self.stop or self.show else None

    def update(self, new: np.ndarray, last: bool) -> None:
        """Take in the tokens ``new [B, n]`` of all steps so far; last: there will be no more."""
        for i, row in enumerate(new):
            if self.done[i]:
                continue
            ended = np.isin(row, self.eos)
            self.ids[i] = row[: int(np.argmax(ended))] if ended.any() else row
            self.done[i] = ended.any() or last
            if self.tokenizer is not None:
                self._read(i)

    def _read(self, i: int) -> None:
        text = self.tokenizer.core.decode(self.ids[i].tolist(), skip_special_tokens=True)  # type: ignore[union-attr]
        cuts = [at for s in self.stop if (at := text.find(s)) >= 0]
        if cuts:
            text, self.done[i] = text[: min(cuts)], True
        self.texts[i] = text
        if self.show is None:
            return
        # Not a part of a character, which later bytes change, nor what may become a stop string.
        keep = 0 if self.done[i] else max([len(s) - 1 for s in self.stop], default=0)
        ready = text if self.done[i] else text[: len(text) - keep].rstrip("\ufffd")
        if len(ready) > self.shown[i]:
            self.show(self.first + i, ready[self.shown[i] :])
            self.shown[i] = len(ready)

    def results(self) -> list[Any]:
        return self.texts if self.tokenizer is not None else self.ids


def _generate(
    model: Any,
    params: Any,
    rows: list[np.ndarray],
    sampling: Sampling,
    max_tokens: int,
    seed: int,
    mesh: Any,
    view: _View,
    batch_size: int,
) -> list[Any]:
    columns, room = rounded(max(map(len, rows))), rounded(max_tokens)
    cached = decoding.has_cache(model, columns + room)
    shards = parallel.batch_shards(mesh)
    # Rows that only fill the batch have ended before they begin.
    count = -(-max(len(rows), batch_size) // shards) * shards
    tokens, lengths = np.zeros((count, columns), np.int32), np.ones(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, columns - len(row) :], lengths[i] = row, len(row)
    done = np.arange(count) >= len(rows)
    run: Programs = programs(model, sampling, room, cached, 0, mesh)
    put = lambda x: x if mesh is None else jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    # Padded, so that another number of ids that end a text is no other program.
    eos = put(np.asarray([*view.eos, *[-1] * (8 - len(view.eos) % 8)], np.int32))
    key = put(np.uint32(seed))
    placed = {"tokens": tokens, "lengths": lengths, "done": done}
    # The same rows on every process, so not by `put_batch`, for which each has its own.
    placed = placed if mesh is None else jax.device_put(placed, parallel.batch_sharding(mesh))
    state: State = run.begin(params, placed["tokens"], placed["lengths"], placed["done"], eos, key)
    prepared = run.prepare(params) if max_tokens > 1 else None
    upto = 1
    while True:
        ended = np.asarray(tree.host(state.done))
        finished = upto >= max_tokens or bool(ended.all())
        view.update(np.asarray(tree.host(state.new))[: len(rows), :upto], finished)
        if finished or view.done.all():
            return view.results()
        # Rows that a stop string has ended go on here, unseen, until the others have ended too.
        upto = min(max_tokens, upto + (view.stride or max_tokens))
        state = run.extend(prepared, state, put(np.int32(upto)), eos, key)
