"""Task arithmetic in the tangent space, on the quickstart's digits, five seeds each. No download.

    jft quickstart --config=configs/tangent.py --workdir=runs/tangent
    jft quickstart --config=configs/tangent.py:rates --workdir=runs/tangent_rates

The four ways of Ortiz-Jimenez, Favero and Frossard 2023 (arXiv:2305.12827): nonlinear fine-tuning, the same task vectors in
the model linearized at the base (post-hoc), linearized fine-tuning, and linearized fine-tuning of the attention modules
alone. Learning rates are what `:rates` finds: of GRID the one with the best mean validation accuracy over two of the tasks,
with a seed that is none of the five (of equal ones the middle). At the nonlinear one 200 steps leave the surroundings of the
base, so nonlinear fine-tuning and its task vectors post hoc are there once more, at a tenth of it. docs/tangent.md has what
came out.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jft.analysis.study import collection, study

QUICKSTART = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))
SEEDS = (0, 1, 2, 3, 4)
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TUNING_SEED, TUNING_TASKS = 100, ("rotated", "parity")
TRAINED = {
    "nonlinear": {"name": "full"},
    "linear": {"name": "linearized"},
    "linear_attention": {"name": "linearized", "include": "/attn/"},
}
NEAR = 1e-3
RATES = {"nonlinear": 1e-2, "linear": 3e-3, "linear_attention": 3e-3}
PAIRS = (("rotated", "inverted"), ("mirrored", "parity"), ("upright", "loops"))


def trained(name: str, rate: float) -> dict:
    """A method with the quickstart's optimizer at another rate."""
    return {"method": TRAINED[name], "optimizer": {**QUICKSTART["COSINE"], "lr": rate}}


def get_config(what: str = "methods") -> ConfigDict:
    if what not in ("methods", "rates"):
        raise ValueError(f"{what!r} is not one of methods, rates")
    parts = QUICKSTART["digits"]().to_dict()
    if what == "rates":
        parts["tasks"] = {task: parts["tasks"][task] for task in TUNING_TASKS}
        parts["methods"] = {f"{name}_{rate:.0e}": trained(name, rate) for name in TRAINED for rate in GRID}
        parts |= {"seeds": (TUNING_SEED,), "arithmetic": {"addition": False, "negation": False}, "disentangle": {}}
    else:
        parts["methods"] = {
            "nonlinear": trained("nonlinear", RATES["nonlinear"]),
            "posthoc": {"of": "nonlinear", "forward": "linearized"},
            "nonlinear_near": trained("nonlinear", NEAR),
            "posthoc_near": {"of": "nonlinear_near", "forward": "linearized"},
            **{name: trained(name, RATES[name]) for name in ("linear", "linear_attention")},
        }
        parts |= {"seeds": SEEDS, "arithmetic": {**parts["arithmetic"], "points": 21}, "disentangle": {"pairs": PAIRS}}
    return collection(
        "Task arithmetic in the tangent space",
        "The quickstart's digits: nonlinear, post-hoc linearized, linearized, and linearized attention, five seeds.",
        digits=study(**parts),
    )
