"""Random bases stored as a key and scales, against float64 NumPy with a Threefry of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jft import delta
from jft.delta import Changed, Dense, LowRank, RandomBases, Rows, Sum
from jft.dot import dot, grouped_dot, take, transpose
from tests.delta.algebra import close

MUTATIONS = (
    ("jft/delta/random_bases.py", "uniform(key, 1, (self.across", "uniform(key, 0, (self.across"),
    ("jft/delta/random_bases.py", "(bits >> 9)", "(bits >> 10)"),
    ("jft/delta/random_bases.py", "dots_saveable", "everything_saveable"),
    ("jft/delta/random_bases.py", "math.sqrt(3)", "math.sqrt(2)"),
    ("jft/delta/random_bases.py", "threefry_partitionable(True)", "threefry_partitionable(False)"),
    ("jft/delta/random_bases.py", "factors if self.axis == COLUMNS", "factors if self.axis == ROWS"),
    ("jft/delta/random_bases.py", "lam=wide(self.lam) * c", "lam=wide(self.lam) + c"),
    ("jft/delta/random_bases.py", "axis=ROWS if self.axis == COLUMNS", "axis=ROWS if self.axis == ROWS"),
)
LEAD, N, RANK = 3, 3, 2
SHAPES = {"columns": (9, 5), "rows": (5, 9)}  # gamma runs along the shorter axis; the last basis is more than is needed


def threefry(key, first, second):
    """Threefry-2x32 of 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")."""
    ks = [np.uint32(key[0]), np.uint32(key[1]), np.uint32(0x1BD11BDA) ^ np.uint32(key[0]) ^ np.uint32(key[1])]
    x, y = np.asarray(first, np.uint32) + ks[0], np.asarray(second, np.uint32) + ks[1]
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            x = x + y
            y = (y << np.uint32(turn) | y >> np.uint32(32 - turn)) ^ x
        x, y = x + ks[(block + 1) % 3], y + ks[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def drawn(key, stream, shape):
    """Uniform in ``+-sqrt(3)``, float64 up to the float32 of the factor."""
    with np.errstate(over="ignore"):
        folded = threefry(key, 0, stream)
        bits = np.bitwise_xor(*threefry(folded, np.zeros(shape), np.arange(np.prod(shape)).reshape(shape)))
    return ((bits >> np.uint32(9)) + 0.5) / 2**22 * np.sqrt(3) - np.sqrt(3)


def by_hand(change, across, axis, lam=None, gamma=None):
    """``sum over n of B_n diag(lam_n) A diag(gamma_n)`` of every matrix ``[L, I, O]``."""
    lam, gamma = (
        np.asarray(x, np.float64)
        for x in (change.lam if lam is None else lam, gamma if gamma is not None else change.gamma)
    )
    out = []
    for key, scales, along in zip(np.asarray(change.key), lam, gamma, strict=True):
        n, rank = scales.shape
        a, b = drawn(key, 0, (rank, along.shape[-1])), drawn(key, 1, (across, n, rank))
        total = sum(b[:, i] @ np.diag(scales[i]) @ a @ np.diag(along[i]) for i in range(n))
        out.append(total.T if axis == -2 else total)
    return np.stack(out)


@functools.cache
def make(name, seed=0):
    """``(change, the same by hand)``."""
    rng = np.random.default_rng(seed)
    across, along, axis = max(SHAPES[name]), min(SHAPES[name]), {"columns": -1, "rows": -2}[name]
    key = jnp.asarray(rng.integers(0, 2**32, (LEAD, 2)), jnp.uint32)
    gamma, lam = (jnp.asarray(rng.normal(size=(LEAD, N, k)), jnp.float32) for k in (along, RANK))
    change = RandomBases(key, gamma, lam, across, axis)
    return change, by_hand(change, across, axis)


each = pytest.mark.parametrize("name", SHAPES)


def test_draws_are_threefry_and_of_variance_one():
    key = jnp.asarray([7, 2**32 - 3], jnp.uint32)
    found = np.asarray(delta.random_bases.uniform(key, 5, (400, 3)))
    np.testing.assert_allclose(found, drawn(np.asarray(key), 5, (400, 3)), atol=4e-7)
    assert abs(found.var() - 1) < 0.05 and abs(found.mean()) < 0.1 and np.abs(found).max() < np.sqrt(3)
    # The known answer of the cipher for a key and counter of ones (Random123, kat_vectors).
    ones = np.uint32(2**32 - 1)
    with np.errstate(over="ignore"):
        assert [hex(x) for x in threefry((ones, ones), ones, ones)] == ["0x1cb996fc", "0xbb002be7"]


@jax.jit
def algebra(x, others, w):
    pairs = {n: ((x + y).dense(), (y + x).dense(), x.dot(y), y.dot(x)) for n, y in others.items()}
    return x.dense(), (-2.5 * x).dense(), x.norm(), x.apply_to(w, 0.5), pairs


@each
def test_algebra(name, tmp_path):
    x, a = make(name)
    y, b = make(name, 1)
    assert x.shape == a.shape and x.nbytes == 4 * (2 * LEAD + x.gamma.size + x.lam.size)
    rng = np.random.default_rng(3)
    array = rng.normal(size=x.shape).astype(np.float32)
    thick, across = array[:, :, :1], array[:, :1]
    others = {
        "another key": (y, b),
        "dense": (Dense(jnp.asarray(array)), array),
        "low rank": (LowRank(jnp.asarray(thick), jnp.asarray(across)), np.float64(thick) @ np.float64(across)),
        "rows": (
            Rows(jnp.asarray([1], jnp.int32), jnp.asarray(array[:1]), x.shape),
            array[:1] * np.eye(LEAD)[1, :, None, None],
        ),
    }
    w = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16)
    dense, scaled, norm, applied, pairs = algebra(x, {n: other for n, (other, _) in others.items()}, w)
    close(dense, a)
    close(scaled, -2.5 * a)
    close(norm, np.linalg.norm(a))
    np.testing.assert_allclose(np.float64(applied), np.float64(w) + 0.5 * a, rtol=2**-8, atol=1e-5)
    for n, (one, other, inner, turned) in pairs.items():
        value = np.asarray(others[n][1], np.float64)
        close(one, a + value)
        close(other, a + value)
        close(inner, np.sum(a * value), 100)
        close(turned, np.sum(a * value), 100)
    assert isinstance(x + others["rows"][0], Sum)  # small enough to stay apart
    assert isinstance(x + y, Dense)  # 272 bytes of each, and a weight of 540
    delta.TaskVector({"w": x}).save(tmp_path / "x.safetensors")
    back = delta.TaskVector.load(tmp_path / "x.safetensors")["w"]
    assert isinstance(back, RandomBases) and back.axis == x.axis and back.key.dtype == jnp.uint32
    jax.tree.map(np.testing.assert_array_equal, back, x)
    assert jax.tree.structure(back) == jax.tree.structure(x)
    assert x.astype(jnp.bfloat16).key.dtype == jnp.uint32 and x.astype(jnp.bfloat16).dtype == jnp.bfloat16


