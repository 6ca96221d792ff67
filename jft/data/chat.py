"""Chat templates: messages as text, and the spans of it that the assistant wrote.

Most published templates have no ``{% generation %}`` marks, and a mask taken from marks that are not there is all zero:
training on nothing. Here the spans come from rendering the conversation turn by turn, and are checked.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from jft.data.errors import DataError, shorten

LOSSES = ("responses", "last", "all")
# Stand for the marks of {% generation %} blocks in rendered text; private-use characters, refused in messages.
_OPEN, _CLOSE = "\ue1f0", "\ue1f1"
Message = dict[str, Any]


def _no_width(form: str) -> str:
    # The C library fills a field to any width that stands in it.
    if re.search(r"%[^a-zA-Z%]*\d", form):
        raise ValueError(f"strftime_now({form[:40]!r}) has a width, which no date needs")
    return form


# Compiling is slow, and every example renders several times.
@functools.lru_cache(maxsize=32)
def _compile(template: str, date: str | None) -> Any:
    # Imported where a template is used: Jinja takes a while.
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension

    from jft.data.sandbox import MAX_TEMPLATE, Environment

    class Generation(Extension):
        """``{% generation %}...{% endgeneration %}``: its output between the two marks."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's interface)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # jinja2's own filter escapes for HTML, which would change the text.
    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Each value may get a line, and levels inside each other as many spaces each.
        if isinstance(indent, int) and indent > 16:
            raise jinja2.TemplateError(f"tojson(indent={indent}) is more than 16")
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        environment.budget.spend(len(text))
        return text

    if len(template) > MAX_TEMPLATE:
        raise DataError(f"the chat template has {len(template):,} characters; at most {MAX_TEMPLATE:,} are read")
    environment = Environment([Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    if date is not None:
        day = datetime.date.fromisoformat(date)
        environment.globals["strftime_now"] = lambda form: day.strftime(_no_width(form))
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template does not parse: line {error.lineno}: {error.message}") from None
    # Python compiles what Jinja makes of it, and refuses in many ways what is too deep or too long.
    except (RecursionError, SyntaxError, ValueError, MemoryError, OverflowError) as error:
        raise DataError(f"the chat template cannot be compiled: {type(error).__name__}: {error}") from None


class ChatTemplate:
    """A Jinja chat template as Hugging Face tokenizers carry it (``apply_chat_template`` with ``tokenize=False``).

    template: the text. specials: names for it (``bos_token`` ...). date: ISO date that ``strftime_now`` formats; None:
    the function is undefined, so that a template falls back to its own fixed date and runs stay reproducible.
    """

    def __init__(self, template: str, specials: dict[str, str] | None = None, date: str | None = None):
        self.template, self.specials, self.date = template, dict(specials or {}), date
        _compile(template, date)

    def render(self, messages: Sequence[Message], prompt: bool = False, tools: Any = None) -> str:
        """The conversation as text; ``prompt``: followed by the opening of an assistant turn. Marks are removed."""
        return self._render_with_marks(messages, prompt, tools).replace(_OPEN, "").replace(_CLOSE, "")

    def _render_with_marks(self, messages: Sequence[Message], prompt: bool, tools: Any) -> str:
        import jinja2

        compiled = _compile(self.template, self.date)
        compiled.environment.budget.start()
        try:
            return compiled.render(
                messages=list(messages), add_generation_prompt=prompt, tools=tools, documents=None, **self.specials
            )
        # Whatever the template stumbles over: it is the user's file.
        except (
            jinja2.TemplateError, TypeError, LookupError, ValueError, ArithmeticError, AttributeError, RuntimeError,
        ) as error:  # fmt: skip
            hint = "; set `date` (ISO) in the data settings" if "strftime_now" in str(error) else ""
            raise DataError(f"the chat template refused the messages: {error}{hint}") from None

    def spans(
        self, messages: Sequence[Message], loss: str = "responses", tools: Any = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """``(text, [(start, stop), ...])``: the rendered conversation and the characters that are targets.

        loss: "responses" (every assistant turn, with the marker that ends it), "last" (the last one), or "all".
        With ``{% generation %}`` marks in the template, those; else turn i spans what
        ``render(messages[:i+1])`` adds to ``render(messages[:i], prompt=True)``. Raises :class:`DataError` where there
        is no assistant turn, or where the template rewrites earlier text, so that no span can be told.
        """
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if loss == "all":
            text = self.render(messages, tools=tools)
            return text, [(0, len(text))]
        if not turns:
            raise DataError("the conversation has no assistant message, so nothing would be trained")
        # By the template's text: the output of one without marks looks like that of one whose marked turns are absent.
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.template):
            text, spans = _unmark(self._render_with_marks(messages, False, tools))
        else:
            text = self.render(messages, tools=tools)
            targets = turns[-1:] if loss == "last" else turns
            spans = [self._turn(messages, i, text, tools) for i in targets]
        return text, spans[-1:] if loss == "last" else spans

    def _turn(self, messages: Sequence[Message], turn: int, text: str, tools: Any) -> tuple[int, int]:
        # With the opening of the answer, which generation supplies and nobody has to learn.
        before = self.render(messages[:turn], prompt=True, tools=tools)
        after = self.render(messages[: turn + 1], tools=tools) if turn + 1 < len(messages) else text
        marks = "chat_template: a template with {% generation %} marks"
        if not after.startswith(before):
            raise DataError(
                f"the chat template opens an answer one way and writes it another ({_difference(before, after)}), so"
                f" where message {turn} starts cannot be told. Ways out: {marks}, or one whose generation prompt is"
                " what its answers start with"
            )
        if not text.startswith(after):
            raise DataError(
                f"the chat template rewrites message {turn} or what stands before it once more follows"
                f" ({_difference(after, text)}), so the responses cannot be told apart. Ways out: loss: 'last' with one"
                f" example per assistant turn; {marks}, or one that leaves earlier turns as they are"
            )
        return len(before), len(after)


def _difference(first: str, second: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return f"at character {at}: {shorten(first[at : at + 30])}, then {shorten(second[at : at + 30])}"


def _unmark(text_with_marks: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the [start, stop) characters that stood between them."""
    text, spans, start = "", [], 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text_with_marks):
        if piece == _OPEN:
            start = len(text)
        elif piece == _CLOSE:
            spans.append((start, len(text)))
        else:
            text += piece
    return text, spans


# ShareGPT's names of the roles, where messages are {"from", "value"}.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "observation": "tool",
    "function": "tool",
}


def _of_sharegpt(message: Any) -> Any:
    """A message of ShareGPT, ``{"from", "value"}``, as ``{"role", "content"}``; any other as it is."""
    if not isinstance(message, dict) or "role" in message or not {"from", "value"} <= message.keys():
        return message
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    return {"role": ROLES.get(message["from"], message["from"]), "content": message["value"], **rest}


def check_messages(messages: Any) -> list[Message]:
    """The messages as a list of dicts with ``role`` and ``content``, ShareGPT's ``from`` and ``value`` renamed;
    :class:`DataError` says which one is wrong.
    """
    if isinstance(messages, list | tuple):
        messages = [_of_sharegpt(message) for message in messages]
    if not isinstance(messages, list | tuple) or not len(messages):
        raise DataError(f"messages must be a list of at least one {{role, content}}, got {shorten(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {i} must be an object with role and content, got {shorten(message)}")
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise DataError(f"message {i} ({message['role']}): content must be text, got {shorten(content)}")
        if isinstance(content, str) and (_OPEN in content or _CLOSE in content):
            raise DataError(f"message {i}: holds U+E1F0 or U+E1F1, which mark responses here; remove them")
    return list(messages)
