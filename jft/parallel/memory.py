"""Device memory of a compiled program, and remedies where it is more than a device has."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

GIB = 2**30
ENVIRONMENT = "JFT_DEVICE_MEMORY"
HBM = {
    "TPU v4": 32 * GIB,
    "TPU v5 lite": 16 * GIB,
    "TPU v5": 95 * GIB,
    "TPU v5p": 95 * GIB,
    "TPU v6 lite": 32 * GIB,
}
"""Bytes per device by ``device_kind``, for the devices of a topology, which cannot be asked (Google Cloud TPU docs)."""


class MemoryBudgetError(ValueError):
    """A compiled program needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device, as the compiler planned them.

    arguments and outputs: what goes in (parameters, optimizer state, batch) and comes out. aliased: outputs that reuse
    donated arguments. temporaries: activations, gradients and buffers of the program. code: the program.
    ``total = arguments + outputs - aliased + temporaries + code`` is what must fit.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int = 0

    @property
    def total(self) -> int:
        """Peak bytes on each device."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code

    def asdict(self) -> dict[str, int]:
        """The fields and ``total``, in bytes, for JSON."""
        return {**dataclasses.asdict(self), "total": self.total}

    def __str__(self) -> str:
        return (
            f"{human(self.total)} per device: arguments {human(self.arguments)}, temporaries {human(self.temporaries)}, "
            f"outputs {human(self.outputs - self.aliased)} beyond the {human(self.aliased)} donated, code {human(self.code)}"
        )


def human(size: float) -> str:
    """Bytes as people read them: ``12.3 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def estimate(compiled: Any) -> MemoryEstimate:
    """Memory of ``jitted.lower(...).compile()`` on each device; ``ValueError`` where the backend does not tell."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend gives no memory analysis of a compiled program")
    return MemoryEstimate(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        # -1 where the backend does not know.
        code=max(stats.generated_code_size_in_bytes, 0),
    )


def plan(lowered: Any) -> MemoryEstimate:
    """Compile ``jitted.lower(...)`` for its estimate alone, also where the compiler refuses because it does not fit.

    The TPU compiler stops at a program larger than the chip and names only the bytes that broke the limit; these are then
    the ``temporaries``, a lower bound of the total.
    """
    try:
        with warnings.catch_warnings():
            # JAX caches programs for a compile-only topology, but cannot read them back: it warns and compiles again.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache", UserWarning)
            return estimate(lowered.compile())
    except Exception as error:
        bound = refusal(error)
        if bound is None:
            raise
        return bound


def refusal(error: Exception) -> MemoryEstimate | None:
    """The memory that a compiler's error names for a program larger than the device; None for any other error."""
    # The two wordings of XLA.
    needed = re.search(r"(?:memory required for [\w ]+?|Used) \(?([\d.]+ ?[KMGT])", str(error))
    # Both, as other errors speak of memory too.
    if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
        return None
    # XLA writes binary units without "iB".
    return MemoryEstimate(arguments=0, outputs=0, aliased=0, temporaries=parse_bytes(needed[1] + "iB"))


def device_budget(device: Any = None) -> int | None:
    """Bytes that programs may use on ``device`` (default: the first local one), or None where nobody knows.

    The environment variable ``JFT_DEVICE_MEMORY`` (``16GiB``, ``80GB`` or bytes) decides where it is set; else the
    device's own ``bytes_limit``; else, for the devices of a compile-only topology, the memory of that kind of chip; for a
    processor its share of :func:`host_memory`, as the devices of a process lie in one memory.
    """
    text = os.environ.get(ENVIRONMENT)
    if text:
        return parse_bytes(text)
    if device is None:
        import jax

        device = jax.local_devices()[0]
    try:
        stats = device.memory_stats()
    except Exception:  # compile-only devices raise a backend-specific error: they have no memory to ask
        stats = None
    if stats and stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    if getattr(device, "platform", "") == "cpu" and (memory := host_memory()):
        import jax

        return memory // jax.local_device_count("cpu")
    return HBM.get(getattr(device, "device_kind", ""))


def host_memory(root: str = "/") -> int | None:
    """Bytes that this process may use: of the machine, or of its control groups (v1 and v2) where they allow less.

    None where the system does not tell. root: of ``proc`` and ``sys``.
    """
    proc, groups = Path(root, "proc"), Path(root, "sys/fs/cgroup")
    limits = [int(n) * 1024 for n in re.findall(r"^MemTotal: +(\d+) kB$", _text(proc / "meminfo"), re.MULTILINE)]
    for line in _text(proc / "self/cgroup").splitlines():
        _, controllers, group = line.split(":", maxsplit=2)
        # Version 2 has one hierarchy, without names of controllers.
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        inside = top / group.strip("/")
        # A limit of a group above holds as well; in a container only the top is to be seen.
        for folder in (inside, *inside.parents):
            limits += [int(n) for n in re.findall(r"^\d+$", _text(folder / name), re.MULTILINE)]
            if folder == top:
                break
    return min(limits, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def parse_bytes(text: str) -> int:
    """``16GiB``, ``80 GB``, ``1.5TiB`` or a plain number of bytes, as an integer."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a number of bytes; write it like 16GiB, 80GB or 17179869184")
    number, prefix, binary = match.groups()
    power = 1 + "KMGT".index(prefix.upper()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def check(
    compiled: Any,
    budget: int | None,
    remedies: Iterable[tuple[str, int]] | Callable[[], Iterable[tuple[str, int]]] = (),
) -> MemoryEstimate:
    """The estimate of ``compiled``, refused where its total exceeds ``budget`` bytes per device (None: never).

    remedies: (description, total bytes with it), in the order of what they cost the user, cheapest first; or a function
    that returns them, called only when they are needed, as each figure usually takes a compilation. Raises
    :class:`MemoryBudgetError` naming the first three that fit or, where none does, the three that come nearest.
    """
    memory = compiled if isinstance(compiled, MemoryEstimate) else estimate(compiled)
    if budget is None or memory.total <= budget:
        return memory
    options = list(remedies() if callable(remedies) else remedies)
    fitting = [option for option in options if option[1] <= budget][:3]
    if fitting:
        advice = "; any of these fits: " + _list(fitting)
    elif options:
        advice = "; nothing tried fits by itself, nearest: " + _list(sorted(options, key=lambda option: option[1])[:3])
    else:
        advice = "; use a larger mesh, a smaller batch, or remat"
    raise MemoryBudgetError(
        f"the step needs {memory}, but a device has {human(budget)} ({ENVIRONMENT} overrides){advice}"
    )


def _list(options: list[tuple[str, int]]) -> str:
    return ", ".join(f"{description} ({human(size)})" for description, size in options)
