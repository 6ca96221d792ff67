"""LocFT-BF: the published location, and steps in it."""

import inspect

import jft
from jft.presets.locft_bf import LOCATION, locft_bf
from tests.methods import decoder

MUTATIONS = (
    ("jft/presets/locft_bf.py", "Between(22 / 32, 23 / 32)", "Between(21 / 32, 22 / 32)"),
    ("jft/presets/locft_bf.py", '(r"mlp/down/",)', '(r"mlp/up/",)'),
    ("jft/presets/locft_bf.py", "tuple(layers) or LOCATION", "LOCATION"),
)


def test_the_default_is_that_of_llama():
    """hparams/llama3-8b.yaml: layer 22, mlp.down_proj."""
    assert LOCATION.of(32) == (22,) and LOCATION.of(28) == (19,) and LOCATION.of(4) == (2,) and LOCATION.of(1) == (0,)
    select = locft_bf().select
    assert select.layers == LOCATION and select.include == ("mlp/down/",)
    assert [p.default for p in inspect.signature(locft_bf).parameters.values()] == [(), ("mlp/down/",)]


def test_steps():
    params, data = decoder.parameters(), decoder.batches(2)
    masks = decoder.in_layers(params, (1,), lambda p: "mlp/down" in p)
    decoder.check(jft.method("locft_bf", layers=(1,)), lambda n, w: masks, params, data, steps=(2,))
