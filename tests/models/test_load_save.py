import dataclasses
import functools
import inspect
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jft
from jft import tree
from jft.models import Classifier, LoadError
from jft.models.hf import reader, registry
from jft.models.hf.checkpoint import Checkpoint
from jft.parallel import make_mesh
from jft.train.config import ModelConfig
from tests.models.checkpoints import LLAMA, llama_tensors, write

MUTATIONS = [
    ("jft/models/hf/checkpoint.py", '".." in parts or', ""),
    ("jft/models/hf/writer.py", 'if folder.parent.name == "snapshots" else []', 'if folder.parent.name == "x" else []'),
    ("jft/models/hf/writer.py", "if not any(file.resolve().is_relative_to(home) for home in homes):", "if False:"),
    ("jft/models/hf/writer.py", "    if others:\n", "    if False:\n"),
    ("jft/models/hf/config_schema.py", "section[name] > limit:", "section[name] > 10**12:"),
    ("jft/safetensors_files.py", "        if entry.start != end:", "        if entry.start < end:"),
    ("jft/safetensors_files.py", "    if end < size:", "    if end < size - 99:"),
]

BF16 = ml_dtypes.bfloat16
load = functools.partial(jft.load, dtype="bfloat16")


def equal(a, b):
    flat_a, flat_b = tree.flatten(a), tree.flatten(b)
    assert flat_a.keys() == flat_b.keys()
    for path in flat_a:
        assert flat_a[path].dtype == flat_b[path].dtype, path
        np.testing.assert_array_equal(np.asarray(flat_a[path]), np.asarray(flat_b[path]), path)


def expected_llama(tensors):
    stack = lambda name: np.stack([tensors[f"model.layers.{i}.{name}.weight"] for i in range(2)])
    flat = {
        "embed/table": tensors["model.embed_tokens.weight"],
        "final_norm/scale": tensors["model.norm.weight"],
        "head/w": tensors["lm_head.weight"].T,
        "layers/attn_norm/scale": stack("input_layernorm"),
        "layers/mlp_norm/scale": stack("post_attention_layernorm"),
    }
    flat |= {f"layers/attn/{n}/w": stack(f"self_attn.{n}_proj").swapaxes(1, 2) for n in "qkvo"}
    return flat | {f"layers/mlp/{n}/w": stack(f"mlp.{n}_proj").swapaxes(1, 2) for n in ("gate", "up", "down")}


@pytest.mark.parametrize("shards", [1, 3])
def test_load_stacks_and_transposes(tmp_path, shards):
    tensors = llama_tensors()
    model, params = load(write(tmp_path, tensors, shards=shards))
    assert model.config.family == "llama"
    assert model.execution.dtype == jnp.bfloat16
    # By default as `jft train` and `jft generate`.
    assert inspect.signature(jft.load).parameters["dtype"].default == ModelConfig().param_dtype == "float32"
    expected = expected_llama(tensors)
    equal(params, expected)
    assert model.apply(params, jnp.ones((1, 4), jnp.int32)).shape == (1, 4, 64)


@pytest.mark.parametrize("stored", [BF16, np.float32, np.float16])
@pytest.mark.parametrize("wanted", ["bfloat16", "float32", None])
def test_load_casts(tmp_path, stored, wanted):
    tensors = llama_tensors(dtype=stored)
    model, params = jft.load(write(tmp_path, tensors), dtype=wanted)
    expected = {p: x.astype(jnp.dtype(wanted) if wanted else stored) for p, x in expected_llama(tensors).items()}
    equal(params, expected)
    assert model.execution.dtype == jnp.dtype(wanted or stored)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "data": 2}, {"tensor": 8}])
