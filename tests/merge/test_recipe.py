"""Recipes: mergekit's YAML as people have it, key by key, and the numbers that mergekit gives for it."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

import jft
from jft.merge.on_disk import merge_to_disk
from jft.merge.plan import plan
from jft.merge.recipe import evaluate, load, parse, resolve
from tests.merge import peers
from tests.models import checkpoints

MUTATIONS = [
    ("jft/merge/recipe.py", "position = t * (len(points) - 1)", "position = t * len(points)"),
    ("jft/merge/recipe.py", 'str(rule["filter"]) in tensor', 'tensor in str(rule["filter"])'),
    (
        "jft/merge/mergekit.py",
        'options.setdefault("normalize", bool(normalize))',
        'options.setdefault("normalize", False)',
    ),
    ("jft/merge/mergekit.py", '"weights" if normalize else "none"', '"none" if normalize else "weights"'),
    ("jft/merge/plan.py", 'f"{prefix}{_first(x) + i}.{rest}"', 'f"{prefix}{i}.{rest}"'),
    ("jft/merge/plan.py", "t = i / (_length(part) - 1)", "t = i / _length(part)"),
]
SETTING = [{"filter": "mlp", "value": [0.0, 0.5, 1.0]}, {"filter": "attn", "value": "1e-1"}, {"value": 0.25}]


def wide(directory):
    return {n: x.astype(np.float32) for n, x in peers.tensors(directory).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three llamas of four layers."""
    folder = tmp_path_factory.mktemp("models")
    description = checkpoints.LLAMA | {"num_hidden_layers": 4}
    return [
        str(checkpoints.write(folder / f"m{i}", checkpoints.llama_tensors(description, np.float32, i), description))
        for i in range(3)
    ]


@pytest.mark.parametrize(
    ("tensor", "t", "value"),
    [("l.mlp.up", 0.25, 0.25), ("l.mlp.up", 0.75, 0.75), ("l.mlp.up", 1, 1), ("l.attn.q", 0.3, 0.1), ("norm", 1, 0.25)],
)
def test_settings(tensor, t, value):
    assert evaluate(SETTING, tensor, t) == pytest.approx(value)


def test_the_first_scope_with_a_match_counts():
    assert resolve("weight", [{}, {"weight": {"filter": "mlp", "value": 3}}, {"weight": 5}], "norm", 0) == 5
    assert resolve("weight", [{"weight": SETTING}, {"weight": 5}], "norm", 0) == 0.25
    assert resolve("weight", [{"density": 1}], "norm", 0) is None
    assert evaluate(["a", "b"], "x", 0.99) == "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_methd": "ties"}, "unknown key 'merge_methd'.*merge_method"),
        ({"merge_method": "tis"}, "none that jft has.*ties"),
        ({"parameters": {"densty": 1}}, "no parameter 'densty'.*density"),
        ({"parameters": {"density": {"value": 1, "fliter": "x"}}}, "'fliter' in parameters.density"),
        ({"parameters": {"density": 1.5}}, "density must be between"),
        ({"tokenizer_source": "union"}, "union is not supported"),
        ({"tokenizer": {"source": "base"}}, "'tokenizer' in the recipe is not supported"),
        ({"modules": {}}, "'modules' in the recipe is not supported"),
        ({"dtype": "int8"}, "dtype is one of"),
        ({"slices": [{"sources": [{"model": "x", "layer_range": [0, 1]}]}]}, "either models or slices"),
        ({"base_model": None}, "merges changes of a base"),
        ({"preset": "papr"}, "no preset 'papr'"),
    ],
)
def test_wrong_recipes(models, change, message):
    value = {"merge_method": "ties", "base_model": models[0], "models": [{"model": m} for m in models[1:]]}
    with pytest.raises(ValueError, match=message):
        plan(parse(value | change))


