"""Reading and writing selected blocks, in both forms, against slices in NumPy: every byte of the weight counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding

from jft.kernels import pallas
from jft.kernels.block_put import block_gather, block_put, fold
from jft.kernels.blocks import stack_put
from jft.parallel import make_mesh, topology_mesh

MUTATIONS = (
    ("jft/kernels/pallas.py", " & (column >= 0) & (column < self.extents[1])", ""),
    ("jft/kernels/pallas.py", "(row >= 0) & (row < self.extents[0]) & ", ""),
    ("jft/kernels/pallas.py", "valid & (tile <= last), (rows", "valid, (rows"),
    ("jft/kernels/pallas.py", "row * self.split + jax.lax.rem(tile, self.split)", "row * self.split"),
    ("jft/kernels/pallas.py", "jax.lax.rem(step, 2)", "jax.lax.rem(step, 1)"),
    ("jft/kernels/pallas.py", "jax.lax.rem(i, across) * columns", "jax.lax.rem(i, 1) * columns"),
    ("jft/kernels/pallas.py", "tpu=pallas, default=xla", "tpu=xla, default=xla"),
    ("jft/kernels/pallas.py", "counts[turn] += 1", "counts[turn] = 1"),
    ("jft/kernels/pallas.py", "(at[:, 0] >= extents[0])", "(at[:, 0] > extents[0])"),
    ("jft/kernels/pallas.py", "if (counts > 1).any()", "if (counts > 2).any()"),
    ("jft/kernels/pallas.py", "if b % sublanes or c % LANES", "if b % sublanes"),
    ("jft/kernels/block_put.py", "jnp.where(valid, x, jnp.zeros_like(x))", "x"),
    ("jft/kernels/block_put.py", "pl.when(step >= 2)(lambda: wait", "pl.when(step >= 3)(lambda: wait"),
    ("jft/kernels/block_put.py", "pl.when(step >= 1)(lambda: wait(step - 1))\n", "pass\n"),
    ("jft/kernels/blocks_forms.py", 'mode="fill", fill_value=0, unique', 'mode="clip", unique'),
    ("jft/kernels/blocks_forms.py", 'mode="drop", unique', 'mode="clip", unique'),
    ("jft/kernels/block_put.py", "put_xla(tangents[0], blocks, tangents[2])", "put_xla(tangents[0], blocks, values)"),
    ("jft/kernels/blocks.py", "ad.instantiate_zeros(dvalues))\n", "values)\n"),
    ("jft/kernels/blocks.py", ".reshape(whole[0].shape), 0\n", ".reshape(whole[0].shape), 1\n"),
    ("jft/kernels/block_put.py", "jnp.where(row < rows, layer * rows + row, padding)", "layer * rows + row"),
)
BLOCK, GRID = (16, 128), (8, 3)
SHAPE = (BLOCK[0] * GRID[0], BLOCK[1] * GRID[1])
BITS = {jnp.float32: np.uint32, jnp.bfloat16: np.uint16}
DTYPES = pytest.mark.parametrize("dtype", list(BITS), ids=lambda dtype: dtype.__name__)
FORMS = pytest.mark.parametrize("form", ["default", "pallas"])
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def options(form):
    """Keywords for one form, which a CPU can run."""
    return {"implementation": "pallas", "_interpret": True} if form == "pallas" else {}


def bits(x):
    return np.asarray(x).view(np.dtype(f"uint{8 * x.dtype.itemsize}"))


def poisoned(shape, dtype, seed=0, payload=True):
    """NaNs, each with bits of its own in its mantissa: a copy through arithmetic, or to another place, shows.

    Without payload, numbers of all sizes are in place of those bits: for bfloat16 XLA's CPU goes through float32.
    """
    if not payload:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(shape) * 10.0 ** rng.integers(-30, 30, shape)
        return np.where(rng.random(shape) < 0.1, np.nan, x).astype(dtype)
    size = jnp.finfo(dtype).bits
    quiet = {32: 0x7FC00000, 16: 0x7FC0}[size]
    sign = np.random.default_rng(seed).integers(0, 2, shape) << (size - 1)
    payload = np.arange(np.prod(shape)).reshape(shape) % (1 << (22 if size == 32 else 6))
    return (quiet | sign | payload).astype(BITS[dtype]).view(dtype)


def placed(n, padding=(), grid=GRID, seed=0):
    """n distinct blocks in no order, of which the slots ``padding`` are past the end."""
    order = np.random.default_rng(seed).permutation(grid[0] * grid[1])[:n]
    blocks = np.stack(np.unravel_index(order, grid), axis=1).astype(np.int32)
    for i, slot in enumerate(padding):
        blocks[slot] = grid[0] + i, 0
    return blocks


def slices(blocks, block=BLOCK, grid=GRID):
    """Of each slot that is no padding: its number and its place in the weight."""
    for k, (i, j) in enumerate(blocks):
        if i < grid[0]:
            yield k, (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))


CASES = {
    "unsorted": placed(13),
    "every block": placed(24),
    "padding": placed(19, padding=(0, 7, 8, 17, 18)),
    "one": placed(1),
    "padding alone": placed(5, padding=range(5)),
    "none": placed(0),
}


@FORMS
@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_exactly_the_blocks_are_read_and_written(case, dtype, form):
    blocks = CASES[case]
    payload = dtype == jnp.float32
    w, values = poisoned(SHAPE, dtype, 0, payload), poisoned((len(blocks), *BLOCK), dtype, 1, payload)
    want_read, want = np.zeros_like(values), w.copy()
    for k, at in slices(blocks):
        want_read[k], want[at] = w[at], values[k]
    read = jax.jit(functools.partial(block_gather, block=BLOCK, **options(form)))(w, blocks)
    np.testing.assert_array_equal(bits(read), bits(want_read))
    np.testing.assert_array_equal(
        bits(jax.jit(functools.partial(block_put, **options(form)))(w, blocks, values)), bits(want)
    )


@pytest.mark.parametrize("vmem", [1, 3, 14])
def test_blocks_larger_than_the_buffers_go_through_in_tiles(vmem, monkeypatch):
    block, grid = (48, 640), (3, 2)
    # Room for a tile of 8 rows, one of 24, and two of 48, of which the last step has one.
    monkeypatch.setattr(pallas, "VMEM", vmem * 8 * block[1] * 16)
    blocks = placed(5, padding=(2,), grid=grid)
    w = poisoned((block[0] * grid[0], block[1] * grid[1]), jnp.float32)
    values = poisoned((5, *block), jnp.float32, seed=1)
    tiles = pallas.Tiles.of(5, block, w.shape, (w.dtype,), 16)
    assert (tiles.rows, tiles.group) == {1: (8, 1), 3: (24, 1), 14: (48, 2)}[vmem]
    read = block_gather(w, blocks, block=block, **options("pallas"))
    put = block_put(w, blocks, values, **options("pallas"))
    want_read, want = np.zeros_like(values), w.copy()
    for k, at in slices(blocks, block, grid):
        want_read[k], want[at] = w[at], values[k]
    np.testing.assert_array_equal(bits(read), bits(want_read))
    np.testing.assert_array_equal(bits(put), bits(want))


@FORMS
def test_values_are_rounded_to_the_weight(form):
    blocks, values = placed(9), np.random.default_rng(0).standard_normal((9, *BLOCK)).astype(np.float32)
    w = jnp.zeros(SHAPE, jnp.bfloat16)
    read = block_gather(block_put(w, blocks, values, **options(form)), blocks, block=BLOCK)
    np.testing.assert_array_equal(read, values.astype(jnp.bfloat16))


@FORMS
def test_columns_past_the_end_are_nothing_too(form):
    # As in programs, where nothing can be looked at.
    blocks = jnp.array([[1, 3], [2, 1], [-1, 0], [1, -1]])
    w, values = jnp.ones(SHAPE), jnp.full((4, *BLOCK), 2.0)
    read = jax.jit(functools.partial(block_gather, block=BLOCK, **options(form)))(w, blocks)
    np.testing.assert_array_equal(read[:, 0, 0], [0, 1, 0, 0])
    put = jax.jit(functools.partial(block_put, **options(form)))(w, blocks, values)
    assert float(jnp.sum(put - w)) == BLOCK[0] * BLOCK[1]


def simulated(fn):
    """Result of a kernel in JAX's simulation of a TPU, whose memory is NaN at first, and in which nothing may race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    # What a simulation that failed has left would fail this one.
    pltpu.reset_tpu_interpret_mode_state()
    out = jax.block_until_ready(fn(implementation="pallas", _interpret=pltpu.InterpretParams(detect_races=True)))
    assert not interpret_pallas_call.races.races_found
    return out


