"""Products with selected blocks of a weight, and with nothing else of it.

    block_spmm:    y = x @ S                                      S zero but for the selected blocks
    block_sddmm:   g[n] = x[:, rows of block n]^T dy[:, columns of block n]

The second is the gradient of the first in its blocks, and either product is the transpose of the other: two primitives, each
bilinear, that are closed under every transformation of JAX (both modes to any order, scan, remat, vmap). FLOPs are those of
the dense product times the share of blocks selected; on TPU and GPU Pallas kernels form them without a copy of x or dy.

Which form runs is decided when a program is lowered: the Pallas kernel of its platform where that takes the shapes, else
XLA's form, panels of x gathered and multiplied. Under vmap over blocks or values it is always XLA's. On a mesh whose axes are
named (:class:`jft.kernels.blocks_forms.Axes`) every device multiplies what it has: blocks are gathered or summed over
devices, operands never.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jft.compiled import program_cache
from jft.kernels import blocks_forms as forms
from jft.kernels.blocks_forms import Axes, Implementation
from jft.kernels.pallas import check_blocks

Array = jax.Array


def block_sddmm(
    x: Array,
    dy: Array,
    blocks: Array,
    *,
    block: tuple[int, int],
    acc: Array | None = None,
    out_dtype: Any = None,
    implementation: Implementation = None,
) -> Array:
    """``acc[n] + x[:, rows of block n]^T dy[:, columns of block n]``: the gradient of a weight at selected blocks.

    x ``[T, I]`` and dy ``[T, O]`` of one dtype; blocks int32 ``[n, 2]``, rows and columns in units of ``block = (b, c)``; one
    whose row or column lies past the end is padding and adds zero (under ``jit``, where blocks cannot be looked at). Sums
    are float32 (or wider), rounded once to ``out_dtype`` (default float32). Returns ``[n, b, c]``.

    implementation: None picks (see above); ``pallas`` is the kernel of the platform or an error that says what it lacks;
    ``xla``; ``interpret`` is the TPU kernel in Pallas's interpreter. Raises ``ValueError`` for blocks that leave the weight or
    occur twice, and extents that do not divide.
    """
    if x.ndim != 2 or dy.ndim != 2 or x.shape[0] != dy.shape[0] or x.dtype != dy.dtype:
        raise ValueError(f"block_sddmm takes x [T, I] and dy [T, O] of one dtype, not {_text(x)} and {_text(dy)}")
    check_blocks(blocks, (x.shape[1], dy.shape[1]), block, padding=False)
    at = jnp.asarray(blocks)[None, None]
    out = jnp.dtype(jnp.promote_types(x.dtype, jnp.float32) if out_dtype is None else out_dtype)
    expected = (at.shape[2], *block)
    if acc is not None and acc.shape != expected:
        raise ValueError(f"acc has the shape of the result, {expected}, not {acc.shape}")
    more = () if acc is None else (acc[None, None].astype(out),)
    how = {"implementation": implementation, "axes": Axes(), "mesh": None}
    return _sddmm.bind(x, dy, at, *more, block=tuple(block), dtype=out, **how)[0, 0]


def block_spmm(x: Array, blocks: Array, values: Array, columns: int, *, implementation: Implementation = None) -> Array:
    """``x @ S`` for a weight S ``[I, columns]`` that is zero but for ``values[n]`` at ``blocks[n]``.

    x ``[T, I]``; blocks int32 ``[n, 2]`` and implementation as for :func:`block_sddmm`; values ``[n, b, c]``, multiplied in the
    dtype of x. Sums are float32 (or wider), rounded once to the dtype of x. Returns ``[T, columns]``.
    """
    if x.ndim != 2 or values.ndim != 3 or values.shape[:1] != blocks.shape[:1]:
        raise ValueError(
            f"block_spmm takes x [T, I] and values [n, b, c] of blocks [n, 2], not {_text(x)}, {_text(values)}"
        )
    check_blocks(blocks, (x.shape[1], columns), values.shape[1:], padding=False)
    at = jnp.asarray(blocks)[None, None]
    return _spmm.bind(x, at, values[None, None], columns=columns, implementation=implementation, axes=Axes(), mesh=None)


def cell_spmm(x: Array, at: Array, values: Array, columns: int, axes: Axes) -> Array:
    """:func:`block_spmm` of cells ``at[gi, gj, n, 2]``, ``values[gi, gj, n, b, c]`` (:mod:`jft.delta.selected`).

    axes: of the mesh in whose context this is traced.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spread = not mesh.empty and bool(forms.spread_names(mesh))
    cut = axes.on(mesh, (x.shape[0], x.shape[1], columns), at.shape[:2]) if spread else None
    how: dict[str, Any] = {"axes": cut or Axes(), "mesh": mesh if cut else None}
    # Outside `shard_map` a Pallas kernel would have all of x gathered on every device.
    how["implementation"] = "xla" if spread and cut is None else None
    return _spmm.bind(x, at, values, columns=columns, **how)


