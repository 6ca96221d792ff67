"""`Streams`: batches for all members, from as many feeds as they have data."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jft import tree
from jft.train import feed
from jft.train.members import Members
from jft.train.state import Layout


class Streams:
    """The data of all members: what several have in common is read once."""

    def __init__(self, members: Members):
        self._members = members
        data = {id(m.data): m.data for m in members}
        places = {key: i for i, key in enumerate(data)}
        self.stream_of = [places[id(m.data)] for m in members]
        self._feeds = [feed.Feed(x) for x in data.values()]

    @property
    def differ(self) -> bool:
        """Whether there are several; one batch does for all otherwise."""
        return len(self._feeds) > 1

    def feed(self, member: int) -> feed.Feed:
        """The data of one member."""
        return self._feeds[self.stream_of[member]]

    def positions(self) -> list[Any]:
        """Where each stream stands, JSON."""
        return [x.position() for x in self._feeds]

    def seek(self, positions: list[Any]) -> None:
        for x, place in zip(self._feeds, positions, strict=True):
            x.seek(place)

    def close(self) -> None:
        for x in self._feeds:
            x.close()

    def peek(self) -> Any:
        """The next batches as the step takes them, without taking them."""
        return self._joined([x.peek() for x in self._feeds])

    def next(self, n: int, objective: Any) -> tuple[Any, Any]:
        """``(the first member's batch, all batches stacked)``; what is wrong with one is said of its member."""
        batches = []
        for i, x in enumerate(self._feeds):
            try:
                batches.append(x.next(n, objective))
            except ValueError as error:
                raise ValueError(f"{self._members[self.stream_of.index(i)].label}{error}") from None
        return batches[0], self._joined(batches)

    def put(self, batch: Any, layout: Layout) -> Any:
        """Host batches of all members to devices."""
        mesh = layout.mesh
        if mesh is None or not self.differ:
            return feed.put(batch, layout)

        def put(x: np.ndarray) -> jax.Array:
            # What has no rows is one number for each member.
            place = layout.batch if x.ndim > 1 else NamedSharding(mesh, PartitionSpec(*layout.batch.spec[:1]))
            return jax.make_array_from_process_local_data(place, x)

        return jax.tree.map(put, batch)

    def _joined(self, batches: list[Any]) -> Any:
        if not self.differ:
            return batches[0]
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
        return jax.tree.map(lambda *x: np.stack([x[i] for i in self.stream_of]), *batches)
