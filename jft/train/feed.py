"""`Feed`: batches for the loop from any iterable, checked on the host, with a position to seek to.

`Streams` are those of all members of a run, from as many feeds as they have data.
"""

from __future__ import annotations

import base64
import collections
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jft import parallel, tree
from jft.data.batches import equally_long
from jft.train import model_check
from jft.train.objectives import Objective
from jft.train.state import Layout


def host(batch: Any) -> Any:
    """A batch as numpy arrays in the dtypes JAX computes with (64-bit numbers become 32-bit ones)."""

    def convert(x: Any) -> np.ndarray:
        x = np.asarray(x)
        # As `device_put` would cast; done here, since a program is compiled for exact dtypes.
        return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)

    return jax.tree.map(convert, batch)


def check(batch: Any, model: Any, mesh: Any) -> None:
    """Refuse rows longer than the model has positions (the last one would stand for all beyond), and a batch that does
    not divide over the mesh. batch: of this process, arrays or shapes.
    """
    # Other libraries' models have no such config: nothing is known of their positions.
    longest = getattr(getattr(model, "config", None), "longest", None)
    length = batch["tokens"].shape[1] if isinstance(batch, Mapping) and "tokens" in batch else 0
    if longest is not None and length > longest:
        raise ValueError(
            f"rows of {length} tokens, but the model has {longest} positions; set data.max_length to at most that"
        )
    check_ids(batch, model)
    if mesh is None:
        return
    parts = parallel.batch_shards(mesh)
    # Each process has an equal share of the rows.
    count = rows(batch) * jax.process_count()
    if count % parts:
        raise ValueError(
            f"a batch of {count} does not divide over the {parts} devices of the mesh's data and fsdp; "
            f"set batch_size to a multiple of {parts}, or make the mesh smaller"
        )


def vocabulary(model: Any) -> int | None:
    """Rows of the embedding of a jft model; None where nothing is known of it, as of other libraries' models."""
    config = getattr(model, "config", None)
    config = getattr(config, "backbone", config)
    # A CLIP has its text tower's.
    return getattr(getattr(config, "text", config), "vocab", None)


def check_ids(batch: Any, model: Any) -> None:
    """Refuse token ids that the embedding has no row for, padding included. Lookups clip them: the last row would train."""
    rows, fields = vocabulary(model), batch if isinstance(batch, Mapping) else {"tokens": batch}
    if rows is None:
        return
    for name in ("tokens", "decoder_tokens"):
        ids = fields.get(name)
        # Shapes have no ids.
        if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < rows:
            raise ValueError(
                f"{name} holds id {ids.max() if ids.max() >= rows else ids.min()}, and the model has {rows} tokens, 0 to "
                f"{rows - 1}; use the model's own tokenizer, and look at the ids of its special tokens"
            )


def put(batch: Any, layout: Layout) -> Any:
    """Host batch to devices: rows over the mesh, or all of it on the one device."""
    if layout.mesh is None:
        # The layout's device, which need not be the default one.
        return jax.device_put(batch, layout.batch)
    return parallel.put_batch(batch, layout.mesh)


def encode(state: Any) -> Any:
    """An iterator's state as JSON; raises ``ValueError`` where it is not bytes or JSON."""
    # jft's own loaders give bytes.
    if isinstance(state, bytes):
        return {"base64": base64.b64encode(state).decode()}
    try:
        # A copy, too: iterators may go on changing the dict that they gave.
        return json.loads(json.dumps(state))
    except TypeError as error:
        raise ValueError(
            f"the data iterator's state is neither bytes nor JSON ({error}); the run could not resume"
        ) from None


def decode(state: Any) -> Any:
    """The inverse of :func:`encode`."""
    return base64.b64decode(state["base64"]) if isinstance(state, Mapping) and set(state) == {"base64"} else state


def shown(position: Any) -> str:
    """A position as a person reads it: of a jft loader the examples before it."""
    state = decode(position)
    if not isinstance(state, bytes):
        return str(position)
    try:
        return f"after {json.loads(state)['position']} examples"
    except (ValueError, KeyError, TypeError):
        return f"a state of {len(state)} bytes"


# Without shuffling: the order of a list is its caller's to choose.
class _Cycle:
    """A sequence of batches, again and again, with the state that Grain's iterators have."""

    def __init__(self, batches: Sequence):
        if not len(batches):
            raise ValueError("the data holds no batch")
        self._batches, self._drawn = batches, 0

    def __next__(self) -> Any:
        self._drawn += 1
        return self._batches[(self._drawn - 1) % len(self._batches)]

    def get_state(self) -> int:
        return self._drawn

    def set_state(self, state: int) -> None:
        self._drawn = state


class _Counted:
    """Any iterator: its state is how many batches were drawn, and it goes there by drawing."""

    def __init__(self, iterator: Iterator):
        self._iterator, self._drawn = iterator, 0

    def __next__(self) -> Any:
        self._drawn += 1
        return next(self._iterator)

    def get_state(self) -> int:
        return self._drawn

    def set_state(self, state: int) -> None:
        if state < self._drawn:
            raise ValueError(
                f"this iterator is {self._drawn} batches on and cannot go back to {state}; pass a fresh one"
            )
        while self._drawn < state:
            next(self)


