"""Sparse matrix tuning: the blocks with the largest gradient."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select import budget, granularity
from jft.select.calibration import Calibration
from jft.select.scores import Scores

POOLS = ("mean_abs", "abs_mean", "l2")


@dataclasses.dataclass(frozen=True)
class MeanGradient:
    """The mean over ``batches`` of g with its sign, which orders blocks as the sum does."""

    batches: int

    def __call__(self, calibration: Calibration) -> Scores:
        return calibration.gradient(self.batches)


CARD = Card(
    formula=(
        "G = sum over 100 batches of g; score of a 256 x 256 block: |mean of G over it|; the int(attention P / 256^2) best "
        "blocks of all q, k, v and the int(mlp P / 256^2) best of all MLP matrices train, P the parameters in all matrices of "
        "the model, embeddings and head among them"
    ),
    follows=(
        "Paper: blocks by gradient, competing over layers, attention and MLP apart. Code: which matrices, |mean| (its "
        "default, its PEFT script, and its attention path whatever the option), fractions of all matrices, the MLP off by "
        "default."
    ),
    code=(
        "HectorHHZ/Sparse_Matrix_Tuning@31c5ff6b2f6bef20ab1e9e14d844b39fb7363eed, deepspeed/fine_tune.py, "
        "deepspeed/smt/smt_helper.py, peft/run_smt_deepspeed.sh"
    ),
    departs=(
        "The code sums gradients over 100 steps of full fine-tuning and goes on from the weights these lead to; here all are "
        "taken at the base, which needs no optimizer state of the whole model and trains nothing outside the blocks. pool "
        "goes for both kinds; the code's option reaches the MLP alone. Its L1 orders blocks as abs_mean does. Its README's "
        "run of a Llama 8B has mlp=0.0084 and abs_mean. Its mode for channels, whose gradient lands in the wrong rows, is not "
        "offered."
    ),
    defaults={
        "attention": ("0.84% of the model", 0.0084),
        "mlp": ("-", "-1, which is none"),
        "block": ((256, 256), (256, 256)),
        "batches": (100, 100),
        "pool": ("-", "mean_abs"),
    },
    check="blocks and three steps on a decoder against float64 NumPy, with equal and with different fractions",
)


@register("smt", paper="He et al. 2024, arXiv:2405.15525", card=CARD)
def smt(
    attention: float = 0.0084,
    mlp: float = 0.0,
    block: tuple[int, int] = (256, 256),
    batches: int = 100,
    pool: Literal["mean_abs", "abs_mean", "l2"] = "mean_abs",
) -> Method:
    """Train the blocks of q, k, v and of the MLP whose gradient, summed over 100 batches, is largest.

    attention, mlp: the parameters of the blocks of each kind as a fraction of those in all of the model's matrices,
    embeddings among them; rounded down to whole blocks, at least one; 0 for none. Blocks of a kind compete over all layers,
    and never with the other kind. pool: of the summed gradient over a block, ``mean_abs`` the size of its mean,
    ``abs_mean`` its mean size, or ``l2``. Gradients are all taken at the base; the code sums them over 100 steps of full
    fine-tuning and goes on from there. For channels take block_sparse with a row as the block.
    """
    if not attention and not mlp:
        raise ValueError("smt with attention and mlp both 0 trains nothing; give one of them a fraction")
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r} is none of smt's; choose one of {', '.join(POOLS)}")
    kinds = (("(^|/)attn/[qkv]/", attention), ("(^|/)mlp/", mlp))
    parts = tuple((path, budget.Globally(density=fraction, of="matrices")) for path, fraction in kinds if fraction)
    select = Select(
        ("|".join(path for path, _ in parts),),
        linear_only=True,
        score=MeanGradient(batches),
        granularity=granularity.Block(*block),
        pool=pool,
        budget=budget.ByPattern(parts),
    )
    return Method(select, InPlace())
