"""docs/commands.md: every command with its real output. ``python -m tests.commands`` writes it anew.

Each command runs in a process of its own, in a folder of tiny files that are made here, as if the terminal had 80 columns and
what is printed went into a file. Seconds and rates, and what names this machine's versions, are left out.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np

import jft
from jft.cli import main
from jft.data.tokenizer import byte_tokenizer
from jft.delta import Entries, LowRank, describe
from tests.models import checkpoints

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
COLUMNS = "80"
MODEL = checkpoints.LLAMA | {"vocab_size": 264, "max_position_embeddings": 1024}
DIGITS = """\
from jft.train.config import default


def get_config():
    config = default()
    config.model.arch, config.model.classes = "vision", 10
    config.model.options = dict(image=8, patch=4, channels=1, width=16, layers=1, heads=2, hidden=32)
    config.data = dict(source="digits", split="train")
    config.eval_data = dict(source="digits", split="test")
    config.steps, config.batch_size, config.log.every = 40, 32, 20
    config.optimizer.lr = 1e-2
    return config
"""
INTRODUCTION = f"""\
# Every command

What each command prints, by `make commands`: it runs them one after the other in a folder of tiny files, and a test runs
those that train nothing again. Rates, dates and versions are left out (`…`). The folder holds

* `base`, `maths` and `code`: Llamas of two layers, with random weights; `sums.jsonl`: lines such as
  `{{"prompt": "3 + 4 = ", "response": "7"}}`; `one.safetensors` and `two.safetensors`: changes of a few weights of `base`;
* `digits.py`:

```python
{DIGITS}```
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A line for a shell.

    lines: as many as ``| head`` leaves of the output, or ``| tail`` where it is below 0; 0: all. trains: it needs more than
    the folder of :func:`files`, or takes long, so that its output is not compared.
    """

    text: str
    lines: int = 0
    trains: bool = False

    @property
    def shown(self) -> str:
        """The line as the page has it."""
        part = f" | {'head' if self.lines > 0 else 'tail'} -n {abs(self.lines)}" if self.lines else ""
        return f"jft {self.text}{part}"

    @property
    def help(self) -> bool:
        return self.text.endswith("--help")


def trained(text: str, lines: int = 0) -> Command:
    return Command(text, lines, trains=True)


SUMS = "--config=sums.py --config.data.max_length=64 --config.data.pack=none"
SECTIONS: dict[str, list[Command]] = {
    "jft": [Command("--help"), Command("--version")],
    "jft init": [Command("init sft --data=sums.jsonl --model=base --out=sums.py"), Command("init --help")],
    "jft train": [
        Command(f"train {SUMS} --print-config", lines=12),
        Command("train --keys", lines=12),
        trained(f"train {SUMS} --dry-run"),
        trained(
            f"train {SUMS} --workdir=runs/sums --config.method.name=full --config.optimizer.lr=5e-3 "
            "--config.epochs=80 --config.log.every=80 --config.checkpoint.every=160"
        ),
        trained("train --config=digits.py --workdir=runs/full"),
        trained("train --config=digits.py --workdir=runs/lora --config.method.name=lora --config.method.rank=2"),
        Command("train --help"),
    ],
    "jft checkpoints": [trained("checkpoints runs/sums"), Command("checkpoints --help")],
    "jft eval": [
        trained("eval --workdir=runs/lora"),
        trained("eval --workdir=runs/lora --base --json"),
        Command("eval --help"),
    ],
    "jft plot": [trained("plot --workdir=runs --out=runs.png"), Command("plot --help")],
    "jft generate": [
        trained("generate --workdir=runs/sums --base --max-tokens=6 '10 + 11 = '"),
        Command("generate --help"),
    ],
    "jft export": [trained("export --workdir=runs/sums --out=sums"), Command("export --help")],
    "jft delta": [
        Command("delta info one.safetensors"),
        Command("delta diff one.safetensors two.safetensors"),
        trained("delta apply base one.safetensors half --scale=0.5"),
        trained("delta compress one.safetensors small.safetensors --method magnitude --density 0.05"),
        trained("delta extract-lora base one.safetensors adapter --rank 2"),
        *(
            Command(f"delta{action} --help")
            for action in ("", " info", " diff", " apply", " compress", " extract-lora")
        ),
    ],
    "jft merge": [
        Command("merge --list", lines=12),
        Command("merge --method ties --base base maths code --out merged --option density=0.3 --dry-run"),
        trained("merge --method ties --base base maths code --out merged --option density=0.3"),
        Command("merge --help"),
    ],
    "jft analyze": [
        trained("analyze linearity runs/lora runs/full --points=3"),
        trained("analyze disentangle runs/lora runs/full --points=3 --lowest=0 --largest=1"),
        trained("analyze ntk runs/lora --examples=16"),
        *(Command(f"analyze{action} --help") for action in ("", " linearity", " disentangle", " ntk")),
    ],
    "jft methods": [Command("methods", lines=12), Command("methods lora"), Command("methods --help")],
    "jft bench": [
        trained("bench step --methods full lora:rank=2 --tokens 16 --batch 2"),
        *(Command(f"bench{action} --help") for action in ("", " kernels", " merge")),
    ],
    "jft quickstart": [trained("quickstart --workdir=runs/quickstart", lines=-24), Command("quickstart --help")],
}


def commands() -> list[Command]:
    """All commands of the page, in its order."""
    return [command for section in SECTIONS.values() for command in section]


def files(folder: Path) -> None:
    """What the commands work on. From NumPy's generator alone, so that fingerprints and norms are the same everywhere."""
    for seed, name in enumerate(("base", "maths", "code")):
        tensors = checkpoints.llama_tensors(MODEL, seed=seed)
        scaled = {k: x if x.ndim == 1 else (x * 0.1).astype(x.dtype) for k, x in tensors.items()}
        checkpoints.write(folder / name, scaled, MODEL)
    byte_tokenizer().save(folder / "base")
    sums = [{"prompt": f"{i} + {i + 1} = ", "response": str(2 * i + 1)} for i in range(64)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "digits.py").write_text(DIGITS)
    base = describe(jft.load(folder / "base")[1])
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    low_rank = {f"layers/attn/{p}/w": LowRank(draw(2, 32, 4) * 0.05, draw(2, 4, 32)) for p in "qo"}
    at = np.arange(24) // 12 * 1024 + np.arange(24) % 12 * 85
    rows, columns = at // 32, at % 32
    entries = {"layers/attn/q/w": Entries(rows, columns, draw(24), (2, 32, 32))}
    jft.TaskVector(low_rank, base | {"method": {"name": "lora"}}).save(folder / "one.safetensors")
    jft.TaskVector(entries, base | {"method": {"name": "fish_mask"}}).save(folder / "two.safetensors")


