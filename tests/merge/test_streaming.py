"""Merges of checkpoints on disk: the numbers of merges in memory, whole outputs, interruptions, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jft
from jft.delta import Dense, Entries, LowRank, TaskVector, apply, describe
from jft.merge import RULES, host, streaming
from jft.merge.in_memory import merge
from jft.merge.on_disk import MANIFEST, merge_to_disk
from jft.merge.plan import plan
from jft.merge.recipe import parse
from jft.merge.rule import Rule
from jft.merge.statistics import load_statistics, save_statistics
from tests.merge import peers
from tests.models import checkpoints

MUTATIONS = [
    ("jft/merge/host.py", "np.where(bits & _SIGN, ~bits, bits | _SIGN)", "bits | _SIGN"),
    ("jft/merge/streaming.py", "else np.maximum", "else np.minimum"),
    ("jft/merge/sources.py", "np.asarray(x[piece.position], np.float32)", "np.asarray(x[0], np.float32)"),
    ("jft/merge/streaming.py", "if merging and not covered", "if merging and covered"),
    ("jft/merge/host.py", "carry += np.uint32(0x7FFF)", "carry += np.uint32(0x8000)"),
    ("jft/merge/host.py", "if above < rank <= above + inner.size", "if above < rank"),
    (
        "jft/merge/host.py",
        "return counts.size - 1 - position, rank - before",
        "return counts.size - 1 - position, rank",
    ),
    ("jft/merge/streaming.py", "np.clip(ends - part.start, 0,", "np.clip(ends, 0,"),
    ("jft/merge/host.py", "part.start + int(equal[missing])", "part.start + int(equal[missing]) + 1"),
    (
        "jft/merge/host.py",
        "base[part] if delta is None else base[part] + delta",
        "base[part] if delta is None else delta",
    ),
    ("jft/merge/output.py", "if not (directory / shard).exists()", "if True"),
    ("jft/merge/adapters.py", "alpha / (math.sqrt(rank) if", "alpha / (rank if"),
    ("jft/merge/sources.py", "handle.seek(entry.start + index", "handle.seek(entry.start + 0 * index"),
]
DESCRIPTION = checkpoints.LLAMA


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three models near it, in bfloat16, where equal magnitudes abound."""
    folder = tmp_path_factory.mktemp("models")
    base = checkpoints.llama_tensors()
    names = [checkpoints.write(folder / "base", base)]
    for i in range(3):
        rng = np.random.default_rng(i + 1)
        near = {n: (x.astype(np.float32) + 0.01 * rng.standard_normal(x.shape, np.float32)) for n, x in base.items()}
        near = {n: x.astype(ml_dtypes.bfloat16) for n, x in near.items()}
        names.append(checkpoints.write(folder / f"model{i}", near, shards=1 + i % 2))
    return [str(n) for n in names]


def recipe(models, method="ties", each=None, **changes):
    base, *tuned = models
    value = {"merge_method": method, "base_model": base, "dtype": "float32"}
    value["models"] = each or [{"model": m} for m in tuned]
    return parse(value | changes)


def tensors(directory):
    return {n: x for file in sorted(directory.glob("*.safetensors")) for n, x in load_file(file).items()}


def merged(tmp_path, *args, name="out", **options):
    planned = merge_to_disk(parse(args[0]) if isinstance(args[0], dict) else args[0], tmp_path / name, **options)
    return tensors(tmp_path / name), planned


