"""`Card`: what a preset computes, held against its paper and the code that its authors released."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Card:
    """The sources of a preset and where it follows which; ``jft methods NAME`` and docs/methods.md print it.

    formula: what is computed, in plain text with its symbols said. code: where the authors' code is, as
    ``owner/name@commit, file``; empty where none is public. follows: which of paper and code each choice is from. departs:
    where the preset computes something else, by how much and why; empty where nowhere. defaults: for each option ``(paper,
    code)``, a value or ``"-"`` where the source is silent; the preset's own default stands in its signature. check: what
    its test compares with what.
    """

    formula: str
    follows: str
    check: str
    code: str = ""
    departs: str = ""
    defaults: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
