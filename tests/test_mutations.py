"""The lists of mutations say what is there; whether tests notice them is for ``python tests/mutate.py``."""

import pytest

from tests.mutate import ROOT, mutated, mutations


@pytest.mark.parametrize("module", sorted({m.module for m in mutations()}))
def test_mutations_apply(module):
    for mutation in mutations([ROOT / module]):
        compile(mutated(mutation), mutation.file, "exec")
