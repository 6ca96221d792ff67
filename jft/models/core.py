"""The parts of every model: `Model`, its inputs, one matrix product, named sites, one scan over layers.

A jft model is a pure function of nested dicts. Three conventions hold in all of them:

* Leaf names say what a leaf is: ``w`` a matrix ``[..., in, out]``, ``b`` its bias, ``table`` an embedding ``[rows, D]``,
  ``scale`` and ``bias`` those of a norm. Layers are stacked: everything under ``layers/`` has a leading axis L.
* Every product ``x @ w`` goes through :meth:`Scope.dot` and every residual-stream value through :meth:`Scope.site`, each
  under its name (that of the parameters: ``layers/attn/q``). Methods read and edit there by passing :class:`Hooks`.
* A weight may be an array or a *structured weight* (:mod:`jft.dot`), which slices under ``lax.scan`` like an array.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jft import tree
from jft.dot import accumulator, dot
from jft.kernels.attention import Mask, attention
from jft.kernels.fused_attention import fused_attention

Array = jax.Array
Params = Mapping[str, Any]


# Leaves that models multiply by or look up, and so may be structured weights; others are read as plain arrays.
STRUCTURED = ("w", "table")


def model_of(apply: Any) -> Any:
    """The model whose ``apply`` this is, bound or wrapped; itself where it is of none."""
    return getattr(apply, "__self__", getattr(apply, "model", apply))


def is_jft_model(model: Any) -> bool:
    """Whether this is a :class:`jft.models.Model`, which takes hooks and structured weights, or any other function.

    Of an ``apply``, ask :func:`model_of` first: alone it counts as any other function, whose weights are plain arrays.
    """
    return hasattr(model, "linear_paths")


def takes_structured(apply: Any, path: str) -> bool:
    """Whether a structured weight may stand at ``path`` of the parameters of ``apply``."""
    return is_jft_model(model_of(apply)) and path.rsplit("/", 1)[-1] in STRUCTURED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs:
    """A stacked leaf cut along its layer axis into consecutive runs, each an array or structured weight.

    Layers that train and layers that do not then live in different scans, so that what is frozen costs no gradient:
    training the last two of 32 layers never runs the backward pass of the first 30. ``sizes`` are the runs' lengths.
    """

    parts: tuple[Any, ...]
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def _is_runs(x: Any) -> bool:
    return isinstance(x, Runs)


def _cut(leaves: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Stacked leaves (arrays, or :class:`Runs` of exactly these sizes) as one tree for each run."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def slice_of(leaf: Any, i: int) -> Any:
        if _is_runs(leaf):
            if leaf.sizes != sizes:
                raise ValueError(
                    f"layers are cut into runs {leaf.sizes} here and {sizes} there; cut all of them at the same layers"
                )
            return leaf.parts[i]
        return jax.lax.slice_in_dim(leaf, starts[i], starts[i] + sizes[i], axis=0)

    # B023: each lambda is called within its own iteration, so the late binding of i is harmless.
    return [jax.tree.map(lambda leaf: slice_of(leaf, i), leaves, is_leaf=_is_runs) for i in range(len(sizes))]  # noqa: B023


@dataclasses.dataclass(frozen=True)
class Hooks:
    """Access of a method to values inside a model, to read and edit; static functions plus arrays.

    ``product(name, x, w, state) -> (y, read)`` replaces every named product; ``value(name, h, state) -> (h, read)`` every
    named residual-stream value (``h[B, T, D]``). ``read`` is a pytree to collect, or None. ``state[name]`` is handed in
    where it is present; names under ``layers/`` hold leaves with a leading axis L and are sliced layer by layer.
    ``Model.apply(params, batch, hooks=hooks)`` then returns ``(outputs, reads)``, reads by name, stacked over layers.
    """

    product: Callable[[str, Array, Any, Any], tuple[Array, Any]] | None = None
    value: Callable[[str, Array, Any], tuple[Array, Any]] | None = None
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Execution:
    """The way a model runs, as opposed to what it computes.

    dtype: activations and products. remat: what the backward pass recomputes inside a layer: ``none`` nothing, ``full``
    everything, ``dots`` all but the matrix products. unroll: layers per scan step (0: all of them, a plain loop whose
    cost XLA counts in full). experts: how mixtures of experts run: ``dense``, every expert on every token, which costs
    E / k times the products but shards, vmaps and shows its products to hooks like any other layer (and is the faster one
    on CPUs, where XLA has no grouped product); ``ragged``, tokens sorted by expert and ``jax.lax.ragged_dot``, for
    accelerators with one. Layers with hooked products, or weights without a grouped product, run dense. attention:
    ``plain``, all scores at once, ``[B, H, T, S]`` in float32, several times over in the backward pass of every layer; or
    ``blockwise``, blocks of at most ``attention_block`` queries and keys at a time, their scores computed again where a
    derivative needs them (:mod:`jft.kernels.attention`): memory linear in T, in forward and reverse mode, and blocks that
    a causal mask or a window hides are skipped. Choose it where T is beyond one block; below, plain is the same and
    compiles sooner. Or ``fused``, a kernel of the platform (:mod:`jft.kernels.fused_attention`): splash attention on TPUs,
    cuDNN's on GPUs in bfloat16; for ordinary training and evaluation, since it has no forward mode, not with every model, and
    on several TPUs only where the model is traced for their mesh (:func:`on_mesh`), as training does. logits_chunk: of a
    model that predicts tokens, tokens of a row whose logits ``[B, chunk, V]`` exist at once in training steps and evaluation
    (0: all), for one more product of the head in the backward pass (:mod:`jft.models.logits`); ``apply`` gives all of them
    always.
    """

    dtype: Any = jnp.float32
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1
    experts: Literal["dense", "ragged"] = "dense"
    attention: Literal["plain", "blockwise", "fused"] = "plain"
    attention_block: int = 512
    logits_chunk: int = 0

    @property
    def block(self) -> int | None:
        """Queries and keys that an attention takes at a time; None for all at once."""
        return self.attention_block if self.attention == "blockwise" else None

    def __post_init__(self) -> None:
        """``ValueError`` for an unknown choice, before anything is traced."""
        choices = {
            "remat": ("none", "full", "dots"),
            "experts": ("dense", "ragged"),
            "attention": ("plain", "blockwise", "fused"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        if self.attention_block < 1:
            raise ValueError(f"attention_block is {self.attention_block}; it must be at least 1")
        if self.logits_chunk < 0:
            raise ValueError(f"logits_chunk is {self.logits_chunk}; it must be at least 0")


class Architecture(Protocol):
    """The interface of a family (decoder, encoder, vision, clip, seq2seq): pure functions of its frozen config."""

    def init(self, key: Array, dtype: Any) -> dict: ...

    def forward(self, execution: Execution, params: Params, batch: Any, hooks: Hooks | None) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Model:
    """A pure function of a parameter pytree: ``model.apply(params, batch) -> outputs``.

    config: the architecture's frozen, hashable description, which is also its code (:class:`Architecture`).
    execution: how it runs (activation dtype, remat, unrolling); ``model.with_(remat="full")`` changes it.
    drawn: paths of the parameters that its checkpoint lacked, and :func:`jft.load` drew at random: a new head.
    A model is hashable, so jitted functions that close over equal models are compiled once.
    """

    config: Any
    execution: Execution = Execution()
    # Nothing of what it computes.
    drawn: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self) -> None:
        """``ValueError`` for chunks of logits in a model that gives none for each token."""
        if self.execution.logits_chunk and not self.predicts_tokens:
            raise ValueError(
                f"logits_chunk={self.execution.logits_chunk} is of models that predict tokens (decoder, t5), and "
                f"{type(self.config).__name__} has no logits for each token; leave it 0"
            )

    def with_(self, **execution: Any) -> Model:
        """The same model run another way: any field of :class:`Execution`."""
        return dataclasses.replace(self, execution=dataclasses.replace(self.execution, **execution))

    def init(self, key: Array, dtype: Any = jnp.float32) -> dict:
        """Random parameters in ``dtype``, drawn per path, so that any device mesh gives the same ones."""
        return self.config.init(key, dtype)

    def abstract(self, dtype: Any = jnp.float32) -> dict:
        """Shapes and dtypes of the parameters; nothing is allocated."""
        return jax.eval_shape(functools.partial(self.config.init, dtype=dtype), jax.random.key(0))

    def apply(self, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """Outputs for a batch: an array ``tokens[B, T]`` or a dict (see the architecture's ``forward``).

        With ``hooks``, ``(outputs, reads)``.
        """
        return self.config.forward(self.execution, params, batch, hooks)

    @property
    def predicts_tokens(self) -> bool:
        """Whether outputs are logits for each token, by :meth:`head`."""
        return hasattr(self.config, "head_params")

    @property
    def product_head(self) -> str | None:
        """The site behind which the model is one product with its head's weights, :meth:`head`; None where it is more."""
        return getattr(self.config, "product_head", None)

    def head(self, params: Params, h: Array) -> Array:
        """Outputs from the value that the head reads: that at the site :attr:`product_head`, where there is one."""
        # Here, since a caller may have cut or computed `h` after its site.
        return self.config.logits(Scope(self.execution), params, rows_over_devices(h))

    def head_params(self, params: Params) -> Params:
        """The part of ``params`` that :meth:`head` reads."""
        return self.config.head_params(params)

    def head_states(self, params: Params, batch: Any, hooks: Hooks | None = None) -> Any:
        """What :meth:`head` reads, ``[B, T, D]``; with hooks ``(states, reads)``."""
        scope = Scope(self.execution, hooks)
        h = self.config.head_states(scope, params, batch)
        return h if hooks is None else (h, scope.reads)

    def linear_paths(self, params: Params | None = None) -> tuple[str, ...]:
        """Paths of the weight matrices inside the layers: what LoRA and sparse methods target by default."""
        flat = tree.flatten(params if params is not None else self.abstract())
        # Not the router: a change there changes which experts run, not what a matrix computes.
        return tuple(p for p in flat if p.endswith("/w") and tree.stack_of(p) is not None and "router" not in p)


class Scope:
    """One trace of one ``apply``: gives names to products and values, and collects what hooks read.

    It lives only while the function is traced; nothing is global, and inside a scan each layer gets its own.
    """

    def __init__(self, execution: Execution, hooks: Hooks | None = None, state: Mapping[str, Any] | None = None):
        self.execution = execution
        self.hooks = hooks
        self.state = state if state is not None else (hooks.state if hooks else {})
        self.reads: dict[str, Any] = {}

    def dot(self, name: str, x: Array, params: Params, key: str = "w") -> Array:
        """``x @ params['w'] (+ params['b'])`` under ``name``; hooks see the product before the bias is added."""
        if self.hooks is None or self.hooks.product is None:
            y = dot(x, params[key])
        else:
            y, read = self.hooks.product(name, x, params[key], self.state.get(name))
            self._collect(name, read)
        return y + params["b"].astype(y.dtype) if "b" in params else y

    def site(self, name: str, h: Array) -> Array:
        """The residual-stream value ``h`` under ``name``, possibly edited, its rows spread over the devices of the mesh."""
        h = rows_over_devices(h)
        if self.hooks is None or self.hooks.value is None:
            return h
        h, read = self.hooks.value(name, h, self.state.get(name))
        self._collect(name, read)
        return h

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Mask | None,
        *,
        scale: float | Array,
        softcap: float | None = None,
        bias: Array | None = None,
    ) -> Array:
        """``softmax(scale * q k^T + bias) v`` as the execution says: see :func:`jft.kernels.attention.attention`."""
        rest: dict[str, Any] = {"scale": scale, "softcap": softcap, "bias": bias}
        if self.execution.attention == "fused":
            return fused_attention(q, k, v, mask, **rest)
        return attention(q, k, v, mask, **rest, block=self.execution.block)

    def _collect(self, name: str, read: Any) -> None:
        if read is None:
            return
        if name in self.reads:
            raise ValueError(f"site {name!r} was read twice in one pass; site names are unique")
        self.reads[name] = read

    def layers(
        self, prefix: str, body: Callable[[Scope, Array, Params, Any], Array], h: Array, params: Params, xs: Any = None
    ) -> Array:
        """``h`` through stacked layers: ``body(scope, h, layer_params, layer_xs) -> h``, scanned over the axis L.

        ``prefix`` (``layers``) is that of the parameters: hook state whose name starts with it is sliced with them.
        """
        # Sites outside the layers have no axis L to slice.
        stacked_state = {k: v for k, v in self.state.items() if k.startswith(prefix + "/")}

        def step(carry: Array, sliced: Any) -> tuple[Array, dict[str, Any]]:
            layer_params, layer_xs, layer_state = sliced
            # A scope per layer: its reads are traced values of the scan's body, which may leave it only as outputs.
            scope = Scope(self.execution, self.hooks, layer_state)
            return body(scope, carry, layer_params, layer_xs), scope.reads

        step = _remat(step, self.execution.remat)
        stacked = (params, xs, stacked_state)
        runs = [leaf for leaf in jax.tree.leaves(params, is_leaf=_is_runs) if _is_runs(leaf)]
        collected = []
        # All leaves of a stack are cut at the same layers, so the sizes of one hold for all.
        for run in _cut(stacked, runs[0].sizes) if runs else [stacked]:
            length = jax.tree.leaves(run)[0].shape[0]
            h, reads = jax.lax.scan(step, h, run, unroll=min(self.execution.unroll or length, length))
            collected.append(reads)
        for name in collected[0]:
            reads = [r[name] for r in collected]
            self._collect(name, reads[0] if len(reads) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *reads))
        return h


