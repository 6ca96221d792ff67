"""Configs on the command line: ``--config=FILE.py[:ARG]`` and ``--config.key=value``.

A config file is Python with ``get_config() -> ConfigDict`` (or ``get_config(arg)``, where ``:ARG`` is passed as it is).
An override must name a key that is there, or one inside a part that its owner reads freely and checks itself
(``method``: the preset's options; ``data``, ``eval_data``: the source's). Values are Python literals, else strings.
Another name of a method drops the options of the one that stands there, another source of data the keys it does not know;
of steps and epochs, and of a model's source and arch, the one that is set takes the place of the other.

Not by ``ml_collections.config_flags``: there either every key may be added or none, a part that is not there is never made,
and what is None, a list, or one or many (``data.classes``) cannot be set.
"""

from __future__ import annotations

import ast
import inspect
import runpy
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jft import strict_json
from jft.cli.errors import Parser, UsageError
from jft.names import nearest

# Parts of a config whose keys are the options of whatever their `name` or `source` says.
OPEN = frozenset({"method", "data", "eval_data", "options", "arch"})
WORDS = {"true": True, "false": False, "none": None, "null": None}


def load(spec: str) -> ConfigDict:
    """The config that ``FILE.py`` or ``FILE.py:ARG`` describes, or the ``config.json`` that a run left.

    Raises :class:`UsageError` for a missing file, a file without ``get_config``, or an argument it does not take.
    """
    path, colon, argument = spec.partition(":")
    if not Path(path).is_file():
        raise UsageError(f"config file {path!r} does not exist{_nearest_config(path)}")
    if path.endswith(".json"):
        hint = "write it anew, or give the --config=FILE.py that the run was started with"
        return ConfigDict(strict_json.read(path, error=UsageError, hint=hint, nan=True))
    # Run, not imported: a config file belongs to no package.
    get_config = _run(path, lambda: runpy.run_path(path)).get("get_config")
    if get_config is None:
        raise UsageError(f"config file {path!r} defines no get_config(); it must return an ml_collections ConfigDict")
    parameters = inspect.signature(get_config).parameters
    if colon and not parameters:
        raise UsageError(f"config file {path!r} takes no argument, but {argument!r} was given after the colon")
    config = _run(path, lambda: get_config(argument) if colon else get_config())
    if not isinstance(config, ConfigDict):
        raise UsageError(f"get_config() of {path!r} returned {type(config).__name__}, not an ml_collections ConfigDict")
    return config


def _run(path: str, part: Callable[[], Any]) -> Any:
    """``part()`` of a config file, whose errors name it and the line."""
    try:
        return part()
    except UsageError:
        raise
    # Whatever a user's file raises.
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        at = f", line {line}" if line else ""
        raise UsageError(f"config file {path!r}{at}: {type(error).__name__}: {error}") from error


def _nearest_config(path: str) -> str:
    folder = Path(path).parent
    return nearest(Path(path).name, [p.name for p in folder.glob("*.py")]) if folder.is_dir() else ""


