"""Seconds of a program compiled for a TPU, by the compiler's own cycles: an estimate without a chip.

XLA writes into a compiled program how many cycles it takes each fusion, product and copy to last. Their sum, each loop's body
times its passes and the longest branch of a condition, over the clock, is what is told here. Transfers between chips are left
out, as if they were hidden behind the rest; so is what a core waits for memory beyond XLA's reckoning. Pallas kernels, of which
XLA knows nothing, last as long as their FLOPs at the rate of their inner loop, or their bytes at that of the memory.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple


class Chip(NamedTuple):
    """clock: cycles a second. flops: a second, of the kernels' inner loops (`jft bench kernels`). bandwidth: bytes a second."""

    clock: float
    flops: float
    bandwidth: float


# 27.4 GFLOP in 166 us of bundles, and in 143 us of one of a v5p's two cores; bandwidths are the published ones.
CHIPS = {"v5e": Chip(1.503e9, 165e12, 819e9), "v5p": Chip(1.75e9, 192e12, 2765e9)}

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-<>]+) \(.*\{$")
_CALLED = re.compile(r"(?:to_apply|calls)=%?([\w.\-<>]+)")


def seconds(text: str, chip: Chip) -> float:
    """The estimate for a compiled program's text."""
    return _Program(text, chip).cycles(_entry(text)) / chip.clock


def _entry(text: str) -> str:
    found = re.search(r"^ENTRY %?([\w.\-<>]+) ", text, re.MULTILINE)
    assert found is not None, "a program has an entry"
    return found[1]


class _Program:
    def __init__(self, text: str, chip: Chip):
        self.chip = chip
        self.computations: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                lines = self.computations.setdefault(header[1], [])
            elif line.startswith("  "):
                lines.append(line)
        self.cycles = functools.cache(self._cycles)

    def _cycles(self, name: str) -> float:
        return sum(self._instruction(line) for line in self.computations.get(name, ()))

    def _instruction(self, line: str) -> float:
        if " while(" in line:
            condition, body = (re.search(rf"{part}=%?([\w.\-<>]+)", line) for part in ("condition", "body"))
            assert condition and body, "a loop has a condition and a body"
            return self._passes(condition[1]) * self.cycles(body[1])
        if " conditional(" in line:
            branches = re.findall(r"%([\w.\-<>]+)", line.split("_computation", 1)[1].split("metadata", 1)[0])
            return max((self.cycles(branch) for branch in branches), default=0)
        if 'custom_call_target="tpu_custom_call"' in line:
            flops, moved = (
                float(found[1]) if (found := re.search(rf'"{what}":"?(\d+)', line)) else 0.0
                for what in ("flops", "bytes_accessed")
            )
            return max(flops / self.chip.flops, moved / self.chip.bandwidth) * self.chip.clock
        told = re.search(r'"estimated_cycles":"(\d+)"', line)
        if told:
            return float(told[1])
        called = _CALLED.search(line) if " call(" in line or " fusion(" in line else None
        return self.cycles(called[1]) if called else 0.0

    def _passes(self, condition: str) -> int:
        """The largest constant that a loop's counter is compared with."""
        lines = " ".join(self.computations.get(condition, ()))
        called = _CALLED.search(lines)
        if called:
            lines += " ".join(self.computations.get(called[1], ()))
        return max((int(n) for n in re.findall(r"constant\((\d+)\)", lines)), default=1)