def in_memory(models, rule, scale=1.0, dtype=np.float32):
    base = {n: jnp.asarray(x) for n, x in tensors(Path(models[0])).items()}
    taus = [TaskVector.between(base, tensors(Path(m))) for m in models[1:]]
    wide = {n: x.astype(jnp.float32) for n, x in base.items()}
    result = apply(wide, merge(rule, taus, scale=scale), check=False)
    return {n: np.asarray(x).astype(dtype) for n, x in result.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("preset", ["mergekit", "paper"])
def test_elementwise_rules_give_the_bits_of_merges_in_memory(models, tmp_path, preset, monkeypatch):
    """In pieces of 512 entries, so that ties at the threshold are cut in the middle of one."""
    monkeypatch.setattr(streaming, "CHUNKS", (64, 512))
    options = {"density": [0.1, 0.3, 0.5]}
    weights = [1.0, 0.5, -0.25]
    each = [
        {"model": m, "parameters": {"weight": w, "density": d}}
        for m, w, d in zip(models[1:], weights, options["density"], strict=True)
    ]
    out, _ = merged(tmp_path, recipe(models, each=each, preset=preset, parameters={"lambda": 0.7}))
    assert_same(out, in_memory(models, RULES["ties"].build(preset=preset, weights=weights, **options), 0.7))


def test_weighted_sums_give_the_bits_of_merges_in_memory(models, tmp_path):
    each = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models[1:], [0.3, 1.0, -0.7], strict=True)]
    out, _ = merged(tmp_path, recipe(models, "task_arithmetic", each=each, dtype=None))
    rule = Rule(lambda t: None, parameters={"weight": [0.3, 1.0, -0.7]}, coefficients=lambda v: v["weight"])
    assert_same(out, in_memory(models, rule, dtype=ml_dtypes.bfloat16))
    assert next(iter(out.values())).dtype == ml_dtypes.bfloat16


def test_rules_of_whole_tensors(models, tmp_path, monkeypatch):
    """A rule with a norm, a base, a random mask, and trimming, in whole tensors."""

    def function(tensor):
        mask = jax.random.bernoulli(tensor.key, 0.5, tensor.deltas.shape)
        norm = jnp.sqrt(jnp.sum(tensor.deltas**2)) + jnp.sum(jnp.abs(tensor.base))
        kept = jnp.abs(tensor.deltas) >= jnp.median(jnp.abs(tensor.deltas))
        return jnp.sum(jnp.where(mask & kept, tensor.deltas, 0), axis=0) / norm

    rule = Rule(function, parameters={"weight": 1.0}, base=True)
    planned = plan(recipe(models))
    jobs = [streaming.dataclasses.replace(job, rule=rule) for job in planned.jobs]
    written = {}

    output = types.SimpleNamespace(missing={job.name for job in jobs}, write=written.__setitem__)
    streaming.run(jobs, output)
    base = {n: jnp.asarray(x) for n, x in tensors(Path(models[0])).items()}
    taus = [TaskVector.between(base, tensors(Path(m))) for m in models[1:]]
    expected = apply({n: x.astype(jnp.float32) for n, x in base.items()}, merge(rule, taus, base=base), check=False)
    for job in jobs:
        np.testing.assert_allclose(written[job.name].reshape(job.shape), expected[job.name], atol=1e-6)


@pytest.mark.parametrize("balance", ["softmax", "tanh"])
def test_passes_over_the_whole_model(models, balance):
    """Maxima, sums and ranks of coefficients, each from those before, of three tensors; one has no entries."""
    rule = RULES["pcb"].build(density=0.3, balance=balance, weights=[1.0, 0.5, -0.7])
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    jobs = [streaming.dataclasses.replace(job, rule=rule) for job in plan(recipe(models)).jobs if job.name in names]
    written = {}
    empty = streaming.dataclasses.replace(jobs[-1], name="empty", shape=(0,))
    output = types.SimpleNamespace(missing={*names, "empty"}, write=written.__setitem__)
    streaming.run([*jobs, empty], output)
    base, *tuned = ({n: jnp.asarray(tensors(Path(m))[n]) for n in names} for m in models)
    wide = {n: x.astype(jnp.float32) for n, x in base.items()}
    expected = apply(wide, merge(rule, [TaskVector.between(base, t) for t in tuned]), check=False)
    assert written.pop("empty").size == 0
    for job in jobs:
        np.testing.assert_allclose(written[job.name].reshape(job.shape), expected[job.name], atol=1e-6)