def test_settings_of_the_merge_are_not_those_of_a_model(models):
    each = [{"model": models[1], "parameters": {"normalize": False}}]
    with pytest.raises(ValueError, match="'normalize' belongs to the merge"):
        plan(parse({"merge_method": "ties", "base_model": models[0], "models": each}))
    each = [{"model": models[1], "parameters": {"weight": 1}}, {"model": models[2]}]
    with pytest.raises(ValueError, match="'weight' is given for some"):
        plan(parse({"merge_method": "ties", "base_model": models[0], "models": each}))


def test_gradients_and_filters_by_hand(models, tmp_path):
    """Task arithmetic whose weight depends on the layer and on the tensor."""
    weight = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": [1.0, 0.0, 1.0]}]
    (tmp_path / "r.yml").write_text(
        yaml.safe_dump(
            {
                "merge_method": "task_arithmetic",
                "base_model": models[0],
                "models": [{"model": models[0]}, {"model": models[1], "parameters": {"weight": weight}}],
                "parameters": {"lambda": 0.5, "int8_mask": True},
            }
        )
    )
    planned = merge_to_disk(load(tmp_path / "r.yml"), tmp_path / "out")
    assert "int8_mask is ignored" in planned.notes[0]
    base, tuned, out = (wide(d) for d in (Path(models[0]), Path(models[1]), tmp_path / "out"))
    for name, x in out.items():
        layer = int(name.split(".")[2]) if "layers" in name else None
        w = {None: 1.0, 0: 1.0, 1: 1 / 3, 2: 1 / 3, 3: 1.0}[layer] if "mlp" not in name else layer / 3
        np.testing.assert_allclose(x, base[name] + 0.5 * w * (tuned[name] - base[name]), atol=1e-6, err_msg=name)


def test_linear_needs_no_base(models, tmp_path):
    value = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, [1, 2, 3], strict=True)],
    }
    for normalize, divisor in ((True, 6), (False, 1)):
        merge_to_disk(parse(value | {"parameters": {"normalize": normalize}}), tmp_path / f"out{divisor}")
        all_wide = [wide(Path(m)) for m in models]
        for name, x in wide(tmp_path / f"out{divisor}").items():
            expected = sum(w * m[name].astype(np.float64) for w, m in zip([1, 2, 3], all_wide, strict=True)) / divisor
            np.testing.assert_allclose(x, expected, atol=2e-6)
    bad = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models, [1, -1, 0], strict=True)]
    with pytest.raises(ValueError, match="sum to zero"):
        plan(parse({"merge_method": "linear", "models": bad}))


def frankenmerge(models):
    """Six layers: 0 to 2 of one model, then 1 to 4 of another, one of them scaled."""
    o_proj = {"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}
    return {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": models[0], "layer_range": [0, 2], "parameters": o_proj}]},
            {"sources": [{"model": models[1], "layer_range": [1, 4]}]},
            {"sources": [{"model": models[1], "layer_range": [3, 4]}]},
        ],
        "dtype": "float32",
    }


def test_passthrough_stacks_layers(models, tmp_path):
    merge_to_disk(parse(frankenmerge(models)), tmp_path / "out")
    a, b, out = (wide(d) for d in (Path(models[0]), Path(models[1]), tmp_path / "out"))
    of = [(a, 0), (a, 1), (b, 1), (b, 2), (b, 3), (b, 3)]
    for name, x in out.items():
        parts = name.split(".")
        if "layers" not in name:
            np.testing.assert_array_equal(x, (a if "embed" in name else b)[name])
            continue
        source, layer = of[int(parts[2])]
        scale = 0.5 if "o_proj" in name and source is a else 1
        np.testing.assert_array_equal(x, source[".".join([*parts[:2], str(layer), *parts[3:]])] * np.float32(scale))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    model, _ = jft.load(tmp_path / "out")
    assert model.config.layers == 6
    wrong = frankenmerge(models)
    wrong["slices"][0]["sources"][0]["layer_range"] = [3, 6]
    with pytest.raises(ValueError, match="has 4 layers"):
        plan(parse(wrong))


