"""LocFT-BF: one module of one layer, for model editing."""

from __future__ import annotations

from collections.abc import Sequence

from jft.methods.parametrise import InPlace
from jft.methods.patterns import Patterns, patterns
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("locft_bf", paper="Yang et al. 2025, arXiv:2509.22072")
def locft_bf(layers: Sequence[int] = (-1,), modules: Patterns = (r"mlp/down/",)) -> Method:
    """Train one module of one layer, on mini-batches over all edits.

    The breadth-first half of the method is how jft trains anyway: epochs of shuffled mini-batches over the whole set of
    edits, in place of each edit to convergence. layers, modules: the location, which the paper finds for each model by
    comparison; its abstract does not name it, and the default is only an example. The loss is on the target tokens.
    """
    return Method(Select(patterns(modules), layers=tuple(layers)), InPlace())
