"""The methods of mergekit as rules of jft: which rule, which preset, which of its options a parameter is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jft.merge.recipe import Recipe, Settings, resolve
from jft.merge.registry import RULES
from jft.merge.rule import Rule
from jft.names import nearest

PASSTHROUGH = "passthrough"


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of mergekit 0.1.5.

    rule: its name in :data:`jft.merge.RULES`. names: parameter -> option of the rule, where they differ. normalize, rescale:
    mergekit's defaults. baseless: the models themselves are merged, as changes of zero, and the base is one of them. origin:
    so only where there is no base, and the rule's option ``origin`` says which. switches: parameter -> value -> options.
    """

    rule: str
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    normalize: bool = False
    rescale: bool = False
    baseless: bool = False
    origin: bool = False
    switches: Mapping[str, Mapping[bool, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)


# Axes are those of torch's [out, in].
_NUSLERP = {
    "nuslerp_flatten": {True: {}, False: {"axis": -1}},
    "nuslerp_row_wise": {False: {}, True: {"axis": 0}},
}
METHODS = {
    "arcee_fusion": Method("arcee_fusion"),
    "breadcrumbs": Method("breadcrumbs"),
    "breadcrumbs_ties": Method("breadcrumbs_ties"),
    "dare_linear": Method("dare", rescale=True),
    "dare_ties": Method("dare_ties", rescale=True),
    "della": Method("della", normalize=True, rescale=True),
    "della_linear": Method("della_linear", rescale=True),
    "karcher": Method("karcher", {"max_iter": "steps"}, baseless=True),
    "linear": Method("task_arithmetic", normalize=True, baseless=True),
    "model_stock": Method("model_stock", switches={"filter_wise": {False: {}, True: {"axis": -1}}}),
    "multislerp": Method("multislerp", {"normalize_weights": "normalize"}, normalize=True, origin=True),
    "nearswap": Method("nearswap"),
    "nuslerp": Method("nuslerp", origin=True, switches=_NUSLERP),
    "ram": Method("ram"),
    "ramplus_tl": Method("ramplus"),
    "sce": Method("sce", {"select_topk": "density"}),
    "slerp": Method("slerp"),
    "task_arithmetic": Method("task_arithmetic"),
    "ties": Method("ties", normalize=True),
}
SHARED = ("normalize", "rescale", "lambda", "int8_mask", "scale")
"""Parameters of all models together."""


class Rules:
    """The rule of a recipe for every tensor, by the numbers that it has there; equal numbers share one rule.

    Raises ``ValueError`` for a method that jft lacks, a preset or parameter that its rule does not have.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.method = METHODS.get(recipe.method, Method(recipe.method))
        self.rule = RULES.get(self.method.rule)
        if self.rule is None:
            known = sorted(
                {n for n, m in METHODS.items() if m.rule in RULES} | set(RULES) | {"linear", "task_arithmetic"}
            )
            raise ValueError(
                f"merge_method {recipe.method!r} is none that jft has{nearest(recipe.method, known)}; "
                f"it has {', '.join(known)}"
            )
        default = "mergekit" if "mergekit" in self.rule.presets else next(iter(self.rule.presets))
        self.preset = recipe.preset or default
        self.baseless = self.method.baseless or (self.method.origin and recipe.base is None)
        self.notes: list[str] = []
        self._built: dict[str, Rule] = {}
        self._names = self._check()

    def _check(self) -> list[str]:
        """The parameters that the recipe sets, each one that is known."""
        assert self.rule is not None
        known = {*self.rule.options, *self.method.names, *self.method.switches, "weight", *SHARED}
        everywhere: list[Settings] = [self.recipe.parameters, *(s.parameters for s in self.recipe.slices)]
        per_model = [i.parameters for s in self.recipe.slices for i in s.inputs]
        for name in dict.fromkeys(n for scope in everywhere + per_model for n in scope):
            if name not in known:
                raise ValueError(f"{self.recipe.method} has no parameter {name!r}{nearest(name, known)}")
        for name in (*SHARED, *self.method.switches):
            if any(name in scope for scope in per_model):
                raise ValueError(
                    f"{name!r} belongs to the merge, not to one model; put it under parameters of the recipe"
                )
        if any("int8_mask" in scope for scope in everywhere):
            self.notes.append("int8_mask is ignored: signs are compared without a mask in memory")
        return list(
            dict.fromkeys(
                n for scope in everywhere + per_model for n in scope if n not in (*SHARED, *self.method.switches)
            )
        )

    def of(
        self, scopes: Sequence[Settings], models: Sequence[tuple[str, Sequence[Settings]]], name: str, t: float
    ) -> tuple[Rule, float]:
        """``(rule, scale)`` for the tensor ``name``: parameters from ``scopes``, or those of each model, first match first.

        models: the name of the tensor in each model, and the scopes of that model.
        """
        options: dict[str, Any] = {}
        for parameter in self._names:
            values = [resolve(parameter, own, tensor, t) for tensor, own in models]
            missing = [v is None for v in values]
            if all(missing):
                continue
            if any(missing):
                raise ValueError(f"{parameter!r} is given for some models of {name!r} and not for all")
            # One number where all are equal: options that are not numbers of models are single.
            options[self.method.names.get(parameter, parameter)] = values[0] if len(set(values)) == 1 else values
        for switch, settings in self.method.switches.items():
            value = resolve(switch, scopes, name, t)
            options |= {} if value is None else settings[bool(value)]
        if self.method.origin:
            options["origin"] = "zero" if self.baseless else "base"
        shared = {n: resolve(n, scopes, name, t) for n in SHARED}
        options, scale = self._shared(options, shared, len(models))
        key = json.dumps(options, sort_keys=True)
        if key not in self._built:
            self._built[key] = self._build(options, len(models))
        return self._built[key], scale

    def _build(self, options: dict[str, Any], count: int) -> Rule:
        assert self.rule is not None
        built = self.rule.build(preset=self.preset, weights=options.pop("weight", None), **options)
        built.check_models(count, self.recipe.method)
        return built

    def _shared(self, options: dict[str, Any], shared: Mapping[str, Any], count: int) -> tuple[dict[str, Any], float]:
        """Options with ``normalize`` and ``rescale`` as the rule calls them, and the factor of the result."""
        assert self.rule is not None
        scale = float(1.0 if shared["lambda"] is None else shared["lambda"])
        scale *= float(1.0 if shared["scale"] is None else shared["scale"])
        # Presets of other names have their own defaults.
        mergekits = self.preset == "mergekit" and self.recipe.method in METHODS
        rescale = shared["rescale"] if shared["rescale"] is not None else self.method.rescale if mergekits else None
        if rescale is not None:
            options |= self._rescale(rescale)
        normalize = (
            shared["normalize"] if shared["normalize"] is not None else self.method.normalize if mergekits else None
        )
        if normalize is None:
            return options, scale
        weights = options.get("weight", 1.0)
        total = sum(weights) if isinstance(weights, list) else weights * count
        if normalize and self.method.baseless and abs(total) < 1e-8:
            raise ValueError(f"weights {weights} sum to zero; normalize: false adds the models without dividing")
        if "divide" in self.rule.options:
            options["divide"] = "weights" if normalize else "none"
        elif "normalize" in self.rule.options:
            options.setdefault("normalize", bool(normalize))
        elif normalize:
            raise ValueError(
                f"jft's {self.rule.name} has no normalize; {self.recipe.method} cannot have normalize: {normalize}"
            )
        return options, scale

    def _rescale(self, rescale: Any) -> dict[str, Any]:
        assert self.rule is not None
        if "rescale" not in self.rule.options:
            if bool(rescale) != self.method.rescale:
                raise ValueError(
                    f"jft's {self.rule.name} has no rescale; {self.recipe.method} cannot have rescale: {rescale}"
                )
            return {}
        if isinstance(rescale, str) or isinstance(self.rule.options["rescale"], bool):
            return {"rescale": rescale}
        return {"rescale": "l1" if rescale else "none"}
