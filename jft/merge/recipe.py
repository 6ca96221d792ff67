"""Recipes of merges: mergekit's YAML, checked key by key, with what jft adds to it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jft import files, strict_json
from jft.names import nearest

Settings = Mapping[str, Any]
MAX_BYTES, MAX_VALUES = 1_000_000, 100_000
"""Of a recipe."""

TOP = {
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "preset", "seed", "mismatch", "check",
}  # fmt: skip
"""Keys of a recipe. The last four are jft's: preset of the rule, seed, what to do where tensors differ, check of bases."""
REFUSED = {
    "modules": "merge the modules of a model one by one, as slices",
    "tokenizer": "tokens are not added or remapped; tokenizer_source: base, or a model of the recipe",
    "chat_template": "the template is that of the tokenizer; replace chat_template.jinja in the output",
    "residual_weight": "mergekit itself does not read it",
}
DTYPES = {"float32", "float16", "bfloat16", "float64"}


@dataclasses.dataclass(frozen=True)
class Input:
    """A model of a slice. layers: the layers ``[first, last)`` that it gives; None is all. statistics: a file of them."""

    model: str
    parameters: Settings
    layers: tuple[int, int] | None = None
    statistics: str | None = None


@dataclasses.dataclass(frozen=True)
class Slice:
    """Layers of the output that are merged of the same models."""

    inputs: tuple[Input, ...]
    base: str | None
    parameters: Settings


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to merge, and how. dtype: of the output; None is that of each tensor of the base. preset: None is "mergekit"."""

    method: str
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Settings
    dtype: str | None
    tokenizer: str | None
    preset: str | None
    seed: int
    mismatch: str
    check: bool
    text: Settings

    @property
    def models(self) -> list[str]:
        """Every model that is read but the base, in order."""
        return list(dict.fromkeys(i.model for s in self.slices for i in s.inputs))


def load(path: str | os.PathLike) -> Recipe:
    """The recipe in a YAML file. Raises ``ValueError`` naming the file and what is wrong with it."""
    file = Path(path)
    try:
        value = yaml.safe_load(files.read_text(file, MAX_BYTES))
        _check_extent(value)
        return parse(value)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    except RecursionError:
        raise ValueError(f"{file}: lists or mappings too deep inside each other") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _check_extent(value: Any) -> None:
    """``ValueError`` for a value that YAML's aliases make larger than any recipe, or endless, out of a few lines."""
    pending, count = [value], 0
    while pending:
        count += 1
        if count > MAX_VALUES:
            raise ValueError(f"the recipe has more than {MAX_VALUES:,} values, aliases (*NAME) included")
        one = pending.pop()
        if isinstance(one, Mapping | list):
            pending += [*one.values()] if isinstance(one, Mapping) else one
    # Endless ones are refused above.
    if strict_json.depth(value) > strict_json.MAX_DEPTH:
        raise ValueError(f"more than {strict_json.MAX_DEPTH} lists or mappings inside each other")


def parse(value: Any) -> Recipe:
    """The recipe that a mapping describes; ``ValueError`` naming an unknown or unsupported key, or a wrong value."""
    _known(value, TOP, "the recipe")
    if not isinstance(value.get("merge_method"), str):
        raise ValueError("the recipe has no merge_method")
    if bool(value.get("models")) == bool(value.get("slices")):
        raise ValueError("a recipe has either models or slices")
    base = _reference(value["base_model"], "base_model") if value.get("base_model") else None
    if value.get("slices"):
        slices = tuple(_slice(s, base, f"slices[{i}]") for i, s in enumerate(_list(value["slices"], "slices")))
    else:
        inputs = (_input(m, f"models[{i}]", False) for i, m in enumerate(_list(value["models"], "models")))
        slices = (Slice(tuple(inputs), base, {}),)
    if value.get("tokenizer_source") == "union":
        raise ValueError(
            "tokenizer_source: union is not supported: jft does not remap embeddings. Give base, or a model"
        )
    mismatch = value.get("mismatch", "refuse")
    if mismatch not in ("refuse", "base"):
        raise ValueError(f"mismatch is refuse or base, not {mismatch!r}")
    for key in ("dtype", "out_dtype"):
        if value.get(key) not in (None, *DTYPES):
            raise ValueError(f"{key} is one of {', '.join(sorted(DTYPES))}, not {value[key]!r}")
    seed = value.get("seed", 0)
    if not strict_json.COUNT.test(seed):
        raise ValueError(f"seed is {strict_json.COUNT.name}, not {seed!r:.60}")
    return Recipe(
        method=value["merge_method"],
        base=base,
        slices=slices,
        parameters=_settings(value.get("parameters"), "parameters"),
        dtype=value.get("out_dtype") or value.get("dtype"),
        tokenizer=value.get("tokenizer_source"),
        preset=value.get("preset"),
        seed=seed,
        mismatch=mismatch,
        check=bool(value.get("check", True)),
        text=value,
    )