def sliced(models):
    """TIES of slices, each with its own layers of the base."""
    source = lambda i, first, **p: {
        "model": models[i],
        "layer_range": [first, first + 2],
        **({"parameters": p} if p else {}),
    }
    return {
        "merge_method": "ties",
        "base_model": models[0],
        "slices": [
            {"sources": [source(0, 0), source(1, 0, weight=1.0, density=0.3), source(2, 0, weight=[0.2, 0.7])]},
            {"sources": [source(0, 1), source(1, 1, weight=0.5), source(2, 2, weight=0.7)]},
        ],
        "parameters": {"density": [0.5, 1.0], "normalize": True},
        "dtype": "float32",
    }


def test_slices_merge_layers_of_other_numbers(models, tmp_path):
    merge_to_disk(parse(sliced(models)), tmp_path / "out")
    out = wide(tmp_path / "out")
    a, b, c = (wide(Path(m)) for m in models)
    layer = lambda m, i: m[f"model.layers.{i}.input_layernorm.weight"]
    # Density 1 in the last layer: no trimming, a weighted mean over those of the elected sign.
    deltas = np.stack([layer(b, 2) - layer(a, 2), layer(c, 3) - layer(a, 2)]) * np.array([[0.5], [0.7]])
    agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    share = (np.array([[0.5], [0.7]]) * agree).sum(0)
    expected = layer(a, 2) + (deltas * agree).sum(0) / np.where(share == 0, 1, share)
    np.testing.assert_allclose(layer(out, 3), expected, atol=1e-6)


PEERS = {
    "ties": {"merge_method": "ties", "each": [{"weight": 0.6, "density": 0.3}, {"weight": [0.2, -0.4], "density": 0.7}]},
    "ties_sum": {"merge_method": "ties", "each": [{"weight": 0.6}, {"weight": 0.2}], "parameters": {
        "density": [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.4}], "normalize": False, "lambda": 0.7}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "each": [{"weight": 0.6}, {"weight": [0, 0.3, 1]}]},
    "normalized": {"merge_method": "task_arithmetic", "each": [{"weight": 0.6}, {"weight": 0.3}],
                   "parameters": {"normalize": True, "lambda": 1.5}},
    "linear": {"merge_method": "linear", "each": [{"weight": 0.6}, {"weight": [0, 0.3, 1]}], "base_model": None},
    "breadcrumbs": {"merge_method": "breadcrumbs", "each": [{"weight": 0.6}, {"weight": 0.3}],
                    "parameters": {"density": 0.6, "gamma": 0.1}},
    "breadcrumbs_ties": {"merge_method": "breadcrumbs_ties", "each": [{"weight": 0.6}, {"weight": 0.3}],
                         "parameters": {"density": 0.6, "gamma": 0.1, "lambda": 0.5}},
    "sce": {"merge_method": "sce", "each": [{}, {}], "parameters": {"select_topk": 0.5}},
    "ram": {"merge_method": "ram", "each": [{}, {}]},
    "ramplus_tl": {"merge_method": "ramplus_tl", "each": [{}, {}], "parameters": {"r": 0.2, "alpha": 0.3}},
    "slerp": {"merge_method": "slerp", "each": [{}], "parameters": {"t": [0.2, 0.9]}},
    "nuslerp": {"merge_method": "nuslerp", "each": [{"weight": 0.6}, {"weight": 0.3}]},
    "nuslerp_rows": {"merge_method": "nuslerp", "each": [{"weight": 0.6}, {"weight": 0.3}], "base_model": None,
                     "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}},
    "multislerp": {"merge_method": "multislerp", "each": [{"weight": 0.6}, {"weight": 0.3}]},
    "karcher": {"merge_method": "karcher", "each": [{}, {}], "base_model": None, "parameters": {"max_iter": 5}},
    "model_stock": {"merge_method": "model_stock", "each": [{}, {}], "parameters": {"filter_wise": True}},
    "nearswap": {"merge_method": "nearswap", "each": [{}], "parameters": {"t": 0.01}},
    # With our random numbers in the place of mergekit's.
    "dare_linear": {"merge_method": "dare_linear", "each": [{"weight": 0.6}, {"weight": -0.4}], "parameters": {
        "density": [0.2, 0.7]}},
    "dare_ties": {"merge_method": "dare_ties", "each": [{"weight": 0.6, "density": 0.3}, {"weight": 0.3, "density": 0.6}],
                  "parameters": {"normalize": True, "rescale": False}},
    "della": {"merge_method": "della", "each": [{"weight": 0.6}, {"weight": 0.3}],
              "parameters": {"density": 0.5, "epsilon": [0.1, 0.3]}},
    "della_linear": {"merge_method": "della_linear", "each": [{"weight": 0.6, "density": 0.4}, {"weight": 0.3, "density": 0.7}],
                     "parameters": {"epsilon": 0.2, "lambda": 0.8}},
}  # fmt: skip
# All architectures have the same code: one has all methods, the others those of a kind that the layout of a file may matter to.
SOME = ["ties", "linear", "breadcrumbs", "slerp", "nuslerp_rows", "multislerp", "karcher", "dare_linear", "dare_ties", "della",
        "della_linear"]  # fmt: skip


