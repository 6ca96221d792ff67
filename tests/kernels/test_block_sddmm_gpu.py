"""The GPU kernel for gradients of blocks: interpreted against float64, lowered for CUDA, compiled for GPUs not there."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jft.kernels import block_sddmm_gpu as module
from jft.kernels.block_sddmm_gpu import Config, block_sddmm_gpu, candidates, heuristic, supported
from tests.kernels.targets import GPU_TARGETS, gpu_topology

# Those that can be seen without the interpreter, which the oldest jax does not have.
MUTATIONS = [
    ("jft/kernels/block_sddmm_gpu.py", "plgpu.wgmma_wait(1)", "plgpu.wgmma_wait(2)"),
    ("jft/kernels/block_sddmm_gpu.py", "delay_release=1", "delay_release=0"),
    ("jft/kernels/block_sddmm_gpu.py", "mantissa_bits=7", "mantissa_bits=8"),
    ("jft/kernels/block_sddmm_gpu.py", "ROWS = 8", "ROWS = 4"),
    ("jft/kernels/block_sddmm_gpu.py", 'to="varying") if axes else out', 'to="varying") if not axes else out'),
    ("jft/kernels/block_sddmm_gpu.py", "tiles * splits <= multiprocessors", "tiles * splits < multiprocessors"),
    ("jft/kernels/block_sddmm_gpu.py", "SMEM_SM // 2", "SMEM_SM // 1"),
    ("jft/kernels/block_sddmm_gpu.py", "* sum(tile_shape(block)) * 2", "* sum(tile_shape(block))"),
]

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the GPU interpreter of jax 0.10 crashes on a transposed operand of wgmma",
)
SHAPES = [(128, 128), (64, 64), (64, 128), (128, 64), (128, 256)]
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # largest relative error of rounding
END = 2**31 - 1


def drawn(t, size, dtype, seed=0):
    """Operands whose means are not zero, so that sums grow with ``t``, not with its root."""
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((t, size[0])) + 0.5, rng.standard_normal((t, size[1])) - 0.25
    return jnp.asarray(x, dtype), jnp.asarray(dy, dtype)


def exact(x, dy, blocks, block, acc=None):
    """Float64, block by block: the sums, and those of the magnitudes that they are made of."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    (b, c), sums = block, np.zeros((2, len(blocks), *block))
    for i, (row, column) in enumerate(np.asarray(blocks, np.int64)):
        panel, other = x[:, row * b : (row + 1) * b], dy[:, column * c : (column + 1) * c]
        if 0 <= row < x.shape[1] // b and 0 <= column < dy.shape[1] // c:
            sums[:, i] = panel.T @ other, abs(panel).T @ abs(other)
    sums[0] += 0 if acc is None else np.asarray(acc, np.float64)
    return sums


def close(result, x, dy, blocks, block, acc=None):
    """Each entry within the float32 error of its sum (2^-24 of each term, four times) and one rounding of the result."""
    value, magnitude = exact(x, dy, blocks, block, acc)
    assert np.isfinite(np.asarray(result, np.float64)).all()
    bound = 4 * 2.0**-24 * (magnitude + abs(value)) + UNIT[result.dtype.name] * abs(value)
    np.testing.assert_array_less(abs(np.asarray(result, np.float64) - value), bound + 1e-30)