def value(text: str) -> Any:
    """``text`` as a Python literal (``3``, ``1e-4``, ``(0, 1)``, ``None``), ``true``/``false``, or the string itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, item in config.items():
        keys.append(prefix + key)
        if isinstance(item, Mapping | ConfigDict):
            keys += _flat(item, f"{prefix}{key}.")
    return keys


# What other trainers call the keys of a run.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "warmup_steps": "optimizer.warmup",
    "max_steps": "steps",
    "num_steps": "steps",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "save_steps": "checkpoint.every",
    "eval_steps": "eval.every",
    "logging_steps": "log.every",
    "output_dir": "workdir",
}


def _meant(path: str, keys: Sequence[str], known: Callable[[str], bool]) -> str:
    """The hint for an unknown key: its name elsewhere, the same key of a section, or the nearest."""
    last = path.split(".")[-1]
    meant = ELSEWHERE.get(last)
    if meant == "workdir":
        return " (did you mean --workdir?)"
    if meant and (meant in keys or known(meant)):
        return f" (did you mean {meant!r}?)"
    same = [key for key in keys if key.split(".")[-1] == last]
    return f" (did you mean {same[0]!r}?)" if len(same) == 1 else nearest(path, keys)


def is_open(path: str, config: Any = None) -> bool:
    """Whether a key may be added at the dotted ``path``: it lies inside a part that its owner checks."""
    return any(part in OPEN for part in path.split(".")[:-1])


def override(config: ConfigDict, path: str, text: str, may_add: Callable[[str, Any], bool] = is_open) -> None:
    """Set the dotted ``path`` of ``config`` to ``value(text)``, in the type of the value that stands there.

    Raises :class:`UsageError` for an unknown key (naming the nearest) or a value of another type.
    """
    *parents, last = path.split(".")
    node: Any = config
    known = any(path == p for p in _flat(config))
    if not known and not may_add(path, config):
        raise UsageError(f"unknown config key {path!r}{_meant(path, _flat(config), lambda key: may_add(key, config))}")
    for key in parents:
        if not isinstance(node, ConfigDict):
            raise UsageError(f"config key {path!r}: nothing can be set below a plain value")
        if key not in node:
            with node.unlocked():
                node[key] = ConfigDict()
        node = node[key]
    old, new = node.get(last), value(text)
    if isinstance(old, ConfigDict) and not isinstance(new, dict):
        raise UsageError(f"config key {path!r} is a group of keys ({', '.join(old) or 'empty'}), not a value")
    # The owner of an open part may take one or many: classes are a number or names, files a pattern or a list.
    several = isinstance(new, list | tuple | dict) and not isinstance(old, list | tuple | ConfigDict)
    # ``_typed`` checks the type, with an error that shows the text as it was written.
    with node.unlocked(), node.ignore_type():
        node[last] = new if several and is_open(path) else _typed(path, old, new, text)


def _typed(path: str, old: Any, new: Any, text: str) -> Any:
    """``new`` in the type of ``old``: integers widen to floats, sequences to the kind that was there."""
    # A text may be "none" (`model.remat`); in an open part None is how a key is unset.
    if isinstance(old, str) and not (new is None and is_open(path)):
        return text
    if old is None or new is None:
        return new
    if isinstance(old, ConfigDict):
        return ConfigDict(new)
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        return float(new)
    if isinstance(old, list | tuple):
        return type(old)(new) if isinstance(new, list | tuple) else type(old)([new])
    # Not isinstance, to which True is an integer.
    if type(old) is not type(new):
        raise UsageError(f"config key {path!r} is {type(old).__name__} ({old!r}); {text!r} is not")
    return new


# Keys of one section of which one is given, the other stays at its default.
ALTERNATIVES = {"steps": "epochs", "epochs": "steps", "source": "arch", "arch": "source"}
# Keys that name what reads the other keys of an open section.
NAMES = {"method": "name", "data": "source", "eval_data": "source", "test_data": "source"}


def _names(path: str) -> bool:
    """Whether the key at ``path`` says what the other keys of its section mean."""
    *parents, last = path.split(".")
    return bool(parents) and NAMES.get(parents[-1]) == last


def _section(config: ConfigDict, path: str) -> ConfigDict | None:
    """The section that holds the key at ``path``; None where there is none yet."""
    node: Any = config
    for key in path.split(".")[:-1]:
        node = node.get(key) if isinstance(node, ConfigDict) else None
    return node if isinstance(node, ConfigDict) else None


def _begin_anew(config: ConfigDict, path: str, name: str) -> None:
    """Before the key at ``path``, which names what its section is about, becomes ``name``: drop what was of another.

    Of a method all options; of data what the new source does not know, so that the task stays.
    """
    node, last = _section(config, path), path.split(".")[-1]
    if node is None or node.get(last) in (None, "", name):
        return
    kept: set[str] = set()
    if last == "source":
        from jft.data.config import known

        kept = known(name)
    with node.unlocked():
        for key in [k for k in node if k != last and k not in kept]:
            del node[key]


def _unset_alternative(config: ConfigDict, path: str, others: set[str]) -> None:
    """Before the key at ``path`` is set: its alternative goes back to nothing, unless ``others`` set that as well."""
    *parents, last = path.split(".")
    node, other = _section(config, path), ALTERNATIVES.get(last)
    if other is None or node is None or ".".join([*parents, other]) in others or not node.get(other):
        return
    # An open section of data has a source too, and no arch.
    with node.unlocked():
        node[other] = type(node[other])()


def parse(
    parser: Parser,
    argv: Sequence[str],
    default: str | None = None,
    may_add: Callable[[str, Any], bool] = is_open,
    what: str = "the one shipped with jft",
) -> tuple[Any, ConfigDict]:
    """``(options, config)``: the parser's own options, and the config with its overrides applied in order.

    default: the config where none is given; ``what`` says which that is in the help.
    """
    parser.add_argument(
        "--config", metavar="FILE.py[:ARG]", help=f"the config (default: {what})" if default else "the config"
    )
    parser.add_argument_group("overrides", "--config.KEY=VALUE sets one key of it, e.g. --config.optimizer.lr=3e-4")
    options, rest = parser.parse_known_args(argv)
    spec = options.config or default
    if spec is None:
        parser.error("--config=FILE.py is needed")
    config, pairs = load(spec), []
    words = iter(rest)
    for word in words:
        if not word.startswith("--config."):
            parser.unknown(word)
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            # ``--config.key VALUE``.
            text = next(words, "")
            if not text:
                raise UsageError(f"config key {key!r} is given no value; write --config.{key}=VALUE")
        pairs.append((key, text))
    # Names first, wherever they stand: what else is set is meant for what they name.
    for key, text in sorted(pairs, key=lambda pair: not _names(pair[0])):
        if _names(key):
            _begin_anew(config, key, text)
        _unset_alternative(config, key, {other for other, _ in pairs})
        override(config, key, text, may_add)
    return options, config