def theirs(recipe, out):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(copy_tokenizer=False, quiet=True))
    return peers.tensors(out)


def assert_equals_mergekit(recipe, folder):
    import transformers

    expected = theirs(recipe, folder / "theirs")
    merge_to_disk(parse(recipe), folder / "ours")
    ours = peers.tensors(folder / "ours")
    assert ours.keys() >= expected.keys()
    assert max(float(np.abs(ours[n] - expected[n]).max()) for n in expected) <= 5e-7
    _, report = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.peers
@pytest.mark.parametrize("kind", peers.KINDS)
def test_mergekit(kind, tmp_path, monkeypatch):
    base, tuned = peers.models(tmp_path, kind, count=2)
    peers.known_masks(monkeypatch, peers.vectors(base, tuned)[1])
    for name in PEERS if kind == "llama" else SOME:
        value = dict(PEERS[name])
        entries = [{"model": str(m), "parameters": p} for m, p in zip(tuned, value.pop("each"), strict=False)]
        recipe = {"base_model": str(base), "models": entries, "dtype": "float32"} | value
        assert_equals_mergekit({k: v for k, v in recipe.items() if v is not None}, tmp_path / name)


@pytest.mark.peers
@pytest.mark.parametrize("kind", peers.KINDS)
def test_mergekit_arcee_fusion(kind, tmp_path):
    """Of changes large enough for the divergence of rows not to be rounding in mergekit."""
    base, (tuned,) = peers.models(tmp_path, kind, count=1, spread=1.0)
    models = [{"model": str(base)}, {"model": str(tuned)}]
    recipe = {"merge_method": "arcee_fusion", "base_model": str(base), "models": models, "dtype": "float32"}
    assert_equals_mergekit(recipe, tmp_path)


@pytest.mark.peers
@pytest.mark.parametrize("make", [frankenmerge, sliced])
def test_mergekit_slices(make, models, tmp_path):
    assert_equals_mergekit(make(models), tmp_path)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # those of peft
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft(kind, tmp_path):
    """An adapter of peft merged here gives what peft merges."""
    import peft
    import torch
    import transformers

    base, _ = peers.models(tmp_path, kind, count=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "down_proj", "embed_tokens"]
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, rank_pattern={targets[1]: 2}, fan_in_fan_out=kind == "gpt2"
    )
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs")
    value = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(tmp_path / "adapter")}],
    }
    merge_to_disk(parse(value), tmp_path / "ours")
    ours, expected = peers.tensors(tmp_path / "ours"), peers.tensors(tmp_path / "theirs")
    for name in ours:
        np.testing.assert_allclose(ours[name], expected[name], rtol=2e-6, atol=2e-5, err_msg=name)
