"""Gradual unfreezing: what trains in every stage, by hand, and a run over all of them."""

import inspect

import jax
import numpy as np
import pytest

import jft
from jft import tree
from jft.models import ClipConfig, EncoderConfig, VisionConfig
from jft.models.clip import TextConfig
from jft.presets.gradual_unfreezing import EMBEDDINGS, FromTheTop, Unfreezing, depths, gradual_unfreezing
from jft.select.layers import Last
from tests.methods import decoder

MUTATIONS = (
    (
        "jft/presets/gradual_unfreezing.py",
        "self.last.count > max(lengths.values())",
        "self.last.count >= max(lengths.values())",
    ),
    (
        "jft/presets/gradual_unfreezing.py",
        "if all_in or not EMBEDDINGS.search(path)",
        "if all_in or EMBEDDINGS.search(path)",
    ),
    ("jft/presets/gradual_unfreezing.py", "Last(self.first + stage * self.by)", "Last(self.first + stage)"),
    ("jft/presets/gradual_unfreezing.py", "step * (last + 1) // steps", "step * last // steps"),
    ("jft/presets/gradual_unfreezing.py", "by: int = 1,\n) -> Method", "by: int = 2,\n) -> Method"),
    ("jft/presets/gradual_unfreezing.py", "    stages: int = 0,\n", "    stages: int = 4,\n"),
)
L = decoder.CONFIG.layers
DATA = decoder.batches(2)
BEHIND = {"final_norm/scale", "head/w"}


def trained(schedule, stage, shapes):
    """``(layers, whether embeddings train)`` of a stage, with all that stands behind the layers."""
    table = schedule.select(gradual_unfreezing().select, stage).layers(shapes)
    inside = {tuple(x) for p, x in table.items() if p.startswith("layers/")}
    outside = {p for p, x in table.items() if x is None}
    assert outside - {"embed/table"} == BEHIND and len(inside) <= 1
    return next(iter(inside), ()), "embed/table" in outside


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Howard and Ruder 2018: the last layer, one more each epoch, all of them in the end.
        ({}, [((3,), False), ((2, 3), False), ((1, 2, 3), False), ((0, 1, 2, 3), False), ((0, 1, 2, 3), True)]),
        ({"first": 0, "by": 2}, [((), False), ((2, 3), False), ((0, 1, 2, 3), False), ((0, 1, 2, 3), True)]),
        ({"stages": 3}, [((2, 3), False), ((1, 2, 3), False), ((0, 1, 2, 3), True)]),
    ],
)
def test_stages(options, expected):
    shapes = {p: x.shape for p, x in tree.flatten(decoder.parameters()).items()}
    method = jft.method("gradual_unfreezing", **options).fitted(decoder.parameters())
    assert [trained(method.schedule, s, shapes) for s in range(len(expected))] == expected
    # Of equal length; with `every` of that, and nothing is due after the last.
    count, steps = len(expected), 10 * len(expected)
    due = [n for n in range(steps) if method.schedule.due(n, steps)]
    assert due == list(range(10, steps, 10)) and method.schedule.stage(steps - 1, steps) == count - 1
    if "stages" not in options:
        every = jft.method("gradual_unfreezing", every=7, **options).fitted(decoder.parameters()).schedule
        assert [n for n in range(999) if every.due(n, 999)] == list(range(7, 7 * count, 7))


@pytest.mark.slow
def test_steps():
    params = decoder.parameters()
    flat = tree.flatten(params)

    def masks_at(n, w):
        embeddings = {"embed/table": True} if n == 2 else {}
        return decoder.in_layers(params, range(max(0, 3 - 3 * n), L)) | dict.fromkeys(BEHIND, True) | embeddings

    result = decoder.run(jft.method("gradual_unfreezing", every=1, by=3), 3, params, DATA)
    expected = decoder.followed(params, masks_at, 3, DATA)
    decoder.compare(result, expected, params, dict.fromkeys(flat, True))
    assert all(np.abs(expected[p] - np.asarray(flat[p])).max() > 1e-3 for p in flat)


def test_layers_and_embeddings_of_other_models():
    vision = VisionConfig(image=8, patch=4, width=8, layers=3, heads=2, hidden=16)
    text = TextConfig(vocab=11, width=8, layers=2, heads=2, hidden=16, positions=6)
    shapes = shapes_of(ClipConfig(vision, text, projection=4))
    assert depths(shapes) == {"vision/layers": 3, "text/layers": 2}
    table = FromTheTop(Last(3))(shapes)
    assert table["vision/layers/mlp/up/w"] == (0, 1, 2) and table["text/layers/mlp/up/w"] == (0, 1)
    last = {p for p in shapes if EMBEDDINGS.search(p)}
    tables = {"vision/positions/table", "text/positions/table", "text/embed/table"}
    assert last == tables | {"vision/patch/w", "vision/patch/b", "vision/cls"}
    assert not last & table.keys() and FromTheTop(Last(4))(shapes).keys() == shapes.keys()
    encoder = {
        p for p in shapes_of(EncoderConfig(vocab=11, width=8, layers=2, heads=2, hidden=16)) if EMBEDDINGS.search(p)
    }
    assert {p.split("/")[0] for p in encoder} == {"embed", "positions", "types", "embed_norm"}
    # Weights whose layers are numbered, not stacked.
    numbered = {"embedding": (9, 4), "blocks/0/w": (4, 4), "blocks/1/w": (4, 4), "out": (4, 9)}
    assert FromTheTop(Last(1))(numbered) == {"blocks/1/w": None, "out": None}
    assert FromTheTop(Last(3))(numbered) == dict.fromkeys(numbered)


def shapes_of(config):
    return {p: x.shape for p, x in tree.flatten(jax.eval_shape(config.init, jax.random.key(0))).items()}


def test_defaults():
    assert [p.default for p in inspect.signature(gradual_unfreezing).parameters.values()] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="depends on the model; give every or stages"):
        Unfreezing().due(1, 9)
    with pytest.raises(ValueError, match="carry no layers"):
        depths({"w": (2, 2)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 2, "stages": 2}, "every=2 and stages=2: give one of them"),
        ({"every": -1}, "every=-1 and stages=0"),
        ({"stages": 2, "first": 2}, "first=2 and by=1 count layers, and stages=2"),
        ({"stages": 2, "by": 3}, "first=1 and by=3 count layers, and stages=2"),
        ({"by": 0}, "first=1 and by=0 layers"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jft.method("gradual_unfreezing", **options)
