"""`reasoning_gym`: questions with answers that can be checked, from the generators of the library of that name."""

from __future__ import annotations

from typing import Any

from jft.data.errors import DataError, hint
from jft.data.source import Source


class ReasoningGym(Source):
    """Records ``{"question", "answer"}`` of a generator of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760).

    name: of the generator (``chain_sum``, ``gsm_symbolic`` ...); size: how many; generator_seed: another one gives other
    questions, such as those to evaluate on. options: the generator's own settings. Records are made when they are read, the
    same at each time. Raises :class:`DataError` without the library, and for an unknown name or setting.
    """

    def __init__(self, name: str, size: int = 2000, generator_seed: int = 0, options: dict[str, Any] | None = None):
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise DataError(f"reasoning_gym: {error}; pip install reasoning-gym") from None
        if name not in DATASETS:
            raise DataError(f"reasoning_gym: there is no generator {name!r}.{hint(name, DATASETS)}")
        try:
            self.made = reasoning_gym.create_dataset(name, size=size, seed=generator_seed, **(options or {}))
        except (TypeError, AssertionError) as error:
            raise DataError(f"reasoning_gym ({name}): {error}") from None
        self.name = f"reasoning_gym ({name}, seed {generator_seed})"

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.made[index]
        return {"question": entry["question"], "answer": str(entry["answer"])}

    def where(self, index: int) -> str:
        return f"{self.name}, question {index}"