def _remat(step: Callable, policy: str) -> Callable:
    if policy == "none":
        return step
    # None keeps nothing, so that everything is recomputed.
    policies = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    if policy not in policies:
        raise ValueError(f"remat policy {policy!r} is unknown; choose none, full or dots")
    # The barriers that prevent CSE are needless inside a scan, and cost time.
    return jax.checkpoint(step, policy=policies[policy], prevent_cse=False)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """The context in which a model is traced for ``mesh``, so that it can spread its activations over the devices."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def rows_over_devices(h: Array) -> Array:
    """``h[B, ...]`` with its rows over the ``data`` and ``fsdp`` axes of the mesh in whose context the model is traced.

    Weights are sharded over ``fsdp`` too, and XLA might as well take their sharding over to activations: every device
    would then compute with all rows. Without a mesh, or where B does not divide, ``h`` as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in ("data", "fsdp") if mesh.shape.get(name, 1) > 1)
    if not axes or h.ndim < 2 or h.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return h
    # XLA's choice for the other axes: tensor parallelism shards some of them.
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(h, PartitionSpec(axes, *(free for _ in h.shape[1:])))


class Inputs(NamedTuple):
    """Token inputs, all int32 ``[B, T]``; ``segments`` may be ``[1, T]`` where every row is one unpadded sequence.

    plain: the batch has neither segments nor positions: position t is t and nothing is padded.
    """

    tokens: Array
    segments: Array
    positions: Array
    plain: bool


