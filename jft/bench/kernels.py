"""The cost of the kernels for selected blocks: bytes, FLOPs and memory of compiled programs, seconds where they can run.

Each operation stands beside its floor (every operand read once and every result written once), the form that XLA makes of it
without a kernel, and the dense one that it stands in for. For a TPU that is not there (``topology``) programs are compiled by
libtpu, and the instruction bundles of a kernel's inner loop times its passes are a lower bound of its time: what the chip would
need if memory were infinitely fast.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jft import parallel
from jft.bench import bundles
from jft.kernels import blocks_tpu
from jft.kernels.block_put import block_put
from jft.kernels.blocks import block_sddmm, block_spmm
from jft.kernels.sparse_adam import sparse_adam

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight ``[inputs, outputs]``, a share of its blocks, and tokens that pass through it."""

    tokens: int = 8192
    inputs: int = 4096
    outputs: int = 4096
    density: float = 0.1
    block: tuple[int, int] = (128, 128)
    dtype: str = "bfloat16"

    @property
    def grid(self) -> tuple[int, int]:
        return self.inputs // self.block[0], self.outputs // self.block[1]

    @property
    def count(self) -> int:
        """Blocks that are selected."""
        return max(round(self.density * math.prod(self.grid)), 1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one form of an operation. form: kernel, xla, or dense (of the whole weight).

    flops, moved: FLOPs and bytes of memory traffic as the compiler has them; None where it does not tell. floor: bytes of all
    operands and results of the sparse operation, once. temporaries: bytes. estimate: seconds by the compiler's own model, which
    knows nothing of a kernel's inside. bundles: of a kernel's inner loop, times its passes. seconds: the median of those
    measured. refusal: why the kernel does not take the case.
    """

    kernel: str
    form: str
    case: Case
    floor: int
    flops: float | None = None
    moved: float | None = None
    temporaries: int | None = None
    estimate: float | None = None
    bundles: int | None = None
    seconds: float | None = None
    refusal: str | None = None

    @property
    def to_floor(self) -> float | None:
        return None if self.moved is None else self.moved / self.floor


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation in its forms. operands: ``(shape, dtype)``, the blocks among them; donated: those updated in place.

    forms: ``{form: function of operands}``; dense takes operands of its own. passes: of the loop in the TPU's kernel.
    """

    name: str
    operands: tuple[tuple[tuple[int, ...], Any], ...]
    floor: int
    forms: dict[str, Callable]
    dense_operands: tuple[tuple[tuple[int, ...], Any], ...]
    donated: tuple[int, ...] = ()
    dense_donated: tuple[int, ...] = ()
    passes: int | None = None


def _nbytes(*operands: tuple[tuple[int, ...], Any]) -> int:
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in operands)


def _forms(function: Callable) -> dict[str, Callable]:
    return {
        "kernel": functools.partial(function, implementation=None),
        "xla": functools.partial(function, implementation="xla"),
    }


def _sddmm(case: Case) -> Operation:
    x, dy = (((case.tokens, size), case.dtype) for size in (case.inputs, case.outputs))
    blocks, g = ((case.count, 2), "int32"), ((case.count, *case.block), "float32")

    def sampled(x: Array, dy: Array, blocks: Array, implementation: Any) -> Array:
        return block_sddmm(x, dy, blocks, block=case.block, implementation=implementation)

    def dense(x: Array, dy: Array) -> Array:
        return jnp.einsum("ti,to->io", x, dy, preferred_element_type=jnp.float32).astype(case.dtype)

    config = blocks_tpu.config_of(
        jax.ShapeDtypeStruct(*x), jax.ShapeDtypeStruct(*dy), case.count, case.block, "float32"
    )
    return Operation(
        "block_sddmm",
        (x, dy, blocks),
        _nbytes(x, dy, g),
        {**_forms(sampled), "dense": dense},
        (x, dy),
        passes=config.passes(case.tokens, case.count) if config else None,
    )


def _spmm(case: Case) -> Operation:
    x, values = ((case.tokens, case.inputs), case.dtype), ((case.count, *case.block), case.dtype)
    blocks, w = ((case.count, 2), "int32"), ((case.inputs, case.outputs), case.dtype)
    y = ((case.tokens, case.outputs), case.dtype)

    def product(x: Array, values: Array, blocks: Array, implementation: Any) -> Array:
        return block_spmm(x, blocks, values, case.outputs, implementation=implementation)

    itemsize = jnp.dtype(case.dtype).itemsize
    passes = blocks_tpu.spmm_passes((case.tokens, case.inputs), case.count, case.block, case.outputs, itemsize)
    forms = {**_forms(product), "dense": jnp.dot}
    return Operation("block_spmm", (x, values, blocks), _nbytes(x, values, y), forms, (x, w), passes=passes)


def _put(case: Case) -> Operation:
    w, values = ((case.inputs, case.outputs), case.dtype), ((case.count, *case.block), "float32")
    blocks, written = ((case.count, 2), "int32"), ((case.count, *case.block), case.dtype)

    def put(w: Array, values: Array, blocks: Array, implementation: Any) -> Array:
        return block_put(w, blocks, values, implementation=implementation)

    def dense(w: Array, values: Array) -> Array:
        return values.astype(w.dtype)

    whole = ((case.inputs, case.outputs), "float32")
    floor = _nbytes(values, written)
    return Operation("block_put", (w, values, blocks), floor, {**_forms(put), "dense": dense}, (w, whole), (0,), (0,))


