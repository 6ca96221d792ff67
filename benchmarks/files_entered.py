"""Which files of jft a run enters: how many a reader passes who follows one step of block-sparse fine-tuning.

    python benchmarks/files_entered.py

A one-step ``jft.finetune`` of a small decoder by ``block_sparse`` runs under a profile function that notes the file of every
function of jft that is called, and so does one trace of its step. Importing is not counted. Prints both lists.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jft
from jft.methods import method
from jft.models import DecoderConfig, Model
from jft.train import finetune, step

ROOT = Path(jft.__file__).parent
BATCH = {"tokens": np.arange(24, dtype=np.int32).reshape(4, 6) % 13}


@contextmanager
def entered() -> Iterator[set[str]]:
    """The files of jft whose functions are called meanwhile; module bodies and comprehensions of other code aside."""
    found: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and frame.f_code.co_name != "<module>" and path.startswith(str(ROOT)):
            found.add(str(Path(path).relative_to(ROOT.parent)))

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def run(width: int) -> None:
    """One step of block-sparse fine-tuning, from a name to a task vector."""
    model = Model(DecoderConfig(vocab=13, width=width, layers=2, heads=2, hidden=2 * width))
    params = model.init(jax.random.key(0))
    blocks = method("block_sparse", density=0.5, block=(4, 4))
    finetune(model, params, [BATCH], steps=1, method=blocks, log={"progress": False})


def files() -> tuple[set[str], set[str]]:
    """Files that a one-step run enters, and files that one trace of its step does."""
    traced: set[str] = set()
    function = step.step

    def watched(*arguments: Any) -> Any:
        before = sys.getprofile()
        with entered() as found:
            out = function(*arguments)
        sys.setprofile(before)
        traced.update(found)
        return out

    run(width=8)  # what is imported late, so that what follows enters functions alone
    step.step = watched
    try:
        with entered() as whole:
            run(width=16)
    finally:
        step.step = function
    return whole | traced, traced


if __name__ == "__main__":
    whole, traced = files()
    for name, found in (("finetune", whole), ("step", traced)):
        print(f"{name}: {len(found)} files")
        for path in sorted(found):
            print(f"    {path}")
