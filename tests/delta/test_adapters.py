"""Arithmetic of adapters: exact merges, truncation, LoRA out of dense changes, and the way to peft and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import tree
from jft.delta import Dense, Entries, LowRank, Sum, TaskVector
from jft.merge import compress, task_arithmetic
from jft.models import DecoderConfig, Model, load_adapter, save_adapter
from jft.models.hf.registry import family_named
from tests.delta.algebra import close, reference

MUTATIONS = [
    ("jft/delta/low_rank.py", "[wide(x.b), wide(y.b)], axis=-2", "[wide(x.b), -wide(y.b)], axis=-2"),
    ("jft/delta/singular.py", "matmul(r, t.T), lambda", "matmul(t, r.T).T[::-1], lambda"),
    ("jft/models/peft.py", "lora_a[start:stop, place.inputs] = a.T", "lora_a[start:stop, place.inputs] = 2 * a.T"),
    ("jft/models/peft.py", "math.sqrt(len(a)) if", "len(a) if"),
    ("jft/models/hf/adapter_config.py", "            return value\n    return", "            return value + 1\n    return"),
    ("jft/models/peft.py", "linear = rows[0, 0] == rows[-1, 0]", "linear = rows[0, 0] != rows[-1, 0]"),
]  # fmt: skip
SHAPES = {"layers/attn/q/w": (2, 8, 32), "layers/mlp/down/w": (2, 16, 8), "head/w": (8, 20)}


def adapter(seed, rank=2, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return TaskVector({p: LowRank(draw(*s[:-1], rank), draw(*s[:-2], rank, s[-1])) for p, s in shapes.items()})


def llama():
    config = DecoderConfig(
        family="llama", vocab=20, width=8, layers=2, heads=2, hidden=16, max_positions=32, tied=False
    )
    return Model(config)


# --- arithmetic


def test_a_merge_is_the_sum_of_products():
    """Concatenated factors: no cross terms, as adding the factors would bring."""
    taus, weights = [adapter(seed, rank) for seed, rank in ((0, 2), (1, 1))], [0.7, -0.4]
    merged = task_arithmetic(taus, weights)
    for path in SHAPES:
        a, b = ([getattr(tau[path], name) for tau in taus] for name in "ab")
        want = sum(w * np.matmul(np.float64(x), np.float64(y)) for w, x, y in zip(weights, a, b, strict=True))
        assert isinstance(merged[path], LowRank)
        assert merged[path].rank == 3
        close(merged[path], want)


def test_a_sum_of_factors_is_another_change():
    first, second = adapter(0)["head/w"], adapter(1)["head/w"]
    of_sums = np.matmul(first.a + second.a, first.b + second.b)
    exact = reference(first + second)
    assert np.linalg.norm(of_sums - exact) > 0.5 * np.linalg.norm(exact)


def test_truncation_of_a_merge(monkeypatch):
    """The singular value decomposition of the sum, from its factors alone."""
    merged = task_arithmetic([adapter(seed, 1) for seed in range(3)], [0.5, 1.0, -2.0])
    want = {path: np.linalg.svd(reference(merged[path]), full_matrices=False) for path in SHAPES}
    monkeypatch.setattr(LowRank, "dense", lambda self: pytest.fail("the product was formed"))
    small = compress(merged, "low_rank", rank=2)
    for path, (u, s, vt) in want.items():
        assert small[path].rank == 2
        close(small[path], np.matmul(u[..., :2] * s[..., None, :2], vt[..., :2, :]))


def test_lora_and_sparse_and_dense_compose_exactly():
    shape = (6, 8)
    low, other = adapter(0, 1, {"w": shape}), adapter(1, 1, {"w": shape})
    sparse = TaskVector({"w": Entries(jnp.array([0, 5]), jnp.array([1, 7]), jnp.array([2.0, -3.0]), shape)})
    dense = TaskVector({"w": Dense(jnp.arange(48.0).reshape(shape))})
    both = 0.5 * low + sparse - other
    assert isinstance(both["w"], Sum)
    assert [type(part) for part in both["w"].parts] == [LowRank, Entries]
    total = both + 2.0 * dense
    f64 = [reference(tau["w"]) for tau in (low, sparse, other, dense)]
    close(total["w"], 0.5 * f64[0] + f64[1] - f64[2] + 2 * f64[3])
    base = {"w": jnp.ones(shape)}
    close(jft.apply(base, both)["w"], 1 + 0.5 * f64[0] + f64[1] - f64[2])


def test_extraction_gives_back_an_adapter():
    """A dense change that is one has its rank, and its factors the same product."""
    tau = adapter(3)
    dense = TaskVector({path: Dense(delta.dense()) for path, delta in tau.items()})
    again = compress(dense, "low_rank", energy=1 - 1e-9)
    for path, delta in tau.items():
        assert again[path].rank == 2
        close(again[path], reference(delta))


# --- directories of peft


def test_an_adapter_goes_and_comes_back(tmp_path):
    model, tau = llama(), adapter(0)
    del tau.deltas["layers/attn/q/w"]
    q = adapter(1, 3, {"layers/attn/q/w": (2, 8, 8)})
    tau = tau + q
    save_adapter(model, tau, tmp_path / "out", base="tiny")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 2, "tiny")
    assert len(config["target_modules"]) == 5
    again = load_adapter(model, tmp_path / "out", base={"w": jnp.ones(2)})
    assert again.manifest["base"]["parameters"] == 2
    assert set(again.paths) == set(tau.paths)
    for path, delta in tau.items():
        np.testing.assert_array_equal(again[path].a, delta.a)
        np.testing.assert_array_equal(again[path].b, delta.b)


def test_scales_and_missing_layers_when_reading(tmp_path):
    """alpha / r, alpha / sqrt(r) and patterns of alpha; an absent layer is zero."""
    model, tau = llama(), adapter(0, 4, {"layers/attn/q/w": (2, 8, 8), "head/w": (8, 20)})
    save_adapter(model, tau, tmp_path / "out")
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    for stabilised, scale, head in ((False, 3 / 4, 10 / 4), (True, 3 / 2, 10 / 2)):
        changes = {"lora_alpha": 3, "use_rslora": stabilised, "alpha_pattern": {"lm_head": 10}}
        file.write_text(json.dumps(config | changes))
        again = load_adapter(model, tmp_path / "out")
        close(again["layers/attn/q/w"], scale * reference(tau["layers/attn/q/w"]))
        close(again["head/w"], head * reference(tau["head/w"]))
    import safetensors.numpy

    weights = tmp_path / "out" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors = {name: x for name, x in tensors.items() if "layers.0." not in name}
    safetensors.numpy.save_file(tensors, weights)
    again = load_adapter(model, tmp_path / "out")["layers/attn/q/w"]
    assert not np.any(again.dense()[0])
    assert np.any(again.dense()[1])
    safetensors.numpy.save_file({**tensors, "base_model.model.lm_head.lora_magnitude_vector": np.ones(3)}, weights)
    with pytest.raises(ValueError, match="lora_magnitude_vector' is no factor"):
        load_adapter(model, tmp_path / "out")
    file.write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(ValueError, match="'pissa_niter_4'"):
        load_adapter(model, tmp_path / "out")
    file.write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="'IA3'"):
        load_adapter(model, tmp_path / "out")


def test_parts_of_one_module(tmp_path):
    """q, k and v of GPT-2 are thirds of one Conv1D: their factors stand side by side, and come back as they multiply."""
    description = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 16}
    model = Model(family_named("gpt2").from_hf(description))
    tau = adapter(0, 2, {"layers/attn/q/w": (2, 8, 8), "layers/attn/v/w": (2, 8, 8), "layers/mlp/up/w": (2, 8, 32)})
    save_adapter(model, tau, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"]
    again = load_adapter(model, tmp_path / "out")
    for path, delta in tau.items():
        close(again[path], reference(delta))
    assert not np.any(again["layers/attn/k/w"].dense())


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({"head/w": Dense(jnp.ones((8, 20)))}, "'head/w' is dense, and an adapter holds factors"),
        ({"nowhere/w": LowRank(jnp.ones((8, 1)), jnp.ones((1, 20)))}, "no parameter of this 'llama' model"),
        ({"embed/table": LowRank(jnp.ones((20, 1)), jnp.ones((1, 8)))}, "no matrix of a module"),
    ],
)
def test_what_an_adapter_cannot_hold(deltas, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_adapter(llama(), TaskVector(deltas), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- against peft and torch


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Tiny models of transformers with two adapters each, by kind, and jft's model and parameters of them."""
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = {}
    for kind in ("llama", "gpt2"):
        torch.manual_seed(0)
        if kind == "llama":
            config = transformers.LlamaConfig(**shape, intermediate_size=24, num_key_value_heads=1)
            targets = ["q_proj", "k_proj", "down_proj", "lm_head"]
        else:
            config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=32)
            targets = ["c_attn", "c_proj"]
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        folder = tmp_path_factory.mktemp(kind)
        theirs.save_pretrained(folder / "base")
        options = {"target_modules": targets, "init_lora_weights": False, "fan_in_fan_out": kind == "gpt2"}
        first = peft.LoraConfig(r=2, lora_alpha=6, **options)
        second = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, rank_pattern={targets[0]: 1}, **options)
        theirs = peft.get_peft_model(theirs, first, adapter_name="first")
        theirs.add_adapter("second", second)
        theirs.save_pretrained(folder / "adapters")
        made[kind] = (theirs, folder, *jft.load(folder / "base", dtype="float32"))
    return made