def stack_put(w: Array, blocks: Array, values: Array) -> Array:
    """:func:`jft.kernels.block_put.block_put` of matrices ``[L, I, O]``, blocks ``[L, n, 2]``, values ``[L, n, b, c]``.

    In place if ``w`` is donated. Nothing is checked.
    """
    return _put.bind(w, blocks, values) if values.size else w


def _text(x: Any) -> str:
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


# Abstract values.

_spmm, _sddmm, _put = Primitive("block_spmm"), Primitive("block_sddmm"), Primitive("block_put")


@_spmm.def_abstract_eval
def _spmm_shape(x: Any, at: Any, values: Any, *, columns: int, **_: Any) -> Any:
    return jax.core.ShapedArray((x.shape[0], columns), x.dtype)


@_sddmm.def_abstract_eval
def _sddmm_shape(x: Any, dy: Any, at: Any, *_: Any, block: tuple[int, int], dtype: Any, **__: Any) -> Any:
    return jax.core.ShapedArray((*at.shape[:-1], *block), dtype)


@_put.def_abstract_eval
def _put_shape(w: Any, *_: Any) -> Any:
    return jax.core.ShapedArray(w.shape, w.dtype)


# Derivatives: both are bilinear, and the transposes of each are the other and itself.


def _spmm_jvp(primals: Sequence[Any], tangents: Sequence[Any], **how: Any) -> tuple[Array, Any]:
    (x, at, values), (dx, _, dvalues) = primals, tangents
    parts = [] if type(dx) is ad.Zero else [_spmm.bind(dx, at, values, **how)]
    parts += [] if type(dvalues) is ad.Zero else [_spmm.bind(x, at, dvalues, **how)]
    y = _spmm.bind(x, at, values, **how)
    # Called only where a float operand moves, so there is a part.
    return y, functools.reduce(jnp.add, parts)


def _spmm_transpose(ct: Any, x: Any, at: Any, values: Any, *, columns: int, axes: Axes, **how: Any) -> tuple:
    if ad.is_undefined_primal(x):
        if type(ct) is ad.Zero:
            return ad.Zero(x.aval), None, None
        back = _spmm.bind(ct, *_turned(at, values), columns=x.aval.shape[1], axes=axes.transposed(), **how)
        return back.astype(x.aval.dtype), None, None
    if type(ct) is ad.Zero:
        return None, None, ad.Zero(values.aval)
    block, dtype = values.aval.shape[-2:], values.aval.dtype
    return None, None, _sddmm.bind(x, ct.astype(x.dtype), at, block=block, dtype=dtype, axes=axes, **how)


def _sddmm_jvp(primals: Sequence[Any], tangents: Sequence[Any], **how: Any) -> tuple[Array, Any]:
    (x, dy, at, *acc), (dx, ddy, _, *dacc) = primals, tangents
    parts = [] if type(dx) is ad.Zero else [_sddmm.bind(dx, dy, at, **how)]
    parts += [] if type(ddy) is ad.Zero else [_sddmm.bind(x, ddy, at, **how)]
    parts += [t for t in dacc if type(t) is not ad.Zero]
    g = _sddmm.bind(x, dy, at, *acc, **how)
    return g, functools.reduce(jnp.add, parts)