def test_eight_devices_give_what_one_gives():
    """Task vectors over jft's own paths, sharded."""
    mesh = jax.make_mesh((8,), ("fsdp",))
    rng = np.random.default_rng(0)
    draw = lambda: {"layers/w": rng.integers(-6, 7, (2, 16, 8)) / 4, "head/w": rng.integers(-6, 7, (8, 24)) / 4}
    arrays = [{p: jnp.asarray(x, jnp.float32) for p, x in draw().items()} for _ in range(3)]
    spec = {"layers/w": PartitionSpec(None, "fsdp"), "head/w": PartitionSpec(None, "fsdp")}
    spread = [{p: jax.device_put(x, NamedSharding(mesh, spec[p])) for p, x in a.items()} for a in arrays]
    one, eight = ([TaskVector({p: Dense(x) for p, x in a.items()}) for a in group] for group in (arrays, spread))
    for preset in ("paper", "mergekit"):
        a, b = (RULES["ties"](taus, [1.0, 0.5, 0.25], density=0.3, preset=preset) for taus in (one, eight))
        assert len(b["head/w"].value.sharding.device_set) == 8
        for path in spec:
            np.testing.assert_array_equal(a[path].dense(), b[path].dense())
    for balance in ("softmax", "tanh"):
        a, b = (RULES["pcb"](taus, [1.0, 0.5, 0.25], density=0.3, balance=balance) for taus in (one, eight))
        for path in spec:
            np.testing.assert_allclose(a[path].dense(), b[path].dense(), atol=1e-6)


def test_cuts_are_exact():
    rng = np.random.default_rng(0)
    size = 5 * host.SAMPLE
    hard = np.where(np.arange(size) % 5, 0, rng.standard_normal(size))  # the sample's stride is 5: it sees no zero
    for x in (rng.standard_normal(size), np.round(rng.standard_normal(size), 1), np.zeros(size), hard):
        x = x.astype(np.float32)
        ordered = np.sort(np.abs(x))[::-1]
        ranks = [0, 1, 7, size // 10, size // 2, size - 1, size]
        for rank, cut in zip(ranks, host.cuts(x, ranks), strict=True):
            limit = ordered[rank - 1] if rank else np.inf
            assert cut.limit == limit
            if rank:
                first = (np.abs(x) == limit) & (np.arange(size) < cut.end)
                assert ((np.abs(x) > limit) | first).sum() == rank


def test_limits_of_a_model_are_exact():
    rng = np.random.default_rng(0)
    parts = [[np.round(rng.standard_normal(n), d).astype(np.float32) for d in (1, 6)] for n in (3, 70_000, 500)]
    ranks = np.array([[1, 0, 20_000], [70_503, 5, 40_000]])
    for by, score in ((host.magnitude_order, np.abs), (host.order, lambda x: x)):
        found = host.limits(lambda count: [count(x) for x in parts], ranks, by)
        for i in range(2):
            ordered = np.sort(score(np.concatenate([p[i] for p in parts])))[::-1]
            np.testing.assert_array_equal(found[i], [ordered[k - 1] if k else np.inf for k in ranks[i]])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_widening_and_rounding(dtype):
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    x[:4] = [np.inf, np.nan, -0.0, 1 + 2**-8]
    out = np.empty(1000, dtype)
    host.narrow(x, out)
    np.testing.assert_array_equal(out[2:], x[2:].astype(dtype))
    host.narrow(x[2:], out[2:])
    np.testing.assert_array_equal(out.astype(np.float32), x.astype(dtype).astype(np.float32))
    np.testing.assert_array_equal(host.widen(out), out.astype(np.float32))


def test_output_is_a_model(models, tmp_path):
    (Path(models[0]) / "tokenizer.json").write_text("{}")
    out, _ = merged(tmp_path, recipe(models, dtype=None), shard_bytes=20_000)
    directory = tmp_path / "out"
    assert len(list(directory.glob("*.safetensors"))) == 3
    assert (directory / "tokenizer.json").read_text() == "{}"
    _, params = jft.load(directory, dtype=None)
    assert params["head"]["w"].dtype == jnp.bfloat16
    manifest = json.loads((directory / MANIFEST).read_text())
    assert (manifest["rule"], manifest["preset"], len(manifest["inputs"])) == ("ties", "mergekit", 4)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    with pytest.raises(ValueError, match="not empty"):
        merged(tmp_path, recipe(models))
    again, _ = merged(tmp_path, recipe(models, dtype=None), overwrite=True)
    assert_same(out, again)


SCRIPT = """
import os, signal, sys
from jft.merge import on_disk, recipe
from jft.merge.output import Output
count, write = 0, Output.write
def killed(self, name, value):
    global count
    write(self, name, value)
    count += 1
    if count == 12: os.kill(os.getpid(), signal.SIGKILL)
Output.write = killed
on_disk.merge_to_disk(recipe.load(sys.argv[1]), sys.argv[2], shard_bytes=20_000, workers=1)
"""


def test_a_killed_merge_goes_on(models, tmp_path):
    whole, _ = merged(tmp_path, recipe(models), name="whole", shard_bytes=20_000)
    text = recipe(models).text
    (tmp_path / "r.yml").write_text(json.dumps(text))
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "r.yml", tmp_path / "out"], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    finished = sorted((tmp_path / ".out.merging").glob("*.safetensors"))
    assert finished
    times = [f.stat().st_mtime_ns for f in finished]
    out, _ = merged(tmp_path, text, shard_bytes=20_000)
    assert_same(out, whole)
    assert [(tmp_path / "out" / f.name).stat().st_mtime_ns for f in finished] == times
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files
    assert {p.name for p in tmp_path.iterdir()} == {"out", "whole", "r.yml"}