def _iterator(data: Any) -> Any:
    if isinstance(data, Sequence):
        return _Cycle(data)
    if isinstance(data, Mapping):
        raise ValueError(
            f"data is one batch ({', '.join(map(str, data))}), not several; give a list of batches: [batch]"
        )
    iterator = iter(data)
    return iterator if hasattr(iterator, "get_state") and hasattr(iterator, "set_state") else _Counted(iterator)


class Feed:
    """An endless stream of host batches with a JSON position.

    data: an iterable whose iterators have ``get_state`` and ``set_state`` (jft's loaders, Grain); a sequence of batches,
    gone through again and again; or any other iterable, whose position is the number of batches drawn. model: that whose
    tokens they hold, where ids are to be checked (:func:`check_ids`).
    """

    def __init__(self, data: Any, model: Any = None):
        self._data, self._iterator, self._model = data, _iterator(data), model
        # `iter` of an iterator is itself; then the caller opened it, and closes it.
        self._closes = self._iterator is not data
        # Of the model's outputs, where labels are to be checked against them.
        self.classes: int | None = None
        # Each with the position before it: a batch that was only peeked at is not taken, whatever the iterator counts.
        self._ahead: collections.deque[tuple[Any, Any]] = collections.deque()

    def position(self) -> Any:
        """The position of the stream, as JSON: the next batch is the same after :meth:`seek` to it."""
        return self._ahead[0][0] if self._ahead else encode(self._iterator.get_state())

    def seek(self, position: Any, accept: bool = False) -> str:
        """Go to a position. One that was just peeked at needs no going back.

        accept: where the position is of other data, go on after as many examples, or from the beginning; it is said which.
        """
        # A plain iterator could not go back by even one batch.
        if self._ahead and self._ahead[0][0] == position:
            return ""
        try:
            self._iterator.set_state(decode(position))
        except ValueError as error:
            if not accept:
                raise ValueError(f"{error} (checkpoint.accept=True does)") from None
            goes_on = hasattr(self._iterator, "set_examples") and self._iterator.set_examples(decode(position))
            if goes_on:
                self._ahead.clear()
            return (
                f"the data is another one; it goes on {'after as many examples' if goes_on else 'from its beginning'}"
            )
        self._ahead.clear()
        return ""

    def close(self) -> None:
        """Stop read-ahead threads and workers of an iterator that was opened here."""
        if self._closes and hasattr(self._iterator, "close"):
            self._iterator.close()

    def peek(self) -> Any:
        """The next batch, without taking it."""
        return self.ahead(1)[0]

    def largest(self, known: bool = True) -> Any:
        """A batch of the largest shape: of a loader with buckets that of its longest, else the next one.

        known: of the examples that are known, not of what the settings allow (:meth:`jft.data.Loader.largest`).
        """
        return host(self._data.largest(known)) if hasattr(self._data, "largest") else self.peek()

    def ahead(self, count: int) -> list[Any]:
        """The next ``count`` batches, without taking them."""
        while len(self._ahead) < count:
            position = encode(self._iterator.get_state())
            try:
                self._ahead.append((position, host(next(self._iterator))))
            except StopIteration:
                raise ValueError(f"the data ended (position {shown(position)}); training data must repeat") from None
            check_ids(self._ahead[-1][1], self._model)
        return [batch for _, batch in itertools.islice(self._ahead, count)]

    def next(self, step: int, objective: Objective) -> Any:
        """The batch for ``step``. One whose loss would be over nothing is refused, naming the step."""
        try:
            batch = self.peek()
        except ValueError as error:
            raise ValueError(f"step {step}: {error}") from None
        try:
            # On the host, before the step: a division by 0 on the devices would show as a NaN without a cause.
            weight = float(objective.weight(batch, np))
            model_check.check_labels(batch, self.classes)
        except ValueError as error:
            raise ValueError(f"the batch for step {step} (data position {shown(self.position())}): {error}") from None
        # Of several processes one may hold only padding; the step itself then sees whether all do.
        if weight == 0 and jax.process_count() == 1:
            raise ValueError(
                f"the batch for step {step} has total weight 0: its loss mask, segments or valid flags leave no target "
                f"(data position {shown(self.position())}); look at the template and the masking of the data"
            )
        # Only now: after an error the position still is that of the batch that was refused.
        self._ahead.popleft()
        return batch


def tokens(batch: Any) -> int:
    """Tokens that are not padding in a host batch; 0 where it has none."""
    if not isinstance(batch, Mapping):
        batch = {"tokens": batch}
    total = 0
    # Of an encoder-decoder both sides are computed.
    for name in ("tokens", "decoder_tokens"):
        if name in batch:
            # Segment 0 is padding in every field of this kind.
            segments = batch.get(name.replace("tokens", "segments"))
            total += batch[name].size if segments is None else int(np.count_nonzero(segments))
    return total


