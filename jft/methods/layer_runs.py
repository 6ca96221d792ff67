"""Training in some layers only: stacks of layers cut into runs that train and runs that do not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from jft.methods.layers import SomeLayers
from jft.methods.parametrise import InPlace, Parametrisation
from jft.select.layers import Depth
from jft.tree import layer_of, stack_of


def by_layer(
    chosen: list[str], shapes: Mapping[str, Any], layers: Any, train: Parametrisation, stacked: bool
) -> dict[str, Parametrisation]:
    """Parametrisations for some layers only: runs of a stacked leaf, or the paths that carry the layer's number."""
    if stacked:
        inside = {p: layers for p in chosen if stack_of(p) is not None}
        every = {stack_of(p) for p in shapes} - {None}
        return by_table(inside, shapes, train, cut=dict.fromkeys(every, layers))
    # Each numbered layer has leaves of its own here, so whole leaves train and nothing has to be cut.
    numbered = {p: layer[1] for p in shapes if (layer := layer_of(p))}
    if not numbered:
        raise ValueError("this model's paths carry no layer numbers (layers/3/...); select by pattern instead")
    indices = _resolve(layers, max(numbered.values()) + 1)
    return {p: train for p in chosen if numbered.get(p) in indices}


def by_table(
    table: Mapping[str, Any], shapes: Mapping[str, Any], train: Parametrisation, cut: Mapping[Any, Any] | None = None
) -> dict[str, Parametrisation]:
    """``train`` for ``{path: layers}`` (None: the whole leaf), every stack cut wherever one of its leaves changes.

    cut: ``{stack: layers}``, where stacks are cut besides.
    """
    leaves: dict[str, Parametrisation] = {p: train for p, layers in table.items() if layers is None}
    for name in dict.fromkeys(stack_of(p) for p in shapes):
        if name is None:
            continue
        # Leaves that train whole stay uncut; where the stack is cut, the model slices them itself.
        lengths = {p: shapes[p].shape[0] for p in shapes if stack_of(p) == name and p not in leaves}
        named = {p: _resolve(table[p] or (), n) for p, n in lengths.items() if p in table}
        length = max(lengths.values(), default=0)
        cuts = _resolve((cut or {}).get(name, ()), length)
        # Per layer, which of the leaves train in it: a run ends wherever this tuple changes.
        flags = [(*(i in w for w in named.values()), i in cuts) for i in range(length)]
        # Nothing trains in this stack; uncut, it stays one scan.
        if not any(map(any, flags)):
            continue
        sizes = tuple(len(list(g)) for _, g in itertools.groupby(flags))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        for path in lengths:
            # Frozen leaves are cut as well, once, at the start: slicing them in the step would copy them every time.
            leaves[path] = _runs(train, sizes, tuple(s in named.get(path, ()) for s in starts))
    return leaves


def _runs(train: Parametrisation, sizes: tuple[int, ...], trains: tuple[bool, ...]) -> Parametrisation:
    if not any(trains):
        # Frozen throughout: nothing of ``first`` is used, so the simplest parametrisation will do.
        return SomeLayers(InPlace(), sizes, trains)
    # A live weight is one array that each update writes into; runs are several.
    if train.live:
        raise ValueError(f"{train} keeps weights that it updates in place; it goes with all layers, or a pattern")
    return SomeLayers(train, sizes, trains)


def _resolve(layers: Any, length: int) -> frozenset[int]:
    layers = layers.of(length) if isinstance(layers, Depth) else layers
    outside = [i for i in layers if not -length <= i < length]
    if outside:
        raise ValueError(f"layer {outside[0]} does not exist: the model has {length} layers (0 to {length - 1})")
    # Negative indices count from the end; the modulus brings them to the front.
    return frozenset(i % length for i in layers)
