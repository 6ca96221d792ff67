import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jft.parallel import make_mesh
from jft.select import Everything, Flops, Globally, PerLayer, PerLeaf, PerMatrix, choose, plan_flops
from jft.select.budget import ByPattern, resolved

SHAPES = {
    "embed/table": (6, 4),
    "layers/attn/q/w": (3, 4, 5),
    "layers/mlp/experts/up/w": (3, 2, 2, 4),
    "layers/norm/scale": (3, 5),
}
LEADS = {"embed/table": 0, "layers/attn/q/w": 1, "layers/mlp/experts/up/w": 2, "layers/norm/scale": 1}
ONE = dict.fromkeys(SHAPES, 1)


def scores(seed=0):
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.integers(0, 9, s).astype(np.float32)) for p, s in SHAPES.items()}


def groups(kind):
    """The units that compete, written out: lists of (path, index)."""
    keys = {
        Globally: lambda p, i: (),
        PerLeaf: lambda p, i: p,
        PerLayer: lambda p, i: i[0] if p.startswith("layers/") else p,
        PerMatrix: lambda p, i: (p, i[: LEADS[p]]),
    }
    out = {}
    for p, s in SHAPES.items():
        for i in np.ndindex(*s):
            out.setdefault(keys[kind](p, i), []).append((p, i))
    return list(out.values())


def greedy(values, kind, amount, costs=ONE, largest=True, unfit="stop"):
    """Granularity by unit in the order of the scores (a stable sort), while what ``amount`` gives for the group lasts."""
    masks = {p: np.zeros(s, bool) for p, s in SHAPES.items()}
    values = {p: np.asarray(x) for p, x in values.items()}
    for group in groups(kind):
        left = amount(group)
        for p, i in sorted(group, key=lambda u: (-1 if largest else 1) * float(values[u[0]][u[1]])):
            if costs[p] <= left:
                masks[p][i] = True
                left -= costs[p]
            elif unfit == "stop":
                break
    return masks


def same(found, expected):
    assert list(found) == list(expected)
    for p, mask in expected.items():
        np.testing.assert_array_equal(np.asarray(found[p]), mask, err_msg=p)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", [Globally, PerLeaf, PerLayer, PerMatrix])
def test_units_of_one_cost(kind, largest):
    x = scores()
    same(choose(x, ONE, LEADS, kind(count=3), largest), greedy(x, kind, lambda g: 3, largest=largest))
    expected = greedy(x, kind, lambda g: max(1, int(0.3 * len(g) + 1e-9)), largest=largest)
    same(choose(x, ONE, LEADS, kind(density=0.3), largest), expected)
    same(choose(x, dict.fromkeys(SHAPES, 7), LEADS, kind(density=0.3), largest), expected)
    same(
        choose(x, dict.fromkeys(SHAPES, 7), LEADS, kind(parameters=27), largest),
        greedy(x, kind, lambda g: 3, ONE, largest),
    )


@pytest.mark.parametrize("unfit", ["stop", "skip"])
@pytest.mark.parametrize("kind", [Globally, PerLayer])
def test_units_of_different_costs(kind, unfit):
    x = scores(1)
    costs = {"embed/table": 3, "layers/attn/q/w": 10, "layers/mlp/experts/up/w": 4, "layers/norm/scale": 1}
    for largest in (True, False):
        found = choose(x, costs, LEADS, kind(parameters=31, unfit=unfit), largest)
        same(found, greedy(x, kind, lambda g: 31, costs, largest, unfit))
        total = lambda g: int(0.4 * sum(costs[p] for p, _ in g))
        found = choose(x, costs, LEADS, kind(density=0.4, unfit=unfit), largest)
        same(found, greedy(x, kind, total, costs, largest, unfit))
    same(choose(x, costs, LEADS, kind(count=4)), greedy(x, kind, lambda g: 4))


