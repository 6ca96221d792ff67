"""Half fine-tuning: how many of each kind every draw takes, what always trains, and steps over several draws."""

import inspect

import jax
import numpy as np
import pytest

import jft
from jft import tree
from jft.presets.half_finetuning import half_finetuning
from jft.select.halves import halves
from tests.methods import decoder

MUTATIONS = (
    ("jft/presets/half_finetuning.py", "outside: bool = True", "outside: bool = False"),
    ("jft/presets/half_finetuning.py", "draw=stage", "draw=0"),
    (
        "jft/select/halves.py",
        "count // 2 + (count % 2) * (order < length / 2)",
        "count // 2 + (count % 2) * (order < length // 2)",
    ),
    ("jft/select/halves.py", "count // 2 + (count % 2)", "count // 2 + 0 * (count % 2)"),
    ("jft/select/halves.py", 'return "norms"', 'return "attention"'),
)
DATA = decoder.batches(3)


@pytest.fixture(scope="module")
def params():
    return decoder.parameters()


@pytest.mark.slow
def test_steps_with_a_draw_each(params):
    """Embeddings, head and final norm train in every one."""
    shapes = {p: w.shape for p, w in tree.flatten(params).items()}
    outside = {p: True for p in shapes if not p.startswith("layers/")}
    assert outside.keys() == {"embed/table", "final_norm/scale", "head/w"}

    def masks_at(n, w):
        found = halves(shapes, 0, n)
        return outside | {p: decoder.in_layers(params, found[p], lambda q, p=p: q == p)[p] for p in found}

    decoder.check(jft.method("half_finetuning", every=1), masks_at, params, DATA, steps=(2,))


@pytest.mark.optimized
def test_a_run_taken_up_at_a_stage_goes_on_as_it_would_have(params, tmp_path):
    method = jft.method("half_finetuning", every=2)
    whole = decoder.run(method, 6, params, DATA)
    for place in (2, 4, 5, 6):
        part = decoder.run(method, place, params, DATA, workdir=tmp_path / "a", checkpoint=1)
    same = jax.tree.map(np.array_equal, part.params, whole.params)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(("gated", "L"), [(True, 6), (False, 6), (True, 5)])
def test_half_of_each_kind_in_every_layer(gated, L):
    """model_utils.py: 2 of 4 and 1 of 2 are frozen, and of gate, up, down 2 in floor(L / 2) layers and 1 in the others."""
    names = ["attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down", *(["mlp/gate"] if gated else [])]
    shapes = {f"layers/{n}/w": (L, 4, 4) for n in names} | {f"layers/{n}/b": (L, 4) for n in names}
    shapes |= {f"layers/{n}/scale": (L, 4) for n in ("attn_norm", "mlp_norm")} | {"head/w": (4, 4)}
    found = halves(shapes, seed=3)
    count = lambda part, i: sum(i in found[p] for p in found if part in p and not p.endswith("/b"))
    assert [count("attn/", i) for i in range(L)] == [2] * L
    assert [count("norm/", i) for i in range(L)] == [1] * L
    assert sorted(count("mlp/", i) for i in range(L)) == ([1] * (L // 2) + [2] * (L - L // 2) if gated else [1] * L)
    assert all(found[f"layers/{n}/b"] == found[f"layers/{n}/w"] for n in names) and "head/w" not in found
    assert halves(shapes, seed=3) == found != halves(shapes, seed=3, draw=1)


def test_defaults_and_errors():
    defaults = {n: p.default for n, p in inspect.signature(half_finetuning).parameters.items()}
    assert defaults == {"every": 0, "stages": 1, "draw": 0, "outside": True}
    with pytest.raises(ValueError, match="every=2 and stages=3: give one of them"):
        half_finetuning(every=2, stages=3)
    with pytest.raises(ValueError, match="stages=0"):
        half_finetuning(stages=0)