def task_vector(models, **more):
    _, params = jft.load(models[0], dtype=None)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    deltas = {
        "layers/mlp/up/w": Dense(draw(2, 32, 48)),
        "layers/attn/q/w": LowRank(draw(2, 32, 3), draw(2, 3, 32)),
        "layers/attn/k/w": Entries(jnp.array([3, 40]), jnp.array([1, 2]), draw(2), (2, 32, 16)),
        "embed/table": Dense(draw(64, 32)),
        "layers/attn_norm/scale": Dense(draw(2, 32)),
    }
    return params, TaskVector(deltas, describe(params))


def test_task_vector_files(models, tmp_path):
    params, tau = task_vector(models)
    tau.save(tmp_path / "tau.safetensors")
    value = {
        "merge_method": "task_arithmetic",
        "base_model": models[0],
        "models": [{"model": str(tmp_path / "tau.safetensors")}],
    }
    merged(tmp_path, value)
    _, out = jft.load(tmp_path / "out", dtype=None)
    expected = apply(params, tau)
    for path, x in jft.tree.flatten(expected).items():
        np.testing.assert_array_equal(jft.tree.flatten(out)[path], x, err_msg=path)
    with pytest.raises(ValueError, match="is not the base"):
        plan(parse(value | {"base_model": models[1]}))
    plan(parse(value | {"base_model": models[1], "check": False}))
    with pytest.raises(ValueError, match="is a change of a model"):
        plan(parse(value | {"merge_method": "linear"}))


def statistics(params, seed, rule):
    """Random ones of the shapes that the rule reads, for some weights of the model."""
    rng = np.random.default_rng(seed)
    out = {}
    for path in ("layers/attn/q/w", "layers/attn/v/w", "layers/mlp/down/w", "embed/table")[
        : 4 if rule == "fisher" else 3
    ]:
        *stack, rows, columns = jft.tree.flatten(params)[path].shape
        if rule == "fisher":
            out[path] = rng.random((*stack, rows, columns), np.float32)
        else:
            x, y = (rng.standard_normal((*stack, 60, n), np.float32) for n in (rows, columns))
            inputs, outputs = (np.swapaxes(z, -1, -2) @ z / 60 for z in (x, y))
            out[path] = inputs if rule == "regmean" else {"inputs": inputs, "outputs": outputs}
    return out