def _sddmm_transpose(
    ct: Any, x: Any, dy: Any, at: Any, *acc: Any, block: tuple[int, int], dtype: Any, axes: Axes, **how: Any
) -> tuple:
    none: tuple = (None,) * (3 + len(acc))
    if acc and ad.is_undefined_primal(acc[0]):
        return *none[:3], ct
    undefined = x if ad.is_undefined_primal(x) else dy
    if type(ct) is ad.Zero:
        back = ad.Zero(undefined.aval)
    elif undefined is x:
        back = _spmm.bind(dy, *_turned(at, ct), columns=x.aval.shape[1], axes=axes.transposed(), **how)
    else:
        back = _spmm.bind(x, at, ct, columns=dy.aval.shape[1], axes=axes, **how)
    return (back, *none[1:]) if undefined is x else (None, back, *none[2:])


def _turned(at: Array, values: Array) -> tuple[Array, Array]:
    """Cells of the transposed weight. No longer row-major, and padding past the end in the second coordinate."""
    return jnp.swapaxes(at, 0, 1)[..., ::-1], jnp.swapaxes(jnp.swapaxes(values, 0, 1), -2, -1)


def _put_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Array, Array]:
    (w, blocks, values), (dw, _, dvalues) = primals, tangents
    # Linear in both; tangents go through XLA's scatter, which has a transpose.
    moved = forms.put(ad.instantiate_zeros(dw), blocks, ad.instantiate_zeros(dvalues))
    return _put.bind(w, blocks, values), moved


ad.primitive_jvps[_put] = _put_jvp
ad.primitive_jvps[_spmm], ad.primitive_jvps[_sddmm] = _spmm_jvp, _sddmm_jvp
ad.primitive_transposes[_spmm], ad.primitive_transposes[_sddmm] = _spmm_transpose, _sddmm_transpose


# Under vmap.


def _spmm_batch(args: Sequence[Any], dims: Sequence[Any], **how: Any) -> tuple[Array, int]:
    x, at, values = args
    if dims[1] is None and dims[2] is None:
        # More rows of one product. Members inside tokens, so that rows stay on the device of their tokens.
        rows = jnp.moveaxis(x, dims[0], 1)
        y = _spmm.bind(rows.reshape(-1, rows.shape[-1]), at, values, **how)
        return y.reshape(*rows.shape[:2], -1), 1
    return jax.vmap(functools.partial(forms.spmm_xla, columns=how["columns"]), dims)(*args), 0


def _sddmm_batch(args: Sequence[Any], dims: Sequence[Any], **how: Any) -> tuple[Array, int]:
    form = functools.partial(forms.sddmm_xla, block=how["block"], dtype=how["dtype"])
    return jax.vmap(form, dims)(*args), 0


def _put_batch(args: Sequence[Any], dims: Sequence[Any]) -> tuple[Array, int]:
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    whole = [batching.bdim_at_front(x, d, size) for x, d in zip(args, dims, strict=True)]
    # Members are more matrices of the stack: one call for all.
    return _put.bind(*(x.reshape(-1, *x.shape[2:]) for x in whole)).reshape(whole[0].shape), 0


batching.primitive_batchers[_put] = _put_batch
batching.primitive_batchers[_spmm], batching.primitive_batchers[_sddmm] = _spmm_batch, _sddmm_batch


# Lowering: by platform, once it is known.


def _register(primitive: Primitive, form: Callable[..., Array]) -> None:
    primitive.def_impl(functools.partial(_eager, primitive))
    for platform in (None, *forms.KERNELS):
        lowered = mlir.lower_fun(functools.partial(form, platform=platform), multiple_results=False)
        mlir.register_lowering(primitive, lowered, platform=platform)


def _eager(primitive: Primitive, *operands: Array, **how: Any) -> Array:
    return _jitted(primitive, **how)(*operands)


@program_cache
def _jitted(primitive: Primitive, **how: Any) -> Callable[..., Array]:
    return jax.jit(functools.partial(primitive.bind, **how))


_register(_spmm, forms.spmm)
_register(_sddmm, forms.sddmm)
_register(_put, forms.put)