# block, dtype, T, acc, out_dtype, config, blocks of a 2 x 3 grid
CASES = {
    "plain": ((128, 128), BF16, 192, None, F32, Config(64, 3), [[0, 1], [1, 2]]),
    "ragged rows": ((128, 128), BF16, 203, None, F32, Config(64, 2), [[1, 2]]),
    "fewer rows than a piece": ((64, 64), BF16, 3, F32, BF16, Config(64, 4), [[1, 0]]),
    "one row": ((64, 64), F16, 1, None, F16, Config(128, 2), [[0, 2]]),
    "unsorted, padding": (
        (64, 64),
        BF16,
        96,
        None,
        F32,
        Config(64, 2),
        [[1, 2], [END, 0], [0, 0], [0, 3], [2, 1], [1, 1], [0, END]],
    ),
    "negative": ((64, 64), BF16, 64, F32, F32, Config(64, 2), [[-1, 0], [0, -1]]),
    "acc and padding": ((64, 128), BF16, 72, F32, F32, Config(64, 2), [[1, 2], [2, 0]]),
    "acc of bfloat16": ((128, 64), F16, 72, BF16, F32, Config(64, 2), [[0, 2], [0, END]]),
    "rounded": ((128, 128), F16, 64, F32, BF16, Config(64, 2), [[1, 0]]),
    "halves": ((128, 256), BF16, 64, F16, F16, Config(64, 2), [[1, 1], [0, 2]]),
    "tall": ((256, 64), BF16, 64, F32, F32, Config(64, 2), [[1, 2], [0, 1]]),
    "large tiles": ((64, 64), BF16, 300, None, BF16, Config(128, 2), [[1, 1]]),
    "split": ((64, 64), BF16, 328, None, F32, Config(64, 2, 4), [[1, 1], [2, 2], [0, 2]]),
    "split, rounded onto acc": ((64, 64), F16, 200, F32, BF16, Config(64, 2, 3), [[1, 1], [2, 2]]),
    "more splits than rows": ((64, 64), BF16, 70, BF16, F32, Config(64, 2, 9), [[0, 1]]),
    "float32": ((64, 64), F32, 136, None, F32, Config(64, 3), [[1, 2], [0, 0], [2, 0]]),
    "float32, split onto acc": ((64, 64), F32, 131, F32, F32, Config(64, 2, 2), [[0, 1], [2, 0]]),
    "float32, halved": ((64, 64), F32, 64, None, F16, Config(64, 2), [[0, 2]]),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case):
    block, dtype, t, acc, out_dtype, config, blocks = CASES[case]
    x, dy = drawn(t, (2 * block[0], 3 * block[1]), dtype)
    blocks = jnp.asarray(blocks, jnp.int32)
    acc = acc and jnp.asarray(10 * np.random.default_rng(1).standard_normal((len(blocks), *block)), acc)
    result = block_sddmm_gpu(x, dy, blocks, block=block, acc=acc, out_dtype=out_dtype, config=config, interpret=True)
    assert result.shape == (len(blocks), *block) and result.dtype == out_dtype
    close(result, x, dy, blocks, block, acc)