USES = {
    "scan": (lambda w, x: jax.lax.scan(lambda _, w: (None, dot(x, w)), None, w)[1], lambda w, x: x @ w),
    "transpose": (
        lambda w, x: jax.lax.scan(lambda _, w: (None, dot(x[:, : w.shape[-1]], transpose(w))), None, w)[1],
        lambda w, x: x[:, : w.shape[-1]] @ np.swapaxes(w, 1, 2),
    ),
    "take": (
        lambda w, x: jax.lax.scan(lambda _, w: (None, take(w, np.array([3, 0]), jnp.float32)), None, w)[1],
        lambda w, x: w[:, [3, 0]],
    ),
    "groups": (
        lambda w, x: grouped_dot(x, w, np.array([2, 0, 3], np.int32)),
        lambda w, x: np.einsum("ni,nio->no", x, w[[0, 0, 2, 2, 2]]),
    ),
    "plain": (lambda w, x: w.plain(), lambda w, x: w),
}


@pytest.mark.parametrize(
    ("name", "use"), [("columns", "scan"), ("columns", "plain"), *(("rows", use) for use in USES if use != "plain")]
)
def test_values_and_derivatives_in_programs(name, use):
    """Beside a frozen weight and held, forwards and backwards, in both kinds of scales."""
    change, value = make(name)
    run, numpy = USES[use]
    rng = np.random.default_rng(5)
    w, x = rng.normal(size=change.shape), rng.normal(size=(5, 9))
    x = x if use == "transpose" else x[:, : change.shape[1]]
    moves = {n: rng.normal(size=getattr(change, n).shape) for n in change.factors}
    by = functools.partial(by_hand, change, change.across, change.axis)
    moved = by(lam=moves["lam"]) + by(gamma=moves["gamma"])

    @jax.jit
    def results(factors, moves, w, x):
        out = []
        for held in (False, True):
            of = lambda factors, held=held: run(Changed(w, change.replace(**factors), held), x)
            y, dy = jax.jvp(of, (factors,), (moves,))
            out.append((y, dy, jax.vjp(of, factors)[1](dy)[0]))
        return out

    f32 = lambda tree: jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree)
    found = results({n: getattr(change, n) for n in change.factors}, *f32((moves, w, x)))
    for held, (y, dy, pulled) in zip((False, True), found, strict=True):
        expected = numpy(moved, x)
        close(y, numpy(w if held else w + value, x))
        close(dy, expected)
        # <pull(dy), direction> = <dy, push(direction)>, for every factor by itself.
        for n, move in moves.items():
            pushed = np.sum(expected * numpy(by(**{n: move}), x))
            np.testing.assert_allclose(np.sum(np.asarray(pulled[n], np.float64) * move), pushed, rtol=1e-3)


