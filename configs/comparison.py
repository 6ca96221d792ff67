"""Seven methods on the quickstart's tasks at one number of trained values, five seeds each. No download.

    jft quickstart --config=configs/comparison.py --workdir=runs/comparison
    jft quickstart --config=configs/comparison.py:rates --workdir=runs/comparison_rates

Bases and tasks are those of `configs/quickstart.py`. LoRA of rank 4 sets the number of trained values, and the sparse methods
get densities that give as many. `masking` trains a score for every weight it may drop and keeps one bit of each; `full`
trains everything. Learning rates are what `:rates` finds: for every method that of the same GRID with the best score on
validation data, for the digits its mean over two of the tasks, with one seed that is none of the five.
docs/comparison.md has what came out.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from jft.analysis.study import collection, study

QUICKSTART = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))
SEEDS = (0, 1, 2, 3, 4)
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNING_SEED, TUNING_TASKS = 100, ("rotated", "parity", "docstrings")
# Digits: 9216 of 101568 values. The matrices of a layer are 64 x 64 and 64 x 256, so all of these are exact.
DIGITS = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 4},
    "block_sparse": {"name": "block_sparse", "density": 0.09375, "block": (8, 8)},
    "lift": {"name": "lift", "rank": 4, "filter_rank": 8, "every": 0},
    "spiel_ag": {"name": "spiel_ag", "density": 0.09074},
    "lt_sft": {"name": "lt_sft", "density": 0.09074, "dense_steps": 200},
    "masking": {"name": "masking", "start": "two_point", "threshold": 5e-3},
}
# Library: 10240 of 140672 values, block_sparse 1.3% more and spiel_ag 0.1% less.
LIBRARY = {
    **DIGITS,
    "block_sparse": {"name": "block_sparse", "density": 0.1, "block": (8, 8)},
    "spiel_ag": {"name": "spiel_ag", "density": 0.0728},
    "lt_sft": {"name": "lt_sft", "density": 0.08278, "dense_steps": 200},
}
RATES = {
    "digits": {
        "full": 1e-2,
        "lora": 3e-2,
        "block_sparse": 1e-1,
        "lift": 3e-2,
        "spiel_ag": 1e-2,
        "lt_sft": 1e-1,
        "masking": 1e-3,
    },
    "library": {
        "full": 3e-3,
        "lora": 1e-2,
        "block_sparse": 1e-2,
        "lift": 3e-2,
        "spiel_ag": 1e-2,
        "lt_sft": 1e-2,
        "masking": 3e-3,
    },
}


def trained(method: dict, rate: float) -> dict:
    """A method with the quickstart's optimizer at another rate."""
    return {"method": method, "optimizer": {**QUICKSTART["COSINE"], "lr": rate}}


def compared(name: str, methods: dict, tune: bool) -> ConfigDict:
    """The quickstart's study of that name with these methods: at every rate of the grid, or at the rate found."""
    parts = QUICKSTART[name]().to_dict()
    if tune:
        parts["tasks"] = {task: said for task, said in parts["tasks"].items() if task in TUNING_TASKS}
        parts["methods"] = {f"{m}_{rate:.0e}": trained(said, rate) for m, said in methods.items() for rate in GRID}
    else:
        parts["methods"] = {m: trained(said, RATES[name][m]) for m, said in methods.items()}
    parts["seeds"] = (TUNING_SEED,) if tune else SEEDS
    parts |= {"arithmetic": {"addition": False, "negation": False}, "disentangle": {}}
    return study(**parts)


def get_config(what: str = "methods") -> ConfigDict:
    if what not in ("methods", "rates"):
        raise ValueError(f"{what!r} is not one of methods, rates")
    return collection(
        "Seven methods at one number of trained values",
        "The quickstart's bases and tasks, learning rates chosen on validation data, five seeds.",
        digits=compared("digits", DIGITS, what == "rates"),
        library=compared("library", LIBRARY, what == "rates"),
    )
