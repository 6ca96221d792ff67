"""Gates: diff pruning, TAPS and FineGates against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import delta
from jft.delta import Changed, LowRank
from jft.dot import grouped_dot, take, transpose
from jft.models import core
from jft.presets.diff_pruning import HardConcrete
from jft.presets.finegates import Gates
from jft.presets.taps import Taps
from tests.methods import leaf

KEY = jax.random.key(4)
sigmoid = lambda x: 1 / (1 + np.exp(-x))
_cdf = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))
_density = lambda x: np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def uniforms(how, key):
    """u of entries and of groups, layer by layer, as drawn."""
    if key is None:
        return np.full((leaf.L, leaf.I, leaf.O), 0.5), np.full(leaf.L, 0.5)
    return leaf.wide(_drawn(key))


@jax.jit
def _drawn(key):
    pairs = [jax.random.split(k) for k in jax.random.split(key, leaf.L)]
    own = jnp.stack([jax.random.uniform(a, (leaf.I, leaf.O)) for a, _ in pairs])
    shared = jnp.stack([jax.random.uniform(b, ()) for _, b in pairs])
    return jnp.clip(own, 1e-4, 1 - 1e-4), jnp.clip(shared, 1e-4, 1 - 1e-4)


def concrete(how, alpha, u):
    """z and its derivative in alpha."""
    s = sigmoid(np.log(u) - np.log(1 - u) + alpha)
    stretched = s * (how.upper - how.lower) + how.lower
    inside = (stretched > 0) & (stretched < 1)
    return np.clip(stretched, 0, 1), inside * (how.upper - how.lower) * s * (1 - s)


def hard_concrete(how, trained, key):
    """The weight and the gradient of loss and penalty, as in the paper's appendix."""
    own, shared = uniforms(how, key)
    z, dz = concrete(how, trained["alpha"], own)
    g, dg = concrete(how, trained["group"], shared) if how.group else (np.ones(leaf.L), np.zeros(leaf.L))
    g, dg = g[:, None, None], dg[:, None, None]
    w = leaf.W + z * g * trained["delta"]
    dw = leaf.loss_and_grad(w)[1]
    shift = math.log(-how.lower / how.upper)
    open_own = sigmoid(trained["alpha"] - shift)
    open_group = sigmoid(trained["group"] - shift)[:, None, None] if how.group else 1.0
    factor, count = (open_group, open_own.sum((1, 2))) if how.counted == "product" else (1.0, np.ones(leaf.L))
    gradient = {
        "delta": dw * z * g,
        "alpha": dw * trained["delta"] * g * dz + how.weight * open_own * (1 - open_own) * factor,
    }
    if how.group:
        closing = how.weight * (open_group * (1 - open_group))[:, 0, 0] * count
        gradient["group"] = (dw * trained["delta"] * z * dg).sum((1, 2)) + closing
    penalty = how.weight * (
        (open_own * open_group).sum() if how.counted == "product" else open_own.sum() + np.sum(open_group)
    )
    return w, gradient, penalty


PRUNING = [
    HardConcrete(weight=0.1, init_alpha=0.3, alpha_rate=3.0),
    HardConcrete(weight=0.1, init_alpha=0.3, counted="sum", lower=-0.5, upper=1.2, alpha_rate=1.0),
    HardConcrete(weight=0.1, init_alpha=0.3, group=False, alpha_rate=1.0),
]


@pytest.mark.parametrize("how", PRUNING, ids=["product", "sum", "no group"])
def test_hard_concrete(how):
    kept, trained = how.init(KEY, leaf.w32())
    np.testing.assert_array_equal(leaf.bound(how, kept, trained, KEY), leaf.W32)
    trained = leaf.moved(trained)
    for key in (KEY, None):
        w, gradient, penalty = hard_concrete(how, leaf.wide(trained), key)
        leaf.close(leaf.bound(how, kept, trained, key), w)
        leaf.check_gradient(how, kept, trained, gradient, key)
    np.testing.assert_allclose(jax.jit(how.penalty)(kept, trained), penalty, rtol=1e-5)
    np.testing.assert_allclose(leaf.W + how.encode(leaf.w32(), kept, trained).dense(), w, atol=1e-6)
    few = trained | {"alpha": jnp.full_like(trained["alpha"], -20.0).at[1, 2, 3].set(20.0)}
    few |= {"group": jnp.full(leaf.L, 20.0)} if how.group else {}
    encoded = how.encode(leaf.w32(), kept, few)
    assert isinstance(encoded, delta.Entries) and encoded.nnz == 1