def test_copies_in_flight_do_not_race():
    # Three steps, so that a buffer is used twice.
    blocks, w = placed(24, padding=(3, 9)), poisoned(SHAPE, jnp.float32)
    values = poisoned((24, *BLOCK), jnp.float32, seed=1)
    for fn in (
        functools.partial(block_gather, w, blocks, block=BLOCK),
        functools.partial(block_put, w, blocks, values),
    ):
        np.testing.assert_array_equal(bits(simulated(fn)), bits(fn(implementation="xla")))


@FORMS
def test_derivatives_are_those_of_slices(form):
    rng = np.random.default_rng(0)
    blocks = placed(9, padding=(4,))
    w, dw, cotangent = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(3))
    values, dvalues = (rng.standard_normal((9, *BLOCK)).astype(np.float32) for _ in range(2))

    def of(w, values):
        put = block_put(w, blocks, values, **options(form))
        # Blocks of the weight and of the values, so that both reach the result of the second.
        return put, block_gather(w + put, blocks, block=BLOCK, **options(form))

    (_, (dput, dread)) = jax.jvp(of, (w, values), (dw, dvalues))
    kept, want = np.ones(SHAPE, np.float32), dw.copy()
    for k, at in slices(blocks):
        kept[at], want[at] = 0, dvalues[k]
        np.testing.assert_array_equal(dread[k], dw[at] + dvalues[k])
    np.testing.assert_array_equal(dput, want)
    np.testing.assert_array_equal(dread[4], 0)
    pulled = jax.vjp(of, w, values)[1]((cotangent, jnp.zeros_like(values)))
    np.testing.assert_array_equal(pulled[0], cotangent * kept)
    for k, at in slices(blocks):
        np.testing.assert_array_equal(pulled[1][k], cotangent[at])