def test_rank():
    """Rank r: as many entries of each matrix as factors of rank r have."""
    shapes = {"layers/q/w": (2, 8, 12), "layers/k/w": (2, 8, 6)}
    rng = np.random.default_rng(2)
    x = {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in shapes.items()}
    masks = choose(x, dict.fromkeys(x, 1), dict.fromkeys(x, 1), PerMatrix(rank=2))
    for p, (layers, rows, columns) in shapes.items():
        np.testing.assert_array_equal(np.sum(masks[p], (1, 2)), [2 * (rows + columns)] * layers)
    blocks = {"layers/q/w": x["layers/q/w"][:, ::2, ::3]}
    with pytest.raises(ValueError, match="needs the shape of layers/q/w"):
        choose(blocks, {"layers/q/w": 6}, {"layers/q/w": 1}, PerMatrix(rank=2))
    masks = choose(blocks, {"layers/q/w": 6}, {"layers/q/w": 1}, PerMatrix(rank=2), shapes=shapes)
    np.testing.assert_array_equal(np.sum(masks["layers/q/w"], (1, 2)), [40 // 6] * 2)
    with pytest.raises(ValueError, match="parameters of each index of layers/k/w, which has 48"):
        choose({"layers/k/w": x["layers/k/w"]}, {"layers/k/w": 1}, {"layers/k/w": 1}, PerMatrix(rank=4))


@pytest.mark.parametrize(
    ("rule", "density", "n", "expected"),
    [
        ("floor", 0.29, 100, 29),  # 28 in binary arithmetic
        ("floor", 0.001, 100, 1),
        ("floor", 0.019, 100, 1),
        ("nearest", 0.015, 100, 2),
        ("nearest", 0.014, 100, 1),
        ("ceil", 0.011, 100, 2),
        ("ceil", 0.07, 100, 7),
        ("floor+1", 0.07, 100, 8),
        ("floor+1", 1.0, 100, 100),
        ("floor", 0.1, 3 * 10**10, 3 * 10**9),
    ],
)
def test_rounding(rule, density, n, expected):
    assert Globally(density=density, round=rule).units(n, 1, "w") == expected


def test_layers_by_number_and_by_stack():
    leads = {"blocks/0/w": 0, "blocks/0/b": 0, "blocks/1/w": 0, "vision/layers/w": 1, "text/layers/w": 1, "head/w": 0}
    found = list(PerLayer(count=1).groups(leads))
    assert found == [
        (["blocks/0/w", "blocks/0/b"], 0),
        (["blocks/1/w"], 0),
        (["vision/layers/w"], 1),
        (["text/layers/w"], 1),
        (["head/w"], 0),
    ]


def test_everything_and_nothing():
    assert all(np.asarray(m).all() for m in choose(scores(), ONE, LEADS, Everything()).values())
    assert choose({}, {}, {}, Globally(count=1)) == {}
    same(choose(scores(), ONE, LEADS, Globally(density=1)), {p: np.ones(s, bool) for p, s in SHAPES.items()})


def test_units_that_span_their_matrix():
    """Scores with fewer axes than the weight has leading ones: of layers, of whole names."""
    x = {
        "layers/q/w": jnp.asarray([3.0, 1.0, 2.0]),
        "layers/k/w": jnp.asarray([0.0, 5.0, 4.0]),
        "head/w": jnp.asarray(2.5),
    }
    leads = {"layers/q/w": 1, "layers/k/w": 2, "head/w": 0}
    found = choose(x, dict.fromkeys(x, 9), leads, Globally(count=3))
    same(found, {"layers/q/w": [True, False, False], "layers/k/w": [False, True, True], "head/w": False})
    found = choose(x, dict.fromkeys(x, 9), leads, PerLayer(count=1))
    same(found, {"layers/q/w": [True, False, False], "layers/k/w": [False, True, True], "head/w": True})
    assert all(np.asarray(m).all() for m in choose(x, dict.fromkeys(x, 9), leads, PerMatrix(count=1)).values())


def test_the_same_on_eight_devices():
    rng = np.random.default_rng(3)
    x = {"layers/a/w": rng.integers(0, 5, (4, 8, 8)), "layers/b/w": rng.integers(0, 5, (4, 16))}
    x = {p: v.astype(np.float32) for p, v in x.items()}
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    specs = {"layers/a/w": P(None, "fsdp", "tensor"), "layers/b/w": P("fsdp", None)}
    placed = {p: jax.device_put(v, NamedSharding(mesh, specs[p])) for p, v in x.items()}
    leads = dict.fromkeys(x, 1)
    for budget in (PerLayer(density=0.2), Globally(parameters=60)):
        for costs in ({"layers/a/w": 1, "layers/b/w": 1}, {"layers/a/w": 2, "layers/b/w": 5}):
            found = choose(placed, costs, leads, budget)
            same(
                found,
                {
                    p: np.asarray(m)
                    for p, m in choose({p: jnp.asarray(v) for p, v in x.items()}, costs, leads, budget).items()
                },
            )
            assert all(m.sharding.is_equivalent_to(placed[p].sharding, m.ndim) for p, m in found.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Globally(), "takes exactly one of density, count, parameters; given: none"),
        (lambda: Globally(density=0.1, count=3), "given: density, count"),
        (lambda: Globally(density=0), r"density 0 is not in \(0, 1\]"),
        (lambda: PerLayer(density=1.5), "density 1.5"),
        (lambda: PerLeaf(density=float("nan")), "density nan"),
        (lambda: Globally(count=0), "count 0 is not a positive integer"),
        (lambda: Globally(count=2.5), "count 2.5"),
        (lambda: PerMatrix(rank=0), "rank 0"),
        (lambda: Globally(density=0.1, round="up"), "round 'up' is unknown"),
        (lambda: Globally(density=0.1, unfit="ignore"), "unfit 'ignore'"),
        (lambda: Flops(0.0), "fraction 0.0"),
        (lambda: choose(scores(), ONE, LEADS, Globally(count=1000)), "budget is 1000 units of embed/table, .* has 147"),
        (lambda: choose(scores(), ONE, LEADS, PerMatrix(count=25)), "25 units of embed/table, which has 24"),
        (lambda: choose(scores(), dict.fromkeys(SHAPES, 9), LEADS, Globally(parameters=8)), "smallest unit has 9"),
        (lambda: choose(scores(), ONE | {"embed/table": 30}, LEADS, PerLayer(parameters=10)), "smallest unit has 30"),
        (lambda: choose(scores(), ONE, LEADS, Flops(0.5)), "use Flops"),
        (
            lambda: choose({"w": jnp.asarray([1.0, jnp.nan])}, {"w": 1}, {"w": 0}, Globally(count=1)),
            "1 scores of w are NaN",
        ),
        (
            lambda: choose(
                {"w": jnp.asarray([1.0, jnp.nan]), "v": jnp.ones(2)},
                {"w": 1, "v": 2},
                {"w": 0, "v": 0},
                Globally(parameters=2),
            ),
            "1 scores of w are NaN",
        ),
        (lambda: plan_flops([1.0], [1, 2], [1], 5), "are not of the same tensors"),
        (lambda: plan_flops([1.0], [1], [1], 0), "at least 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def flops(chosen, weight, passing):
    return sum(weight[i] for i in chosen) + sum(passing[: max(chosen, default=0)])


def brute(importance, weight, passing, budget):
    """The largest importance of all subsets within the budget."""
    n = len(importance)
    subsets = (c for size in range(n + 1) for c in itertools.combinations(range(n), size))
    return max(sum(importance[i] for i in c) for c in subsets if flops(c, weight, passing) <= budget)


TENSORS = st.lists(st.tuples(st.integers(-3, 20), st.integers(0, 30), st.integers(0, 15)), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(TENSORS, st.integers(1, 150))
def test_plan_flops_is_the_best_subset(tensors, budget):
    importance, weight, passing = map(list, zip(*tensors, strict=True))
    chosen = plan_flops(importance, weight, passing, budget)
    assert chosen == sorted(set(chosen)) and flops(chosen, weight, passing) <= budget
    assert sum(importance[i] for i in chosen) == brute(importance, weight, passing, budget)


@settings(max_examples=100, deadline=None)
@given(TENSORS, st.integers(20, 150), st.integers(5, 20))
def test_plan_flops_coarsely(tensors, budget, resolution):
    """Never above the budget, and no worse than the best with what rounding up can take from it."""
    importance, weight, passing = map(list, zip(*tensors, strict=True))
    chosen = plan_flops(importance, weight, passing, budget, resolution)
    assert flops(chosen, weight, passing) <= budget
    reserve = (len(tensors) + 1) * -(-budget // resolution)
    assert sum(importance[i] for i in chosen) >= brute(importance, weight, passing, max(budget - reserve, 0))


def test_flops_of_a_fraction():
    """Half of the full backward pass of four equal tensors, 4 * 10 + 3 * 10, pays for two weights and one step down."""
    assert Flops(0.5).plan([1, 3, 2, 9], [10] * 4, [10] * 4) == [0, 1]
    assert Flops(1.0).plan([1, 3, 2, 9], [10] * 4, [10] * 4) == [0, 1, 2, 3]
    assert Flops(0.1).plan([1, 3, 2, 9], [10] * 4, [10] * 4) == []


def test_patterns_are_pools_of_their_own_whatever_their_number():
    """Equal budgets of two patterns are met twice, not once by both."""
    x = scores()
    halves = {"attn": ["layers/attn/q/w"], "experts": ["layers/mlp/experts/up/w"]}
    for one, other in ((0.3, 0.3), (0.3, 0.5)):
        found = choose(
            {p: x[p] for paths in halves.values() for p in paths}, ONE, LEADS,
            ByPattern((("attn/", Globally(density=one)), ("experts/", Globally(density=other)))),
        )  # fmt: skip
        for density, path in ((one, "layers/attn/q/w"), (other, "layers/mlp/experts/up/w")):
            assert int(found[path].sum()) == int(density * x[path].size + 1e-9), (path, density)


def test_a_density_of_the_model_is_spread_over_the_candidates():
    sizes = {p: int(np.prod(s)) for p, s in SHAPES.items()}  # 24, 60, 48 and 15
    for of, total in (("model", 147), ("matrices", 132)):
        wanted = int(0.25 * total)  # 36 and 33
        paths = ["layers/attn/q/w", "layers/mlp/experts/up/w"]
        budget = resolved(Globally(density=0.25, of=of), paths, SHAPES, LEADS)
        chosen = choose({p: scores()[p] for p in paths}, ONE, LEADS, budget)
        assert sum(int(m.sum()) for m in chosen.values()) == wanted
        one_more = resolved(Globally(density=0.25, of=of, round="floor+1"), paths, SHAPES, LEADS)
        chosen = choose({p: scores()[p] for p in paths}, ONE, LEADS, one_more)
        assert sum(int(m.sum()) for m in chosen.values()) == wanted + 1
        each = resolved(PerMatrix(density=0.25, of=of), paths, SHAPES, LEADS)
        chosen = choose({p: scores()[p] for p in paths}, ONE, LEADS, each)
        for path in paths:
            for matrix in np.ndindex(*SHAPES[path][: LEADS[path]]):
                size = sizes[path] // int(np.prod(SHAPES[path][: LEADS[path]]))
                assert int(chosen[path][matrix].sum()) == wanted * size // 108
    parts = resolved(ByPattern((("attn", Globally(density=0.1, of="model")),)), ["layers/attn/q/w"], SHAPES, LEADS)
    assert parts.of("layers/attn/q/w").density == Fraction(14, 60)
    with pytest.raises(
        ValueError, match=r"density 0.9 of all 147 parameters of the model is 132, and layers/attn/q/w can give"
    ):
        resolved(Globally(density=0.9, of="model"), ["layers/attn/q/w"], SHAPES, LEADS)
    with pytest.raises(ValueError, match="of='model' says what a density is a fraction of; given: count"):
        Globally(count=3, of="model")
    with pytest.raises(ValueError, match="of 'head' is unknown"):
        Globally(density=0.1, of="head")
    with pytest.raises(ValueError, match="needs all of the model's weights"):
        choose(scores(), ONE, LEADS, Globally(density=0.1, of="model"))