def weights_of(theirs, name, model, folder):
    """The merged weights of an adapter of peft, as jft loads them."""
    import copy

    copied = copy.deepcopy(theirs)
    copied.set_adapter(name)
    merged = copied.merge_and_unload(adapter_names=[name])
    merged.save_pretrained(folder / f"merged_{name}")
    return jft.load(folder / f"merged_{name}", dtype="float32")[1]


def largest(params, other):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (params, other)), strict=True))


peers = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]


class TestPeft:
    pytestmark = peers

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_reads_what_peft_writes(self, tuned, kind):
        theirs, folder, model, params = tuned[kind]
        for name in ("first", "second"):
            tau = load_adapter(model, folder / "adapters" / name)
            assert largest(jft.apply(params, tau), weights_of(theirs, name, model, folder)) <= 5e-7

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_peft_reads_what_is_written(self, tuned, kind, tmp_path):
        """Two adapters merged, written, and run by peft: the outputs of the merged model."""
        import peft
        import torch
        import transformers

        _, folder, model, params = tuned[kind]
        taus = [load_adapter(model, folder / "adapters" / name) for name in ("first", "second")]
        merged = task_arithmetic(taus, [0.6, -0.3])
        save_adapter(model, merged, tmp_path / "out", base=str(folder / "base"))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "out").eval()
        tokens = np.random.default_rng(0).integers(0, 40, (2, 7))
        expected = theirs(torch.tensor(tokens)).logits.detach().numpy()
        np.testing.assert_allclose(model.apply(jft.apply(params, merged), tokens), expected, atol=2e-6)

    def test_combinations(self, tuned):
        """'cat' is the exact merge, 'svd' its truncation; 'linear' multiplies sums of factors, which is another change."""
        theirs, folder, model, params = tuned["llama"]
        names, weights = ["first", "second"], [0.6, 0.3]
        exact = task_arithmetic([load_adapter(model, folder / "adapters" / name) for name in names], weights)
        theirs.add_weighted_adapter(names, weights, "cat", combination_type="cat")
        assert largest(jft.apply(params, exact), weights_of(theirs, "cat", model, folder)) <= 5e-7
        theirs.add_weighted_adapter(names, weights, "svd", combination_type="svd", svd_rank=2)
        expected, small = weights_of(theirs, "svd", model, folder), compress(exact, "low_rank", rank=2)
        applied, expected = tree.flatten(jft.apply(params, small)), tree.flatten(expected)
        for path, delta in exact.items():
            s = np.linalg.svd(reference(delta), compute_uv=False)
            # What float32 leaves of singular vectors depends on the distance of their values from the next.
            bound = 1e-6 * s[..., 0] * np.max(s[..., 0] / (s[..., 1] - s[..., 2]))
            assert np.abs(applied[path] - expected[path]).max() <= bound.max(), path
        # Adding factors takes equal ranks.
        theirs.add_adapter("third", theirs.peft_config["first"])
        for kind in ("linear", "cat"):
            theirs.add_weighted_adapter(["first", "third"], weights, f"both_{kind}", combination_type=kind)
        linear, cat = (weights_of(theirs, f"both_{kind}", model, folder) for kind in ("linear", "cat"))
        assert largest(linear, cat) > 0.5 * largest(params, cat)

    def test_extraction_is_that_of_torch(self):
        import torch

        x = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
        u, s, v = torch.linalg.svd(torch.tensor(x), full_matrices=False)
        tau = compress(TaskVector({"w": Dense(jnp.asarray(x))}), "low_rank", rank=4)
        expected = ((u[:, :4] * s[:4]) @ v[:4]).numpy()
        assert np.abs(tau["w"].dense() - expected).max() <= 1e-5 * np.abs(expected).max()
