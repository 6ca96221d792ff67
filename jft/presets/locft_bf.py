"""LocFT-BF: one module of one layer, for model editing."""

from __future__ import annotations

from collections.abc import Sequence

from jft.methods import Card
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.select.layers import Between
from jft.tree import Patterns, patterns

# Layer 22 of the 32 of Llama-3-8B.
LOCATION = Between(22 / 32, 23 / 32)
CARD = Card(
    formula="one module of one layer trains, on epochs of shuffled mini-batches over all edits",
    follows="the authors' code for Llama-3-8B: mlp.down_proj of layer 22 of 32; other depths take the same share of theirs",
    check="the published layer, others by hand; one and three Adam steps against float64",
    code="ICT-STAR/LocFT@51db785, hparams/ and fine-tune.py",
    departs="the code has a location for each model: down_proj of layer 6 of 28 for Qwen2.5-7B, all of layer 23 of 32 for "
    "Mistral-7B: give them. Its 25 epochs of batches of 100 with Adam (5e-4; Mistral 5e-5), its end at a loss below .01 and "
    "the end-of-sequence token after each target are the run's and the data's",
    defaults={
        "layers": ("one for each model", "22 | 23 | 6"),
        "modules": ("one for each model", "down_proj | all | down_proj"),
    },
)


@register("locft_bf", paper="Yang et al. 2025, arXiv:2509.22072", card=CARD)
def locft_bf(layers: Sequence[int] = (), modules: Patterns = (r"mlp/down/",)) -> Method:
    """Train one module of one layer, on mini-batches over all edits.

    The breadth-first half of the method is how jft trains anyway: epochs of shuffled mini-batches over the whole set of
    edits, in place of each edit to convergence. layers, modules: the location, which the authors find for each model by
    comparison; the default is theirs of Llama-3-8B, the MLP's down projection at 22/32 of the depth. The loss is on the
    target tokens.
    """
    # A location by depth, so that other models get the corresponding layer.
    return Method(Select(patterns(modules), layers=tuple(layers) or LOCATION), InPlace())
