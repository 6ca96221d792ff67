"""AdamW on selected blocks of a weight, in place: moments and gradient exist for the blocks alone.

On a TPU one Pallas kernel reads each operand once and writes each result once: with w and g in bfloat16 that is 22 bytes an
element. The copies of several blocks from and to the weight are in flight at a time. Elsewhere XLA gathers windows, fuses the
arithmetic and scatters windows.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jft.kernels.blocks_forms import gather_xla, put_xla
from jft.kernels.pallas import Tiles, check_blocks, choose, parity
from jft.tree import visible

Array = jax.Array


class Rates(NamedTuple):
    """The constants of a step that are known when a program is compiled."""

    b1: float
    b2: float
    eps: float
    weight_decay: float


def sparse_adam(
    w: Array,
    blocks: Array,
    g: Array,
    m: Array,
    v: Array,
    master: Array | None = None,
    *,
    count: Array | int,
    lr: Array | float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    origin: Array | None = None,
    implementation: str | None = None,
    _interpret: Any = False,
) -> tuple[Array, ...]:
    """One step of AdamW (Kingma and Ba 2014, arXiv:1412.6980; Loshchilov and Hutter 2017, arXiv:1711.05101) on blocks of w.

    In float32, with p the values of the blocks (``master`` where given) and t the count::

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay (p - origin))

    which is ``optax.adamw`` where there is no origin, up to rounding: ``1 - b^t`` is exact to float32 here.

    w ``[I, O]``; blocks int32 ``[n, 2]`` as for :func:`jft.kernels.block_put.block_put`; g ``[n, b, c]``; m, v float32
    ``[n, b, c]``; master float32 ``[n, b, c]``, of which w holds the rounding, or None; origin ``[n, b, c]``, what weight
    decay pulls to (the base's values), or None for zero. count: steps with this one, 1 at the first; it and lr may be traced.
    implementation as for ``block_put``. Returns ``(w, m, v)``, or ``(w, m, v, master)``, in place if donated. Padding leaves
    w alone; its compact values follow the same formula. For a stack see :func:`jft.kernels.block_put.fold`.

    Raises ``ValueError`` for blocks as ``block_put`` does, for shapes and dtypes other than these, and for a count below 1.
    """
    compact = {"g": g, "m": m, "v": v, "master": master, "origin": origin}
    _check(w, blocks, compact, count)
    held = (m, v) if master is None else (m, v, master)
    if len(blocks) == 0:
        return (w, *held)
    if not weight_decay:
        origin = None
    rates = Rates(b1, b2, eps, weight_decay)
    values = [g, *held] if origin is None else [g, *held, origin]
    moved = sum(x.dtype.itemsize for x in (*values, *held))
    # Two buffers of all that comes and goes, and of the weight in both directions.
    tiles = Tiles.of(
        len(blocks), g.shape[1:], w.shape, (w.dtype, *(x.dtype for x in values)), 2 * moved + 4 * w.dtype.itemsize
    )
    pallas: Any = tiles
    if not isinstance(tiles, str):
        pallas = functools.partial(_adam_pallas, rates=rates, tiles=tiles, interpret=_interpret)
    args = w, blocks, _scalars(lr, count, rates), g, held, origin
    return choose(implementation, pallas, functools.partial(_adam_xla, rates=rates), *args)


def _check(w: Array, blocks: Array, compact: dict[str, Any], count: Any) -> None:
    shape = compact["g"].shape
    for name, x in compact.items():
        if x is None:
            continue
        if len(x.shape) != 3 or x.shape != shape or len(x) != len(blocks):
            raise ValueError(
                f"{name} has shape {list(x.shape)}; g, m, v, master and origin are all [n, b, c], here with n = {len(blocks)} "
                f"as there are blocks, and g has {list(shape)}"
            )
        wanted, kind = (jnp.floating, "a float type") if name in ("g", "origin") else (jnp.float32, "float32")
        if not jnp.issubdtype(x.dtype, wanted):
            raise ValueError(f"{name} is {x.dtype}; it must be {kind}: convert it with {name}.astype('float32')")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w is {w.dtype}; it must be of a float type, such as bfloat16")
    check_blocks(blocks, w.shape, shape[1:])
    if (isinstance(count, int) or visible(count)) and count < 1:
        raise ValueError(f"count is {count}; it counts this step too, and is 1 at the first: pass count + 1")


def _scalars(lr: Array | float, count: Array | int, rates: Rates) -> Array:
    """``[lr / (1 - b1^t), 1 / (1 - b2^t), lr * weight_decay]``, float32."""
    t = jnp.asarray(count, jnp.float32)
    # `1 - 0.999**t` in float32 would lose ten of its 24 bits at the first step.
    first, second = (-jnp.expm1(t * jnp.float32(math.log(b))) if b else 1 for b in (rates.b1, rates.b2))
    rate = jnp.asarray(lr, jnp.float32)
    return jnp.stack([rate / first, 1 / jnp.asarray(second), rate * rates.weight_decay])


def _step(
    scalars: Any, rates: Rates, p: Array, g: Array, m: Array, v: Array, origin: Array | None
) -> tuple[Array, Array, Array]:
    """New p, m and v, float32, of arrays of any shape: the arithmetic of both forms."""
    g = g.astype(jnp.float32)
    m = rates.b1 * m + (1 - rates.b1) * g
    v = rates.b2 * v + (1 - rates.b2) * (g * g)
    update = m * scalars[0] / (jnp.sqrt(v * scalars[1]) + rates.eps)
    if rates.weight_decay:
        update += scalars[2] * (p if origin is None else p - origin.astype(jnp.float32))
    return p - update, m, v


def _adam_xla(
    w: Array,
    blocks: Array,
    scalars: Array,
    g: Array,
    held: tuple[Array, ...],
    origin: Array | None,
    *,
    rates: Rates,
) -> tuple[Array, ...]:
    m, v, *master = held
    p = master[0] if master else gather_xla(w, blocks, block=g.shape[1:]).astype(jnp.float32)
    p, m, v = _step(scalars, rates, p, g, m, v, origin)
    return put_xla(w, blocks, p), m, v, *([p] if master else [])


def _adam_pallas(
    w: Array,
    blocks: Array,
    scalars: Array,
    g: Array,
    held: tuple[Array, ...],
    origin: Array | None,
    *,
    rates: Rates,
    tiles: Tiles,
    interpret: Any,
) -> tuple[Array, ...]:
    from jax.experimental import pallas as pl

    compact = [*held, g] if origin is None else [*held, g, origin]
    has_master = len(held) == 3

    def kernel(blocks: Any, scalars: Any, _: Any, *refs: Any) -> None:
        inputs, (w, *outputs) = refs[: len(compact)], refs[len(compact) :][: 1 + len(held)]
        written, *in_flight = refs[len(compact) + 1 + len(held) :][:3]
        step = pl.program_id(0)
        start, wait = tiles.copies(blocks, written, w, *in_flight)
        # A master is all that is read of the weight.
        if not has_master:
            current, *reads_in_flight = refs[-3:]
            start_read, wait_read = tiles.copies(blocks, w, current, *reads_in_flight)
            # Blocks are distinct: those of the next step can be read before those of this one are written.
            pl.when(step == 0)(lambda: start_read(step))
            pl.when(step + 1 < tiles.steps)(lambda: start_read(step + 1))
            wait_read(step)
        pl.when(step >= 2)(lambda: wait(step - 2))

        @pl.loop(0, tiles.group)
        def one(j: Any) -> None:
            def chunk(at: Any) -> None:
                m, v, *others = (ref[(j, *at)] for ref in inputs)
                p = others.pop(0) if has_master else current[(parity(step), j, *at)].astype(jnp.float32)
                g, origin = others if len(others) == 2 else (*others, None)
                p, m, v = _step([scalars[i] for i in range(3)], rates, p, g, m, v, origin)
                written[(parity(step), j, *at)] = p.astype(w.dtype)
                for ref, x in zip(outputs, (m, v, p), strict=False):
                    ref[(j, *at)] = x

            tiles.chunks(chunk)

        start(step)

        @pl.when(step == tiles.steps - 1)
        def finish() -> None:
            pl.when(step >= 1)(lambda: wait(step - 1))
            wait(step)

    inputs, outputs = ["scalars", "weight", *["tiles"] * len(compact)], ["weight", *["tiles"] * len(held)]
    grid = tiles.grid(inputs, outputs, [w.dtype] * (1 if has_master else 2))
    shapes = [w, *(tiles.cut(x) for x in held)]
    moved = w.dtype.itemsize * (1 if has_master else 2) + sum(x.dtype.itemsize for x in (*compact, *held))
    call = tiles.call(kernel, "sparse_adam", grid, shapes, 2, interpret, moved)
    w, *new = call(blocks.T, scalars, w, *(tiles.cut(x) for x in compact))
    return w, *(tiles.joined(x) for x in new)
