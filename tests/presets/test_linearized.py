"""Linearized fine-tuning against float64 NumPy, forward and reverse mode by hand."""

import numpy as np

import jft
from tests.methods import stack
from tests.methods.stack import DATA, SHAPES

MUTATIONS = (
    ("jft/presets/linearized.py", 'forward="linearized")', 'forward="standard")'),
    ("jft/presets/linearized.py", "Select()", "Select(linear_only=True)"),
    ("jft/presets/linearized.py", "InPlace()", "InPlace(rate=0.5)"),
    ("jft/methods/parametrise.py", "return Shift(self.rate) if linearized", "return Shift(2.0) if linearized"),
)
STEPS = 3


def followed(decay=0.0):
    """``(tau, losses)`` of Adam on f(theta0) + J(theta0) tau, tau from zero; decay pulls tau, decoupled."""
    w, adam = stack.wide(stack.parameters()), stack.Adam()
    tau, losses, everything = {p: np.zeros(s) for p, s in SHAPES.items()}, [], stack.everything()
    for batch in DATA[:STEPS]:
        z = stack.forward(w, batch)[0][-1] + stack.moved(w, tau, batch)
        p = np.exp(z - z.max(1, keepdims=True))
        losses.append(-np.mean(np.log((p / p.sum(1, keepdims=True))[np.arange(len(z)), batch["labels"]])))
        g = stack.pulled(w, stack.loss_gradient(z, batch), batch)
        shrunk = {p: x * (1 - stack.RATE * decay) if x.ndim == 3 or p == stack.HEAD else x for p, x in tau.items()}
        tau = {p: shrunk[p] + x - tau[p] for p, x in adam.step(tau, g, everything).items()}
    return tau, losses


def test_three_steps_and_the_base_stays():
    for decay in (0.0, 2.0):
        optimizer = {**stack.ADAM, "name": "adamw", "weight_decay": decay}
        # Biases are not decayed by default.
        run = stack.run("linearized", STEPS, optimizer=optimizer, log={"progress": False, "every": 1})
        tau, losses = followed(decay)
        assert set(run.task_vector.deltas) == set(SHAPES)
        for path, x in tau.items():
            np.testing.assert_allclose(run.task_vector[path].dense(), x, atol=1e-5, err_msg=path)
        np.testing.assert_allclose([row["loss"] for row in run.metrics], losses, rtol=1e-5)
    stack.check(run, {p: w + tau[p] for p, w in stack.wide(stack.parameters()).items()})


def test_all_weights_by_default():
    method = jft.method("linearized")
    assert method.forward == "linearized" and method.until is None
    assert set(method.plan(stack.parameters(), stack.MODEL).leaves) == set(SHAPES)
