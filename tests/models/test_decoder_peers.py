"""Decoders against transformers: logits, gradients, configurations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft import tree
from jft.models import Model
from jft.models.hf.decoders import FAMILIES
from tests.models import hf_tools

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

SMALL = dict(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    initializer_range=0.2,
)
THETA = dict(rope_theta=5000.0)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
    **THETA,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, **THETA)
MSCALE = dict(YARN, mscale=1.5, mscale_all_dim=0.7, beta_fast=16.0, beta_slow=2.0, truncate=False)
LONG = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[2.0, 3.0, 4.0, 5.0],
    partial_rotary_factor=1.0,
    **THETA,
)
WINDOWS = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
MOE = dict(num_local_experts=5, num_experts_per_tok=2)
LEGACY = dict(vocab_size=37, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2)
LEGACY |= dict(bos_token_id=None, eos_token_id=None)
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
HALF = dict(rope_type="longrope", **THETA, short_factor=[1.0, 1.2], long_factor=[2.0, 4.0], partial_rotary_factor=0.5)

CASES = [
    ("gpt2", "GPT2LMHeadModel", "GPT2Config", LEGACY),
    ("gpt2", "GPT2LMHeadModel", "GPT2Config", dict(LEGACY, scale_attn_by_inverse_layer_idx=True, n_inner=40)),
    ("gpt2", "GPT2LMHeadModel", "GPT2Config", dict(LEGACY, tie_word_embeddings=False, scale_attn_weights=False)),
    ("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    ("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", dict(NEOX, use_parallel_residual=False, attention_bias=False)),
    ("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", dict(NEOX, tie_word_embeddings=True, hidden_act="gelu_new")),
    ("llama", "LlamaForCausalLM", "LlamaConfig", SMALL),
    ("llama", "LlamaForCausalLM", "LlamaConfig", dict(SMALL, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    ("llama", "LlamaForCausalLM", "LlamaConfig", dict(SMALL, attention_bias=True, mlp_bias=True, head_dim=12)),
    (
        "llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(SMALL, rope_parameters=dict(rope_type="linear", factor=3.0, **THETA)),
    ),
    ("llama", "LlamaForCausalLM", "LlamaConfig", dict(SMALL, rope_parameters=YARN, num_key_value_heads=1)),
    ("llama", "LlamaForCausalLM", "LlamaConfig", dict(SMALL, rope_parameters=MSCALE)),
    (
        "llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(SMALL, max_position_embeddings=8, rope_parameters=dict(rope_type="dynamic", factor=3.0, **THETA)),
    ),
    ("mistral", "MistralForCausalLM", "MistralConfig", dict(SMALL, sliding_window=5)),
    ("mistral", "MistralForCausalLM", "MistralConfig", dict(SMALL, sliding_window=None, head_dim=16)),
    ("qwen2", "Qwen2ForCausalLM", "Qwen2Config", SMALL),
    (
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        dict(SMALL, **WINDOWS, rope_parameters=YARN, tie_word_embeddings=True),
    ),
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", dict(SMALL, head_dim=16)),
    ("qwen3", "Qwen3ForCausalLM", "Qwen3Config", dict(SMALL, head_dim=8, attention_bias=True, **WINDOWS)),
    ("gemma", "GemmaForCausalLM", "GemmaConfig", dict(SMALL, head_dim=16)),
    ("gemma", "GemmaForCausalLM", "GemmaConfig", dict(SMALL, head_dim=8, num_key_value_heads=1, hidden_act="gelu")),
    (
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        dict(SMALL, head_dim=16, sliding_window=4, query_pre_attn_scalar=24),
    ),
    (
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        dict(SMALL, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
    ),
    (
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        dict(SMALL, head_dim=16, sliding_window=4, sliding_window_pattern=2, query_pre_attn_scalar=24),
    ),
    (
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        dict(
            SMALL,
            head_dim=8,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            final_logit_softcapping=3.0,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
                sliding_attention=dict(rope_type="default", rope_theta=1e3),
            ),
        ),
    ),
    ("olmo2", "Olmo2ForCausalLM", "Olmo2Config", SMALL),
    ("olmo2", "Olmo2ForCausalLM", "Olmo2Config", dict(SMALL, tie_word_embeddings=True, num_key_value_heads=4)),
    ("phi3", "Phi3ForCausalLM", "Phi3Config", dict(SMALL, sliding_window=5)),
    (
        "phi3",
        "Phi3ForCausalLM",
        "Phi3Config",
        dict(SMALL, original_max_position_embeddings=8, rope_parameters=LONG),
    ),
    (
        "phi3",
        "Phi3ForCausalLM",
        "Phi3Config",
        dict(SMALL, original_max_position_embeddings=32, rope_parameters=HALF, tie_word_embeddings=True),
    ),
    ("mixtral", "MixtralForCausalLM", "MixtralConfig", dict(SMALL, **MOE)),
    ("mixtral", "MixtralForCausalLM", "MixtralConfig", dict(SMALL, **MOE, sliding_window=5, head_dim=16)),
    ("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(SMALL, **MOE, head_dim=16, moe_intermediate_size=20)),
    (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        dict(SMALL, **MOE, head_dim=8, moe_intermediate_size=20, norm_topk_prob=True, tie_word_embeddings=True),
    ),
    ("olmoe", "OlmoeForCausalLM", "OlmoeConfig", dict(SMALL, num_experts=5, num_experts_per_tok=3)),
    (
        "olmoe",
        "OlmoeForCausalLM",
        "OlmoeConfig",
        dict(SMALL, num_experts=5, num_experts_per_tok=2, clip_qkv=0.8, norm_topk_prob=True, num_key_value_heads=4),
    ),
]
IDS = [f"{case[0]}-{sum(c[0] == case[0] for c in CASES[:i])}" for i, case in enumerate(CASES)]


def build(case):
    """A tiny random torch model, with every norm and bias off its neutral value."""
    family, model, config, options = case
    torch.manual_seed(0)
    peer = getattr(transformers, model)._from_config(
        getattr(transformers, config)(**options), attn_implementation="eager"
    )
    peer.eval()
    with torch.no_grad():
        for p in peer.parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape))
    family = FAMILIES[family]
    config = family.from_hf(hf_tools.config_dict(peer))
    return peer, family, config


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def pair(request):
    return build(request.param)


TOKENS = np.random.default_rng(0).integers(0, 37, (2, 13))


def test_logits(pair, record_property):
    peer, family, config = pair
    params = hf_tools.from_torch(peer, family, config)
    with torch.no_grad():
        expected = peer(torch.tensor(TOKENS)).logits.numpy()
    logits = np.asarray(Model(config).apply(params, TOKENS))
    error = np.abs(logits - expected).max()
    record_property("error", float(error))
    print(f"{config.family}: logits error {error:.1e} of {np.abs(expected).max():.1f}")
    assert error < 2e-4


def test_gradients(pair):
    """Of a language-modelling loss, in every parameter."""
    peer, family, config = pair
    params = hf_tools.from_torch(peer, family, config)
    peer.zero_grad()
    logits = peer(torch.tensor(TOKENS)).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(TOKENS)[:, 1:].flatten()).backward()
    expected = hf_tools.grads(peer, family, config)
    actual = jax.jit(jax.grad(lambda p: lm_loss(Model(config), p)))(params)
    errors = hf_tools.worst(actual, expected)
    worst = max(errors, key=errors.get)
    print(f"{config.family}: gradient error {errors[worst]:.1e} in {worst}")
    assert errors[worst] < 1e-3, {p: e for p, e in errors.items() if e >= 1e-3}


def lm_loss(model, params):
    log = jax.nn.log_softmax(model.apply(params, TOKENS)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log, jnp.asarray(TOKENS)[:, 1:, None], axis=-1))


def test_config_round_trip(pair, tmp_path):
    """What jft writes, transformers reads as the same model."""
    import json

    peer, family, config = pair
    written = family.to_hf(config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    reloaded = type(peer)._from_config(again, attn_implementation="eager").eval()
    reloaded.load_state_dict(peer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(reloaded(torch.tensor(TOKENS)).logits, peer(torch.tensor(TOKENS)).logits)
    assert written["architectures"] == [type(peer).__name__]
    assert family.from_hf(hf_tools.config_dict(reloaded)) == config


def test_padding_matches():
    """A left-padded batch with an attention mask, as segments."""
    peer, family, config = build(next(c for c in CASES if c[0] == "qwen2"))
    params = hf_tools.from_torch(peer, family, config)
    segments = np.ones_like(TOKENS)
    segments[0, :4] = 0
    with torch.no_grad():
        expected = peer(torch.tensor(TOKENS), attention_mask=torch.tensor(segments)).logits.numpy()
    actual = np.asarray(Model(config).apply(params, {"tokens": TOKENS, "segments": segments}))
    np.testing.assert_allclose(actual[segments > 0], expected[segments > 0], atol=2e-4)


def test_base_model_names():
    """Checkpoints of the bare model, without ``model.`` or ``transformer.``, load too; old buffers are ignored."""
    for name, buffers in (
        ("gpt2", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("llama", ["layers.0.self_attn.rotary_emb.inv_freq"]),
    ):
        peer, family, config = build(next(c for c in CASES if c[0] == name and c[3].get("tie_word_embeddings", True)))
        whole = hf_tools.on_disk(peer, peer.state_dict())
        bare = {k.removeprefix("transformer.").removeprefix("model."): v for k, v in whole.items()}
        bare |= {k: np.ones(3) for k in buffers}
        same = jax.tree.map(
            np.array_equal, hf_tools.from_tensors(bare, family, config), hf_tools.from_torch(peer, family, config)
        )
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_fused_experts_load(name):
    """As ``save_pretrained(save_original_format=False)`` writes them."""
    peer, family, config = build(next(c for c in CASES if c[0] == name))
    fused = {k: v.numpy() for k, v in peer.state_dict().items()}
    assert any(k.endswith("experts.gate_up_proj") for k in fused)
    same = jax.tree.map(
        np.array_equal, hf_tools.from_tensors(fused, family, config), hf_tools.from_torch(peer, family, config)
    )
    assert all(jax.tree.leaves(same))


def test_loader_reads_fused_experts(tmp_path):
    """The same through jft.load, from both layouts on disk."""
    import jft

    peer, family, config = build(next(c for c in CASES if c[0] == "mixtral"))
    expected = hf_tools.from_torch(peer, family, config)
    for original in (True, False):
        peer.save_pretrained(tmp_path / str(original), save_original_format=original)
        model, params = jft.load(str(tmp_path / str(original)), dtype="float32")
        assert model.config == config
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), b), params, expected)))


def test_ragged_experts_match():
    for name in ("mixtral", "olmoe"):
        peer, family, config = build(next(c for c in CASES if c[0] == name))
        params = hf_tools.from_torch(peer, family, config)
        with torch.no_grad():
            expected = peer(torch.tensor(TOKENS)).logits.numpy()
        actual = Model(config).with_(experts="ragged").apply(params, TOKENS)
        np.testing.assert_allclose(actual, expected, atol=2e-4)


OLD = dict(
    vocab_size=37, hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, rms_norm_eps=1e-5
)


@pytest.mark.parametrize(
    ("name", "old", "fields"),
    [
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"theta": 5e5, "factor": 2.0},
        ),
        (
            "phi3",
            {
                "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
                "original_max_position_embeddings": 16,
                "max_position_embeddings": 64,
            },
            {"kind": "longrope", "original_positions": 16},
        ),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}, {"theta": 1e6}),
    ],
)
def test_older_files(name, old, fields):
    """``config.json`` as written before transformers 5."""
    rope = FAMILIES[name].from_hf({"model_type": name, **OLD, **old}).rope
    assert {k: getattr(rope, k) for k in fields} == fields


def test_older_gemma3():
    old = {
        **OLD,
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
    }
    old |= {"rope_theta": 2e6, "rope_local_base_freq": 3e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = FAMILIES["gemma3_text"].from_hf(old)
    assert config.windows == (4, 4, 4, 4, 4, None, 4)
    assert (config.rope.theta, config.rope.factor, config.local_rope.theta, config.local_rope.kind) == (
        2e6,
        8.0,
        3e3,
        "default",
    )
    theirs = transformers.AutoConfig.for_model(**old)
    assert FAMILIES["gemma3_text"].from_hf(theirs.to_dict()) == dataclasses.replace(
        config, special_tokens=FAMILIES["gemma3_text"].from_hf(theirs.to_dict()).special_tokens
    )


def test_refusals():
    moe = {**OLD, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    with pytest.raises(ValueError, match="decoder_sparse_step=2"):
        FAMILIES["qwen3_moe"].from_hf({**moe, "decoder_sparse_step": 2})
    with pytest.raises(ValueError, match="mlp_only_layers=\\[0\\]"):
        FAMILIES["qwen3_moe"].from_hf({**moe, "mlp_only_layers": [0]})
    with pytest.raises(ValueError, match="quantization_config"):
        FAMILIES["llama"].from_hf({**OLD, "quantization_config": {"bits": 4}})
    with pytest.raises(ValueError, match="rope type 'mrope'"):
        FAMILIES["llama"].from_hf({**OLD, "rope_scaling": {"rope_type": "mrope"}})
    config = FAMILIES["llama"].from_hf({**OLD, "model_type": "llama"})
    with pytest.raises(ValueError, match="cannot say qk_norm='head'"):
        FAMILIES["llama"].to_hf(dataclasses.replace(config, qk_norm="head"))
    assert tree.count(Model(config).abstract()) > 0
