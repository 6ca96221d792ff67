"""Masking: which weights are there is what trains."""

from __future__ import annotations

from jft.methods.masks import Masked
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("masking", paper="Zhao et al. 2020, arXiv:2004.12406")
def masking(
    sparsity: float = 0.05,
    threshold: float = 5e-3,
    margin: float = 5e-3,
) -> Method:
    """Train which weights of the matrices inside the layers are there; their values stay. One bit for each is stored.

    sparsity: the fraction masked at random at the start (the paper's best is about 0.05). threshold, margin: scores start at
    ``threshold`` plus or minus ``margin``. The paper also masks the pooler and the classifier.
    """
    return Method(Select(linear_only=True), Masked(None, sparsity, threshold, margin))
