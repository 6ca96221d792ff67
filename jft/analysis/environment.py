"""The environment of a run, for its report: versions, devices, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in ("jft", "jax", "optax", "numpy", "scikit-learn")
    }


def devices() -> str:
    """``"8 x TPU v5 lite"``, or ``"1 x CPU with 2 cores"``."""
    import jax

    all_devices = jax.devices()
    cpu = all_devices[0].platform == "cpu"
    return f"{len(all_devices)} x " + (f"CPU with {os.cpu_count()} cores" if cpu else all_devices[0].device_kind)


def commit() -> str | None:
    """The commit of the checkout that jft runs from, marked where files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    # Only a checkout of jft: installed inside another project's, git would describe that one.
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            # --exclude=*: the commit itself, whatever tags there are.
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def now() -> str:
    """The time in UTC, to the minute."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