@interpreted
@pytest.mark.parametrize("out_dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("dtype", "acc_dtype"), [(BF16, F16), (F16, F32), (F32, BF16)])
def test_every_pair_of_dtypes(dtype, acc_dtype, out_dtype):
    x, dy = drawn(64, (64, 64), dtype)
    blocks, acc = jnp.zeros((1, 2), jnp.int32), jnp.asarray(drawn(64, (64, 0), acc_dtype, seed=1)[0])[None]
    for onto in (None, acc):
        result = block_sddmm_gpu(
            x, dy, blocks, block=(64, 64), acc=onto, out_dtype=out_dtype, config=Config(64, 2), interpret=True
        )
        assert result.dtype == out_dtype
        close(result, x, dy, blocks, (64, 64), onto)


@interpreted
def test_padding_reads_nothing_and_blocks_only_theirs():
    x, dy = drawn(64, (128, 128), BF16)
    x, dy = x.at[:, :64].set(jnp.nan), dy.at[:, 64:].set(jnp.inf)
    blocks = jnp.asarray([[1, 0], [2, 1], [0, 2], [-1, 1], [0, -1]], jnp.int32)
    result = block_sddmm_gpu(x, dy, blocks, block=(64, 64), config=Config(64, 2), interpret=True)
    close(result, x, dy, blocks, (64, 64))
    assert not np.asarray(result[1:]).any()


@interpreted
def test_partial_sums_are_added_in_their_order():
    x, dy = drawn(192, (64, 64), BF16)
    blocks, acc = jnp.zeros((1, 2), jnp.int32), jnp.full((1, 64, 64), 1e4)
    of = lambda x, dy, config, acc=None: block_sddmm_gpu(
        x, dy, blocks, block=(64, 64), acc=acc, config=config, interpret=True
    )
    first, second, third = (of(x[i : i + 64], dy[i : i + 64], Config(64, 2)) for i in (0, 64, 128))
    np.testing.assert_array_equal(of(x, dy, Config(64, 2, 3), acc), acc + ((first + second) + third))


@interpreted
def test_batches():
    (x, dy), acc = drawn(72, (128, 64), BF16), jnp.ones((2, 2, 64, 64))
    x, blocks = jnp.stack([x, -2 * x]), jnp.asarray([[[1, 0], [0, 0]], [[0, 0], [2, 0]]], jnp.int32)
    call = lambda x, blocks, acc: block_sddmm_gpu(
        x, dy, blocks, block=(64, 64), acc=acc, config=Config(64, 2), interpret=True
    )
    singly = jnp.stack([call(*one) for one in zip(x, blocks, acc, strict=True)])
    np.testing.assert_array_equal(jax.vmap(call)(x, blocks, acc), singly)


@interpreted
def test_small_terms_of_float32_count():
    """Entries that bfloat16, or two terms of it, would round to others."""
    x = jnp.full((64, 64), 1 + 2.0**-9 + 2.0**-18, F32)
    blocks = jnp.zeros((1, 2), jnp.int32)
    result = block_sddmm_gpu(x, jnp.ones_like(x), blocks, block=(64, 64), config=Config(64, 2), interpret=True)
    np.testing.assert_array_equal(result, np.full((1, 64, 64), 64 * (1 + 2.0**-9 + 2.0**-18), np.float32))


def test_terms_add_up_in_compiled_programs():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 64)) * 10.0 ** rng.integers(-20, 20, (40, 64))).astype(np.float32)
    terms = jax.jit(module._terms)(x)
    assert terms.shape == (3, 40, 64) and terms.dtype == BF16
    np.testing.assert_allclose(np.asarray(terms, np.float64).sum(0), x, rtol=2.0**-24)


@pytest.mark.parametrize(("n", "t"), [(0, 64), (2, 0)])
@pytest.mark.parametrize("out_dtype", [F32, BF16])
def test_nothing_to_add_up(n, t, out_dtype):
    x, dy = drawn(t, (128, 128), BF16)
    blocks = jnp.zeros((n, 2), jnp.int32)
    empty = block_sddmm_gpu(x, dy, blocks, block=(64, 64), out_dtype=out_dtype)
    assert empty.shape == (n, 64, 64) and empty.dtype == out_dtype and not np.asarray(empty).any()
    onto = block_sddmm_gpu(x, dy, blocks, block=(64, 64), acc=jnp.full((n, 64, 64), 1.5), out_dtype=out_dtype)
    np.testing.assert_array_equal(onto, jnp.full((n, 64, 64), 1.5, out_dtype))


