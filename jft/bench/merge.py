"""Merging of checkpoints on disk, jft beside mergekit: seconds and peak memory, in one run, each in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jft.models.hf import writer

# Width, hidden, layers, heads, key-value heads, words: of the sizes people merge to try something.
SHAPES = {
    "10M": (256, 704, 4, 8, 4, 16_000),
    "350M": (1024, 2816, 24, 16, 16, 32_000),
    "1.1B": (2048, 5632, 22, 32, 4, 32_000),
}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ties": ({"weight": 0.5, "density": 0.3}, {}),
    "task_arithmetic": ({"weight": 0.5}, {}),
    "linear": ({"weight": 0.5}, {}),
}
"""method -> parameters of every model, and of the merge."""

_JFT = "import sys; from jft.merge import on_disk, recipe; on_disk.merge_to_disk(recipe.load(sys.argv[1]), sys.argv[2])"
_MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
recipe = MergeConfiguration.model_validate(yaml.safe_load(open(sys.argv[1])))
run_merge(recipe, sys.argv[2], MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False))
"""
TOOLS = {"jft": _JFT, "mergekit": _MERGEKIT}


@dataclasses.dataclass(frozen=True)
class Run:
    """One merge: wall-clock seconds and the peak of resident memory, imports included."""

    method: str
    tool: str
    seconds: float
    peak: int


def measure(
    params: str, methods: Sequence[str], models: int, tools: Sequence[str], say: Callable[[str], None], repeat: int = 1
) -> list[Run]:
    """Each method with each tool, in turns; of ``repeat`` the fastest. models: checkpoints, the base among them.

    Raises ``RuntimeError`` with what a process printed where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="jft-bench-") as name:
        folder = Path(name)
        say(f"writing {models} checkpoints of {params} parameters in bfloat16")
        checkpoints = [_write(folder / f"model{i}", params, i) for i in range(models)]
        runs = []
        for method in methods:
            file = folder / f"{method}.yml"
            file.write_text(json.dumps(_recipe(method, checkpoints)))
            tried: dict[str, list[Run]] = {tool: [] for tool in tools}
            for _ in range(repeat):
                for tool in tools:
                    tried[tool].append(_run(tool, method, file, folder / "out"))
                    say(f"{method} {tool}: {tried[tool][-1].seconds:.1f} s, {tried[tool][-1].peak / 2**30:.2f} GiB")
            runs += [min(tried[tool], key=lambda run: run.seconds) for tool in tools]
        return runs


def _recipe(method: str, checkpoints: Sequence[Path]) -> dict[str, Any]:
    parameters, shared = RECIPES[method]
    base, *tuned = map(str, checkpoints)
    merged = [base, *tuned] if method == "linear" else tuned
    entries = [{"model": m, "parameters": parameters} for m in merged]
    recipe = {"merge_method": method, "models": entries, "parameters": shared, "dtype": "bfloat16"}
    return recipe if method == "linear" else recipe | {"base_model": base}


def _write(directory: Path, params: str, number: int) -> Path:
    """A Llama near the others: equal weights, and a change of its own."""
    width, hidden, layers, heads, key_values, words = SHAPES[params]
    narrow = width // heads * key_values
    shapes = {
        "model.embed_tokens.weight": (words, width),
        "lm_head.weight": (words, width),
        "model.norm.weight": (width,),
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        linear = {"q": (width, width), "k": (narrow, width), "v": (narrow, width), "o": (width, width)}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": shape for n, shape in linear.items()}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (hidden, width) for n in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (width, hidden)
        shapes |= {f"{layer}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        index = list(shapes).index(name)
        value = 0.02 * np.random.default_rng(index).standard_normal(shape, np.float32)
        if number:
            value += 0.002 * np.random.default_rng([number, index]).standard_normal(shape, np.float32)
        return value.astype(ml_dtypes.bfloat16)

    dtype = np.dtype(ml_dtypes.bfloat16)
    tensors = [writer.Tensor(n, s, dtype, lambda n=n, s=s: draw(n, s)) for n, s in shapes.items()]  # type: ignore[misc]
    directory.mkdir()
    writer.write_weights(directory, tensors, 5e9)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": words, "hidden_size": width,
        "intermediate_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_values, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    writer.write_json(directory / "config.json", config)
    return directory


def _run(tool: str, method: str, recipe: Path, out: Path) -> Run:
    if out.exists():
        shutil.rmtree(out)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", TOOLS[tool], str(recipe), str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    # wait4 tells the peak of this child alone.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{tool} failed at {method}: {printed.decode(errors='replace')[-2000:]}")
    process.stdout.close()
    # In KiB on Linux, in bytes on macOS.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(method, tool, time.perf_counter() - began, peak)