def test_sharded_load_equals_unsharded(tmp_path, mesh):
    description = LLAMA | {"hidden_size": 128, "intermediate_size": 256}
    directory = write(tmp_path, llama_tensors(description), description, shards=2)
    _, whole = load(directory)
    mesh = make_mesh(mesh)
    _, sharded = load(directory, mesh=mesh)
    equal(whole, sharded)
    assert not sharded["layers"]["mlp"]["up"]["w"].sharding.is_fully_replicated
    assert sharded["final_norm"]["scale"].sharding.is_fully_replicated
    _, ruled = load(directory, mesh=mesh, rules=[("up/w$", ())])
    assert ruled["layers"]["mlp"]["up"]["w"].sharding.is_fully_replicated
    equal(whole, ruled)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_slice_reads_only_its_pages(tmp_path):
    rows, width = 8192, 1024
    save_file({"w": np.zeros((rows, width), np.float32)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.release = lambda name: None
    leaf = reader.bind(checkpoint, "x/w", reader.Source("w", (rows, width), lambda x: x.T), (width, rows))
    out = reader.read(checkpoint, leaf, (slice(None), slice(0, rows // 8)), np.dtype(np.float32))
    assert out.shape == (width, rows // 8)
    assert _resident(tmp_path / "model.safetensors") < 0.2 * rows * width * 4


def _resident(file):
    """Bytes of the mapping of ``file`` that are in this process's memory."""
    mapping, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mapping = line.endswith(str(file))
        elif mapping and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


FAMILIES = {
    "llama": LLAMA,
    "llama tied": LLAMA | {"tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 16,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
    "mixtral": LLAMA | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt_neox": LLAMA | {"model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25},
    "bert": LLAMA | {"model_type": "bert", "hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": 1e-12},
}


def fresh(description):
    config = registry.family_named(description["model_type"]).from_hf(description)
    model = jft.Model(config)
    return model, model.init(jax.random.key(0), jnp.bfloat16)


@pytest.mark.parametrize("name", FAMILIES)
def test_save_load_save_is_bit_equal(tmp_path, name):
    model, params = fresh(FAMILIES[name])
    jft.save(model, params, tmp_path / "a")
    loaded, back = jft.load(tmp_path / "a", dtype=None)
    equal(params, back)
    assert loaded.config == model.config
    jft.save(loaded, back, tmp_path / "b", shard_bytes=20_000)
    _, again = load(tmp_path / "b")
    equal(params, again)
    merged = {}
    for file in sorted((tmp_path / "b").glob("*.safetensors")):
        merged |= load_file(file)
    one = load_file(tmp_path / "a" / "model.safetensors")
    assert merged.keys() == one.keys()
    assert all(merged[n].tobytes() == one[n].tobytes() for n in one)


def test_save_writes_what_was_loaded(tmp_path):
    tensors = llama_tensors()
    model, params = load(write(tmp_path / "a", tensors), mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    jft.save(model, params, tmp_path / "b", shard_bytes=10_000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for name, file in index["weight_map"].items():
        stored = load_file(tmp_path / "b" / file)[name]
        assert stored.dtype == BF16
        np.testing.assert_array_equal(stored, tensors[name])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_save_casts_and_copies_companions(tmp_path):
    origin = write(tmp_path / "a", llama_tensors(), LLAMA | {"eos_token_id": 7})
    (origin / "tokenizer.json").write_text("{}")
    (origin / "notes.txt").write_text("not copied")
    model, params = load(origin)
    jft.save(model, params, tmp_path / "b", like=origin, dtype="float32")
    assert sorted(f.name for f in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_file(tmp_path / "b" / "model.safetensors")["model.norm.weight"].dtype == np.float32
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == 7


def test_an_occupied_directory_is_refused_and_replaced_only_whole(tmp_path):
    model, params = fresh(LLAMA)
    jft.save(model, params, tmp_path / "a")
    with pytest.raises(ValueError, match="exists and is not empty; give another name, or overwrite=True"):
        jft.save(model, params, tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()

    class Failing(np.ndarray):
        def __getitem__(self, index):
            raise OSError("disk full")

    broken = tree.flatten(jax.tree.map(np.asarray, params))
    broken["layers/mlp/up/w"] = broken["layers/mlp/up/w"].view(Failing)
    with pytest.raises(OSError, match="disk full"):
        jft.save(model, tree.unflatten(broken), tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    jft.save(model, jax.tree.map(lambda x: x + 1, params), tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != before
    assert [f.name for f in tmp_path.iterdir()] == ["a"]
    (tmp_path / "other").mkdir()
    jft.save(model, params, tmp_path / "other")
    (tmp_path / "other" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json, so it is no checkpoint"):
        jft.save(model, params, tmp_path / "other", overwrite=True)


def test_parameters_of_another_form_are_refused(tmp_path):
    model, params = fresh(LLAMA)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Structured:
        w: jax.Array

    flat = tree.flatten(params)
    wrong = tree.unflatten(flat | {"head/w": Structured(flat["head/w"])})
    with pytest.raises(ValueError, match=r"'head/w' is a Structured, not an array.*run\.params"):
        jft.save(model, wrong, tmp_path / "a")
    lacking = tree.unflatten({p: x for p, x in flat.items() if p != "head/w"})
    with pytest.raises(ValueError, match="params lack 'head/w'"):
        jft.save(model, lacking, tmp_path / "a")
    with pytest.raises(ValueError, match="params hold the unknown 'extra/w'"):
        jft.save(model, params | {"extra": {"w": jnp.ones(2)}}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"'head/w' has shape \(3,\), the model wants \(32, 64\)"):
        jft.save(model, tree.unflatten(flat | {"head/w": jnp.ones(3)}), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_classifiers(tmp_path, name):
    backbone, params = fresh(FAMILIES[name])
    jft.save(backbone, params, tmp_path / "a")
    model, wrapped = load(tmp_path / "a", classes=5, pool="mean")
    assert isinstance(model.config, Classifier)
    assert wrapped["classifier"]["w"].shape == (32, 5)
    assert wrapped["classifier"]["w"].dtype == jnp.bfloat16
    equal({k: v for k, v in wrapped.items() if k != "classifier"}, params)
    equal(load(tmp_path / "a", classes=5, pool="mean", mesh=make_mesh())[1], wrapped)
    assert jnp.any(load(tmp_path / "a", classes=5, seed=1)[1]["classifier"]["w"] != wrapped["classifier"]["w"])
    # A new head trains under LoRA, as in peft, unless it is frozen.
    assert model.drawn == ("classifier/b", "classifier/w") and model.with_(remat="full").drawn == model.drawn
    trains = {x: set(jft.method("lora", freeze=x).plan(wrapped, model).leaves) for x in ((), "^classifier/")}
    assert trains[()] - trains["^classifier/"] == set(model.drawn)
    jft.save(model, wrapped, tmp_path / "zero")
    assert not load(tmp_path / "zero")[0].drawn
    equal(load(tmp_path / "zero")[1], wrapped)
    wrapped["classifier"]["b"] = jnp.arange(5, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="2 labels are given, and the model has 5 classes"):
        jft.save(model, wrapped, tmp_path / "b", labels=["a", "b"])
    jft.save(model, wrapped, tmp_path / "b")
    for classes in (0, 5):
        again, back = load(tmp_path / "b", classes=classes)
        assert again.config == model.config
        equal(back, wrapped)
    assert load(tmp_path / "b", classes=3)[1]["classifier"]["w"].shape == (32, 3)


def drop(tensors, name):
    return {n: x for n, x in tensors.items() if n != name}


def test_wrong_tensors_are_named(tmp_path):
    tensors = llama_tensors()
    up = "model.layers.1.mlp.up_proj.weight"
    cases = {
        "missing": (drop(tensors, up), rf"'{up}' \(for 'layers/mlp/up/w'\) is missing"),
        "extra": (tensors | {"model.layers.2.x": np.ones(2)}, r"holds 'model\.layers\.2\.x', which"),
        "shape": (tensors | {up: np.ones((3, 4), BF16)}, rf"'{up}' in .* has shape \(3, 4\), but .* wants \(48, 32\)"),
        "integers": (tensors | {up: np.ones((48, 32), np.int8)}, "has dtype I8, a weight must be floating point"),
    }
    for name, (wrong, message) in cases.items():
        with pytest.raises(LoadError, match=message):
            load(write(tmp_path / name, wrong))


def test_buffers_of_old_checkpoints_are_let_pass(tmp_path):
    tensors = llama_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    load(write(tmp_path, tensors))


def test_wrong_descriptions_are_named(tmp_path):
    tensors = llama_tensors()
    cases = [
        (LLAMA | {"model_type": "lama"}, "model_type 'lama' .* nearest: llama; known: .*llama"),
        (LLAMA | {"model_type": None}, "model_type None"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        (LLAMA | {"hidden_act": "swiglu9"}, r"config\.json: .*swiglu9"),
        ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, r"config\.json.*lacks 'vocab_size'"),
    ]
    for i, (description, message) in enumerate(cases):
        with pytest.raises(LoadError, match=message):
            load(write(tmp_path / str(i), tensors, description))
    (tmp_path / "0" / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"config\.json: bad JSON at column 2"):
        load(tmp_path / "0")
    (tmp_path / "0" / "config.json").unlink()
    with pytest.raises(LoadError, match=r"has no config\.json"):
        load(tmp_path / "0")


def test_damaged_files_are_named(tmp_path):
    file = write(tmp_path, llama_tensors()) / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    cases = [
        (whole[:-100], rf"truncated: its header says {len(whole)} bytes, the file has {len(whole) - 100}"),
        (whole[:20], "truncated: its header ends at byte"),
        (whole[:5], "is not a safetensors file"),
        (b"<html>" * 100, "is not a safetensors file"),
        (whole[:8] + b"x" * length + whole[8 + length :], "corrupt header"),
        (whole.replace(b"[48,32]", b"[48,33]", 1), r"corrupt header.*\(48, 33\)"),
    ]
    for content, message in cases:
        file.write_bytes(content)
        with pytest.raises(LoadError, match=message):
            load(tmp_path)
    file.unlink()
    with pytest.raises(LoadError, match="has neither model"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match=r"only pytorch_model\.bin, a pickle.*save_pretrained"):
        load(tmp_path)


def test_incomplete_shards_are_named(tmp_path):
    directory = write(tmp_path, llama_tensors(), shards=2)
    file = directory / "model-00002-of-00002.safetensors"
    kept = load_file(file)
    save_file(drop(kept, "model.norm.weight"), file)
    if "model.norm.weight" in kept:
        with pytest.raises(LoadError, match=r"'model\.norm\.weight' is in .*, which does not hold it"):
            load(directory)
    file.unlink()
    with pytest.raises(LoadError, match=r"lacks model-00002-of-00002\.safetensors, named in"):
        load(directory)


def test_sources_that_are_nothing(tmp_path):
    with pytest.raises(LoadError, match="neither a directory, a GGUF file nor a hub id"):
        load(tmp_path / "nowhere")
    with pytest.raises(LoadError, match="'no-such/model' is no directory here"):
        load("no-such/model")
    with pytest.raises(LoadError, match="'int8' is not a floating-point type"):
        jft.load(write(tmp_path, llama_tensors()), dtype="int8")
    with pytest.raises(LoadError, match="rules were given without a mesh"):
        load(tmp_path, rules=[("w$", ())])
    with pytest.raises(LoadError, match="give classes as well"):
        load(tmp_path, pool="mean")


def test_hub_ids_are_downloaded_without_pickles(tmp_path, monkeypatch):
    directory = write(tmp_path / "cache", llama_tensors())
    asked = {}

    def snapshot_download(name, revision=None, **patterns):
        asked.update(name=name, revision=revision, **patterns)
        return str(directory)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    model, params = load("org/model", revision="v1")
    assert (asked["name"], asked["revision"]) == ("org/model", "v1")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    jft.save(model, params, tmp_path / "b", like="org/model")


def test_the_hub_that_is_absent_or_away_is_named(monkeypatch):
    def away(*arguments, **options):
        raise OSError("no route to host\nmore")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=away))
    with pytest.raises(LoadError, match=r"could not be fetched from the hub at revision 'v1': no route to host$"):
        load("org/model", revision="v1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LoadError, match=r"pip install 'jft\[hf\]'"):
        load("org/model")


def test_overwriting_deletes_nothing_of_others(tmp_path):
    model, params = fresh(LLAMA)
    jft.save(model, params, tmp_path / "a")
    for name in ("model-00001-of-00002.safetensors", "tokenizer.json"):
        (tmp_path / "a" / name).write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"a also holds notes\.txt, which jft does not write and overwriting would delete"
    ):
        jft.save(model, params, tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    (tmp_path / "a" / "notes.txt").unlink()
    jft.save(model, params, tmp_path / "a", overwrite=True)
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"config.json", "model.safetensors"}


def test_like_copies_no_link_out_of_its_folder(tmp_path):
    model, params = fresh(LLAMA)
    jft.save(model, params, tmp_path / "hub" / "snapshots" / "1")
    origin = tmp_path / "hub" / "snapshots" / "1"
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "abc").write_text("{}")
    (origin / "tokenizer.json").symlink_to("../../blobs/abc")
    (origin / "vocab.json").symlink_to("tokenizer.json")
    jft.save(model, params, tmp_path / "good", like=origin)
    assert (tmp_path / "good" / "tokenizer.json").read_text() == (tmp_path / "good" / "vocab.json").read_text() == "{}"
    assert not (tmp_path / "good" / "tokenizer.json").is_symlink()
    (tmp_path / "secret").write_text("key")
    (origin / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(
        ValueError, match=r"merges\.txt is a link to .*secret, outside its folder; put the file itself there"
    ):
        jft.save(model, params, tmp_path / "bad", like=origin)
    assert not (tmp_path / "bad").exists()


def test_an_index_names_files_of_its_folder(tmp_path):
    directory = write(tmp_path / "a", llama_tensors(), shards=2)
    (directory / "model-00001-of-00002.safetensors").rename(tmp_path / "stolen.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002", "../stolen"))
    with pytest.raises(
        LoadError, match=r"is said to be in '\.\./stolen\.safetensors', which is no file of that folder"
    ):
        load(directory)
