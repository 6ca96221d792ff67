"""TR-PTS: connections per neuron by the share of each layer, written out in float64 NumPy with loops."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jft.methods import Select
from jft.parallel import make_mesh
from jft.presets.tr_pts import ByContribution, tr_pts
from jft.select import choose, scores
from tests.methods import stack
from tests.methods.stack import LAYERS, LINEAR, W

MUTATIONS = (
    ("jft/presets/tr_pts.py", "np.maximum(1, weight", "np.maximum(0, weight"),
    ("jft/presets/tr_pts.py", "weight * self.minimum // least", "weight * self.minimum // max(least - 1, 1)"),
    ("jft/presets/tr_pts.py", "w[w > 0].min()", "w[w > 0].max()"),
    ("jft/presets/tr_pts.py", "budget.PerLayer(", "budget.PerMatrix("),
    ("jft/presets/tr_pts.py", "top: float = 0.005", "top: float = 0.01"),
    ("jft/presets/tr_pts.py", "minimum: int = 1", "minimum: int = 2"),
    ("jft/presets/tr_pts.py", "scores.Fisher(count, per)", "scores.Fisher(count, per, 1)"),
    ("jft/select/columns.py", "jnp.swapaxes(score, -1, -2)", "score"),
)


def reference(fisher, layers, top, minimum):
    """``{path: mask}``. layers: of each, the ``(path, index)`` of its matrices ``[in, out]``.

    Luo et al. 2025, as quoted in two summaries: of the top M % of entries by Fisher information each layer has a
    contribution w_l; C_l = max(1, w_l / min(w) * C_min); of every neuron of layer l the top C_l connections train.
    """
    over = stack.largest_of_all(fisher, int(top * sum(f.size for f in fisher.values())))
    weight = [sum(over[p][i].sum() for p, i in layer) for layer in layers]
    least = min(w for w in weight if w)
    masks = {p: np.zeros(f.shape, bool) for p, f in fisher.items()}
    for w, layer in zip(weight, layers, strict=True):
        connections = max(1, int(w * minimum / least + 1e-9))
        for p, i in layer:
            for neuron in range(fisher[p].shape[-1]):
                best = np.argsort(-fisher[p][i][:, neuron], kind="stable")[:connections]
                masks[p][i][best, neuron] = True
    return masks


def test_defaults():
    given = {name: p.default for name, p in inspect.signature(tr_pts).parameters.items()}
    assert given == {"top": 0.005, "minimum": 1, "count": 1024, "per": "example"}


@pytest.mark.parametrize(("top", "minimum"), [(0.1, 1), (0.15, 3)])
def test_entries_and_steps(top, minimum):
    each = [stack.gradient(W, b) for b in stack.rows(9)]
    fisher = stack.average([{p: g**2 for p, g in one.items()} for one in each])
    fisher = {p: fisher[p] for p in sorted(LINEAR)}
    expected = reference(fisher, [[(p, i) for p in LINEAR] for i in range(LAYERS)], top, minimum)
    counts = [expected[LINEAR[0]][i].sum(0) for i in range(LAYERS)]
    assert len({int(c.min()) for c in counts}) == LAYERS  # the layers have different numbers
    assert all(m.any(axis=-2).all() for m in expected.values())  # no neuron is without
    method = {"name": "tr_pts", "top": top, "minimum": minimum, "count": 9}
    stack.check_entries(method, expected, steps=(1, 3) if minimum == 1 else (1,))


SHAPES = {"blocks/0/w": (6, 4), "blocks/1/w": (6, 4), "layers/experts/up/w": (3, 2, 4, 8), "layers/up/w": (3, 8, 4)}
LEADS = {"blocks/0/w": 0, "blocks/1/w": 0, "layers/experts/up/w": 2, "layers/up/w": 1}


def made(seed=0):
    """Scores with ties, of layers in stacks and by number, with experts; block 1 holds none of the top."""
    rng = np.random.default_rng(seed)
    out = {p: rng.integers(1, 40, s).astype(np.float32) for p, s in SHAPES.items()}
    out["layers/up/w"][2] *= 2
    out["blocks/1/w"][:] = rng.integers(0, 2, SHAPES["blocks/1/w"])
    return out


@pytest.mark.parametrize("mesh", [False, True])
def test_layers_of_every_kind(mesh):
    found = made()
    stack_of_layers = [[("layers/up/w", i), *(("layers/experts/up/w", (i, e)) for e in range(2))] for i in range(3)]
    layers = [[("blocks/0/w", ())], [("blocks/1/w", ())], *stack_of_layers]
    expected = reference({p: x.astype(np.float64) for p, x in found.items()}, layers, 0.2, 2)
    assert (expected["blocks/1/w"].sum(0) == 1).all()  # C = max(1, 0)
    # What a plan without weights counts on: layers that contribute the same.
    assert ByContribution(0.2, 2).share((3, 8, 4)) == 2 * 4 and ByContribution(0.2, 9).share((3, 8, 4)) == 8 * 4
    given = {p: jnp.asarray(x) for p, x in found.items()}
    if mesh:
        place = NamedSharding(make_mesh({"fsdp": 4, "tensor": 2}), P())
        split = NamedSharding(place.mesh, P(None, "fsdp", "tensor"))
        given = {p: jax.device_put(x, split if p == "layers/up/w" else place) for p, x in given.items()}
    masks = choose(given, dict.fromkeys(found, 1), LEADS, ByContribution(0.2, 2))
    for p, mask in expected.items():
        np.testing.assert_array_equal(masks[p], mask, err_msg=p)
        assert masks[p].sharding.is_equivalent_to(given[p].sharding, mask.ndim)


def test_what_is_refused():
    with pytest.raises(ValueError, match="minimum is 0; give how many connections"):
        tr_pts(minimum=0)
    with pytest.raises(ValueError, match="density 0 is not in"):
        stack.run({"name": "tr_pts", "top": 0, "count": 4}, 1)
    method = tr_pts(top=0.1, count=4)
    everything = Select(score=scores.Magnitude(), budget=method.select.budget)
    with pytest.raises(ValueError, match=r"layers/up/b with scores of shape .* has no columns"):
        stack.run(type(method)(everything, method.train), 1)