def compare_statistics(tmp_path, models, rule, **options):
    """A recipe with files of statistics gives what the rule gives of task vectors in memory."""
    loaded = [jft.load(m, dtype="float32")[1] for m in models]
    taus = [TaskVector.between(loaded[0], params) for params in loaded[1:]]
    of = [statistics(params, i, rule) for i, params in enumerate(loaded[1:])]
    entries = []
    for i, (model, values) in enumerate(zip(models[1:], of, strict=True)):
        save_statistics(values, tmp_path / f"{rule}{i}", data="random")
        entries.append({"model": str(model), "statistics": str(tmp_path / f"{rule}{i}")})
    again = load_statistics(tmp_path / f"{rule}0")
    assert again.keys() == of[0].keys()
    jax.tree.map(np.testing.assert_array_equal, again, of[0])
    value = {"merge_method": rule, "base_model": str(models[0]), "models": entries, "dtype": "float32"}
    planned = merge_to_disk(parse(value | {"parameters": {"weight": 0.7, **options}}), tmp_path / f"out_{rule}")
    assert len(planned.manifest["inputs"]) == 2 * len(entries) + 1
    merged = RULES[rule](taus, 0.7, statistics=of, **options)
    _, result = jft.load(tmp_path / f"out_{rule}", dtype="float32")
    for path, x in jft.tree.flatten(apply(loaded[0], merged)).items():
        np.testing.assert_allclose(jft.tree.flatten(result)[path], x, atol=2e-6, rtol=1e-5, err_msg=path)
    average = apply(loaded[0], RULES["average"](taus))
    different = jft.tree.flatten(average)["layers/attn/v/w"] - jft.tree.flatten(result)["layers/attn/v/w"]
    assert np.abs(different).max() > 1e-3
    return value


def test_statistics_from_files(models, tmp_path):
    compare_statistics(tmp_path, models[:3], "fisher", normalise=True)
    compare_statistics(tmp_path, models[:3], "mats", iterations=5)
    value = compare_statistics(tmp_path, models[:3], "regmean")
    lacking = value | {"models": [value["models"][0], {"model": models[2]}]}
    with pytest.raises(ValueError, match="statistics: FILE; 1 of 2 have one"):
        plan(parse(lacking))
    with pytest.raises(ValueError, match="ties reads no statistics of data"):
        plan(parse(value | {"merge_method": "ties"}))
    other = value["models"][1] | {"statistics": str(tmp_path / "fisher1")}
    with pytest.raises(ValueError, match="of the same weights for all models"):
        plan(parse(value | {"models": [value["models"][0], other]}))
    save_statistics({"layers/attn/x/w": np.ones((2, 3, 3))}, tmp_path / "wrong", data="none")
    wrong = [entry | {"statistics": str(tmp_path / "wrong")} for entry in value["models"]]
    with pytest.raises(ValueError, match=r"'layers/attn/x/w', which .* does not have"):
        plan(parse(value | {"models": wrong}))
    with pytest.raises(ValueError, match="not finite"):
        save_statistics({"w": np.array([np.nan])}, tmp_path / "nan", data="none")


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_statistics_of_other_layouts(kind, tmp_path):
    """GPT-2 has query, key and value in one tensor, [in, out]."""
    base, tuned = peers.models(tmp_path, kind, count=2)
    for rule in ("fisher", "regmean"):
        compare_statistics(tmp_path, [base, *tuned], rule)


def adapter(folder, rank=2, **config):
    rng = np.random.default_rng(7)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    start = "base_model.model.model"
    held = {
        f"{start}.layers.1.self_attn.k_proj.lora_A.weight": draw(rank, 32),
        f"{start}.layers.1.self_attn.k_proj.lora_B.weight": draw(16, rank),
        f"{start}.embed_tokens.lora_embedding_A": draw(rank, 64),
        f"{start}.embed_tokens.lora_embedding_B": draw(32, rank),
        "base_model.model.lm_head.weight": draw(64, 32),
    }
    folder.mkdir(exist_ok=True)
    save_file(held, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 6} | config))
    return list(held.values())


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters(models, tmp_path, rslora):
    a, b, ea, eb, head = adapter(tmp_path / "adapter", use_rslora=rslora)
    scaling = 6 / (2**0.5 if rslora else 2)
    base = {n: x.astype(np.float32) for n, x in tensors(Path(models[0])).items()}
    other = {n: x.astype(np.float32) for n, x in tensors(Path(models[1])).items()}
    value = {"merge_method": "task_arithmetic", "base_model": models[0], "dtype": "float32"}
    for reference, start in ((str(tmp_path / "adapter"), base), (f"{models[1]}+{tmp_path / 'adapter'}", other)):
        out, _ = merged(tmp_path, value | {"models": [{"model": reference}]}, overwrite=True)
        expected = dict(start)
        expected["model.layers.1.self_attn.k_proj.weight"] = (
            start["model.layers.1.self_attn.k_proj.weight"] + scaling * b @ a
        )
        expected["model.embed_tokens.weight"] = start["model.embed_tokens.weight"] + scaling * (eb @ ea).T
        expected["lm_head.weight"] = head
        for name, x in expected.items():
            np.testing.assert_allclose(out[name], x, atol=1e-5, err_msg=name)


