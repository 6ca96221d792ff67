"""Sharding of parameters over the axes of a mesh: path patterns for jft's models, one generic rule for others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jft import tree

Axis = str | tuple[str, ...] | None
Layout = tuple[Axis, ...]
Rules = Sequence[tuple[str, Layout | list[Layout]]]

SMALL = 2**14
"""Leaves with fewer elements are replicated: an all-gather of them costs more than their memory."""

RULES: Rules = (
    # Whole experts on a device multiply without communication; where there are too few, each is cut like an MLP.
    (r"(^|/)experts/(gate|up)/w$", [("tensor", "fsdp", None), (None, "fsdp", "tensor")]),
    (r"(^|/)experts/down/w$", [("tensor", None, "fsdp"), (None, "tensor", "fsdp")]),
    (r"(^|/)router/w$", ("fsdp", None)),
    (r"(^|/)(q|k|v|gate|up|pooler|vision_projection|text_projection)/w$", ("fsdp", "tensor")),
    (r"(^|/)(q|k|v|gate|up)/b$", ("tensor",)),
    (r"(^|/)(o|down)/w$", ("tensor", "fsdp")),
    # Added after the sum over ``tensor``, hence whole.
    (r"(^|/)(o|down)/b$", (None,)),
    # A vocabulary that the mesh does not divide (50257) stays whole, and D is cut.
    (r"(^|/)table$", [("tensor", "fsdp"), (None, ("fsdp", "tensor")), (None, "fsdp")]),
    (r"(^|/)head/w$", [("fsdp", "tensor"), (("fsdp", "tensor"), None), ("fsdp", None)]),
    (r"(^|/)(patch|classifier)/w$", ("fsdp", None)),
    (r"(^|/)[a-z_]*norm/(scale|bias)$", (None,)),
)
"""Pattern -> layout of the *last* axes (Shoeybi et al. 2019, arXiv:1909.08053, on ``tensor``; Rajbhandari et al. 2020,
arXiv:1910.02054, on ``fsdp``).

Axes before those a layout names (the stacked L) stay whole. A list gives alternatives: the first whose axes all divide is
taken, else the first with what does not divide left out. The first pattern that matches a path decides.
"""


def specs(
    params: Any, mesh: Mesh, rules: Rules | Mapping[str, Layout | list[Layout]] | None = None, small: int = SMALL
) -> dict[str, PartitionSpec]:
    """``{path: PartitionSpec}`` for a tree of arrays or shapes.

    rules: (pattern, layout) pairs like :data:`RULES`, looked at before them; each must match some path, name only axes of
    the mesh, and name no more axes than the leaf has. Paths that no rule matches get the largest axis that ``fsdp``
    divides over ``fsdp`` (never the first axis of what lies under ``layers/``). Leaves with fewer than ``small`` elements
    that no rule of yours names are replicated. A mesh axis that does not divide an array axis is left out for that leaf.
    """
    flat = tree.flatten(params)
    user_rules = list(rules.items() if isinstance(rules, Mapping) else rules or ())
    for pattern, layouts in user_rules:
        hits = tree.matching(flat, pattern, "sharding rule")
        _check_user_rules(pattern, _alternatives(layouts), mesh, {path: tuple(flat[path].shape) for path in hits})
    return {path: _spec(path, tuple(leaf.shape), mesh, user_rules, small) for path, leaf in flat.items()}


def shardings(
    params: Any, mesh: Mesh, rules: Rules | Mapping[str, Layout | list[Layout]] | None = None, small: int = SMALL
) -> Any:
    """The tree of ``params`` with a ``NamedSharding`` for each leaf; see :func:`specs`."""
    return tree.like(params, {p: NamedSharding(mesh, s) for p, s in specs(params, mesh, rules, small).items()})


def _alternatives(layouts: Layout | list[Layout]) -> list[Layout]:
    return layouts if isinstance(layouts, list) else [layouts]


def names(axis: Axis) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _check_user_rules(pattern: str, layouts: list[Layout], mesh: Mesh, shapes: dict[str, tuple[int, ...]]) -> None:
    for layout in layouts:
        unknown = [name for axis in layout for name in names(axis) if name not in mesh.shape]
        if unknown:
            raise ValueError(
                f"sharding rule {pattern!r} names mesh axis {unknown[0]!r}; the mesh has {', '.join(mesh.shape)}"
            )
        for path, shape in shapes.items():
            if len(layout) > len(shape):
                raise ValueError(f"sharding rule {pattern!r} names {len(layout)} axes, but {path!r} has shape {shape}")


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, user_rules: list, small: int) -> PartitionSpec:
    for pattern, layouts in user_rules:
        if tree.matcher(pattern)(path):
            return _fit(_alternatives(layouts), shape, mesh)
    # After the caller's rules, which may name a small leaf.
    if math.prod(shape) < small:
        return PartitionSpec()
    for pattern, layouts in RULES:
        if tree.matcher(pattern)(path):
            # Another library's model may have a vector of such a name.
            fitting = [layout for layout in _alternatives(layouts) if len(layout) <= len(shape)]
            return _fit(fitting, shape, mesh) if fitting else PartitionSpec()
    return _generic(path, shape, mesh)


def _fit(layouts: list[Layout], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The first layout that divides the last axes of ``shape`` as it stands, else the first with the rest left out."""
    reduced = [
        tuple(_divide(axis, n, mesh) for axis, n in zip(x, shape[len(shape) - len(x) :], strict=True)) for x in layouts
    ]
    complete = [tuple(_present(axis, mesh) for axis in layout) for layout in layouts]
    best = next((r for r, w in zip(reduced, complete, strict=True) if r == w), reduced[0])
    entries: list[Axis] = [None] * (len(shape) - len(best)) + list(best)
    # Specs compare entry by entry: a None at the end would make equal ones differ.
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _present(axis: Axis, mesh: Mesh) -> Axis:
    """``axis`` without names that the mesh lacks or has at size 1."""
    return _collapse([name for name in names(axis) if mesh.shape.get(name, 1) > 1])


def _divide(axis: Axis, size: int, mesh: Mesh) -> Axis:
    """As many of the names of ``axis``, in order, as divide ``size``."""
    fitting: list[str] = []
    for name in names(_present(axis, mesh)):
        if size % math.prod(mesh.shape[n] for n in [*fitting, name]) == 0:
            fitting.append(name)
    return _collapse(fitting)


def shards(axis: Axis, mesh: Mesh) -> int:
    """Number of parts into which ``mesh`` cuts an array axis with this entry of a spec."""
    return math.prod(mesh.shape.get(name, 1) for name in names(axis))


def dividing(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """``spec`` without the mesh axes that do not divide an array of ``shape``."""
    return PartitionSpec(*(_divide(axis, n, mesh) for axis, n in zip(spec, shape, strict=False)))


def _collapse(axes: list[str]) -> Axis:
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


def _generic(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    # The axis L stays whole, as a scan slices it.
    first = 0 if tree.stack_of(path) is None else 1
    ways = mesh.shape.get("fsdp", 1)
    fitting = [i for i in range(first, len(shape)) if shape[i] % ways == 0]
    if ways == 1 or not fitting:
        return PartitionSpec()
    # Of equal axes the last: rows of the others then stay contiguous on every device.
    axis = max(fitting, key=lambda i: (shape[i], i))
    return PartitionSpec(*[None] * axis, "fsdp")
