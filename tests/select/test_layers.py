"""Layers by depth: indices written out."""

import pytest

from jft.select.layers import Between, Last, Spaced


@pytest.mark.parametrize(
    ("chosen", "length", "expected"),
    [
        (Spaced(0.25), 32, tuple(range(0, 32, 4))),
        (Spaced(0.25, ends=True), 32, (0, 4, 9, 13, 18, 22, 27, 31)),
        (Spaced(0.01), 4, (0,)),
        (Last(3), 2, (0, 1)),
        (Last(share=(1, 4)), 6, (4, 5)),
        (Between(0.25, 0.5), 8, (2, 3)),
        (Between(0.25, 0.5), 1, (0,)),
    ],
)
def test_layers_by_depth(chosen, length, expected):
    assert chosen.of(length) == expected
