"""SpIEL-AG: entries that drop, and grow by accumulated gradients."""

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
        "k = int(int(density P) n / N) random entries of each matrix, n its size, N that of all matrices inside layers, P of "
        "the model. Before updates 5, 25, 45, ... p k entries of smallest |delta| may go, p = 1 at first, then first (1 - t / "
        "T); candidates are the top k of |g_1| but for the other (1 - p) k; the p k of largest |g_1 + ... + g_5| win; winners "
        "that did not train start at the base with Adam's moments (1 - b1^5) mean(g), (1 - b2^5) mean(g^2), in place of as "
        "many losers of smallest |delta|"
    ),
    follows="Paper: drop by |delta|, grow by accumulated gradients. Code: every number, who competes, when, and the moments.",
    code="AlanAnsell/peft@73b455b480c5a93ec17ff0e817f946df5899b2af, src/peft/tuners/sft/trainer.py, optimizer.py, model.py",
    departs=(
        "Gradients are of the `batches` batches that the run is about to train on, at the weights of that moment; the code's "
        "are those of the updates just made, of 5 batches the first time and of 6 later, at the weights as they moved. Adam's "
        "count starts at 1 in the code, so that a newcomer's first step is 4.5% larger there. Decay is to zero unless "
        "optimizer.decay_to is 'base', which is the paper's."
    ),
    defaults={"density": ("-", 0.01), "every": ("-", 20), "first": ("-", 0.2), "batches": ("-", 5)},
    check="selections, moments and eight steps through two reselections against float64 NumPy, dropped entries winning again",
)


@register("spiel_ag", paper="Ansell et al. 2024, arXiv:2401.16405", card=CARD)
def spiel_ag(
    density: float = 0.01,
    every: int = 20,
    first: float = 0.2,
    batches: int = 5,
) -> Method:
    """Train entries of every matrix that start at random; drop what changed least, grow what has the largest gradient.

    density: of all of the model's parameters, spread evenly over the matrices inside layers. every, first, batches: see
    :class:`jft.methods.schedules.DropAndGrow`; gradients are accumulated over ``batches`` batches, and entries first replaced,
    all of them, before update ``batches``. The paper decays towards the base: ``optimizer.decay_to='base'``. Differs from the
    released code in where gradients come from: the batches that the run is about to train on, at the weights of that moment.
    """
    each = budget.PerMatrix(density=density, of="model")
    select = Select(linear_only=True, score=scores.Random(), budget=each)
    return Method(select, InPlace(), schedule=DropAndGrow(every, first, batches, "gradient"))
