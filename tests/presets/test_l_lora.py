"""L-LoRA in both readings against float64 NumPy: the model linear in b, and each adapted product linear in b."""

import jax
import numpy as np
import pytest

import jft
from jft import delta, tree
from jft.models import ClipConfig, DecoderConfig, T5Config, VisionConfig
from jft.models.clip import TextConfig
from tests.methods import stack
from tests.methods.low_rank import LINEAR, Moments, W, factors, turned
from tests.methods.stack import DATA

MUTATIONS = (
    ("jft/presets/l_lora.py", 'if linearize == "model" else', 'if linearize != "model" else'),
    ("jft/presets/l_lora.py", "rank: int = 16", "rank: int = 8"),
    ("jft/presets/l_lora.py", "alpha: float = 32.0", "alpha: float = 16.0"),
    ("jft/presets/l_lora.py", 'linearize: Literal["model", "modules"] = "model"', 'linearize: str = "modules"'),
    ("jft/presets/l_lora.py", "/[qv]/w$", "/[qkv]/w$"),
    ("jft/presets/l_lora.py", "^(?!text/)", ""),
    ("jft/presets/l_lora.py", "LowRankFixed(rank, float(alpha))", "LowRankFixed(rank, float(rank))"),
)
RANK, ALPHA, STEPS = 2, 6.0, 3


def change(a, b):
    return {p: ALPHA / RANK * a[p] @ b[p] for p in LINEAR}


def trained(linearize):
    """b after three steps of Adam, the losses, and the change."""
    start, moments, losses = factors(beside=False, rank=RANK), Moments(), []
    a, b = ({p: f[k] for p, f in start.items()} for k in ("a", "b"))
    for batch in DATA[:STEPS]:
        tau = change(a, b)
        if linearize == "model":  # f(theta0) + J tau, and J^T of the loss's gradient there
            z = stack.forward(W, batch)[0][-1] + stack.moved(W, tau, batch)
            g = stack.pulled(W, stack.loss_gradient(z, batch), batch)
        else:  # the model at W + s a0 b
            z = stack.forward({**W, **{p: W[p] + tau[p] for p in LINEAR}}, batch)[0][-1]
            g = stack.gradient({**W, **{p: W[p] + tau[p] for p in LINEAR}}, batch)
        shifted = z - z.max(1, keepdims=True)
        rows = np.arange(len(z))
        losses.append(np.mean(np.log(np.exp(shifted).sum(1)) - shifted[rows, batch["labels"]]))
        b = {p: moments.step(p, b[p], ALPHA / RANK * turned(a[p]) @ g[p]) for p in LINEAR}
    return b, losses, change(a, b)


@pytest.mark.parametrize("linearize", ["model", "modules"])
def test_three_steps(linearize):
    method = {"name": "l_lora", "rank": RANK, "alpha": ALPHA, "linearize": linearize, "include": ""}
    run = stack.run(method, STEPS, log={"progress": False, "every": 1})
    b, losses, tau = trained(linearize)
    assert set(run.state.trained) == set(LINEAR) and set(run.task_vector.deltas) == set(LINEAR)
    for path in LINEAR:
        assert set(run.state.trained[path]) == {"b"}
        np.testing.assert_allclose(run.state.trained[path]["b"], b[path], atol=1e-5)
        assert isinstance(run.task_vector[path], delta.LowRank)
        np.testing.assert_allclose(run.task_vector[path].dense(), tau[path], atol=1e-5)
    np.testing.assert_allclose([row["loss"] for row in run.metrics], losses, rtol=1e-5)


def test_the_two_readings_part_after_the_first_step():
    (one, first, _), (other, second, _) = trained("model"), trained("modules")
    np.testing.assert_allclose(first[0], second[0], rtol=1e-12)
    assert max(np.abs(one[p] - other[p]).max() for p in LINEAR) > 1e-4


def paths(config, **options):
    shapes = jax.eval_shape(lambda: config.init(jax.random.key(0)))
    return jft.method("l_lora", **options).plan(shapes, jft.models.Model(config)).leaves


def test_defaults():
    """tanganke/peta@db0e76f: r 16 and lora_alpha 32 (config/finetune_clip_l_lora.yaml, config/peft/lora-16.yaml) on q_proj
    and v_proj of the image encoder (peta/models/clip.py:51), on q and v of T5's three attentions."""
    text = TextConfig(vocab=11, width=8, layers=1, heads=2, hidden=12, positions=6, eos=9)
    vision = VisionConfig(image=8, patch=4, channels=1, width=8, layers=1, heads=2, hidden=12)
    decoder = DecoderConfig(vocab=11, width=8, layers=1, heads=2, hidden=12)
    t5 = T5Config(vocab=11, width=8, head=4, heads=2, hidden=12, layers=1, decoder_layers=1)
    found = paths(decoder)
    assert set(found) == {"layers/attn/q/w", "layers/attn/v/w"}
    assert {(how.rank, how.alpha, how.scale) for how in found.values()} == {(16, 32.0, 2.0)}
    clip = paths(ClipConfig(vision=vision, text=text, projection=4))
    assert set(clip) == {"vision/layers/attn/q/w", "vision/layers/attn/v/w"}
    sides = ("encoder/layers/attn", "decoder/layers/attn", "decoder/layers/cross")
    assert set(paths(t5)) == {f"{side}/{x}/w" for side in sides for x in "qv"}
    assert len(paths(decoder, include="")) == 7
    assert jft.method("l_lora").forward == "linearized" == jft.method("l_lora", linearize="model").forward
    assert jft.method("l_lora", linearize="modules").forward == "standard"


def test_what_is_refused():
    with pytest.raises(ValueError, match="linearize is 'module'; 'model' expands"):
        jft.method("l_lora", linearize="module")
    with pytest.raises(ValueError, match="no factors of rank 0"):
        jft.method("l_lora", rank=0, include="").plan(stack.parameters(), stack.MODEL)
    assert tree.flatten(stack.parameters())  # which has neither queries nor values
    with pytest.raises(ValueError, match="matches no weight"):
        jft.method("l_lora").plan(stack.parameters(), stack.MODEL)
