"""A peft adapter directory as low-rank changes of the tensors of its base."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jft.merge import host
from jft.models.hf import adapter_config
from jft.models.hf.checkpoint import DTYPES, LoadError, read_header
from jft.names import nearest

FILE = "adapter_model.safetensors"
_LORA = re.compile(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?$")
# What changes the meaning of the factors, and is not the plain product.
_REFUSED = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "megatron_config", "target_parameters")


class PeftAdapter:
    """LoRA: ``delta = scaling B A`` in torch's ``[out, in]``; ``scaling = alpha / r``, or ``alpha / sqrt(r)`` with rslora.

    What is saved in full (other modules, an embedding beside its factors) stands in place of the base's. Hu et al. 2021,
    arXiv:2106.09685. Raises ``LoadError`` for adapters of other kinds and for DoRA, whose change depends on the base.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = adapter_config.read(directory)
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise LoadError(f"{directory} is a peft adapter of type {kind!r}; LORA is what can be merged")
        for option in _REFUSED:
            if self.config.get(option):
                raise LoadError(
                    f"{directory} has {option}={self.config[option]!r}, which is not read; merge it with peft"
                )
        if self.config.get("bias") not in (None, "none"):
            raise LoadError(f"{directory} has bias={self.config['bias']!r}, which is not read; merge it with peft")
        if not (directory / FILE).is_file():
            raise LoadError(
                f"{directory} has no {FILE}; pickles are not read: save it again with safe_serialization=True"
            )
        self.files = [directory / FILE, directory / "adapter_config.json"]
        self.entries = read_header(directory / FILE)
        self.factors: dict[str, dict[str, str]] = {}
        for name in self.entries:
            match = _LORA.match(name)
            module = _module(match[1]) if match else _module(name).removesuffix(".weight")
            self.factors.setdefault(module, {})[match[2] if match else "whole"] = name

    def bind(self, shapes: Mapping[str, tuple[int, ...]], base: Path) -> dict[str, str]:
        """``{tensor of the base: module}``; ``ValueError`` for a module that the base lacks, or of another shape."""
        bound = {}
        for module, factors in self.factors.items():
            # Files of a model without its head name tensors without the prefix of the model with it.
            candidates = [f"{module}.weight", *(f"{part}.weight" for part in _shortened(module))]
            name = next((n for n in candidates if n in shapes), None)
            if name is None:
                near = nearest(candidates[0], shapes, hint="; nearest there: '{}'")
                raise ValueError(f"{self.directory} changes {module!r}, which the base {base} does not have{near}")
            if len(factors.keys() & {"A", "B"}) == 1:
                raise ValueError(f"{self.directory} holds {', '.join(factors)} alone of {module!r}")
            shape = self._shape(module)
            if shape != shapes[name]:
                raise ValueError(
                    f"{self.directory} changes {module!r} in shape {shape}, the base {base} has {shapes[name]}"
                )
            bound[name] = module
        return bound

    def _shape(self, module: str) -> tuple[int, ...]:
        factors = self.factors[module]
        if "whole" in factors:
            return self.entries[factors["whole"]].shape
        shape = (self.entries[factors["B"]].shape[0], self.entries[factors["A"]].shape[-1])
        return shape[::-1] if self._transposed(module) else shape

    def _transposed(self, module: str) -> bool:
        # peft keeps the factors of an embedding transposed, and torch's Conv1D its weight [in, out].
        return "lora_embedding" in self.factors[module]["A"] or bool(self.config.get("fan_in_fan_out"))

    def scaling(self, module: str, rank: int) -> float:
        """The factor of ``B A``."""
        alpha = adapter_config.value_of(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        declared = adapter_config.value_of(self.config.get("rank_pattern"), module, self.config["r"])
        if declared != rank:
            raise ValueError(f"{self.directory}: {module!r} has rank {rank}, adapter_config.json says {declared}")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def add(self, module: str, base: np.ndarray, out: np.ndarray) -> None:
        """Add the change of a module to ``out``, flat float32."""
        factors = self.factors[module]
        if "whole" in factors:
            out[...] = self._read(factors["whole"]).reshape(-1) - base
        if "A" not in factors:
            return
        a, b = self._read(factors["A"]), self._read(factors["B"])
        product = b @ a
        product *= np.float32(self.scaling(module, a.shape[0]))
        out += (product.T if self._transposed(module) else product).reshape(-1)

    def nbytes(self, module: str) -> int:
        """Bytes of the module's tensors."""
        return sum(self.entries[name].nbytes for name in self.factors[module].values())

    def _read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        with entry.file.open("rb") as handle:
            handle.seek(entry.start)
            flat = np.frombuffer(handle.read(entry.nbytes), DTYPES[entry.dtype])
        return host.widen(flat).reshape(entry.shape)


def _module(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".base_layer", "")


def _shortened(module: str) -> list[str]:
    """The module without its first names, one after the other: ``transformer.h.0.x`` is ``h.0.x`` in older files."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(1, min(3, len(parts)))]
