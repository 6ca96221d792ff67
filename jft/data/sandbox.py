"""The Jinja environment of chat templates, which come with downloaded models: sandboxed, and bounded in time and output.

Jinja's immutable sandbox keeps a template from anything outside it. It does not keep it from looping for ever or multiplying
text, and some of that happens while a template is compiled. Here nothing of a template runs before it is rendered, and
rendering has a budget: seconds, and characters that are printed or made on the way.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sized
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE = 1_000_000
"""Characters of a template; the longest that are published have some 20,000."""
MAX_SECONDS = 10.0
MAX_CHARACTERS = 50_000_000
"""Of one rendering: printed, and in the texts and lists that it makes on the way."""
MAX_BITS = 1024
"""Of an integer that a template computes."""

# Nobody's chat template needs them, and each makes much out of little.
_REMOVED = ("center", "wordwrap", "urlize", "xmlattr", "batch", "slice", "pprint", "filesizeformat", "random")


class BudgetError(jinja2.TemplateError):
    """A template that takes too long, or makes too much."""


class Budget(threading.local):
    """What the rendering in this thread may still use."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.until, self.left = time.monotonic() + MAX_SECONDS, MAX_CHARACTERS

    def spend(self, count: int) -> None:
        """Use ``count`` characters; :class:`BudgetError` past the end of the budget, or of the time."""
        self.left -= count
        if self.left < 0:
            raise BudgetError(f"it makes more than {MAX_CHARACTERS:,} characters of these messages")
        if time.monotonic() > self.until:
            raise BudgetError(f"it takes more than {MAX_SECONDS:.0f} s")

    def afford(self, count: int) -> None:
        """:class:`BudgetError` unless ``count`` characters are left; none is used."""
        if count > self.left:
            raise BudgetError(f"it makes more than {MAX_CHARACTERS:,} characters of these messages")


class Loops(Extension):
    """Spends at every turn of a loop and every call of a macro, as much as its text has characters."""

    def parse(self, parser: Any) -> Any:
        raise AssertionError("no tags")

    def spend(self, count: int) -> str:
        self.environment.budget.spend(count)  # type: ignore[attr-defined]
        return ""

    def instrument(self, tree: nodes.Template) -> nodes.Template:
        """``tree`` with a call of :meth:`spend` at the head of whatever may run more than once."""
        for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            size = 1 + sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            call = self.call_method("spend", [nodes.Const(size)])
            node.body.insert(0, nodes.ExprStmt(call))  # type: ignore[attr-defined]
        return tree


