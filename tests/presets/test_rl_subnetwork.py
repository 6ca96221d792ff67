"""The subnetwork that a tuned model changed: the mask, in the dtype of the base, and its training from the base."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jft
from jft import tree
from jft.models import DecoderConfig, Model
from jft.presets.rl_subnetwork import rl_subnetwork
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import stack
from tests.methods.stack import HEAD, W

MUTATIONS = (
    ("jft/presets/rl_subnetwork.py", "tolerance: float = 1e-5", "tolerance: float = 1e-3"),
    ("jft/presets/rl_subnetwork.py", "scores.Difference(tuned, tolerance)", "scores.Difference(tuned)"),
    ("jft/presets/rl_subnetwork.py", "budget.Beyond(0.5)", "budget.Globally(density=0.5)"),
    ("jft/select/scores.py", "{p: tuned[p].astype(w.dtype) for p, w in base.items()}", "tuned"),
)
MOVED = {p: np.random.default_rng(7).random(x.shape) < 0.2 for p, x in W.items() if p != HEAD}
TUNED = {p: jnp.asarray(x + 0.1 * MOVED[p] if p in MOVED else x, jnp.float32) for p, x in W.items()}
METHOD = {"name": "rl_subnetwork", "tuned": TUNED}


def test_defaults():
    # Mukherjee et al. and check_sparsity.py: a tolerance of 1e-5.
    given = {name: p.default for name, p in inspect.signature(rl_subnetwork).parameters.items()}
    assert given == {"tuned": None, "tolerance": 1e-5}


def test_entries_and_steps():
    stack.check_entries(METHOD, {p: MOVED.get(p, np.zeros(x.shape, bool)) for p, x in W.items()})


@pytest.mark.parametrize("tolerance", [1e-5, 1e-3])
def test_every_form_of_a_tuned_model_has_the_mask_of_the_bases_dtype(tmp_path, tolerance):
    """bfloat16 hides most small steps of float32 masters, in whatever form they are given."""
    model = Model(DecoderConfig(vocab=8, width=8, layers=2, heads=2, hidden=12))
    base = tree.flatten(jax.jit(lambda: model.init(jax.random.key(0), jnp.bfloat16))())
    base["final_norm/scale"] = base["final_norm/scale"].astype(jnp.float32)  # one of another dtype
    rng = np.random.default_rng(0)
    masters = {
        p: np.asarray(x, np.float32) * (1 + 0.005 * rng.normal(size=x.shape)).astype(np.float32)
        for p, x in base.items()
    }
    expected, unrounded = {}, 0
    for p, x in base.items():
        kind = np.float32 if x.dtype == jnp.float32 else ml_dtypes.bfloat16
        gap = masters[p].astype(kind).astype(np.float64) - np.asarray(x, np.float64)
        expected[p] = np.abs(gap) > tolerance
        unrounded += (np.abs(masters[p].astype(np.float64) - np.asarray(x, np.float64)) > tolerance).sum()
    assert 0 < sum(m.sum() for m in expected.values()) < 0.8 * unrounded

    nested = tree.unflatten({p: jnp.asarray(x) for p, x in masters.items()})
    jft.save(model, nested, tmp_path / "tuned")
    vector = jft.TaskVector.between(tree.unflatten(base), nested)
    vector.save(tmp_path / "tau.safetensors")
    calibration = RunCalibration(model, tree.unflatten(base), tuple(base), LanguageModel(), [])
    for tuned in (nested, tmp_path / "tuned", vector, str(tmp_path / "tau.safetensors")):
        select = rl_subnetwork(tuned, tolerance).select
        found = select.budget.masks(select.score(calibration), True, {})
        for p, mask in expected.items():
            np.testing.assert_array_equal(found[p], mask, err_msg=f"{p} of a {type(tuned).__name__}")


def test_a_run_resumes_whose_tuned_model_left_a_weight_alone(tmp_path):
    for steps in (1, 2):
        resumed = stack.run(METHOD, steps, workdir=tmp_path, checkpoint=1)
    whole = stack.run(METHOD, 2)
    for a, b in zip(*(tree.flatten(r.params).values() for r in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("tuned", "message"), [(None, "needs the tuned model"), (stack.parameters(), "nothing would train")]
)
def test_what_is_refused(tuned, message):
    with pytest.raises(ValueError, match=message):
        stack.run({"name": "rl_subnetwork", "tuned": tuned}, 1)
