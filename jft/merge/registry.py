"""The registry of merging rules: a function from options to a rule becomes what people call with task vectors."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jft.merge.in_memory import merge
from jft.merge.rule import Rule, Vectors, listed
from jft.names import nearest


@dataclasses.dataclass(frozen=True)
class MergingRule:
    """A published rule: call it with task vectors; ``build`` makes the :class:`Rule` of a preset and options.

    presets: name -> options, what the rule is called in that place; the first is the default.
    """

    name: str
    factory: Callable[..., Rule]
    paper: str
    presets: Mapping[str, Mapping[str, Any]]

    def __call__(
        self,
        vectors: Vectors,
        weights: Any = None,
        scale: Any = 1.0,
        *,
        base: Any = None,
        statistics: Any = None,
        preset: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        taus = listed(vectors)
        rule = self.build(preset=preset, weights=weights, **options)
        rule.check_models(len(taus), self.name)
        note = {"rule": self.name, "preset": preset or next(iter(self.presets)), "seed": seed, **_described(options)}
        return merge(rule, taus, scale=scale, base=base, statistics=statistics, seed=seed, note=note)

    def build(self, *, preset: str | None = None, weights: Any = None, **options: Any) -> Rule:
        """The rule of ``preset`` with ``options`` in place of the preset's. Raises ``ValueError`` for names it lacks."""
        for option in options:
            if option not in self.options:
                hint = nearest(option, self.options, otherwise=f"; it has {', '.join(self.options) or 'none'}")
                raise ValueError(f"{self.name} has no option {option!r}{hint}")
        check_choices(self.factory, **options)
        rule = self.factory(**preset_options(self.name, self.presets, preset, options))
        if weights is not None and not rule.weighted:
            raise ValueError(f"{self.name} has no weights; it was given {weights!r}")
        return dataclasses.replace(rule, parameters={"weight": 1.0 if weights is None else weights, **rule.parameters})

    @property
    def options(self) -> dict[str, Any]:
        """The options of the rule and their defaults."""
        parameters = inspect.signature(self.factory).parameters.values()
        return {p.name: None if p.default is p.empty else p.default for p in parameters}

    @property
    def __signature__(self) -> inspect.Signature:
        """What ``help`` and editors show."""
        common = [p for p in inspect.signature(type(self).__call__).parameters.values() if p.name != "self"]
        options = list(inspect.signature(self.factory).parameters.values())
        return inspect.Signature([*common[:3], *options, *(p for p in common[3:] if p.kind is not p.VAR_KEYWORD)])


def preset_options(
    rule: str, presets: Mapping[str, Mapping[str, Any]], preset: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of a preset, None being the first, with those of ``given`` in their place."""
    preset = next(iter(presets)) if preset is None else preset
    if preset not in presets:
        hint = nearest(preset, presets, otherwise=f"; it has {', '.join(presets)}")
        raise ValueError(f"{rule} has no preset {preset!r}{hint}")
    return {**presets[preset], **given}


def check_choices(function: Callable[..., Any], **options: Any) -> None:
    """Raise ``ValueError`` for a value that the annotation of its option in ``function``, a ``Literal``, does not list."""
    for name, hint in typing.get_type_hints(function).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if choices and name in options and options[name] not in choices:
            raise ValueError(
                f"{name} of {function.__name__} is {options[name]!r}; it may be {', '.join(map(repr, choices))}"
            )


RULES: dict[str, MergingRule] = {}


def register(
    *, paper: str, presets: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[Callable[..., Rule]], MergingRule]:
    """Decorator: a function from keyword options to a :class:`Rule` becomes a rule that people call with task vectors.

    The name of the function is that of the rule, its docstring the rule's. presets: name -> options; the first is what
    a call without ``preset`` gets. None: one preset, "paper", with the defaults.
    """

    def add(factory: Callable[..., Rule]) -> MergingRule:
        rule = MergingRule(factory.__name__, factory, paper, types.MappingProxyType(dict(presets or {"paper": {}})))
        for name, options in rule.presets.items():
            unknown = set(options) - set(rule.options)
            if unknown:
                raise ValueError(f"preset {name!r} of {rule.name} sets {min(unknown)!r}, which is none of its options")
        # Written past the frozen fields: documentation of an instance, for `help`.
        object.__setattr__(rule, "__doc__", factory.__doc__)
        object.__setattr__(rule, "__name__", factory.__name__)
        RULES[rule.name] = rule
        return rule

    return add


def _described(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as JSON holds them."""
    return {
        name: np.asarray(v).tolist() if isinstance(v, np.ndarray | list | tuple) else v for name, v in options.items()
    }