def test_adapters_that_are_refused(models, tmp_path):
    value = {"merge_method": "task_arithmetic", "base_model": models[0], "models": [{"model": str(tmp_path / "a")}]}
    for config, message in [({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias")]:
        adapter(tmp_path / "a", **config)
        with pytest.raises(ValueError, match=message):
            plan(parse(value))
    adapter(tmp_path / "a", rank_pattern={"k_proj": 4})
    with pytest.raises(ValueError, match="rank 2, adapter_config"):
        merged(tmp_path, value)
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(models, tmp_path):
    base = checkpoints.llama_tensors()
    lacking = dict(base)
    del lacking["model.norm.weight"]
    wider = base | {"model.embed_tokens.weight": np.zeros((65, 32), np.float32)}
    more = base | {"model.layers.0.extra.weight": np.zeros(3, np.float32)}
    gpt = DESCRIPTION | {"model_type": "gpt2"}
    cases = [(lacking, DESCRIPTION, "lacks 'model.norm.weight'"), (wider, DESCRIPTION, r"shape \(65, 32\)"),
             (more, DESCRIPTION, "extra.weight"), (base, gpt, "'gpt2' model")]  # fmt: skip
    for i, (held, description, message) in enumerate(cases):
        other = str(checkpoints.write(tmp_path / f"m{i}", held, description))
        value = {"merge_method": "ties", "base_model": models[0], "models": [{"model": other}]}
        with pytest.raises(ValueError, match=message):
            plan(parse(value))
        if i < 3:
            planned = plan(parse(value | {"mismatch": "base"}))
            assert len(planned.notes) == 1
    out, _ = merged(
        tmp_path, parse(value | {"models": [{"model": str(tmp_path / "m1")}], "mismatch": "base", "dtype": "float32"})
    )
    np.testing.assert_array_equal(
        out["model.embed_tokens.weight"], base["model.embed_tokens.weight"].astype(np.float32)
    )


def test_a_tied_head_is_the_embedding(models, tmp_path):
    held = checkpoints.llama_tensors(seed=3)
    del held["lm_head.weight"]
    tied = str(checkpoints.write(tmp_path / "tied", held, DESCRIPTION | {"tie_word_embeddings": True}))
    value = {
        "merge_method": "task_arithmetic",
        "base_model": models[0],
        "models": [{"model": tied}],
        "dtype": "float32",
    }
    out, planned = merged(tmp_path, value)
    assert "tied" in planned.notes[0]
    np.testing.assert_allclose(out["lm_head.weight"], held["model.embed_tokens.weight"].astype(np.float32), atol=1e-6)
    # The other way: the base has no tensor for a head of its own.
    with pytest.raises(ValueError, match="lm_head"):
        plan(parse(value | {"base_model": tied, "models": [{"model": models[0]}]}))


def test_rules_of_each_model_are_refused(models):
    rule = Rule(lambda t: t.deltas, parameters={"weight": 1.0}, each=True)
    jobs = [streaming.dataclasses.replace(job, rule=rule) for job in plan(recipe(models)).jobs]
    with pytest.raises(ValueError, match="one result per model"):
        streaming.run(jobs, None)