def inputs(batch: Any, prefix: str = "") -> Inputs:
    """Tokens with their segments and positions, from a batch: an integer array ``[B, T]``, or a dict.

    ``segments`` (0: padding; 1, 2, ...: the sequences packed in a row) default to one segment, or, where ``positions``
    are given, to a new one wherever positions fall back. ``positions`` default to counting from the start of each
    segment. ``prefix`` is that of the keys (``decoder_``). Raises ValueError for a missing key, a wrong shape or dtype.
    """
    fields = batch if hasattr(batch, "keys") else {"tokens": batch}
    if prefix + "tokens" not in fields:
        raise ValueError(f"the batch has no {prefix + 'tokens'!r}, only {sorted(fields)}")
    tokens = _integers(fields[prefix + "tokens"], prefix + "tokens")
    segments, positions = (fields.get(prefix + key) for key in ("segments", "positions"))
    if segments is None and positions is None:
        # One row for all: the mask is then [1, T, T] and not B times as large.
        T = tokens.shape[1]
        return Inputs(tokens, jnp.ones((1, T), jnp.int32), jnp.arange(T, dtype=jnp.int32)[None], True)
    if positions is not None:
        positions = _integers(positions, prefix + "positions", tokens.shape)
    if segments is None and positions is not None:
        falls = jnp.pad(positions[:, 1:] <= positions[:, :-1], ((0, 0), (1, 0)))
        segments = 1 + jnp.cumsum(falls, axis=1, dtype=jnp.int32)
    segments = _integers(segments, prefix + "segments", tokens.shape)
    return Inputs(tokens, segments, count_within(segments) if positions is None else positions, False)


