"""Text from language models: prompts continued with a cache of keys and values, greedily or by sampling."""

from jft.generation.sampling import Sampling
from jft.generation.text import generate

__all__ = ["Sampling", "generate"]