@FORMS
def test_shards_and_members_go_by_themselves(form):
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    w, blocks = poisoned((2, *SHAPE), jnp.float32), np.stack([placed(9, padding=(1,), seed=seed) for seed in (1, 2)])
    values = poisoned((2, 9, *BLOCK), jnp.float32, seed=1)
    put = functools.partial(block_put, **options(form))

    def shard(w, blocks, values):
        read = block_gather(w[0], blocks[0], block=BLOCK, **options(form))
        return read[None], put(w[0], blocks[0], values[0])[None]

    split = PartitionSpec("fsdp")
    both = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))(w, blocks, values)
    members = jax.jit(jax.vmap(put))(w, blocks, values)
    for i in range(2):
        np.testing.assert_array_equal(bits(both[0][i]), bits(block_gather(w[i], blocks[i], block=BLOCK)))
        np.testing.assert_array_equal(bits(both[1][i]), bits(block_put(w[i], blocks[i], values[i])))
        np.testing.assert_array_equal(bits(members[i]), bits(both[1][i]))


def test_a_stack_is_one_matrix():
    w, values = poisoned((3, *SHAPE), jnp.float32), poisoned((3, 9, *BLOCK), jnp.float32, seed=1)
    blocks = np.stack([placed(9, padding=(1, 5)[:i], seed=i) for i in range(3)])
    matrix, at = fold(w, blocks, BLOCK)
    # Concrete ones are checked: distinct, padding too.
    read = block_gather(matrix, at, block=BLOCK).reshape(values.shape)
    put = block_put(matrix, at, values.reshape(-1, *BLOCK)).reshape(w.shape)
    for i in range(3):
        np.testing.assert_array_equal(bits(read[i]), bits(block_gather(w[i], blocks[i], block=BLOCK)))
        np.testing.assert_array_equal(bits(put[i]), bits(block_put(w[i], blocks[i], values[i])))


