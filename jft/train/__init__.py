"""Training: one loop for every method, from a base to a task vector."""

from jft.train.evaluation import evaluate
from jft.train.finetune import finetune
from jft.train.metrics import Logging
from jft.train.objectives import Objective, objective, objectives
from jft.train.optimizers import Optimizer, optimizer
from jft.train.preemption import Preempted
from jft.train.run_config import Profiling
from jft.train.state import State
from jft.train.training import FinishedError, NonFiniteError, Run

__all__ = [
    "FinishedError",
    "Logging",
    "NonFiniteError",
    "Objective",
    "Optimizer",
    "Preempted",
    "Profiling",
    "Run",
    "State",
    "evaluate",
    "finetune",
    "objective",
    "objectives",
    "optimizer",
]
