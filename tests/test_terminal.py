import io
import sys

from jft import terminal

HEADERS = ("name", "what it does", "count")
ROWS = [("a/[b]", "short", 1), ("c", ":smile: " + "word " * 60, 12345), ("total", "", 12346)]


def table(**options):
    return terminal.table(HEADERS, ROWS, left=HEADERS[:2], fold=HEADERS[1:2], **options)


def shown(monkeypatch, interactive, columns, what=None):
    out = io.StringIO()
    out.isatty = lambda: interactive
    monkeypatch.setattr(sys, "stdout", out)
    for name, value in {"COLUMNS": str(columns), "TERM": "xterm", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    terminal.show(what or table(total=True))
    return out.getvalue()


def test_text_is_aligned_and_whole():
    lines = terminal.text(table()).split("\n")
    assert [line.split()[0] for line in lines] == ["name", "a/[b]", "c", "total"]
    assert lines[0].startswith("name   what it does") and lines[1].startswith("a/[b]  short")
    assert {len(line) for line in lines} == {len(lines[0])} and lines[2].endswith("  12345")
    assert ":smile: word word" in lines[2], "no markup, no emoji"


def test_text_has_no_spaces_at_the_ends():
    assert (
        terminal.text(terminal.table(("a", "b"), [("x", "long"), ("y", "-")], left=("a", "b"))) == "a  b\nx  long\ny  -"
    )
    assert terminal.text(terminal.table(("a", "b"), [])) == "a  b"


def test_pipes_get_plain_lines_and_whole_names(monkeypatch):
    lines = shown(monkeypatch, False, 20).splitlines()
    assert max(map(len, lines)) == 150 and "\x1b" not in "".join(lines)
    assert lines[-1].split() == ["total", "12346"]
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    terminal.show(terminal.table(("path",), [("long/" * 100,)], left=("path",)))
    assert "long/" * 100 in out.getvalue()


def test_a_terminal_gets_bold_headers_and_total_and_no_longer_lines(monkeypatch):
    written = shown(monkeypatch, True, 60)
    lines = written.splitlines()
    assert len(lines) > 5 and lines[0].startswith("\x1b[1m") and lines[-1].startswith("\x1b[1m")
    assert not lines[1].startswith("\x1b[1m")


def test_a_narrow_terminal_cuts_nothing(monkeypatch):
    """Headers of several words make room first; then lines are longer than the terminal."""
    numbers = [terminal.table(("path", "bytes before", "bytes after"), [("layers/w", "12,288", "978")], left=("path",))]
    numbers.append(terminal.table(("path", "bytes before"), [("layers/" * 6, "12,288")], left=("path",)))
    wrapped, long = (shown(monkeypatch, True, 30, what).replace("\x1b[0m", "") for what in numbers)
    lines = [line.replace("\x1b[1m", "").rstrip() for line in wrapped.splitlines()]
    assert lines == ["           bytes  bytes", "path      before  after", "layers/w  12,288    978"]
    assert "layers/" * 6 + "  12,288" in long


def test_control_characters_are_shown_as_escapes():
    assert terminal.plain("é\u3000日本 \U0001f600\n\tx") == "é\u3000日本 \U0001f600\n\tx"
    assert terminal.plain("\x1b[31mred\x1b]0;t\x07") == r"\x1b[31mred\x1b]0;t\x07"
    assert terminal.plain("a\u202eb\x9b\r\x7f\ud800") == r"a\u202eb\x9b\r\x7f\ud800"
    assert terminal.text(terminal.table(["a"], [["\x1b[2J"]])).splitlines()[1].strip() == r"\x1b[2J"
