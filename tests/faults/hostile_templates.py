"""Chat templates that loop, multiply, or look for what is outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.hostile import Case

TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that print": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "product": "{{ 'a' * 10**12 }}",
    "product in a condition": "{% if 'a' * 10**12 %}x{% endif %}",
    "product of lists": "{{ [0] * 10**12 }}",
    "power": "{{ 10**(10**10) }}",
    "power of powers": "{{ 9**9**9**9 }}",
    "filter of constants": "{{ 'a'|center(10**11) }}",
    "filter that repeats": "{{ ('a' * 9999999)|replace('a', 'b' * 999999) }}",
    "indent": "{{ ('\n' * 999999)|indent(999999, true) }}",
    "justified": "{{ 'a'.ljust(10**11) }}",
    "zeros": "{{ 'a'.zfill(10**11) }}",
    "format": "{{ '{:99999999999}'.format(1) }}",
    "format by a number": "{{ '{:{}}'.format(1, 10**11) }}",
    "percent": "{{ '%99999999999d' % 1 }}",
    "percent filter": "{{ '%99999999999d'|format(1) }}",
    "replace": "{{ ('a' * 999999).replace('a', 'b' * 999999) }}",
    "join": "{{ ('a' * 999999).join(['b'] * 999999) }}",
    "join filter": "{{ range(99999)|join('a' * 999999) }}",
    "tabs": "{{ ('\t' * 999999).expandtabs(999999) }}",
    "doubling by ~": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling blocks": "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "doubling numbers": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "slices": "{% set n = namespace(x=[]) %}{% set s = 'a' * 999999 %}"
    "{% for i in range(99999) %}{% set n.x = n.x + [s[1:]] %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "static text": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "deep loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "long": "a" * 1_000_001,
    "long number": "{{ " + "9" * 5000 + " }}",
    "unfinished": "{% for",
    "undefined call": "{{ nothing() }}",
    "division": "{{ 1 / 0 }}",
    "attribute": "{{ messages[0].content.nothing.more }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format to classes": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "lipsum": "{{ lipsum(n=99999999) }}",
    "batches": "{{ [1]|batch(10**10, 0)|list }}",
    "sliced": "{{ [1]|slice(10**10)|list }}",
    "json": "{{ messages|tojson(indent=10**9) }}",
    "date": "{{ strftime_now('%99999999999d') }}",
    "surrogate": "{{ '\\ud800' }}",
}
HARMLESS_TEMPLATES = ("surrogate",)
CHAT = [{"role": "user", "content": "upright"}, {"role": "assistant", "content": "upright"}]


def cases() -> Iterator[Case]:
    """Templates that loop, multiply, or look for what is outside."""

    def render(folder: Any) -> Any:
        from jft.data.chat import ChatTemplate

        template = (folder / "chat_template.jinja").read_text()
        return ChatTemplate(template, {"eos_token": "</s>"}, date="2026-01-02").render(CHAT)

    for name, template in TEMPLATES.items():

        def make(folder: Path, template: str = template) -> Path:
            (folder / "chat_template.jinja").write_text(template)
            return folder

        yield Case(f"chat template/{name}", make, render, refused=name not in HARMLESS_TEMPLATES)