def _known(value: Any, keys: set[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, not {type(value).__name__}")
    for key in value:
        if key in REFUSED and value[key] is not None:
            raise ValueError(f"{key!r} in {where} is not supported: {REFUSED[key]}")
        if key not in keys and key not in REFUSED:
            raise ValueError(f"unknown key {key!r} in {where}{nearest(key, keys)}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list with at least one entry")
    return value


def _reference(value: Any, where: str) -> str:
    if isinstance(value, Mapping):
        # mergekit's long form of MODEL+ADAPTER.
        _known(value, {"model", "lora"}, where)
        parts = [p.get("path") if isinstance(p, Mapping) else p for p in (value.get("model"), value.get("lora"))]
        return "+".join(str(p) for p in parts if p)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must be a model (a directory, a hub id, a task-vector file), not {value!r}")
    return value


def _input(value: Any, where: str, ranged: bool) -> Input:
    # Statistics are of whole models.
    _known(value, {"model", "parameters", "layer_range" if ranged else "statistics"}, where)
    layers = None
    if ranged:
        bounds = value.get("layer_range")
        if not isinstance(bounds, list) or len(bounds) != 2 or not all(isinstance(n, int) for n in bounds):
            raise ValueError(f"{where} must have layer_range: [first, last], not {bounds!r}")
        layers = (bounds[0], bounds[1])
        if not 0 <= layers[0] < layers[1]:
            raise ValueError(f"layer_range {bounds} in {where} holds no layers")
    settings = _settings(value.get("parameters"), f"{where}.parameters")
    statistics = value.get("statistics")
    if statistics is not None and not isinstance(statistics, str):
        raise ValueError(f"statistics in {where} is a file that jft.merge.save_statistics wrote, not {statistics!r}")
    return Input(_reference(value.get("model"), f"{where}.model"), settings, layers, statistics)


def _slice(value: Any, base: str | None, where: str) -> Slice:
    _known(value, {"sources", "base_model", "parameters"}, where)
    inputs = [_input(s, f"{where}.sources[{i}]", True) for i, s in enumerate(_list(value.get("sources"), where))]
    if len({i.layers[1] - i.layers[0] for i in inputs if i.layers}) > 1:
        raise ValueError(f"the sources of {where} must have the same number of layers")
    own = value.get("base_model")
    parameters = _settings(value.get("parameters"), f"{where}.parameters")
    return Slice(tuple(inputs), _reference(own, f"{where}.base_model") if own else base, parameters)


def _settings(value: Any, where: str) -> Settings:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping, not {type(value).__name__}")
    for name, setting in value.items():
        _check_setting(setting, f"{where}.{name}")
    return value


def _check_setting(setting: Any, where: str) -> None:
    for entry in setting if isinstance(setting, list) else [setting]:
        if isinstance(entry, Mapping):
            _known(entry, {"filter", "value"}, where)
            if "value" not in entry:
                raise ValueError(f"{where} has a filter without a value")
            _check_setting(entry["value"], where)
        elif not isinstance(entry, bool | int | float | str):
            raise ValueError(f"{where} must be a number, a list of numbers, or filters with values, not {entry!r}")
    if isinstance(setting, list) and len({isinstance(e, Mapping) for e in setting}) > 1:
        raise ValueError(f"{where} mixes filters with plain numbers; give the last one as value without filter")


def evaluate(setting: Any, tensor: str, t: float) -> Any:
    """The value of a setting for a tensor ``t`` of the way through the layers; None where no filter matches.

    A list of numbers is a gradient: points spread evenly over the layers, linear between them. Of filters the first whose
    text is in the tensor's name counts; no filter, or ``*``, matches all.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _number(setting)
    if not setting:
        return None
    if isinstance(setting[0], Mapping):
        for rule in setting:
            if rule.get("filter") in (None, "*") or str(rule["filter"]) in tensor:
                return evaluate(rule["value"], tensor, t)
        return None
    return _interpolated([_number(x) for x in setting], t)


def _interpolated(points: Sequence[Any], t: float) -> Any:
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in points):
        # Words and switches have nothing between them.
        return points[int(t * (len(points) - 1))]
    position = t * (len(points) - 1)
    low = int(position)
    high = min(len(points) - 1, low + 1)
    return (1 - (position - low)) * points[low] + (position - low) * points[high]


def _number(value: Any) -> Any:
    """YAML reads ``1e-3`` as a word."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def resolve(name: str, scopes: Sequence[Settings], tensor: str, t: float) -> Any:
    """The parameter in the first scope that has a value of it for the tensor; None where none has."""
    for scope in scopes:
        if name in scope:
            value = evaluate(scope[name], tensor, t)
            if value is not None:
                return value
    return None
