"""The dispatcher behind ``jft``: finds the command, imports nothing but that, and turns user errors into one line."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jft import terminal
from jft.cli.errors import UsageError, tell_others
from jft.names import nearest

# What a user can cause and cure: bad values, missing files and extras, a full disk. All else is a bug: its traceback shows.
USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)


def commands() -> dict[str, str]:
    """``{name: one line of help}``, read from the sources of this folder without importing any of them."""
    summaries = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            summaries[path.stem] = (ast.get_docstring(module) or "").split("\n", maxsplit=1)[0]
    return summaries


def usage() -> str:
    """The text of ``jft --help``."""
    known = commands()
    width = max(map(len, known))
    columns = shutil.get_terminal_size().columns
    wrapped = lambda name, text: textwrap.fill(
        text, max(columns, 60), initial_indent=f"  {name:<{width}}  ", subsequent_indent=" " * (width + 4)
    )
    lines = [
        "jft: fine-tune pretrained models in JAX, and do arithmetic with what it changed.",
        "",
        "usage: jft COMMAND [options]    jft COMMAND --help    (also: python -m jft ...)",
        "",
        *(wrapped(name, summary) for name, summary in known.items()),
        "",
        "JFT_TRACEBACK=1 shows the whole traceback of an error.",
    ]
    return "\n".join(lines)


def dispatch(argv: Sequence[str]) -> int:
    """Run ``argv`` (without the program's name). Returns the exit code: 0, 1 for a failed run, 2 for wrong usage."""
    name, *rest = argv or [""]
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else 2
    if name in ("--version", "version"):
        from jft.version import __version__

        print(f"jft {__version__}")
        return 0
    known = commands()
    if name not in known:
        raise UsageError(f"unknown command {name!r}{nearest(name, known)}; `jft --help` lists all")
    # This module alone: other commands import what it does not need.
    code = importlib.import_module(f"jft.cli.{name}").main(rest)
    return int(code or 0)


def call(argv: Sequence[str]) -> int:
    """:func:`dispatch`, with user errors printed in one line on standard error."""
    traceback = os.environ.get("JFT_TRACEBACK", "") not in ("", "0")
    try:
        return dispatch(argv)
    except KeyboardInterrupt as error:
        tell_others(error, 130)
        print("jft: interrupted", file=sys.stderr)
        # 128 + SIGINT, as shells report it.
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # 128 + SIGPIPE.
        return 141
    except USER_ERRORS as error:
        if traceback:
            raise
        tell_others(error, 1)
        # On one line, whatever line breaks the message has.
        print(f"jft: {terminal.plain(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def only_processor(devices: Path = Path("/dev")) -> bool:
    """Whether JAX would find nothing but the processor, and libtpu, which is there for plans, would complain of no TPU."""
    installed = {name: importlib.util.find_spec(name) is not None for name in ("libtpu", "jax_plugins")}
    # GPUs come as plugins.
    found = installed["jax_plugins"] or any(devices.glob("accel*")) or (devices / "vfio").exists()
    return installed["libtpu"] and not found


def run() -> None:
    """The console script."""
    if "JAX_PLATFORMS" not in os.environ and only_processor():
        os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(call(sys.argv[1:]))
