"""What transformers writes loads with equal outputs, and what jft saves, transformers loads with equal outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.parallel import make_mesh

pytestmark = pytest.mark.peers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CAUSAL = {
    "llama": ("Llama", SIZES),
    "qwen2": ("Qwen2", SIZES),
    "gpt2": ("GPT2", GPT2),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}


def make(name, suffix, options):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, name + suffix)(config).eval()


def run(torch_model, **inputs):
    import torch

    with torch.no_grad():
        return torch_model(**{k: torch.tensor(v) for k, v in inputs.items()})


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models(tmp_path, name):
    theirs = make(CAUSAL[name][0], "ForCausalLM" if name != "gpt2" else "LMHeadModel", CAUSAL[name][1])
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = np.arange(12).reshape(2, 6) * 7 % 96
    expected = run(theirs, input_ids=tokens).logits.numpy()
    model, params = jft.load(tmp_path / "theirs", dtype="float32", mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    found = jax.jit(model.apply)(params, jnp.asarray(tokens))
    np.testing.assert_allclose(np.asarray(found), expected, rtol=2e-4, atol=2e-5)
    jft.save(model, params, tmp_path / "ours", shard_bytes=50_000)
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    np.testing.assert_array_equal(run(again.eval(), input_ids=tokens).logits.numpy(), expected)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DistilBert", "ViT", "Llama", "GPT2"])
def test_classifiers(tmp_path, name):
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"num_labels": 3}
    if name == "DistilBert":
        sizes = {"vocab_size": 96, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "num_labels": 3}
    if name == "GPT2":
        sizes = GPT2 | {"num_labels": 3, "bos_token_id": 1, "eos_token_id": 2}
    if name in ("Llama", "GPT2"):
        sizes |= {"pad_token_id": 0}
    if name == "ViT":
        sizes |= {"image_size": 16, "patch_size": 8}
        theirs = make(name, "ForImageClassification", sizes)
        images = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
        batch, inputs = {"images": images}, {"pixel_values": images.transpose(0, 3, 1, 2)}
    else:
        theirs = make(name, "ForSequenceClassification", sizes)
        tokens = 4 + np.arange(12).reshape(2, 6) * 7 % 90
        batch, inputs = {"tokens": tokens}, {"input_ids": tokens}
    theirs.save_pretrained(tmp_path / "theirs")
    expected = run(theirs, **inputs).logits.numpy()
    model, params = jft.load(tmp_path / "theirs", dtype="float32", classes=3)
    np.testing.assert_allclose(np.asarray(model.apply(params, batch)), expected, rtol=2e-4, atol=2e-5)
    jft.save(model, params, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    np.testing.assert_array_equal(run(again.eval(), **inputs).logits.numpy(), expected)