def test_hard_concrete_steps_and_transformations():
    how = PRUNING[0]
    kept, trained = how.init(KEY, leaf.w32())
    trained = leaf.moved(trained)
    leaf.check_steps(
        how, kept, trained, lambda t, k: hard_concrete(how, t, k)[1], keys=jax.random.split(KEY, 3), rate=1e-3
    )
    leaf.check_transforms(how, kept, trained, KEY)


@pytest.mark.optimized
def test_noise_of_all_layers_never_exists_at_once():
    how, layers, width = HardConcrete(), 48, 64
    kept, trained = how.init(KEY, jnp.ones((layers, width, width)))

    def loss(t, k, structured):
        body = lambda h, w: (jnp.tanh(core.dot(h, w)), None)
        return jnp.sum(jax.lax.scan(body, jnp.ones((2, width)), how.bind(k, t, structured, KEY))[0])

    tapped = leaf.largest_buffer(jax.grad(lambda t, k: loss(t, k, True)), trained, kept)
    plain = leaf.largest_buffer(jax.grad(lambda t, k: loss(t, k, False)), trained, kept)
    assert tapped < 0.5 * layers * width * width * 4 < plain


def test_groups_follow_the_leading_axes():
    vectors = jnp.zeros((3, 7))
    assert HardConcrete().init(KEY, vectors)[1]["group"].shape == ()
    assert HardConcrete().fitted(lead=1).init(KEY, vectors)[1]["group"].shape == (3,)
    kept, trained = HardConcrete().fitted(lead=1).init(KEY, vectors)
    assert HardConcrete().fitted(lead=1).bind(kept, trained, False, KEY).shape == (3, 7)


def taps(how, trained, _=None):
    active = (trained["score"] >= how.threshold).astype(np.float64)[:, None, None]
    dw = leaf.loss_and_grad(leaf.W + active * trained["delta"])[1]
    return {"delta": active * dw, "score": (dw * trained["delta"]).sum((1, 2))}


def test_taps():
    how = Taps()
    kept, trained = how.init(KEY, leaf.w32())
    np.testing.assert_array_equal(how.bind(kept, trained, False), leaf.w32())
    assert trained["score"].shape == (leaf.L,) and how.active(trained).all()
    trained = leaf.moved(trained) | {"score": jnp.asarray([0.2, 0.05, 0.1])}
    leaf.check_gradient(how, kept, trained, taps(how, leaf.wide(trained)))
    leaf.check_steps(how, kept, trained, lambda t, _: taps(how, t), rate=1e-3)
    leaf.check_transforms(how, kept, trained)
    encoded = how.encode(leaf.w32(), kept, trained)
    np.testing.assert_array_equal(encoded.indices, [0, 2])
    np.testing.assert_allclose(leaf.w32() + encoded.dense(), how.bind(kept, trained, False), atol=1e-6)


def fine(how, trained, key):
    """Weight and gradient of FineGates."""
    names = sorted(trained)
    each = [None, None] if key is None else list(jax.random.split(key))
    spread = {"rows": lambda z: z[:, :, None], "columns": lambda z: z[:, None, :]}
    z, dz = {}, {}
    for name, k in zip(names, each, strict=False):
        mu = np.tanh(trained[name]) + 0.5 if how.squash else trained[name]
        slope = 1 - np.tanh(trained[name]) ** 2 if how.squash else 1.0
        noise = how.sigma if how.noise is None else how.noise
        at = mu if k is None else mu + noise * np.asarray(jax.random.normal(k, mu.shape), np.float64)
        z[name], dz[name] = np.clip(at, 0, 1), slope * ((at > 0) & (at < 1))
    product = math.prod(spread[n](z[n]) for n in names)
    w = leaf.W * product
    dw = leaf.loss_and_grad(w)[1]
    gradient, penalty = {}, 0.0
    for name in names:
        others = math.prod([spread[n](z[n]) for n in names if n != name], start=1.0)
        axis = 2 if name == "rows" else 1
        mu = np.tanh(trained[name]) + 0.5 if how.squash else trained[name]
        slope = 1 - np.tanh(trained[name]) ** 2 if how.squash else 1.0
        likely, dlikely = _cdf(mu / how.sigma), _density(mu / how.sigma) / how.sigma * slope
        if how.open is None:
            penalty += how.weight * likely.sum()
            closing = how.weight * dlikely
        else:
            away = likely.mean(-1, keepdims=True) - how.open
            penalty += how.weight * np.abs(away).sum() / len(names)
            closing = how.weight * np.sign(away) * dlikely / likely.shape[-1] / len(names)
        gradient[name] = (dw * leaf.W * others).sum(axis) * dz[name] + closing
    return w, gradient, penalty


