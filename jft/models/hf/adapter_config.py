"""``adapter_config.json`` of a LoRA adapter of peft, checked, and the values that it has for single modules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jft.models.hf.checkpoint import LoadError, read_json
from jft.strict_json import FLAG, NULL, NUMBER, SIZE, TEXT, Kind, check, need

FILE = "adapter_config.json"
_LORA = {"r": SIZE, "lora_alpha": NUMBER}
_KINDS = {
    "peft_type": TEXT | NULL,
    "bias": TEXT | NULL,
    "use_rslora": FLAG | NULL,
    "fan_in_fan_out": FLAG | NULL,
    **{
        key: Kind(f"an object, each {of.name}", lambda x, of=of: isinstance(x, dict) and all(map(of.test, x.values())))  # type: ignore[misc]
        | NULL
        for key, of in (("rank_pattern", SIZE), ("alpha_pattern", NUMBER))
    },
}
# Repetitions without end, other than of digits. Three, or one of a group, can take a regular expression for ever.
_REPEATED = re.compile(r"(?<!\\d)[*+{]")
_MOST, _LONGEST = 2, 200


def read(directory: Path) -> dict[str, Any]:
    """The config of an adapter; :class:`LoadError` for values of another kind, and of a LoRA for what it lacks."""
    file = directory / FILE
    config = read_json(file)
    check(config, _KINDS, file, LoadError)
    if config.get("peft_type") == "LORA":
        need(config, _LORA, file, LoadError)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or ():
            _check_pattern(pattern, f"{file}: {key}")
    return config


def _check_pattern(pattern: str, where: str) -> None:
    plain = len(_REPEATED.findall(pattern)) <= _MOST and not re.search(r"\)[*+{?]", pattern)
    if len(pattern) > _LONGEST or not plain:
        raise LoadError(
            f"{where}: the pattern {pattern!r:.80} is too involved; name the modules, or use one or two of .*"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise LoadError(f"{where}: {pattern!r:.80} is no regular expression: {error}") from None


def value_of(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the module's name ends in, as peft looks it up."""
    if len(module) > _LONGEST and patterns:
        raise LoadError(f"the module {module!r:.80} has a name of more than {_LONGEST} characters")
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