def test_stacks_of_members_and_their_tangents():
    """The primitive of a step: equal to a matrix at a time, under vmap and forward mode."""
    w, values = poisoned((2, 3, *SHAPE), jnp.float32), poisoned((2, 3, 9, *BLOCK), jnp.float32, seed=1)
    blocks = np.stack([placed(9, padding=(1, 5)[:i], seed=i) for i in range(3)])
    members = jax.jit(jax.vmap(stack_put, in_axes=(0, None, 0)))(w, blocks, values)
    dw, dvalues = (np.nan_to_num(x, nan=0.5) for x in (np.roll(w, 1, -1), np.roll(values, 1, -1)))
    put, tangent = jax.jvp(lambda w, v: stack_put(w, blocks, v), (w[0], values[0]), (dw[0], dvalues[0]))
    np.testing.assert_array_equal(bits(put), bits(members[0]))
    for i in range(3):
        np.testing.assert_array_equal(bits(tangent[i]), bits(block_put(dw[0, i], blocks[i], dvalues[0, i])))
        for m in range(2):
            np.testing.assert_array_equal(bits(members[m, i]), bits(block_put(w[m, i], blocks[i], values[m, i])))
    np.testing.assert_array_equal(bits(stack_put(w[0], blocks[:, :0], values[0, :, :0])), bits(w[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": np.array([[8, 0], [1, 3]], np.int32)}, r"block \(1, 3\) is outside a weight of 8 x 3 blocks"),
        ({"blocks": np.array([[0, 0], [-1, 2]], np.int32)}, r"block \(-1, 2\) is outside .* \(padding: 8 and more\)"),
        ({"blocks": np.array([[4, 2], [4, 2]], np.int32)}, r"block \(4, 2\) occurs 2 times; blocks must be distinct"),
        (
            {"blocks": np.array([[8, 0], [8, 0]], np.int32)},
            r"block \(8, 0\) occurs 2 times; .* padding too \(rows 8, 9",
        ),
        ({"blocks": np.zeros((2, 3), np.int32)}, r"blocks are int32\[2, 3\]; they must be int32\[n, 2\]"),
        ({"blocks": np.array([[0, 0], [0, 1]])}, r"blocks are int64\[2, 2\]; they must be int32"),
        ({"w": np.zeros((100, 384), np.float32)}, r"16 x 128 do not divide a weight of shape \(100, 384\)"),
        ({"w": np.zeros((128,), np.float32)}, r"it must be a matrix"),
        ({"implementation": "cuda"}, r"'cuda' is not one of None, 'pallas', 'xla'"),
        ({"w": np.zeros(SHAPE, np.float16), "implementation": "pallas"}, r"dtypes float16, .* use 'xla'"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    given = {
        "w": np.zeros(SHAPE, np.float32),
        "blocks": placed(2),
        "values": np.zeros((2, *BLOCK), np.float32),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        block_put(**given)
    del given["values"]
    with pytest.raises(ValueError, match=message.replace("float16, ", "float16")):
        block_gather(**given, block=BLOCK)


def test_values_that_do_not_fit_the_blocks_are_refused():
    with pytest.raises(ValueError, match=r"values \[3, 16, 128\] are not \[n, b, c\] for the n = 2 blocks"):
        block_put(np.zeros(SHAPE, np.float32), placed(2), np.zeros((3, *BLOCK), np.float32))
    small = {"w": np.zeros((64, 96), np.float32), "blocks": placed(2), "values": np.zeros((2, 8, 32), np.float32)}
    with pytest.raises(ValueError, match=r"blocks of 8 x 32 are not in multiples of 8 rows and 128 columns; leave"):
        block_put(**small, implementation="pallas")
    # Which None takes to mean the other form.
    assert block_put(**small).shape == (64, 96)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_each_platform_is_lowered_its_form(platform):
    for block, implementation, kernel in (
        (BLOCK, None, platform == "tpu"),
        ((16, 96), None, False),
        (BLOCK, "xla", False),
    ):
        shapes = (SHAPE, jnp.bfloat16), ((5, 2), jnp.int32), ((5, *block), jnp.float32)
        w, blocks, values = (jax.ShapeDtypeStruct(*x) for x in shapes)
        put = lowered(functools.partial(block_put, implementation=implementation), platform, w, blocks, values)
        read = lowered(functools.partial(block_gather, block=block, implementation=implementation), platform, w, blocks)
        assert ("tpu_custom_call" in put) == ("tpu_custom_call" in read) == kernel
        assert ("stablehlo.scatter" in put) == ("stablehlo.gather" in read) == (not kernel)


def lowered(fn, platform, *shapes):
    return jax.jit(fn).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.optimized
def test_the_weight_is_written_in_place_and_not_copied():
    struct = jax.ShapeDtypeStruct
    shapes = struct((2048, 2048), jnp.float32), struct((12, 2), jnp.int32), struct((12, 128, 128), jnp.float32)
    memory = jax.jit(block_put, donate_argnums=0).lower(*shapes).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 4 * 2048**2
    assert memory.temp_size_in_bytes < 4 * 128**2


@pytest.mark.peers
@DTYPES
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_on_a_tpu_nothing_is_copied(topology, dtype):
    for block, n in (((128, 128), 102), ((1024, 512), 9), ((16, 128), 3000)):
        w, blocks, values = on_chip(topology, ((4096, 4096), dtype), ((n, 2), jnp.int32), ((n, *block), jnp.float32))
        read = compiled(functools.partial(block_gather, block=block), (), w, blocks)
        assert (read.temp_size_in_bytes, read.alias_size_in_bytes) == (0, 0)
        put = compiled(block_put, (0,), w, blocks, values)
        assert (put.temp_size_in_bytes, put.alias_size_in_bytes) == (0, 4096**2 * jnp.dtype(dtype).itemsize)


def on_chip(topology, *shapes):
    pytest.importorskip("libtpu")
    chip = SingleDeviceSharding(topology_mesh(topology).devices.flat[0])
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=chip) for shape, dtype in shapes]


def compiled(fn, donated, *shapes):
    """Memory analysis of a program for a TPU, of which the kernel is all."""
    program = jax.jit(fn, donate_argnums=donated).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
    return program.memory_analysis()