def test_bases_are_not_kept_for_the_way_back():
    """What a scan stacks over layers are scales, inputs and their products with B, and nothing of the size of weights."""
    change, _ = make("columns")
    w, x = jnp.zeros(change.shape), jnp.ones((1, 9))

    def loss(gamma):
        layers = Changed(w, change.replace(gamma=gamma))
        return jnp.sum(jax.lax.scan(lambda x, w: (x, dot(x, w)), x, layers)[1])

    scans = [e for e in jax.make_jaxpr(jax.grad(loss))(change.gamma).jaxpr.eqns if e.primitive.name == "scan"]
    assert [e.params["reverse"] for e in scans] == [False, True]
    assert max(v.aval.size for v in scans[0].outvars) <= LEAD * N * RANK < LEAD * change.across * N * RANK


def test_the_same_on_eight_devices():
    change, value = make("columns", 2)
    mesh = jax.make_mesh((3, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    whole = jax.jit(lambda c: c.dense(), out_shardings=place(None, "fsdp"))(change)
    bases = jax.jit(lambda c: c.bases, out_shardings=(place(None, "tensor"), place(None, "fsdp", None, "tensor")))(
        change
    )
    close(whole, value)
    for sharded, alone in zip(bases, change.bases, strict=True):
        np.testing.assert_array_equal(sharded, alone)


def test_draws_depend_on_no_setting():
    change, _ = make("rows")
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(change.bases[1], make("rows")[0].bases[1])
        close(change.dense(), make("rows")[1])


@pytest.mark.parametrize("wrong", ["key", "dtype", "scales", "axis"])
def test_what_is_refused(wrong):
    key, gamma, lam = np.zeros((2, 2), np.uint32), np.zeros((2, 3, 4)), np.zeros((2, 3, 1))
    arguments = {
        "key": (key[:1], gamma, lam, 5),
        "dtype": (key.astype(np.int32), gamma, lam, 5),
        "scales": (key, gamma[:, :2], lam, 5),
        "axis": (key, gamma, lam, 5, 0),
    }[wrong]
    with pytest.raises(ValueError, match="random bases need a key"):
        RandomBases(*arguments)
