"""What stands before and behind the layers trains."""

from __future__ import annotations

from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select


@register("embeddings_and_output", paper="-")
def embeddings_and_output() -> Method:
    """Train what embeds the input and the output head, nothing inside the layers."""
    return Method(
        Select(include=(r"(^|/)(table|cls)$|(^|/)(patch|head|classifier)/",), exclude=("layers/",)), InPlace()
    )