FINE = [
    Gates(weight=0.2, start=0.6),
    Gates(columns=False, weight=0.2, start=0.6, noise=0.1),
    Gates(weight=0.5, squash=True, noise=0.1, open=0.8, start=-0.2),
]


@pytest.mark.parametrize("how", FINE, ids=["both", "rows", "released"])
def test_fine_gates(how):
    kept, trained = how.init(KEY, leaf.w32())
    trained = leaf.moved(trained, by=0.1)
    for key in (KEY, None):
        w, gradient, penalty = fine(how, leaf.wide(trained), key)
        leaf.close(leaf.bound(how, kept, trained, key), w)
        leaf.check_gradient(how, kept, trained, gradient, key)
    np.testing.assert_allclose(jax.jit(how.penalty)(kept, trained), penalty, rtol=1e-5)
    leaf.check_steps(how, kept, trained, lambda t, k: fine(how, t, k)[1], keys=jax.random.split(KEY, 3), rate=1e-3)
    leaf.check_transforms(how, kept, trained, KEY)


def test_fine_gates_start_at_the_base_and_encode_what_they_close():
    how = Gates()
    kept, trained = how.init(KEY, leaf.w32())
    np.testing.assert_array_equal(how.bind(kept, trained, False), leaf.w32())
    closed = trained | {"rows": trained["rows"].at[1, 2].set(-1.0)}
    change = how.encode(leaf.w32(), kept, closed).resolve(leaf.w32()).dense()
    np.testing.assert_allclose(change[1, 2], -leaf.w32()[1, 2])
    assert np.count_nonzero(change) == leaf.O


def test_gates_beside_low_rank_and_on_experts_and_tables():
    how = Gates(start=0.5)
    w = jax.random.normal(KEY, (3, 8, 6))
    kept, trained = how.init(KEY, w)
    trained = leaf.moved(trained, by=0.2)

    @jax.jit
    def results(kept, trained):
        structured, plain = how.bind(kept, trained, True), how.bind(kept, trained, False)
        x, sizes, ids = jax.random.normal(KEY, (7, 8)), jnp.asarray([2, 0, 5]), jnp.asarray([[7, 0], [3, 3]])
        one, flat = jax.tree.map(lambda a: a[1], structured), plain[1]
        a, b = jax.random.normal(KEY, (8, 2)), jax.random.normal(KEY, (2, 6))
        return [
            (grouped_dot(x, structured, sizes), grouped_dot(x, plain, sizes)),
            (take(one, ids, jnp.float32), flat[ids]),
            (core.dot(jnp.ones((2, 6)), transpose(one)), jnp.ones((2, 6)) @ flat.T),
            (core.dot(x, Changed(one, LowRank(a, 0.5 * b))), x @ (flat + 0.5 * a @ b)),
        ]

    for found, expected in results(kept, trained):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardConcrete(lower=0.1), "lower < 0 and upper > 1"),
        (lambda: HardConcrete(counted="mean"), "product or sum"),
        (lambda: Gates(rows=False, columns=False), "gates need a side"),
        (lambda: Gates(sigma=0.0), "sigma must be above 0"),
        (lambda: Gates().init(KEY, jnp.ones(3)), "need a matrix"),
    ],
)
def test_wrong_uses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
