"""L-LoRA: a low-rank change that the model is linear in."""

from __future__ import annotations

from typing import Literal

from jft.methods.card import Card
from jft.methods.low_rank import LowRankFixed
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.tree import Patterns, patterns

# Queries and values of self- and cross-attention; of CLIP those of the image encoder, the one that the authors train.
QUERIES_AND_VALUES = r"^(?!text/)(.*/)?(attn|cross)/[qv]/w$"

CARD = Card(
    formula=(
        "f(x; phi0) + grad_phi f(x; phi0) (phi - phi0), phi the factors a, b of W + (alpha / rank) a b, at a0 ~ "
        "U(+-1/sqrt(I)), b0 = 0: the derivative in a vanishes there, so that tau = (alpha / rank) a0 b and b alone trains"
    ),
    follows=(
        "the paper's equation, in which the model is linear in phi; linearize='modules' is the code, which wraps each LoRA "
        "module by itself in its expansion at (a0, b0): the model at W + (alpha / rank) a0 b, nonlinear in b beyond one "
        "module. Matrices, rank and alpha are the code's"
    ),
    code="tanganke/peta@db0e76f, peta/models/LinearizedModel.py, finetune_clip.py:97, finetune_lm.py:113, config/",
    departs=(
        "no dropout between x and a (code: 0.1). With linearize='model', the default, b differs from the code's by 1.4 % after "
        "5 steps and 14 % after 60 on a small classifier"
    ),
    check="outputs and three Adam steps of both readings against float64 NumPy with forward and reverse mode by hand",
    defaults={
        "rank": ("-", "16; 8 for t5-base"),
        "alpha": ("-", 32),
        "linearize": ("model", "modules"),
        "include": ("-", "q and v of attention (the released CLIP config misspells v_proj, so that q alone trains)"),
    },
)


@register("l_lora", paper="Tang et al. 2023, arXiv:2310.04742", card=CARD)
def l_lora(
    rank: int = 16,
    alpha: float = 32.0,
    linearize: Literal["model", "modules"] = "model",
    include: Patterns = (QUERIES_AND_VALUES,),
) -> Method:
    """Train a low-rank change of the attention's queries and values that the model, or each module, is linear in.

    linearize: ``model``, the paper's equation: outputs are the first-order expansion of the model in its factors at their
    start. There ``b`` is zero, so that the derivative in ``a`` is: tau is ``(alpha / rank) a0 b``, with ``a0`` as LoRA draws
    it, and outputs are linear in what trains. ``modules``, the authors' code: each adapted product by itself is so expanded,
    ``x (W + (alpha / rank) a0 b)``, and the model stays nonlinear in what trains. Both agree at the start and to first order
    in b. include: the matrices, part of the method; other patterns (``""``: all inside the layers) replace queries and
    values. ``lora`` with ``forward="linearized"`` trains both factors: linear in tau, not in them.
    """
    if linearize not in ("model", "modules"):
        raise ValueError(
            f"linearize is {linearize!r}; 'model' expands the whole model, 'modules' each adapted product alone"
        )
    # b is zero at the start, so the derivative in a vanishes there: training b alone is the whole expansion.
    train = LowRankFixed(rank, float(alpha))
    forward: Literal["standard", "linearized"] = "linearized" if linearize == "model" else "standard"
    return Method(Select(patterns(include), linear_only=True), train, forward=forward)