def of(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


BLOCKS = of(5, 2, dtype=jnp.int32)


def test_what_it_takes():
    for block in SHAPES:
        for dtype in (BF16, F16, F32):
            assert supported(of(99, 256, dtype=dtype), of(99, 512, dtype=dtype), BLOCKS, block, dtype) is None
    x, dy, block = of(99, 256), of(99, 512), (128, 128)
    for reason, *args in [
        ("two dtypes", x, of(99, 512, dtype=F16), BLOCKS, block, F32),
        ("operands of int8", of(99, 256, dtype=jnp.int8), of(99, 512, dtype=jnp.int8), BLOCKS, block, F32),
        ("result of float64", x, dy, BLOCKS, block, np.float64),
        ("not [T, K]", x, of(98, 512), BLOCKS, block, F32),
        ("not [T, K]", of(1, 99, 256), of(1, 99, 512), BLOCKS, block, F32),
        ("not int32[n, 2]", x, dy, of(2, 5, dtype=jnp.int32), block, F32),
        ("not int32[n, 2]", x, dy, of(5, 2, dtype=jnp.int16), block, F32),
        ("multiples of 64", x, dy, BLOCKS, (32, 64), F32),
        ("multiples of 64", x, dy, BLOCKS, (64, 96), F32),
        ("multiples of 64", x, dy, BLOCKS, (0, 64), F32),
        ("do not divide", of(99, 192), dy, BLOCKS, block, F32),
        ("do not divide", x, of(99, 192), BLOCKS, block, F32),
    ]:
        assert reason in supported(*args)


def test_refusals():
    x, dy = drawn(8, (128, 128), BF16)
    blocks = jnp.zeros((1, 2), jnp.int32)
    call = lambda **options: block_sddmm_gpu(x, dy, blocks, **{"block": (128, 128), **options})
    with pytest.raises(ValueError, match=r"does not take block \(32, 32\)"):
        call(block=(32, 32))
    with pytest.raises(ValueError, match=r"acc has shape \(128, 128\)"):
        call(acc=jnp.zeros((128, 128)))
    with pytest.raises(ValueError, match="acc is int32"):
        call(acc=jnp.zeros((1, 128, 128), jnp.int32))
    for config, message in [
        (Config(tile_t=32), "tile_t=32"),
        (Config(tile_t=96), "tile_t=96"),
        (Config(max_concurrent_steps=1), "needs 2 or more"),
        (Config(splits=0), "splits=0"),
        (Config(128, 4), "266240 bytes of shared memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(config=config)
    if not hasattr(plgpu, "InterpretGPUParams"):
        with pytest.raises(NotImplementedError, match=r"0\.11"):
            call(interpret=True)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("block", SHAPES)
def test_configs_run(block, dtype):
    for t in (1, 64, 1000, 8192):
        for n in (1, 10, 66, 132, 1000):
            configs = candidates(t, n, block, dtype)
            assert configs[0] == heuristic(t, n, block, dtype) and len(set(configs)) == len(configs) <= 25
            for config in configs:
                module.check(config, block)
                assert config.splits <= max(1, -(-t // config.tile_t))
                assert Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_rows_are_split_where_blocks_are_few():
    splits = lambda n, **options: heuristic(8192, n, (128, 128), BF16, **options).splits
    assert 33 <= 33 * splits(33) <= 132 and splits(33) > 1 and splits(4) > splits(33)
    assert splits(132) == splits(1000) == 1 and splits(16, multiprocessors=16) == 1
    # Two CTAs share a multiprocessor where there is more than one for each.
    alone, shared = (module.shared_memory(heuristic(8192, n, (128, 128), BF16), (128, 128)) for n in (132, 264))
    assert alone <= 232448 and 2 * (shared + 1024) <= 233472 < 2 * alone


def structs(t, block, dtype, acc, n=20, sharding=None):
    struct = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    operands = struct((t, 4 * block[0]), dtype), struct((t, 6 * block[1]), dtype), struct((n, 2), jnp.int32)
    return operands if acc is None else (*operands, struct((n, *block), acc))


def lowered(block, out_dtype, config, operands):
    def sddmm(x, dy, blocks, acc=None):
        return block_sddmm_gpu(x, dy, blocks, block=block, acc=acc, out_dtype=out_dtype, config=config)

    return jax.jit(sddmm).trace(*operands).lower(lowering_platforms=("cuda",))


# acc, out_dtype, config: the variants of the kernel's body
VARIANTS = [
    (None, F32, Config(64, 3)),
    (F32, BF16, Config(64, 2)),
    (BF16, F16, Config(64, 3, 4)),
    (F16, F32, Config(128, 2)),
]


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("block", SHAPES)
def test_lowers_for_cuda(block, dtype, variant):
    acc, out_dtype, config = VARIANTS[variant]
    text = lowered(block, out_dtype, config, structs(8200, block, dtype, acc)).as_text()
    assert text.count("@mosaic_gpu") == 1 and "dot_general" not in text and "stablehlo.pad" not in text
    # Or XLA would see through the rounding of the terms, as it does through two casts.
    assert ("reduce_precision" in text) == (dtype == F32)


def test_lowers_for_cuda_with_rows_of_any_number():
    for t in (1, 8195):
        assert "stablehlo.pad" in lowered((128, 128), F32, None, structs(t, (128, 128), BF16, F32)).as_text()


def test_lowers_for_cuda_with_wide_integers():
    with jax.enable_x64(True):
        for splits in (1, 2):
            lowered((128, 128), F32, Config(64, 3, splits), structs(192, (128, 128), F32, F32))


def test_panels_are_waited_for():
    """Nothing else keeps the pipeline from overwriting panels that the tensor cores still read."""
    call = lambda *operands: block_sddmm_gpu(*operands, block=(128, 128), config=Config(64, 6))
    text = str(jax.make_jaxpr(call)(*structs(8192, (128, 128), BF16, None)))
    # All but one product are over when the next panels, five steps ahead, take the place of those of the step before.
    assert re.search(r"wgmma_ref [^\n]*\n\s*wgmma_wait(\[n=1\]| 1:)[^\n]*\n[^\n]* = add \w+ 5:", text)


@pytest.mark.parametrize("splits", [1, 2])
def test_results_in_shard_map_differ_where_operands_do(splits):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    specs = PartitionSpec("data"), PartitionSpec(None, "tensor"), PartitionSpec()
    shapes = ((1024, 256), BF16), ((512, 512), BF16), ((5, 2), jnp.int32)
    operands = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, specs, strict=True)
    ]

    def local(x, dy, blocks):
        part = block_sddmm_gpu(x, dy, blocks, block=(128, 128), config=Config(64, 3, splits))
        assert jax.typeof(part).manual_axis_type.varying == {"data", "tensor"}
        return jax.lax.psum(part, "data")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("tensor"))
    text = jax.jit(sharded).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "@mosaic_gpu" in text and "all_reduce" in text and "all_gather" not in text


def compiled(target, block, dtype, acc, out_dtype, config, capfd, monkeypatch, n=20):
    """A program for a GPU, and what ptxas says of the kernel in it."""
    topology = gpu_topology(target)
    operands = structs(8192, block, dtype, acc, n, SingleDeviceSharding(topology.devices[0]))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    program = lowered(block, out_dtype, config, operands).compile()
    return program, capfd.readouterr().out


@pytest.fixture
def no_cache():
    """Programs of the cache are not compiled, and say nothing."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


COMPILED = {
    **{f"{b} x {c}": ("h200", (b, c), BF16, None, F32, None) for b, c in SHAPES},
    "h100": ("h100", (128, 128), BF16, None, F32, Config(64, 4)),
    "h100, acc": ("h100", (128, 128), F16, F32, F32, Config(128, 3)),
    "acc": ("h200", (128, 128), BF16, BF16, BF16, Config(64, 3)),
    "split": ("h200", (128, 128), F16, F32, F16, Config(64, 6, 4)),
    "float32": ("h200", (128, 128), F32, None, F32, Config(64, 6)),
}


@pytest.mark.peers
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_gpus_that_are_not_there(case, capfd, monkeypatch, no_cache):
    target, block, dtype, acc, out_dtype, config = COMPILED[case]
    n = 20 if config else 200
    program, said = compiled(target, block, dtype, acc, out_dtype, config, capfd, monkeypatch, n)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    # Between two steps' products: the wait for the first of them, and only then the loads into what it read.
    loop = said[said.index("wgmma.commit_group") :]
    assert re.search(r"wgmma\.wait_group\.sync\.aligned\s+1;", loop).start() < loop.index("cp.async.bulk.tensor")

    memory = program.memory_analysis()
    assert memory.output_size_in_bytes == n * block[0] * block[1] * jnp.dtype(out_dtype).itemsize
    partial = config.splits * n * block[0] * block[1] * 4 if config and config.splits > 1 else 0
    terms = 3 * 2 * 8192 * (4 * block[0] + 6 * block[1]) if dtype == F32 else 0
    assert memory.temp_size_in_bytes <= 1.01 * (partial + terms)


@pytest.mark.peers
def test_targets():
    for name in GPU_TARGETS:
        assert name in gpu_topology(name).devices[0].device_kind.lower()
