"""Attention by kernels that others have written: `jax.nn.dot_product_attention`, and splash attention on TPUs.

Both are flash attention (Dao et al. 2022, arXiv:2205.14135) where there is a kernel: scores never lie in memory. They have a
derivative in reverse mode alone. :mod:`jft.kernels.attention` has both, and all masks.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jft.kernels.attention import Mask

Array = jax.Array
LANES = 128
"""Splash attention takes tokens in multiples of the lanes of a TPU's vector registers."""
BLOCKS = (512, 256, LANES)
"""Queries and keys of one block of splash attention, the first that divides them."""
ROWS, HEADS = ("data", "fsdp"), "tensor"
"""Axes of a mesh over which splash attention is divided."""


def fused_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    *,
    scale: float | Array,
    softcap: float | None = None,
    bias: Array | None = None,
) -> Array:
    """``softmax(scale * q k^T + bias) v`` as :func:`jft.kernels.attention.attention`, by a kernel of the platform.

    The platform is that of the mesh in whose context it is traced, without one JAX's default. TPUs: :func:`splash_attention`.
    GPUs: cuDNN's, in bfloat16 and float16. Else XLA's products of all scores at once. What is no token of any segment gets
    something finite.

    Raises ``ValueError`` for what the kernel lacks: softcap off TPUs; on TPUs bias, windows that differ between the layers of
    a scan, and keys that are not those of the queries.
    """
    platform = _platform()
    if platform == "tpu":
        if bias is not None:
            raise ValueError(_lacks("a bias of the scores (T5)", platform))
        return splash_attention(q, k, v, mask, scale=scale, softcap=softcap)
    if softcap is not None:
        raise ValueError(_lacks(f"a softcap of the scores ({softcap})", platform))
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if not isinstance(scale, int | float):
        q, scale = _scaled(q, scale), 1.0
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        None if bias is None else bias[None],
        scale=scale,
        implementation="cudnn" if platform == "gpu" and half else "xla",
        **_rules(mask),
    )


def _platform() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _lacks(what: str, platform: str) -> str:
    return f"attention='fused' has no {what} on {platform}; use attention='blockwise' or 'plain'"


def _scaled(q: Array, scale: float | Array) -> Array:
    return (q.astype(jnp.promote_types(q.dtype, jnp.float32)) * scale).astype(q.dtype)


def _rules(mask: Mask | None) -> dict[str, Any]:
    """A mask as arguments of ``jax.nn.dot_product_attention``: what its kernels have by name, else a dense array."""
    if mask is None:
        return {}
    rules: dict[str, Any] = {"is_causal": mask.causal}
    # cuDNN has windows of causal masks only.
    named = mask.window is None or (mask.causal and _static(mask.window))
    if mask.window is not None and named:
        rules["local_window_size"] = (int(mask.window) - 1, 0)
    if mask.segmented or not named:
        rules["mask"] = mask.dense()[:, None]
    return rules


def _static(window: Any) -> bool:
    return isinstance(window, int | np.integer)


def splash_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | None,
    *,
    scale: float | Array,
    softcap: float | None = None,
    interpret: bool = False,
) -> Array:
    """``softmax(scale * q k^T) v`` by JAX's splash attention for TPUs, with grouped queries and ``softcap``.

    q ``[B, T, H, K]``, k and v ``[B, T, G, K]`` with H a multiple of G. Blocks that a causal mask or a window hides are not
    computed. On a mesh (in whose context it is traced) each device has its rows, over ``data`` and ``fsdp``, and its heads,
    over ``tensor``, where they divide. q is scaled before the product, in its own dtype. Padding sees padding. interpret: as a
    program of JAX, on any device.
    """
    B, T, H, _ = q.shape
    G = k.shape[2]
    if k.shape[1] != T or (mask is not None and mask.q_segments is not mask.k_segments):
        raise ValueError(_lacks("keys that are not those of the queries (cross attention)", "tpu"))
    window = None if mask is None else mask.window
    if window is not None and not _static(window):
        raise ValueError(_lacks("windows that differ between layers", "tpu"))
    segments = jnp.ones((1, T), jnp.int32) if mask is None else mask.q_segments
    arguments = _scaled(q, scale), k, v, jnp.broadcast_to(segments, (B, T)).astype(jnp.int32)
    causal = mask is not None and mask.causal
    run = functools.partial(_on_device, causal, None if window is None else int(window), softcap, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(*arguments)
    axes = tuple(name for name in ROWS if mesh.shape.get(name, 1) > 1)
    rows = axes if B % math.prod(mesh.shape[name] for name in axes) == 0 else None
    shards = mesh.shape.get(HEADS, 1)
    heads = HEADS if shards > 1 and H % shards == G % shards == 0 else None
    each = PartitionSpec(rows, None, heads, None)
    # A kernel is opaque to XLA, which could not divide it.
    divided = jax.shard_map(
        run, in_specs=(each, each, each, PartitionSpec(rows, None)), out_specs=each, check_vma=False
    )
    return divided(*arguments)


def _on_device(
    causal: bool,
    window: int | None,
    softcap: float | None,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    segments: Array,
) -> Array:
    """Splash attention of the rows and heads of one device."""
    # Imported here: it takes its time, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, H = q.shape[1:3]
    missing = -T % LANES
    size = T + missing
    block = next(b for b in BLOCKS if size % b == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": block for name in names}
    rule: splash.Mask
    if window is not None:
        rule = splash.LocalMask((size, size), (window - 1, 0 if causal else window - 1), 0)
    else:
        rule = splash.CausalMask((size, size)) if causal else splash.FullMask((size, size))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([rule] * H),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).transpose(0, 2, 1, 3) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, missing)))
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return out.transpose(0, 2, 1, 3)[:, :T].astype(v.dtype)