def _adam(case: Case) -> Operation:
    compact, shape = (case.count, *case.block), (case.inputs, case.outputs)
    w, g, moment, blocks = (shape, case.dtype), (compact, case.dtype), (compact, "float32"), ((case.count, 2), "int32")

    def sparse(w: Array, g: Array, m: Array, v: Array, blocks: Array, implementation: Any) -> Any:
        return sparse_adam(w, blocks, g, m, v, count=10, lr=1e-4, implementation=implementation)

    def dense(w: Array, g: Array, m: Array, v: Array) -> Any:
        g = g.astype(jnp.float32)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        return (w - 1e-4 * m / (jnp.sqrt(v) + 1e-8)).astype(w.dtype), m, v

    values = (compact, case.dtype)
    floor = _nbytes(values, g, moment, moment) + _nbytes(values, moment, moment)
    whole = (shape, case.dtype), (shape, case.dtype), (shape, "float32"), (shape, "float32")
    return Operation(
        "sparse_adam",
        (w, g, moment, moment, blocks),
        floor,
        {**_forms(sparse), "dense": dense},
        whole,
        (0, 2, 3),
        (0, 2, 3),
    )


OPERATIONS: dict[str, Callable[[Case], Operation]] = {
    "block_sddmm": _sddmm,
    "block_spmm": _spmm,
    "block_put": _put,
    "sparse_adam": _adam,
}
KERNELS = tuple(OPERATIONS)


def measure(
    cases: Sequence[Case],
    kernels: Sequence[str] = KERNELS,
    topology: str = "",
    steps: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> list[Cost]:
    """The cost of every form of these kernels. steps: rounds that are timed on the device that is here (0: none).

    Bundles are told where libtpu was not loaded in this process before.
    """
    with bundles.dumps(topology) as dumps:
        sharding = None
        if topology:
            sharding = SingleDeviceSharding(parallel.topology_mesh(topology).devices.flat[0])
        costs = []
        for case in cases:
            for operation in (OPERATIONS[name](case) for name in kernels):
                for form in operation.forms:
                    costs.append(_cost(operation, form, case, sharding, topology, dumps, steps))
                    say(f"{operation.name}, {form}, {case.inputs} x {case.outputs}, {100 * case.density:g}%: done")
        return costs


def _cost(
    operation: Operation, form: str, case: Case, sharding: Any, topology: str, dumps: str | None, steps: int
) -> Cost:
    dense = form == "dense"
    operands, donated = (
        (operation.dense_operands, operation.dense_donated) if dense else (operation.operands, operation.donated)
    )
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in operands]
    platform = "tpu" if topology else jax.default_backend().replace("gpu", "cuda")
    jitted = jax.jit(operation.forms[form], donate_argnums=donated)
    bundles.clear(dumps)
    lowered = jitted.trace(*structs).lower(lowering_platforms=(platform,))
    has_kernel = any(name in lowered.as_text() for name in ("tpu_custom_call", "mosaic_gpu"))
    if form == "kernel" and not has_kernel:
        return Cost(operation.name, form, case, operation.floor, refusal=f"no kernel for {platform} and these shapes")
    compiled = lowered.compile()
    counted = compiled.cost_analysis() or {}
    flops, moved, estimate = (counted.get(name) for name in ("flops", "bytes accessed", "optimal_seconds"))
    inner = bundles.inner_loop(dumps, operation.name) if form == "kernel" and operation.passes else None
    return Cost(
        operation.name, form, case, operation.floor, flops, moved, compiled.memory_analysis().temp_size_in_bytes,
        estimate if topology and not has_kernel else None,
        inner and inner * operation.passes,  # type: ignore[operator]
        seconds(compiled, operands, donated, case, steps) if steps and not topology else None,
    )  # fmt: skip


def seconds(compiled: Any, operands: Sequence[Any], donated: tuple[int, ...], case: Case, steps: int) -> float:
    """The median of ``steps`` runs, on new random numbers; results are waited for."""
    rng = np.random.default_rng(0)
    blocks = np.stack(np.divmod(rng.permutation(math.prod(case.grid))[: case.count], case.grid[1]), axis=1)

    def draw(shape: tuple[int, ...], dtype: Any) -> Array:
        if dtype == "int32":
            return jnp.asarray(np.sort(blocks.view("i8,i8"), axis=0).view("i8").reshape(shape), jnp.int32)
        return jax.random.normal(jax.random.key(rng.integers(2**31)), shape, jnp.float32).astype(dtype)

    arrays = [draw(*operand) for operand in operands]
    times = []
    for step in range(steps + 1):
        # What is donated is gone after a run.
        arrays = [
            draw(*o) if i in donated and step else a for i, (o, a) in enumerate(zip(operands, arrays, strict=True))
        ]
        jax.block_until_ready(arrays)
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        # The first run warms up.
        times += [time.perf_counter() - begin] if step else []
    return statistics.median(times)
