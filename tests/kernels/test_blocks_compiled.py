"""Products with selected blocks lowered for chips that are not there, compiled for them, and inside a sharded training step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jft import parallel
from jft.bench.shapes import MODELS
from jft.bench.step import Candidate, Setting
from jft.kernels import blocks_tpu
from jft.kernels.blocks import block_sddmm, block_spmm
from jft.models import DecoderConfig
from jft.models.rope import Rope
from tests.kernels.targets import gpu_topology

T, D, F, B = 8192, 4096, 4096, 128
BF16 = jnp.bfloat16
# Blocks at 10%, and at 25%, of 4096 x 4096; of an 8B model's MLP; more than fit at once.
SHAPES = [(T, D, F, 104), (T, D, F, 256), (T, D, 14336, 358), (4096, 8192, 28672, 1434)]
PLATFORMS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}
CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

MUTATIONS = (
    ("jft/kernels/blocks_forms.py", '"cuda": "jft.kernels.block_sddmm_gpu"', '"rocm": "jft.kernels.block_sddmm_gpu"'),
    ("jft/kernels/blocks_tpu.py", "first = jnp.arange(config.groups)[:, None] * m", "first = jnp.zeros((3, 1), int)"),
    ("jft/kernels/blocks_tpu.py", "jnp.where(before < 0, jnp.argmax", "jnp.where(before < 9, jnp.argmax"),
    ("jft/kernels/blocks_tpu.py", "size % LANES for size in block", "size % 64 for size in block"),
)  # fmt: skip


def sampled(tokens, inputs, outputs, n, dtype=BF16, block=(B, B), **options):
    shapes = ((tokens, inputs), dtype), ((tokens, outputs), dtype), ((n, 2), jnp.int32)
    return functools.partial(block_sddmm, block=block, **options), shapes


def product(tokens, inputs, outputs, n, dtype=BF16, block=(B, B), **options):
    def apply(x, values, blocks):
        return block_spmm(x, blocks, values, outputs, **options)

    return apply, (((tokens, inputs), dtype), ((n, *block), dtype), ((n, 2), jnp.int32))


def lowered(platform, function, shapes, sharding=None):
    structs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    return jax.jit(function).trace(*structs).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("make", [sampled, product])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_platform_gets_its_kernel(make, shape, dtype):
    for platform, name in PLATFORMS.items():
        text = lowered(platform, *make(*shape, dtype=dtype)).as_text()
        # More than VMEM has room for.
        crowded = make is product and shape is SHAPES[-1]
        assert (name in text) == (not crowded and (make is sampled or platform == "tpu"))
        assert name not in lowered(platform, *make(*shape, dtype=dtype, implementation="xla")).as_text()


@pytest.mark.parametrize("block", [(64, 64), (32, 128)])
def test_what_a_kernel_does_not_take_is_xlas(block):
    assert PLATFORMS["tpu"] not in lowered("tpu", *sampled(T, D, F, 9, block=block)).as_text()
    with pytest.raises(ValueError, match=r"multiples of 128 it does.*: leave implementation out, or take 'xla'"):
        lowered("tpu", *sampled(T, D, F, 9, block=block, implementation="pallas"))
    # The GPU's takes multiples of 64.
    assert (PLATFORMS["cuda"] in lowered("cuda", *sampled(T, D, F, 9, block=block)).as_text()) == (block == (64, 64))


@pytest.mark.parametrize(("groups", "panels"), [(1, 4), (3, 4), (8, 2), (2, 16)])
def test_panels_of_dy_stream_once_and_once_more_for_each_group(groups, panels):
    rng = np.random.default_rng(groups)
    # Some panels are without blocks.
    panel = np.sort(rng.choice(rng.permutation(panels)[: max(panels * 3 // 4, 1)], 50))
    config = blocks_tpu.Config(128, panels, groups)
    m = -(-50 // groups)
    starts = np.asarray(blocks_tpu._starts(jnp.asarray(panel), m, config))
    reads = np.asarray(blocks_tpu._reads(jnp.asarray(starts)))
    members = [
        [i for p in range(panels) for i in range(starts[g, p], starts[g, p + 1])] for g in range(groups)
    ]  # fmt: skip
    assert members == [list(range(g * m, min(g * m + m, 50))) for g in range(groups)]
    for g, p in np.ndindex(groups, panels):
        inside = panel[starts[g, p] : starts[g, p + 1]]
        assert (inside == p).all() and (not inside.size or reads[g, p] == p)
    fetched = sum(1 + int((np.diff(row) != 0).sum()) for row in reads)
    assert fetched <= panels + groups - 1


@pytest.mark.peers
@pytest.mark.parametrize("chip", CHIPS)
def test_compiled_for_a_tpu(chip):
    pytest.importorskip("libtpu")
    mesh = parallel.topology_mesh(chip)
    sharding = SingleDeviceSharding(mesh.devices.flat[0])
    for make in (sampled, product):
        compiled = lowered("tpu", *make(*SHAPES[0]), sharding).compile()
        text, cost = compiled.as_text(), compiled.cost_analysis()
        # A copy of the indices in scalar memory is all that some chips take beside the kernel.
        assert compiled.memory_analysis().temp_size_in_bytes <= 2**20
        assert text.count("tpu_custom_call") == 1 and f"[{D},{F}]" not in text
        floor = 2 * T * (D + F) + 104 * B * B * (4 if make is sampled else 2)
        assert cost["bytes accessed"] <= 1.05 * floor
    # Groups and panels, and additions in place.
    crowded = lowered("tpu", *sampled(*SHAPES[-1]), sharding).compile()
    assert crowded.memory_analysis().temp_size_in_bytes <= 2**20


@pytest.mark.peers
@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_compiled_for_a_gpu(gpu):
    sharding = SingleDeviceSharding(gpu_topology(gpu).devices[0])
    compiled = lowered("cuda", *sampled(*SHAPES[0]), sharding).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**20
    assert PLATFORMS["cuda"] in compiled.as_text() and f"[{D},{F}]" not in compiled.as_text()


@pytest.mark.peers
@pytest.mark.parametrize("forward", ["standard", "linearized"])
def test_a_sharded_step_of_an_8b_shape_has_the_kernels_and_gathers_no_operand(forward, monkeypatch):
    pytest.importorskip("libtpu")
    two_layers = DecoderConfig(
        vocab=32000, width=4096, layers=2, heads=32, kv_heads=8, hidden=14336, rope=Rope(theta=5e5)
    )
    monkeypatch.setitem(MODELS, "two layers of 8B", lambda: two_layers)
    shape = {"fsdp": 2, "tensor": 2}
    mesh = parallel.topology_mesh("v5e:2x2", shape)
    setting = Setting(
        model="two layers of 8B", batch=4, tokens=768, dtype="bfloat16", remat="full", unroll=1, topology="v5e:2x2",
        mesh=tuple(shape.items()),
    )  # fmt: skip
    candidate = Candidate(setting, "block_sparse", {"density": 0.1, "forward": forward}, mesh)
    text = candidate.update.compiled(candidate.batch).as_text()
    kernels = set(re.findall(r"op_name=\"[^\"]*/(block_\w+)", text))
    # Live weights are written in place; a linearized step multiplies with the tangent and leaves them alone.
    assert kernels >= ({"block_sddmm", "block_put"} if forward == "standard" else {"block_sddmm", "block_spmm"})
    # Of all 3072 tokens no device has activations: each has those of two rows of the batch.
    gathered = re.findall(r"= \w+\[([\d,]*)\][^ ]* all-gather", text)
    assert gathered and not [g for g in gathered if re.search(r"\b(3072|4,768),\d{2,}", g)], gathered
