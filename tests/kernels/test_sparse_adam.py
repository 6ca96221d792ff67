"""AdamW on selected blocks, in both forms, against the papers' formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jft.kernels.sparse_adam import sparse_adam
from jft.parallel import make_mesh, topology_mesh
from tests.kernels.test_block_put import (
    BLOCK,
    DTYPES,
    FORMS,
    SHAPE,
    TOPOLOGIES,
    bits,
    compiled,
    lowered,
    on_chip,
    options,
    placed,
    poisoned,
    simulated,
    slices,
)

MUTATIONS = (
    ("jft/kernels/sparse_adam.py", "(1 - rates.b1) * g\n", "(1 - rates.b2) * g\n"),
    ("jft/kernels/sparse_adam.py", "(g * g)", "g"),
    ("jft/kernels/sparse_adam.py", "(jnp.sqrt(v * scalars[1]) + rates.eps)", "jnp.sqrt(v * scalars[1] + rates.eps)"),
    ("jft/kernels/sparse_adam.py", "rate / first, 1 /", "rate, 1 /"),
    ("jft/kernels/sparse_adam.py", "p - origin.astype(jnp.float32)", "p + origin.astype(jnp.float32)"),
    ("jft/kernels/sparse_adam.py", "return p - update", "return p + update"),
    ("jft/kernels/sparse_adam.py", "-jnp.expm1(t * jnp.float32(math.log(b)))", "1 - jnp.float32(b) ** t"),
    ("jft/kernels/sparse_adam.py", "rate * rates.weight_decay]", "1 * rates.weight_decay]"),
    ("jft/kernels/sparse_adam.py", "p = master[0] if master else gather", "p = gather"),
    ("jft/kernels/sparse_adam.py", "others.pop(0) if has_master", "others[-1] if has_master"),
    ("jft/kernels/sparse_adam.py", "pl.when(step >= 2)(lambda: wait", "pl.when(step >= 3)(lambda: wait"),
    ("jft/kernels/sparse_adam.py", "grid, shapes, 2, interpret", "grid, shapes, None, interpret"),
    ("jft/kernels/pallas.py", "counts[turn] += 1", "counts[turn] = 1"),
    ("jft/kernels/sparse_adam.py", "and count < 1", "and count < 0"),
)
U = 2.0**-24  # half a unit in the last place of float32, of a number in [1, 2)


def drawn(n, dtype, sizes=(-12, 3)):
    """g, m, v and master, with gradients of all sizes around eps (powers of ten), zeros among them, and blocks of the base."""
    rng = np.random.default_rng(0)
    shape = (n, *BLOCK)
    size = 10.0 ** rng.uniform(*sizes, shape) * (rng.random(shape) > 0.1)
    g = (rng.standard_normal(shape) * size).astype(dtype)
    m, v = (0.5 * rng.standard_normal(shape) * size).astype(np.float32), (size**2).astype(np.float32)
    master = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 1, shape)).astype(np.float32)
    origin = (master + 0.1 * rng.standard_normal(shape)).astype(dtype)
    return g, m, v, master, origin


def adamw(p, g, m, v, t, lr, decay, origin, b1, b2, eps):
    """Algorithm 2 of Loshchilov and Hutter in float64, and what bounds the rounding of m and of the update."""
    p, g, m, v = (np.asarray(x, np.float64) for x in (p, g, m, v))
    m_size = b1 * abs(m) + (1 - b1) * abs(g)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    scale = lr / (np.sqrt(v / (1 - b2**t)) + eps) / (1 - b1**t)
    pull = lr * decay * (p - np.asarray(origin, np.float64))
    return p - scale * m - pull, m, v, m_size, scale * m_size + abs(pull)


def order(x):
    """bfloat16 as integers, of which neighbours are neighbours."""
    x = np.asarray(x).view(np.int16).astype(np.int32)
    return np.where(x < 0, -(x & 0x7FFF), x)


@FORMS
@DTYPES
@pytest.mark.parametrize(
    ("held", "decay", "pulled"),
    [(False, 0.0, False), (True, 0.0, True), (False, 0.1, False), (True, 0.3, True), (False, 0.3, True)],
)
@pytest.mark.parametrize("t", [1, 700])
def test_a_step_is_that_of_the_papers(t, held, decay, pulled, dtype, form):
    blocks = placed(13, padding=(0, 8))
    g, m, v, master, origin = drawn(13, dtype)
    w = poisoned(SHAPE, dtype, payload=dtype == jnp.float32)
    for k, at in slices(blocks):
        w[at] = master[k].astype(dtype)
    p = master if held else master.astype(dtype)
    lr, rates = np.float32(3e-3), {"b1": 0.8, "b2": 0.99, "eps": 1e-6}
    new_p, new_m, new_v, m_size, update = adamw(p, g, m, v, t, float(lr), decay, origin if pulled else 0, **rates)

    def step(w, g, m, v, master, t, lr):
        decay_to = {"weight_decay": decay, "origin": origin if pulled else None}
        return sparse_adam(w, blocks, g, m, v, master, count=t, lr=lr, **rates, **decay_to, **options(form))

    got_w, got_m, got_v, *got_master = jax.jit(step)(w, g, m, v, master if held else None, t, lr)
    assert (got_w.dtype, len(got_master)) == (dtype, held)
    want_w = w.copy()
    for k, at in slices(blocks):
        assert (abs(got_m[k] - new_m[k]) <= 4 * U * m_size[k]).all()
        assert (abs(got_v[k] - new_v[k]) <= 4 * U * new_v[k]).all()
        precise = got_master[0][k] if held else got_w[at]
        if held or dtype == jnp.float32:
            # Where the update is the larger, its own seven roundings show.
            assert (abs(precise - new_p[k]) <= 4 * U * abs(p[k].astype(np.float64)) + 8 * U * update[k]).all()
        else:
            assert (abs(order(precise) - order(new_p[k].astype(dtype))) <= 1).all()
        want_w[at] = precise.astype(dtype)
    np.testing.assert_array_equal(bits(got_w), bits(want_w))
    assert (new_p != np.asarray(p, np.float64)).any()


def test_without_blocks_all_stays():
    g, m, v, master, _ = drawn(0, jnp.float32)
    w = poisoned(SHAPE, jnp.float32)
    out = sparse_adam(w, placed(0), g, m, v, master, count=1, lr=1e-3)
    np.testing.assert_array_equal(bits(out[0]), bits(w))
    assert [x.shape for x in out[1:]] == [(0, *BLOCK)] * 3


def test_the_steps_are_those_of_optax():
    blocks = placed(9)
    w = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    dense, m, v = w.copy(), np.zeros((9, *BLOCK), np.float32), np.zeros((9, *BLOCK), np.float32)
    optimizer = optax.adamw(1e-3, weight_decay=0.1)
    values = np.stack([w[at] for _, at in slices(blocks)])
    state = optimizer.init(values)
    step = jax.jit(functools.partial(sparse_adam, lr=1e-3, weight_decay=0.1))
    for t in range(1, 5):
        g = np.random.default_rng(t).standard_normal(values.shape).astype(np.float32)
        updates, state = optimizer.update(g, state, values)
        values = optax.apply_updates(values, updates)
        w, m, v = step(w, blocks, g, m, v, count=t)
    for k, at in slices(blocks):
        dense[at] = values[k]
    np.testing.assert_allclose(m, state[0].mu, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(v, state[0].nu, rtol=1e-6)
    # optax rounds 0.999^t before it takes it from 1, which moves its first steps by some 1e-5 of themselves.
    np.testing.assert_allclose(w, dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("held", [False, True])
def test_copies_in_flight_do_not_race(held):
    # Three steps, so that a buffer is used twice; the interpreter wants full ones.
    blocks, w = placed(24, padding=(3, 9)), np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    g, m, v, master, origin = drawn(24, jnp.float32, (-1, 0))
    given = {"count": 3, "lr": 1e-2, "weight_decay": 0.1, "origin": origin}
    step = functools.partial(sparse_adam, w, blocks, g, m, v, master if held else None, **given)
    got = simulated(step)
    for a, b in zip(got, step(implementation="xla"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@FORMS
def test_shards_and_members_go_by_themselves(form):
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    w = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    blocks = np.stack([placed(9, padding=(1,), seed=seed) for seed in (1, 2)])
    g, m, v, *_ = (x.reshape(2, 9, *BLOCK) for x in drawn(18, jnp.float32, (-1, 0)))
    step = functools.partial(sparse_adam, count=2, lr=1e-3)

    def shard(*args):
        return [x[None] for x in step(*(x[0] for x in args), **options(form))]

    split = PartitionSpec("fsdp")
    both = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))(
        w, blocks, g, m, v
    )
    members = jax.jit(jax.vmap(functools.partial(step, **options(form))))(w, blocks, g, m, v)
    for i in range(2):
        for one, other, want in zip(both, members, step(w[i], blocks[i], g[i], m[i], v[i]), strict=True):
            np.testing.assert_allclose(one[i], want, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(other[i], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, r"count is 0; it counts this step too"),
        ({"m": np.zeros((2, 16, 64), np.float32)}, r"m has shape \[2, 16, 64\]; .* g has \[2, 16, 128\]"),
        ({"blocks": placed(3)}, r"g has shape \[2, 16, 128\]; .* n = 3 as there are blocks"),
        ({"v": np.zeros((2, *BLOCK), jnp.bfloat16)}, r"v is bfloat16; it must be float32: convert it with v.astype"),
        ({"master": np.zeros((2, *BLOCK), np.float16)}, r"master is float16; it must be float32"),
        ({"origin": np.zeros((2, *BLOCK), np.int32)}, r"origin is int32; it must be a float type"),
        ({"w": np.zeros(SHAPE, np.int32)}, r"w is int32; it must be of a float type"),
        ({"blocks": np.array([[0, 0], [7, 3]], np.int32)}, r"block \(7, 3\) is outside a weight of 8 x 3 blocks"),
        ({"blocks": np.array([[1, 2], [1, 2]], np.int32)}, r"block \(1, 2\) occurs 2 times"),
        ({"implementation": "triton"}, r"'triton' is not one of None"),
        ({"w": np.zeros(SHAPE, np.float16), "implementation": "pallas"}, r"'pallas': dtypes float16, .* use 'xla'"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    zeros = np.zeros((2, *BLOCK), np.float32)
    given = {"w": np.zeros(SHAPE, np.float32), "blocks": placed(2), "g": zeros, "m": zeros, "v": zeros, "count": 1}
    with pytest.raises(ValueError, match=message):
        sparse_adam(**{**given, **change}, lr=1e-3)


def shapes(n, block, shape, dtype, held):
    compact = (n, *block)
    f32 = jnp.float32
    master = ((compact, f32),) if held else ()
    return ((shape, dtype), ((n, 2), jnp.int32), (compact, dtype), (compact, f32), (compact, f32), *master)


def stepped(w, blocks, g, m, v, *rest):
    """A step of which all but the rates are arguments of the program."""
    *master, origin, count, lr = rest
    return sparse_adam(w, blocks, g, m, v, *master, count=count, lr=lr, weight_decay=0.1, origin=origin)


SCALARS = (((), jnp.int32), ((), jnp.float32))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_each_platform_is_lowered_its_form(platform):
    for block, kernel in ((BLOCK, platform == "tpu"), ((16, 96), False)):
        every = (*shapes(5, block, SHAPE, jnp.bfloat16, True), ((5, *block), jnp.bfloat16), *SCALARS)
        text = lowered(stepped, platform, *(jax.ShapeDtypeStruct(*x) for x in every))
        assert ("tpu_custom_call" in text) == kernel
        assert ("stablehlo.scatter" in text) == (not kernel)


@pytest.mark.optimized
@pytest.mark.parametrize("held", [False, True])
def test_the_weight_and_its_state_are_updated_in_place(held):
    every = (*shapes(12, (128, 128), (2048, 2048), jnp.float32, held), ((12, 128, 128), jnp.float32), *SCALARS)
    donated = (0, 3, 4, *([5] if held else []))
    structs = [jax.ShapeDtypeStruct(*x) for x in every]
    program = jax.jit(stepped, donate_argnums=donated).lower(*structs).compile()
    memory, compact = program.memory_analysis(), 4 * 12 * 128**2
    assert memory.alias_size_in_bytes == 4 * 2048**2 + (2 + held) * compact
    assert memory.temp_size_in_bytes <= 2 * compact + 4096


@pytest.mark.peers
@pytest.mark.parametrize("held", [False, True])
@DTYPES
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_on_a_tpu_one_kernel_is_all_and_nothing_is_copied(topology, dtype, held):
    for block, n in (((128, 128), 102), ((1024, 512), 9)):
        every = (*shapes(n, block, (4096, 4096), dtype, held), ((n, *block), dtype), *SCALARS)
        memory = compiled(stepped, (0, 3, 4, *([5] if held else [])), *on_chip(topology, *every))
        compact = 4 * n * block[0] * block[1]
        assert memory.alias_size_in_bytes == 4096**2 * jnp.dtype(dtype).itemsize + (2 + held) * compact
        assert memory.temp_size_in_bytes == 0


@pytest.mark.peers
def test_on_a_mesh_of_tpus_each_shard_is_updated_in_place():
    pytest.importorskip("libtpu")
    mesh = topology_mesh("v5e:2x2", {"fsdp": 2, "tensor": 2})
    cell = PartitionSpec("fsdp", "tensor")
    spec = (cell, *[PartitionSpec("fsdp", "tensor", *[None] * axes) for axes in (2, 3, 3, 3)])
    n, block = 30, (128, 128)
    (w, *compact) = shapes(n, block, (4096, 8192), jnp.bfloat16, False)
    every = [w, *(((2, 2, *shape), dtype) for shape, dtype in compact)]
    structs = [jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh, s)) for x, s in zip(every, spec, strict=True)]

    def shard(w, *compact):
        w, *held = sparse_adam(w, *(x[0, 0] for x in compact), count=1, lr=1e-3)
        return w, *(x[None, None] for x in held)

    step = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=(cell, *spec[-2:]), check_vma=False)
    program = jax.jit(step, donate_argnums=(0, 3, 4)).trace(*structs).lower(lowering_platforms=("tpu",)).compile()
    text, memory = program.as_text(), program.memory_analysis()
    assert "tpu_custom_call" in text and not any(word in text for word in ("all-gather", "all-reduce", "collective"))
    assert memory.alias_size_in_bytes == 2 * 2048 * 4096 + 2 * 4 * n * 128**2
    assert memory.temp_size_in_bytes == 0
