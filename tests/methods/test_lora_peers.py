"""LoRA against peft on the same weights: outputs, gradients, merged weights."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings(
        "ignore:.*is_gradient_checkpointing.*:FutureWarning"
    ),  # peft reads it, transformers renamed it
]

RANK, ALPHA = 4, 8
TARGETS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
LAYERS = 2


def path_of(target):
    return f"layers/{'attn' if target in 'qkvo' else 'mlp'}/{target}/w"


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "rslora"])
def pair(request, tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    base.save_pretrained(folder)
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, use_rslora=request.param, target_modules=[t.split(".")[1] for t in TARGETS.values()],
        init_lora_weights=False, lora_dropout=0.0,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, lora)
    model, params = jft.load(folder, dtype="float32")
    plan = jft.method("lora", rank=RANK, alpha=ALPHA, rank_stabilised=request.param).plan(params, model)
    kept, _ = plan.init(jax.random.key(0), params)
    return torch, theirs, model, params, plan, kept, stacked(theirs, lambda x: x.detach().numpy())


def stacked(theirs, read):
    """peft's factors (or what ``read`` takes of them) in jft's layout: a [L, in, r], b [L, r, out]."""
    modules = dict(theirs.named_modules())
    out = {}
    for target, name in TARGETS.items():
        layers = [modules[f"base_model.model.model.layers.{i}.{name}"] for i in range(LAYERS)]
        out[path_of(target)] = {
            "a": jnp.asarray(np.stack([read(m.lora_A["default"].weight).T for m in layers])),
            "b": jnp.asarray(np.stack([read(m.lora_B["default"].weight).T for m in layers])),
        }
    return out


TOKENS = np.random.default_rng(0).integers(0, 67, (3, 11))


def test_targets_are_all_linear_layers(pair):
    plan, trained = pair[4], pair[6]
    assert set(plan.leaves) == set(trained)


def test_outputs_and_gradients(pair):
    torch, theirs, model, _, plan, kept, trained = pair
    calibration = np.random.default_rng(1).standard_normal((3, 11, 67)).astype(np.float32) / 100
    expected = theirs(torch.tensor(TOKENS)).logits
    (expected * torch.tensor(calibration)).sum().backward()

    def loss(t):
        logits = model.apply(plan.bind(kept, t), TOKENS)
        return jnp.sum(logits * calibration), logits

    grads, logits = jax.grad(loss, has_aux=True)(trained)
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-5)
    for path, leaf in stacked(theirs, lambda x: x.grad.numpy()).items():
        for part, want in leaf.items():
            np.testing.assert_allclose(
                grads[path][part], want, atol=1e-5 * max(1.0, float(jnp.abs(want).max())), err_msg=path
            )
    assert all(p.grad is None for n, p in theirs.named_parameters() if "lora" not in n)


def test_merged_weights(pair):
    _, theirs, _, params, plan, kept, trained = pair
    merged = plan.merged(params, kept, trained)
    full = dict(copy.deepcopy(theirs).merge_and_unload().named_parameters())
    for target, name in TARGETS.items():
        want = np.stack([full[f"model.layers.{i}.{name}.weight"].detach().numpy().T for i in range(LAYERS)])
        block = merged["layers"]["attn" if target in "qkvo" else "mlp"][target]["w"]
        np.testing.assert_allclose(block, want, atol=1e-5)
    encoded = plan.encode(params, kept, trained)
    tuned, base = full["model.layers.1.self_attn.q_proj.weight"], params["layers"]["attn"]["q"]["w"][1]
    want = tuned.detach().numpy().T - np.asarray(base)
    np.testing.assert_allclose(encoded["layers/attn/q/w"].dense()[1], want, atol=1e-5)
