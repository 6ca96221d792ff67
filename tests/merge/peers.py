"""Tiny models of transformers on disk, and what mergekit makes of them: what rules are compared with.

Task vectors here are over the tensors of the files, by their names: no layers are stacked, so that a tensor is what mergekit
takes for one.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jft.delta import TaskVector, apply
from tests.merge.draws import uniforms

Tensors = dict[str, np.ndarray]
KINDS = ("llama", "qwen2", "gpt2")


def models(directory: Path, kind: str, count: int = 3, seed: int = 0, spread: float = 0.02) -> tuple[Path, list[Path]]:
    """A tiny base of ``kind`` and ``count`` models near it, as directories; some entries of each are the base's own."""
    import torch
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    torch.manual_seed(seed)
    if kind == "llama":
        config: Any = transformers.LlamaConfig(**shape, intermediate_size=48, num_key_value_heads=2)
    elif kind == "qwen2":
        config = transformers.Qwen2Config(
            **shape, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
        )
    else:
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    model = transformers.AutoModelForCausalLM.from_config(config)
    base = directory / "base"
    model.save_pretrained(base)
    tuned = []
    for i in range(count):
        generator = torch.Generator().manual_seed(100 * seed + i)
        copy = transformers.AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            for parameter in copy.parameters():
                change = torch.randn(parameter.shape, generator=generator) * spread
                # A third of the entries do not change: zeros of a delta, and ties among them.
                parameter += torch.where(torch.rand(parameter.shape, generator=generator) < 0.33, 0.0, change)
        tuned.append(directory / f"model{i}")
        copy.save_pretrained(tuned[-1])
    return base, tuned


def tensors(directory: Path) -> Tensors:
    """``{name: array}`` of the directory's safetensors file."""
    return load_file(directory / "model.safetensors")


def vectors(base: Path, tuned: Sequence[Path]) -> tuple[Tensors, list[TaskVector]]:
    """The base's tensors, and the task vectors of the models."""
    before = tensors(base)
    return before, [TaskVector.between(before, tensors(directory)) for directory in tuned]


def mergekit(
    method: str,
    base: Path | None,
    tuned: Sequence[Path],
    out: Path,
    parameters: Mapping[str, Any] | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
) -> Tensors:
    """The tensors of mergekit's merge in float32. each: the parameters of every model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

    entries = [
        {"model": str(path), "parameters": dict(p)} for path, p in zip(tuned, each or [{}] * len(tuned), strict=True)
    ]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": entries,
        "dtype": "float32",
        "parameters": dict(parameters or {}),
    }
    if base is not None:
        recipe["base_model"] = str(base)
    run_merge(MergeConfiguration.model_validate(recipe), str(out), MergeOptions(copy_tokenizer=False, quiet=True))
    return tensors(out)


def known_masks(monkeypatch: pytest.MonkeyPatch, taus: Sequence[TaskVector]) -> None:
    """Let mergekit draw the numbers that rules of jft draw for these vectors, with the seed 0."""
    import mergekit.merge_methods.generalized_task_arithmetic as theirs
    import torch

    numbers, sparsify, bernoulli = uniforms(taus), theirs.sparsify, torch.bernoulli
    known = {np.asarray(t[n].dense()).tobytes(): numbers[n][i] for i, t in enumerate(taus) for n in numbers}
    current: list[Any] = []

    def sparsify_known(delta: Any, **options: Any) -> Any:
        current[:] = [torch.tensor(known[delta.numpy().tobytes()])]
        return sparsify(delta, **options)

    def drawn(p: Any) -> Any:
        return (current[0].reshape(p.shape) < p).to(p.dtype) if current else bernoulli(p)

    monkeypatch.setattr(theirs, "sparsify", sparsify_known)
    monkeypatch.setattr(torch, "bernoulli", drawn)


def fusionbench(module: str) -> Any:
    """``fusion_bench.MODULE``, from where `make test-peers` puts it; the test is skipped where it is not."""
    folder = Path(sys.prefix) / "fusionbench"
    if not folder.is_dir():
        pytest.skip("fusion-bench is not installed; make test-peers does it")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    with warnings.catch_warnings():
        # What a training stack warns of while it is imported is no matter of ours.
        warnings.simplefilter("ignore")
        return importlib.import_module(f"fusion_bench.{module}")


def largest_difference(base: Tensors, merged: TaskVector, expected: Tensors) -> float:
    """The largest difference of a parameter of ``base + merged`` from ``expected``; every tensor must be there."""
    params = {name: np.asarray(x) for name, x in apply(base, merged, check=False).items()}
    assert params.keys() >= expected.keys()
    return max(float(np.abs(params[name] - expected[name]).max()) for name in expected)
