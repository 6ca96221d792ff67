"""Precise SFT: heads by path patching, one pass for each, and steps of their slices in float64 NumPy."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.dot import dot
from jft.models import Hooks
from jft.presets.precise_sft import precise_sft
from jft.select import heads
from jft.train import run_config
from tests.methods import decoder

DATA = decoder.batches()
L, H, G, K = 4, 4, 2, 2
O, V, DOWN, UP, GATE = (f"layers/{n}/w" for n in ("attn/o", "attn/v", "mlp/down", "mlp/up", "mlp/gate"))  # noqa: E741
PRODUCTS = ("layers/attn/o", "layers/mlp/down")
MUTATIONS = (
    ("jft/presets/precise_sft.py", "heads: float = 0.05,\n    mlps", "heads: float = 0.1,\n    mlps"),
    ("jft/presets/precise_sft.py", "chosen = top(of_heads, wanted)", "chosen = top(of_heads, wanted, False)"),
    ("jft/presets/precise_sft.py", "freeze=self.freeze, mlps", "freeze=not self.freeze, mlps"),
    ("jft/presets/precise_sft.py", "jnp.any(mask.reshape", "jnp.all(mask.reshape"),
    ("jft/select/heads.py", "jnp.roll(x, -1, axis=0)", "jnp.roll(x, 0, axis=0)"),
)


@pytest.fixture(scope="module")
def params():
    return decoder.parameters()


def best(score, count):
    """Bool mask of the ``count`` largest of each row; ties: the lower."""
    order = np.argsort(-score, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


@jax.jit
def products(params, tokens):
    """What goes into the products that heads and MLPs write by, ``{name: [L, B, T, ...]}``."""
    read = lambda name, x, w, state: (dot(x, w), x if name in PRODUCTS else None)
    return decoder.MODEL.apply(params, {"tokens": tokens}, Hooks(product=read))[1]


@functools.partial(jax.jit, static_argnums=2)
def right_logit(params, tokens, name, parts, other, clean):
    """Sum of the right next tokens' logits with ``parts[L, width]`` of one product's input from ``other``, other heads held."""

    def product(at, x, w, index):
        if index is None:
            return dot(x, w), None
        x = clean[at][index] if at == PRODUCTS[0] else x
        return dot(jnp.where(parts[index], other[at][index], x) if at == name else x, w), None

    state = {at: jnp.arange(L) for at in PRODUCTS}
    logits = decoder.MODEL.apply(params, {"tokens": tokens}, Hooks(product=product, state=state))[0]
    return jnp.sum(jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1))


def falls(params, name, groups):
    """``[L, groups]``: by how much the right logits fall when one part says what it says on the next example."""
    tokens = jnp.asarray(DATA[0]["tokens"])
    clean, other = products(params, tokens), products(params, jnp.roll(tokens, -1, axis=0))
    width = clean[name].shape[-1]
    before = right_logit(params, tokens, name, jnp.zeros((L, width), bool), other, clean)
    out = np.zeros((L, groups))
    for layer, part in np.ndindex(L, groups):
        parts = np.zeros((L, width), bool)
        parts[layer, part * width // groups : (part + 1) * width // groups] = True
        out[layer, part] = before - right_logit(params, tokens, name, parts, other, clean)
    return out


@pytest.mark.parametrize("mlps", [0, 1])
def test_precise_sft_trains_the_slices_of_the_chosen_heads(mlps, params):
    chosen = best(falls(params, "layers/attn/o", H).ravel(), 3).reshape(L, H)
    queries, groups = np.repeat(chosen, K, 1), np.repeat(chosen.reshape(L, G, -1).any(2), K, 1)
    masks = {
        "layers/attn/q/w": queries[:, None], "layers/attn/k/w": groups[:, None], V: groups[:, None],
        O: queries[:, :, None],
    }  # fmt: skip
    if mlps:
        layer = best(falls(params, "layers/mlp/down", 1).ravel(), 1)[:, None, None]
        masks |= {UP: layer, GATE: layer, DOWN: layer}
    method = jft.method("precise_sft", heads=0.2, mlps=mlps)
    decoder.check(method, lambda n, w: masks, params, DATA, steps=(3,) if mlps else (1, 3))


def test_defaults():
    """The paper: fewer than 5% of the heads, by patching along paths through no other head."""
    defaults = {p.name: p.default for p in inspect.signature(precise_sft).parameters.values()}
    assert defaults == {"heads": 0.05, "mlps": 0, "batches": 1, "counterfactual": heads.rolled, "freeze": True}


def test_a_run_is_told_by_what_does_not_change_between_processes():
    method = jft.method("precise_sft")
    said = run_config._json(method.options)
    assert said["counterfactual"] == "jft.select.heads.rolled" and "0x" not in str(said)