class _Generator(CodeGenerator):
    """Jinja's, with a ``~`` and slices that spend."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if not isinstance(node.arg, nodes.Slice):
            return super().visit_Getitem(node, frame)
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            self.visit(nodes.Const(None) if bound is None else bound, frame)
            self.write(", ")
        self.write("))")


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a :class:`Budget`. The whitespace options are those of transformers."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Generator

    def __init__(self, extensions: Any = ()) -> None:
        self.budget = Budget()
        # optimized: folding constants would run parts of a template while it is compiled, without a budget.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Loops, loopcontrols, *extensions]
        )
        self.finalize = _printed
        for name in _REMOVED:
            self.filters.pop(name, None)
        for name, function in self.filters.items():
            self.filters[name] = _bounded(function, name, self.budget)
        # Text without end by a number.
        self.globals.pop("lipsum", None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        loops: Any = self.extensions[Loops.identifier]
        return loops.instrument(super()._parse(source, name, filename))

    def concatenated(self, parts: tuple) -> str:
        """The texts of ``parts`` as one."""
        texts = [str(part) for part in parts]
        self.budget.spend(sum(map(len, texts)))
        return "".join(texts)

    def sliced(self, value: Any, bounds: slice) -> Any:
        """``value[bounds]``."""
        return self._spent(value[bounds])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,), self.budget)
        elif operator == "**":
            if _bits(left) * abs(right if isinstance(right, int) else 0) > MAX_BITS:
                raise BudgetError("it computes a number that is too large")
        elif operator == "*":
            for size, times in ((left, right), (right, left)):
                if isinstance(size, Sized) and isinstance(times, int):
                    self.budget.afford(len(size) * times)
            if _bits(left) + _bits(right) > MAX_BITS:
                raise BudgetError("it computes a number that is too large")
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            self.budget.afford(len(left) + len(right))
        return self._spent(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_call(getattr(__obj, "__self__", None), getattr(__obj, "__name__", ""), args, kwargs, __self.budget)
        return __self._spent(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, (*args, *kwargs.values()), self.budget)
            return wrapped(*args, **kwargs)

        return bounded

    def _spent(self, result: Any) -> Any:
        self.budget.spend(_size(result))
        return result


@jinja2.pass_context
def _printed(context: Any, value: Any) -> Any:
    # With a context, so that Jinja does not call it, and whatever is printed, while a template is compiled.
    text = value if isinstance(value, str) else str(value)
    context.environment.budget.spend(len(text))
    return text


def _size(value: Any) -> int:
    # An element is a pointer, and mostly an object.
    return len(value) if isinstance(value, str) else 16 * len(value) if isinstance(value, list | tuple | dict) else 1


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_format(text: str, values: tuple, budget: Budget) -> None:
    """Refuse a format past the budget: each place takes up to the longest value, and a width, ``%900d`` or ``{:900}``, makes as
    many characters; one that is computed, any number.
    """
    inner = [x for value in values for x in (value.values() if isinstance(value, dict) else (value,))]
    longest = max((len(x) if isinstance(x, str) else 1000 for x in inner), default=1)
    places = text.count("%") + text.count("{")
    budget.afford(places * longest + sum(int(digits[:12]) for digits in re.findall(r"\d{3,}", text)))
    if re.search(r"\{[^{}]*:[^{}]*\{|%[-#0 +]*\*|%[^%a-zA-Z]*\.\*", text):
        raise BudgetError(f"it formats with a computed width ({text!r:.40})")


def _check_call(of: Any, name: str, args: Any, kwargs: Any, budget: Budget) -> None:
    """Refuse a method of a text, or a filter of one, whose result would be past the budget before it is made."""
    given = [*args, *kwargs.values()]
    if not isinstance(of, str):
        return
    numbers = [abs(x) for x in given if isinstance(x, int) and not isinstance(x, bool)]
    if name in ("center", "ljust", "rjust", "zfill") and numbers:
        budget.afford(max(numbers))
    # Each line, each tabulator: at most one for each character.
    if name in ("expandtabs", "indent") and numbers:
        budget.afford(len(of) * max(numbers))
    # As if every character were replaced.
    if name == "replace" and len(given) > 1:
        old, new = str(given[0]), str(given[1])
        budget.afford(len(of) + (of.count(old) if old else len(of) + 1) * len(new))
    if name in ("join", "translate") and given and isinstance(given[0], Sized):
        budget.afford((len(of) if name == "join" else 1) * len(given[0]))


def _bounded(function: Callable, name: str, budget: Budget) -> Callable:
    """A filter that spends what it gives back."""
    # Those that take the environment or a context have it as their first argument.
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    def bounded(*args: Any, **kwargs: Any) -> Any:
        if len(args) > skip:
            value, *rest = args[skip:]
            if name == "format" and isinstance(value, str):
                _check_format(value, (*rest, *kwargs.values()), budget)
            if name == "join":
                # Also what is made as it is gone through, which has no length before.
                value = list(value)
                separator = (rest or [*kwargs.values()] or [""])[0]
                budget.afford(sum(len(str(x)) for x in value) + len(value) * len(str(separator)))
                args = (*args[:skip], value, *rest)
            _check_call(value, name, rest, kwargs, budget)
        result = function(*args, **kwargs)
        budget.spend(_size(result))
        return result

    if skip:
        bounded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    # Some filters have a name and parameters that others look up.
    bounded.__name__ = name
    return bounded
