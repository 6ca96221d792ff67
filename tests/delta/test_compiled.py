"""Forms of change that need no kernel, compiled for chips that are not there: in place, and what they hold beside."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jft.delta import EntryLayout, SliceLayout
from jft.delta.changed import COLUMNS, ROWS
from jft.parallel import topology_mesh
from tests.kernels.targets import gpu_topology

T, D, LAYERS = 8192, 4096, 4
ENTRIES, SLICES = D * D // 100, 410
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
WEIGHT, STACK = ((D, D), BF16), ((LAYERS, D, D), BF16)
X = ((T, D), BF16)

pytestmark = pytest.mark.peers


def values(axis, dtype, *lead):
    return ((*lead, 1, SLICES, D) if axis == ROWS else (*lead, D, 1, SLICES), dtype)


def put(layout):
    return lambda w, at, values: layout.put(w, at, values)


def gradient(layout):
    def of(x, dy, at, values):
        return jax.vjp(lambda values: layout.product(x, at, values, (D, D)), values)[1](dy)[0]

    return of


def masked(x, w, scores):
    return x @ (w * (scores > 0.01))


# name: function, operands, which are donated, and the most that it may hold beside them, on a TPU and on a GPU.
GATHERED = T * SLICES * 2
FORMS = {
    "entries": (put(EntryLayout()), (WEIGHT, ((1, 1, ENTRIES, 2), I32), ((1, 1, ENTRIES), F32)), (0,), 0, 0),
    "entries of a stack": (
        put(EntryLayout()),
        (STACK, ((LAYERS, 1, 1, ENTRIES, 2), I32), ((LAYERS, 1, 1, ENTRIES), F32)),
        (0,),
        # The coordinates and values of a layer, and not the weight of one (32 MiB).
        12 * ENTRIES * 2,
        0,
    ),
    "read entries": (lambda w, at: EntryLayout().gather(w, at), (WEIGHT, ((1, 1, ENTRIES, 2), I32)), (), 0, 2 * ENTRIES),
    "rows": (put(SliceLayout(ROWS)), (WEIGHT, ((1, SLICES), I32), values(ROWS, F32)), (0,), 0, 0),
    "columns": (put(SliceLayout(COLUMNS)), (WEIGHT, ((1, SLICES), I32), values(COLUMNS, F32)), (0,), 0, SLICES * D * 2),
    # A TPU gathers columns of x or dy in a copy with these in front.
    "gradient of rows": (gradient(SliceLayout(ROWS)), (X, X, ((1, SLICES), I32), values(ROWS, BF16)), (), T * D * 2, GATHERED),
    "gradient of columns": (
        gradient(SliceLayout(COLUMNS)), (X, X, ((1, SLICES), I32), values(COLUMNS, BF16)), (), T * D * 2, GATHERED,
    ),
    # A TPU masks inside the product; XLA on a GPU writes the masked weight.
    "masked product": (masked, (X, WEIGHT, ((D, D), F32)), (), 0, D * D * 2),
}  # fmt: skip


def compiled(platform, sharding, function, operands, donated):
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in operands]
    return jax.jit(function, donate_argnums=donated).trace(*structs).lower(lowering_platforms=(platform,)).compile()


def check(platform, sharding, name, most):
    function, operands, donated, *_ = FORMS[name]
    memory = compiled(platform, sharding, function, operands, donated).memory_analysis()
    assert memory.temp_size_in_bytes <= most + 2**18
    in_place = sum(math.prod(operands[i][0]) * jnp.dtype(operands[i][1]).itemsize for i in donated)
    assert memory.alias_size_in_bytes == in_place


@pytest.mark.parametrize("name", FORMS)
def test_on_a_tpu(name):
    pytest.importorskip("libtpu")
    check("tpu", SingleDeviceSharding(topology_mesh("v5e:2x2").devices.flat[0]), name, FORMS[name][3])


@pytest.mark.parametrize("name", FORMS)
def test_on_a_gpu(name):
    check("cuda", SingleDeviceSharding(gpu_topology("h200").devices[0]), name, FORMS[name][4])
