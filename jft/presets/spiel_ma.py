"""SpIEL-MA: entries that drop, and grow by the momentum of SM3."""

from __future__ import annotations

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.schedules import DropAndGrow
from jft.methods.select import Select
from jft.select import budget, scores

CARD = Card(
    formula=(
        "As spiel_ag, but p k entries of smallest |delta| go, and those of largest row_i column_j come among all that did not "
        "train; nu = min(row, column) + g^2, row = max of nu over columns, column = max over rows; moments start at 0"
    ),
    follows="Paper: growth by SM3's accumulators. Code: every number, who competes, and when.",
    code="AlanAnsell/peft@73b455b480c5a93ec17ff0e817f946df5899b2af, src/peft/tuners/sft/trainer.py, optimizer.py",
    departs=(
        "The code trains by SM3, and its accumulators are the optimizer's: of the active entries' gradients alone, since the "
        "run began. Here the run's optimizer is any, Adam by default, and the accumulators are made anew at each reselection, "
        "from the gradients of all entries over `batches` batches at the weights of that moment."
    ),
    defaults={"density": ("-", 0.01), "every": ("-", 20), "first": ("-", 0.2), "batches": ("-", 5)},
    check="accumulators, selections and eight steps through two reselections against float64 NumPy",
)


@register("spiel_ma", paper="Ansell et al. 2024, arXiv:2401.16405", card=CARD)
def spiel_ma(
    density: float = 0.01,
    every: int = 20,
    first: float = 0.2,
    batches: int = 5,
) -> Method:
    """As spiel_ag, growing by the momentum that SM3 keeps in one number per row and column: ``row * column``.

    The released code's accumulators are those of its optimizer, SM3, which sees gradients of active entries since the run
    began. Here they are made anew at each reselection, from the gradients of all entries over ``batches`` batches, and the
    optimizer is the run's own.
    """
    each = budget.PerMatrix(density=density, of="model")
    select = Select(linear_only=True, score=scores.Random(), budget=each)
    return Method(select, InPlace(), schedule=DropAndGrow(every, first, batches, "sm3"))