def count_within(segments: Array) -> Array:
    """Positions ``[B, T]`` that restart at 0 wherever the segment changes."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    # The largest start so far is that of the token's segment.
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _integers(x: Any, name: str, shape: tuple[int, ...] | None = None) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers; got {x.dtype}")
    if x.ndim != 2 or (shape is not None and x.shape != shape):
        raise ValueError(f"{name} must have shape {shape or '[B, T]'}; got {x.shape}")
    return x.astype(jnp.int32)


def recomputed(fn: Callable[..., Array]) -> Callable[..., Array]:
    """``fn``, cheap and elementwise, of whose inside the backward pass keeps nothing but the arguments.

    Derivatives of what is elementwise are as large as its value, and JAX would keep several. Inside a scan they are kept
    for every layer; outside, XLA finds them computed in a linearized forward pass and keeps them until they are used again.
    """
    return jax.checkpoint(fn)


def gated(act: Callable[[Array], Array], gate: Array, up: Array) -> Array:
    """``act(gate) * up``, keeping ``gate`` and ``up`` alone for the backward pass."""
    return recomputed(lambda gate, up: act(gate) * up)(gate, up)


def layer_norm(x: Array, params: Params, eps: float) -> Array:
    """``(x - mean) / sqrt(var + eps) * scale + bias`` over the last axis, in float32 (Ba et al. 2016, arXiv:1607.06450)."""
    return recomputed(functools.partial(_layer_norm, eps))(x, params)


def _layer_norm(eps: float, x: Array, params: Params) -> Array:
    y = x.astype(accumulator(x.dtype))
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = y * params["scale"].astype(y.dtype)
    return (y + params["bias"].astype(y.dtype) if "bias" in params else y).astype(x.dtype)


def rms_norm(x: Array, params: Params, eps: float, offset: float = 0.0) -> Array:
    """``x / sqrt(mean(x^2) + eps) * (offset + scale)`` in float32 (Zhang and Sennrich 2019, arXiv:1910.07467).

    Gemma stores ``scale - 1``: ``offset=1``.
    """
    return recomputed(functools.partial(_rms_norm, eps, offset))(x, params)


def _rms_norm(eps: float, offset: float, x: Array, params: Params) -> Array:
    y = x.astype(accumulator(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * (offset + params["scale"].astype(y.dtype))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    # Not an approximation to be improved: CLIP's weights were trained with this function.
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