REPLACED = (
    # Rates, durations and dates.
    (r"[\d.,e+]+ (steps|tokens|rows|examples)/s", r"… \1/s"),
    (r"\d+:\d\d:\d\d left", "… left"),
    (r"(took|in|about) [\d.]+ (s|min)\b", r"\1 … \2"),
    (r"(?m)^created .*$", "created      …"),
    (r"(?m)^versions .*$", "versions     …"),
    (r"(?m)^jft \d+\.\d+\.\d+\S*$", "jft …"),
)


def plain(output: str, command: Command) -> str:
    """An output as the page has it."""
    for pattern, text in REPLACED:
        output = re.sub(pattern, text, output)
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    part = slice(command.lines, None) if command.lines < 0 else slice(command.lines or None)
    return "\n".join(lines[part])


def in_process(command: Command) -> str:
    """What a command prints, run here; the current directory is the folder."""
    out = io.StringIO()
    environment = mock.patch.dict(os.environ, COLUMNS=COLUMNS)
    with environment, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        main.call(shlex.split(command.text))
    return plain(out.getvalue(), command)


def in_a_shell(command: Command, folder: Path) -> str:
    """What a command prints in a process of its own."""
    environment = os.environ | {"COLUMNS": COLUMNS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PAGE.parents[1])}
    argv = [sys.executable, "-m", "jft", *shlex.split(command.text)]
    done = subprocess.run(
        argv, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
    )
    return plain(done.stdout, command)


def block(command: Command, output: str) -> str:
    """A command and its output in Markdown; help folds away."""
    text = f"```console\n$ {command.shown}\n{output}\n```"
    return f"<details><summary>{command.shown}</summary>\n\n{text}\n\n</details>" if command.help else text


def outputs(page: str) -> dict[str, str]:
    """``{command as shown: output}`` of a page."""
    return dict(re.findall(r"```console\n\$ (.*)\n((?s:.*?))\n```", page))


def sections(folder: Path) -> Iterator[str]:
    """The page, part by part; every command is run."""
    yield INTRODUCTION
    for title, of_section in SECTIONS.items():
        blocks = []
        for command in of_section:
            print(command.shown, file=sys.stderr, flush=True)
            blocks.append(block(command, in_a_shell(command, folder)))
        yield "\n\n".join([f"## {title}", *blocks]) + "\n"


def write() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as name:
        files(Path(name))
        PAGE.write_text("\n".join(sections(Path(name))))


if __name__ == "__main__":
    write()
