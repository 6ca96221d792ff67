"""Shapes of well-known models, without their weights, on which costs depend."""

from __future__ import annotations

from typing import Any

from jft.models import DecoderConfig
from jft.models.rope import Rope

MODELS: dict[str, Any] = {
    # Ben Allal et al. 2025, arXiv:2502.02737: SmolLM2-135M.
    "smollm2-135m": lambda: DecoderConfig(
        vocab=49152, width=576, layers=30, heads=9, kv_heads=3, hidden=1536, tied=True, rope=Rope(theta=100000.0)
    ),
    # Grattafiori et al. 2024, arXiv:2407.21783: Llama 3 8B.
    "llama3-8b": lambda: DecoderConfig(
        vocab=128256, width=4096, layers=32, heads=32, kv_heads=8, hidden=14336, rope=Rope(theta=500000.0)
    ),
    "tiny": lambda: DecoderConfig(vocab=256, width=64, layers=2, heads=4, hidden=128, tied=True),
}