def global_shapes(batch: Any, axis: int = 0) -> Any:
    """Shapes of the global batch, from this process's rows of it, along ``axis``."""

    def widen(x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = tuple(n * jax.process_count() if i == axis else n for i, n in enumerate(x.shape))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(widen, batch)


def positions(batch: Any) -> int:
    """Token positions of a batch of arrays or shapes, padding included: what is computed. 0 where it has no tokens."""
    if not isinstance(batch, Mapping):
        batch = {"tokens": batch}
    return sum(tree.size(batch[name]) for name in ("tokens", "decoder_tokens") if name in batch)


def rows(batch: Any) -> int:
    """Examples of a host batch: its leading axis."""
    # Scalars belong to the batch as a whole.
    return next((x.shape[0] for x in jax.tree.leaves(batch) if x.ndim), 0)


class Streams:
    """The data of all members: what several have in common is read once."""

    def __init__(self, members: Sequence[Any], model: Any = None):
        self._members = members
        # By identity: loaders do not compare by value, and equal lists may be two streams.
        data = {id(m.data): m.data for m in members}
        indices = {key: i for i, key in enumerate(data)}
        self.stream_of = [indices[id(m.data)] for m in members]
        self._feeds = [Feed(x, model) for x in data.values()]

    @property
    def differ(self) -> bool:
        """Whether there are several; one batch does for all otherwise."""
        return len(self._feeds) > 1

    def check_labels(self, classes: int | None) -> None:
        """Refuse labels beyond ``classes`` in the next batches, which were peeked at, and in all that follow."""
        for x in self._feeds:
            x.classes = classes
            model_check.check_labels(x.peek(), classes)

    def feed(self, member: int) -> Feed:
        """The data of one member."""
        return self._feeds[self.stream_of[member]]

    def positions(self) -> list[Any]:
        """The position of each stream, JSON."""
        return [x.position() for x in self._feeds]

    def seek(self, positions: list[Any], accept: bool = False) -> list[str]:
        """Go to a position of each stream; what is to be said of it (:meth:`Feed.seek`)."""
        notes = [x.seek(position, accept) for x, position in zip(self._feeds, positions, strict=True)]
        return [note for note in notes if note]

    def close(self) -> None:
        for x in self._feeds:
            x.close()

    def peek(self) -> Any:
        """The next batches as the step takes them, without taking them."""
        return self._joined([x.peek() for x in self._feeds])

    def largest(self) -> Any:
        """A batch of the largest shape as the step takes it."""
        return self._joined([x.largest() for x in self._feeds])

    def next(self, n: int, objective: Any) -> tuple[Any, Any]:
        """``(the first member's batch, all batches stacked)``; what is wrong with one is said of its member."""
        batches = []
        # One after another: batches that came before an error are dropped, so the loop saves the positions from before.
        for i, x in enumerate(self._feeds):
            try:
                batches.append(x.next(n, objective))
            except ValueError as error:
                raise ValueError(f"{self._members[self.stream_of.index(i)].label}{error}") from None
        # The first is for the meter: all have one shape.
        return batches[0], self._joined(batches)

    def put(self, batch: Any, layout: Layout) -> Any:
        """Host batches of all members to devices."""
        mesh = layout.mesh
        # One batch goes to all members as in a run by itself.
        if mesh is None or not self.differ:
            return put(batch, layout)

        def spread(x: np.ndarray) -> jax.Array:
            # What has no rows is one number for each member.
            sharding = layout.batch if x.ndim > 1 else NamedSharding(mesh, PartitionSpec(*layout.batch.spec[:1]))
            return jax.make_array_from_process_local_data(sharding, x)

        return jax.tree.map(spread, batch)

    def _joined(self, batches: list[Any]) -> Any:
        if not self.differ:
            return batches[0]
        batches = equally_long(batches)
        # Checked at each step: a loader may give shorter rows at any time, and np.stack would not say which member's.
        first = tree.flatten(batches[0])
        for i, batch in enumerate(batches[1:], 1):
            other = tree.flatten(batch)
            kinds = [{p: (x.shape, x.dtype) for p, x in flat.items()} for flat in (first, other)]
            if kinds[0] != kinds[1]:
                names = [self._members[self.stream_of.index(j)].name for j in (0, i)]
                path = next(p for p in {**first, **other} if kinds[0].get(p) != kinds[1].get(p))
                shown = [f"{k[path][0]} {k[path][1]}" if path in k else "nothing" for k in kinds]
                raise ValueError(
                    f"batches of members {names[0]!r} and {names[1]!r} differ in {path}: {shown[0]} and {shown[1]}; the "
                    "members of a fleet train on batches of one shape (the same batch_size, max_length and fields)"
                )
        # By member, not by stream: members that share data get a copy each, as the vmapped axis needs.
        return jax.tree.map(lambda *x: np.stack([x[i] for i in self.stream_of]), *batches)
