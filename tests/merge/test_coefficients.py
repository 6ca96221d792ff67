"""Coefficients of layers, of many points at once, and learned: against float64 and against the loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jft import merge
from jft.delta import BaseMismatch, Dense, TaskVector, apply, describe
from jft.merge import vectorised
from tests.delta.algebra import KINDS, close, make, reference

MUTATIONS = [
    ("jft/merge/depth.py", "change.scaled(outside) if stack is None", "change if stack is None"),
    ("jft/merge/depth.py", "of_stack(name, counts[name])[layer[1]]", "of_stack(name, counts[name])[0]"),
    ("jft/merge/depth.py", "if np.shape(values) != (count,)", "if np.shape(values) == ()"),
    ("jft/merge/vectorised.py", "else value / weight for", "else value for"),
    ("jft/merge/vectorised.py", "totals.get(name, 0.0) + np", "np"),
    ("jft/merge/vectorised.py", "_POINTS_BYTES // max(1", "_POINTS_BYTES * max(1"),
    ("jft/merge/coefficients.py", "penalty * violation", "violation"),
    ("jft/merge/coefficients.py", "0.0, least - control(", "0.0, control("),
    ("jft/merge/coefficients.py", "check_data(data, allow_test)", "check_data(data)"),
    ("jft/merge/coefficients.py", "jax.jit(change)(solution.values, taus)", "jax.jit(change)(start, taus)"),
    (
        "jft/merge/in_memory.py",
        "return jax.ensure_compile_time_eval() if traced",
        "return contextlib.nullcontext() if traced",
    ),
    (
        "jft/merge/in_memory.py",
        "with jax.ensure_compile_time_eval():\n            self.key",
        "with jax.named_scope('key'):\n            self.key",
    ),
    ("jft/merge/in_memory.py", "if ranked is None or _concrete(v)", "if True"),
]
SHAPES = {"layers/w": (3, 2, 4), "out/w": (4, 3)}


@functools.cache
def problem():
    """A base, two task vectors, and batches for ``tanh(x w_l) ... w_out``."""
    draw = np.random.default_rng(7)
    normal = lambda shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    base = {"layers": {"w": normal(SHAPES["layers/w"])}, "out": {"w": normal(SHAPES["out/w"])}}
    taus = [TaskVector({p: Dense(normal(s)) for p, s in SHAPES.items()}, describe(base)) for _ in range(2)]
    targets = [{p: draw.normal(size=s) for p, s in SHAPES.items()} for _ in range(2)]
    return base, taus, [{p: jnp.asarray(x, jnp.float32) for p, x in t.items()} for t in targets]


def float64(tau):
    return {path: np.asarray(delta.dense(), np.float64) for path, delta in tau.items()}


def distance(params, batch):
    """Half the squared distance from the batch, whose gradient is the difference."""
    return sum(0.5 * jnp.sum((x - batch[p]) ** 2) for p, x in flat(params).items())


def flat(params):
    return {"layers/w": params["layers"]["w"], "out/w": params["out"]["w"]}


def sums(params, batch):
    return {"weight": 2.0, "loss": distance(params, batch), "first": params["out"]["w"][0, 0]}


@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind):
    tau = TaskVector({"text/layers/w": make(kind, 3), "embed/w": make("low_rank", 4)})
    by_layer = np.array([0.5, -1.0, 0.0, 2.0])
    scaled = merge.layerwise(tau, by_layer, outside=3.0)
    close(scaled["text/layers/w"], by_layer.reshape(4, 1, 1) * reference(tau["text/layers/w"]))
    close(scaled["embed/w"], 3 * reference(tau["embed/w"]))
    line = merge.lines(tau, 0.2, 0.6)
    same = merge.layerwise(tau, 0.2 + 0.6 * np.linspace(0, 1, 4), outside=0.2)
    for path in tau:
        close(same[path], reference(line[path]))
    assert scaled.manifest["coefficients"] == by_layer.tolist()


def test_layers_of_stacks_and_numbered():
    ones = Dense(jnp.ones(2))
    base = {f"image/blocks/{i}/w": jnp.zeros(2) for i in range(3)} | {f"h_{i}/w": jnp.zeros(2) for i in range(2)}
    tau = TaskVector({"image/blocks/1/w": ones, "h_1/w": ones}, describe(base))
    scaled = merge.layerwise(tau, {"image/blocks": [1.0, 2.0, 3.0], "h": [4.0, 5.0]})
    close(scaled["image/blocks/1/w"], np.full(2, 2.0))
    close(scaled["h_1/w"], np.full(2, 5.0))
    with pytest.raises(ValueError, match="no coefficients of 'h', only of image/blocks"):
        merge.layerwise(tau, {"image/blocks": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match=r"'h' has 2 layers; its coefficients have shape \(3,\)"):
        merge.layerwise(tau, [1.0, 2.0, 3.0])


def weighted(weights, taus):
    return merge.task_arithmetic(taus, weights=weights)


def profile(point, taus):
    line = point["alpha"] + point["beta"] * jnp.linspace(0, 1, 3)
    return merge.layerwise(merge.task_arithmetic(taus), line, outside=point["alpha"])


@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_many_points_are_the_loop(at_once):
    base, taus, batches = problem()
    points = np.array([[0.0, 0.0], [0.3, 0.0], [0.3, -0.5], [1.0, 1.0], [0.25, 0.75]], np.float32)
    table = merge.evaluate_points(weighted, taus, points, sums, batches, base=base, at_once=at_once)
    for i, point in enumerate(points):
        params = apply(base, weighted(point, taus))
        one = [jax.device_get(sums(params, batch)) for batch in batches]
        for name in ("loss", "first"):
            np.testing.assert_allclose(table[name][i], sum(float(x[name]) for x in one) / 4, rtol=1e-6)
    # And in float64, from the formula.
    start, (a, b) = {p: np.asarray(x, np.float64) for p, x in flat(base).items()}, map(float64, taus)
    want = [
        sum(0.5 * ((start[p] + x * a[p] + y * b[p] - t[p]) ** 2).sum() for t in batches for p in SHAPES) / 4
        for x, y in points.astype(np.float64)
    ]
    np.testing.assert_allclose(table["loss"], want, rtol=1e-6)
    assert table["weight"].tolist() == [4.0] * 5


def test_as_many_points_at_once_as_fit(monkeypatch):
    base, taus, batches = problem()
    sizes, program = [], vectorised._program
    monkeypatch.setattr(vectorised, "_program", lambda *args: sizes.append(args[2]) or program(*args))
    points = jnp.array([[0.0, 0.0], [0.3, 0.0], [0.3, -0.5], [1.0, 1.0], [0.25, 0.75]])
    # More at once are slower on processors. 36 float32 weights have 144 bytes.
    merge.evaluate_points(weighted, taus, points, sums, batches, base=base)
    assert sizes == [1]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for limit in (143, 2 * 144, 10**6):
        monkeypatch.setattr(vectorised, "_POINTS_BYTES", limit)
        merge.evaluate_points(weighted, taus, points, sums, batches, base=base)
    assert sizes[1:] == [1, 2, 5]


def test_many_points_of_profiles_and_of_rules():
    base, taus, batches = problem()
    points = {"alpha": jnp.array([0.2, 0.5]), "beta": jnp.array([0.3, -0.1])}
    table = merge.evaluate_points(profile, taus, points, sums, batches, base=base)
    for i, (alpha, beta) in enumerate([(0.2, 0.3), (0.5, -0.1)]):
        params = apply(base, merge.lines(merge.task_arithmetic(taus), alpha, beta))
        want = sum(float(distance(params, b)) for b in batches) / 4
        np.testing.assert_allclose(table["loss"][i], want, rtol=1e-6)
    # Trimmed by whole model: the vectors are known, the weights traced.
    trimmed = lambda w, _: merge.ties(taus, weights=w, density=0.5)
    table = merge.evaluate_points(trimmed, (), jnp.array([0.5, 1.0]), sums, batches, base=base)
    params = apply(base, merge.ties(taus, weights=0.5, density=0.5))
    np.testing.assert_allclose(table["loss"][0], sum(float(distance(params, b)) for b in batches) / 4, rtol=1e-6)


def descent(rule, steps, rate, start):
    """Coefficients by gradient descent on the distance, in float64; ``rule(c, deltas) -> merged, [d merged / d c_i]``."""
    base, taus, batches = problem()
    c, deltas = np.array(start, np.float64), [float64(t) for t in taus]
    origin = {p: np.asarray(x, np.float64) for p, x in flat(base).items()}
    for step in range(steps):
        slope = np.zeros(2)
        for path in SHAPES:
            merged, slopes = rule(c, [d[path] for d in deltas])
            residual = origin[path] + merged - np.asarray(batches[step % 2][path], np.float64)
            slope += [(residual * s).sum() for s in slopes]
        c -= rate * slope
    return c


def linear(c, x):
    return c[0] * x[0] + c[1] * x[1], x


def ties_of_mergekit(c, x):
    """Density 1: of those that agree with the sign of the weighted sum, the weighted mean."""
    sign = np.where(c[0] * x[0] + c[1] * x[1] < 0, -1, 1)
    agree = [np.sign(k * y) == sign for k, y in zip(c, x, strict=True)]
    share = sum(np.where(a, k, 0) for a, k in zip(agree, c, strict=True))
    merged = sum(np.where(a, k * y, 0) for a, k, y in zip(agree, c, x, strict=True)) / share
    return merged, [np.where(a, (y - merged) / share, 0) for a, y in zip(agree, x, strict=True)]


def ties_of_paper(c, x):
    """Density 1: of those that agree with the sign of the sum, the sum by the count."""
    agree = [np.sign(y) == np.sign(x[0] + x[1]) for y in x]
    count = agree[0] * 1 + agree[1]
    slopes = [np.where(a, y / count, 0) for a, y in zip(agree, x, strict=True)]
    return c[0] * slopes[0] + c[1] * slopes[1], slopes


@pytest.mark.parametrize(
    ("rule", "options", "formula"),
    [
        (merge.task_arithmetic, {}, linear),
        (merge.ties, {"preset": "mergekit"}, ties_of_mergekit),
        (merge.ties, {"density": 1.0}, ties_of_paper),
    ],
)
def test_learned_weights_of_rules(rule, options, formula):
    base, taus, batches = problem()
    # Thresholds of whole models are those of vectors that are known.
    of_rule = lambda w, traced: rule(taus if "density" in options else traced, weights=w, **options)
    start, rate = (0.3, 0.6), 0.01
    how = {"base": base, "objective": distance, "batches": batches, "data": "val", "optimizer": optax.sgd(rate)}
    merged = merge.learn_coefficients(of_rule, jnp.array(start), taus, steps=4, **how)
    want = descent(formula, 4, rate, start)
    np.testing.assert_allclose(merged.manifest["coefficients"], want, rtol=2e-6)
    assert np.abs(want - start).max() > 0.05
    assert merged.manifest["data"] == "val"
    assert merged.manifest["objective"]["steps"] == 4
    for path, delta in rule(taus, weights=want.tolist(), **options).items():
        np.testing.assert_allclose(merged[path].dense(), delta.dense(), atol=1e-5)


@pytest.mark.parametrize("rule", [merge.dare, merge.dare_ties])
def test_gradients_of_rules_that_draw(rule):
    """Where a rule is a sum that is linear in the weights, the gradient is the rule at the unit weights."""
    _, taus, (direction, _) = problem()
    along = lambda tau: sum(jnp.vdot(direction[p], d.dense()) for p, d in tau.items())
    gradient = jax.jit(jax.grad(lambda w: along(rule(taus, weights=w, seed=5))))(jnp.array([0.3, 0.6]))
    units = [along(rule(taus, weights=w, seed=5)) for w in ([1.0, 0.0], [0.0, 1.0])]
    np.testing.assert_allclose(gradient, units, rtol=1e-5)


def test_learned_profile():
    """Layers and tasks together: the objective falls, and what is not linear in the values is learned as well."""
    base, taus, batches = problem()
    both = lambda v, taus: merge.layerwise(merge.task_arithmetic(taus, v["tasks"]), v["layers"])
    values = {"tasks": jnp.full(2, 0.3), "layers": jnp.ones(3)}
    how = {"base": base, "objective": distance, "batches": batches[:1], "data": "val", "steps": 20}
    merged = merge.learn_coefficients(both, values, taus, **how)
    note = merged.manifest
    assert note["objective"]["last"] < note["objective"]["first"]
    assert {name: len(x) for name, x in note["coefficients"].items()} == {"tasks": 2, "layers": 3}


def test_what_must_be_kept():
    """Target falls by c, control is 1 - c**2 of at least 0.95: c = sqrt(0.05), and the search keeps to it exactly."""
    base = {"w": jnp.zeros(1)}
    tau = TaskVector({"w": Dense(jnp.ones(1))}, describe(base))
    control = lambda p, batch: batch - p["w"][0] ** 2
    objective = merge.constrained(lambda p, batch: batch * p["w"][0], control, least=0.95)
    batches = [{"target": jnp.float32(1), "control": jnp.float32(1)}]
    how = {"base": base, "objective": objective, "data": "val", "optimizer": optax.sgd(1e-3), "steps": 400}
    merged = merge.learn_coefficients(lambda c, taus: -taus[0] * c, 0.0, [tau], batches=batches, **how)
    assert abs(merged.manifest["coefficients"] - np.sqrt(0.05)) < 5e-3
    chosen = merge.negation_search(base, -merged, lambda p: 1 + p["w"][0], lambda p: 1 - p["w"][0] ** 2)
    assert chosen.row["control"] >= 0.95
    assert chosen.best >= 0.9
    params = {"w": jnp.array([-1.0])}
    assert float(objective(params, batches[0])) == pytest.approx(-1 + 10 * 0.95)
    with pytest.raises(ValueError, match="lacks 'control'"):
        objective(params, {"target": 1.0})


def test_errors():
    base, taus, batches = problem()
    learn = functools.partial(merge.learn_coefficients, weighted, jnp.ones(2), taus, objective=distance)
    with pytest.raises(ValueError, match="not chosen on test data"):
        learn(base=base, batches=batches, data="cars/test")
    with pytest.raises(BaseMismatch):
        learn(base=jax.tree.map(lambda x: x + 1, base), batches=batches, data="val", steps=1)
    broken = lambda w, taus: merge.task_arithmetic(taus, weights=w + jnp.sqrt(w - 1.0))
    with pytest.raises(ValueError, match="coefficients are not finite"):
        merge.learn_coefficients(
            broken, jnp.ones(2), taus, base=base, objective=distance, batches=batches, data="val", steps=1
        )
    with pytest.raises(ValueError, match="penalty must be positive"):
        merge.constrained(distance, distance, 1.0, penalty=0.0)
    points = functools.partial(merge.evaluate_points, weighted, taus, base=base)
    for message, args, options in (
        ("one first axis", (jnp.zeros((0, 2)), sums, batches), {}),
        ("one first axis", (0.5, sums, batches), {}),
        ("no batches", (jnp.ones((1, 2)), sums, []), {}),
        ("must return 'weight'", (jnp.ones((1, 2)), lambda p, b: {"loss": 1.0}, batches), {}),
        ("weights sum to zero", (jnp.ones((1, 2)), lambda p, b: {"weight": 0.0}, batches), {}),
        ("at_once must be", (jnp.ones((1, 2)), sums, batches), {"at_once": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            points(*args, **options)
