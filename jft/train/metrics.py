"""Metrics of a run, and their sinks: one JSON object a line, TensorBoard, Weights & Biases, the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from jft import files, strict_json, terminal


@dataclasses.dataclass(frozen=True)
class Logging:
    """Options of the log.

    every: steps between rows; the loss of a row is the mean over all targets since the last one. progress: show the run on
    stdout. tensorboard; wandb: a project's name.
    """

    every: int = 10
    progress: bool = True
    tensorboard: bool = False
    wandb: str = ""

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}; it must be at least 1")


class Sink(Protocol):
    """A place for metrics."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def _number(value: Any) -> Any:
    """A value JSON can hold; NaN and infinities become strings, since JSON has none."""
    # `json.dumps` would write a bare NaN, which other readers refuse.
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


class JsonLines:
    """``metrics.jsonl``: a row a line, flushed, so that a reader or a crash finds all that was logged.

    Resuming at ``step`` drops rows beyond it, and a last line that was cut off. A full disk does not end a run: rows wait
    until there is room, and ``error`` says why, empty where none waits.
    """

    def __init__(self, path: Path, step: int = 0):
        self.rows: list[dict] = [row for row in read(path) if row["step"] <= step] if step and path.exists() else []
        # Rewritten whole and by a rename, so that a crash here loses no row; appending to a cut line would damage two.
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        # Unbuffered: a reader may follow the file, and what was written of a row is then known.
        self._file, self._waiting, self.error = path.open("ab", buffering=0), b"", ""

    def write(self, row: dict[str, Any]) -> None:
        self._waiting += (json.dumps({k: _number(v) for k, v in row.items()}) + "\n").encode()
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self.error = ""
        except OSError as error:
            self.error = f"{self._file.name} cannot be written: {error.strerror}"

    def close(self) -> None:
        self._flush()
        self._file.close()


def read(path: Path) -> list[dict]:
    """The rows of a ``metrics.jsonl``; a truncated last line is dropped. Other damage is refused, naming the line."""
    rows = []
    try:
        files.check_regular(path)
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); {_REMOVE}") from None
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        try:
            row = strict_json.loads(line, where, hint=_REMOVE)
        except ValueError:
            # Only the last line can be cut off by a crash; an earlier one was changed by somebody.
            if number < len(lines):
                raise
            continue
        strict_json.need(row, _ROW, where, hint=_REMOVE)
        rows.append(row)
    return rows


_ROW = {"step": strict_json.COUNT, "split": strict_json.TEXT}
_REMOVE = "remove that line, or the file, of which nothing but the log depends"


class TensorBoard:
    """Scalars as ``split/name`` in ``workdir/tensorboard``."""

    def __init__(self, workdir: Path, step: int = 0):
        try:
            # Not tensorboard's own writer, which comes with torch or TensorFlow.
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError(
                "log.tensorboard needs tensorboardX: pip install 'jft[tensorboard]', or turn it off"
            ) from None
        # purge_step hides what an interrupted run logged beyond the checkpoint it resumes from.
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step or None)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            # Strings are the split and the like; a scalar has no place for them.
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run in ``project``, resumed by the id kept in ``workdir/wandb_id``."""

    def __init__(self, workdir: Path, project: str):
        try:
            import wandb
        except ImportError:
            raise ValueError("log.wandb needs wandb: pip install 'jft[wandb]', or leave it empty") from None
        id_file = workdir / "wandb_id"
        name = id_file.read_text().strip() if id_file.exists() else None
        # `allow`: with a known id it goes on, without one it starts anew.
        self._run = wandb.init(project=project, dir=str(workdir), id=name, resume="allow")
        id_file.write_text(self._run.id)

    def write(self, row: dict[str, Any]) -> None:
        values = {f"{row['split']}/{k}": v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        self._run.finish()


class Metrics:
    """All sinks as one; ``rows`` are those of the whole run, resumed parts included. Only the first process writes files."""

    def __init__(
        self, workdir: Path | None, step: int = 0, tensorboard: bool = False, wandb: str = "", writes: bool = True
    ):
        self.rows: list[dict] = []
        self._resumed: list[dict] = []
        self._sinks: list[Sink] = []
        self._lines: JsonLines | None = None
        # Rows are kept in memory all the same, for `Run.metrics`.
        if workdir is None:
            if tensorboard or wandb:
                raise ValueError("log.tensorboard and log.wandb need a workdir")
            return
        if not writes:
            return
        # The file last: what fails before leaves nothing open or cut.
        if tensorboard:
            self._sinks.append(TensorBoard(workdir, step))
        if wandb:
            self._sinks.append(WeightsAndBiases(workdir, wandb))
        lines = self._lines = JsonLines(workdir / "metrics.jsonl", step)
        self.rows = list(lines.rows)
        self._resumed = [row for row in self.rows if row.get("step") == step]
        self._sinks.append(lines)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Log ``values`` of ``split`` (train, eval) after ``step`` updates."""
        row = {"step": step, "split": split, **values}
        # A finished run that is started again evaluates its last state once more.
        if any(r["step"] == step and r["split"] == split for r in self._resumed):
            return
        self.rows.append(row)
        for sink in self._sinks:
            sink.write(row)

    @property
    def error(self) -> str:
        """Why rows are not in the file; empty where all are."""
        return self._lines.error if self._lines else ""

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


PEAK_FLOPS = {
    "TPU v4": 275e12,
    # libtpu calls v5e and v6e "lite"; both names are known.
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # 2307e12 a chip, which JAX shows as two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
"""Dense bfloat16 FLOP/s of one JAX device by the start of its ``device_kind``, from the makers' data sheets."""


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None where it is not known (every CPU)."""
    kind = device.device_kind
    # TPU kinds are exact ("TPU v5" is a v5p, "TPU v5 lite" is not); NVIDIA's go on with memory and form factor.
    names = [name for name in PEAK_FLOPS if kind == name or (name.startswith("NVIDIA") and _starts(kind, name))]
    # The longest: an "H100 PCIe" is an "H100" as well.
    return PEAK_FLOPS[max(names, key=len)] if names else None


def _starts(kind: str, name: str) -> bool:
    # "NVIDIA L4" must not take "NVIDIA L40".
    return kind.startswith(name) and not kind[len(name) : len(name) + 1].isalnum()


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one step on all devices, and how they were counted (``source``), over their peak FLOP/s (None: unknown).

    positions: of the tokens of that step, padding included; 0 where FLOPs do not follow from tokens.
    """

    flops: float | None
    source: str
    peak: float | None
    positions: int = 0


class Meter:
    """Steps, examples and tokens per second since it was last read; time spent in :meth:`pause` does not count."""

    def __init__(self, work: Work):
        self._work = work
        self._reset()

    def _reset(self) -> None:
        self._since, self._steps, self._examples, self._tokens, self._positions = time.perf_counter(), 0, 0, 0, 0

    def add(self, examples: int, tokens: int, positions: int = 0) -> None:
        """A step. tokens: without padding; positions: with it."""
        self._steps += 1
        self._examples += examples
        self._tokens += tokens
        self._positions += positions

    def pause(self, seconds: float) -> None:
        self._since += seconds

    def read(self) -> dict[str, float]:
        """Rates since the last reading: ``steps_per_s``, ``examples_per_s``, ``tokens_per_s`` and ``mfu`` where known,
        both of tokens that are not padding, and ``padding``, its share.
        """
        # A clock may not have moved between two readings.
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rates = {"steps_per_s": self._steps / seconds, "examples_per_s": self._examples / seconds}
        if self._tokens:
            rates["tokens_per_s"] = self._tokens / seconds
        if self._positions:
            rates["padding"] = 1 - self._tokens / self._positions
        if self._work.flops and self._work.peak:
            # Work on padding is none of the model's.
            steps = self._tokens / seconds / self._work.positions if self._work.positions else rates["steps_per_s"]
            rates["mfu"] = self._work.flops * steps / self._work.peak
        self._reset()
        return rates


def line(step: int, steps: int, split: str, values: dict[str, float]) -> str:
    """One row as text: ``train 120/1000  loss 1.234  accuracy 0.56  12.3 steps/s``."""
    # What fits one line; the file has all of them.
    names = [
        k for k in ("loss", "accuracy", "f1", "matthews", "pearson", "perplexity", "grad_norm", "lr") if k in values
    ]
    parts = [f"{split:5} {step}/{steps}"] + [f"{k} {values[k]:.4g}" for k in names]
    for key, unit in (("steps_per_s", "steps/s"), ("tokens_per_s", "tokens/s")):
        if key in values:
            parts.append(f"{values[key]:,.3g} {unit}" if values[key] < 100 else f"{values[key]:,.0f} {unit}")
    if "mfu" in values:
        parts.append(f"MFU {100 * values['mfu']:.1f}%")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``1:02:03``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Progress:
    """The progress bar of a run, or its lines. shows: nothing at all if false (processes but the first, quiet runs)."""

    def __init__(self, steps: int, start: int, shows: bool):
        self._steps, self._shows = steps, shows
        self._bar: Any = None
        # In a pipe or a log file a bar would be lines of escape codes.
        if shows and sys.stdout.isatty():
            self._bar, self._task = _bar(steps, start)

    def say(self, text: str) -> None:
        """Print ``text``, above the bar if there is one."""
        # It may hold rows of data.
        text = terminal.plain(text)
        if self._bar is not None:
            # Text of the user's data may hold [brackets], which rich would take for markup.
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shows:
            # The terminal of a lost connection is gone, and the run must still save.
            with contextlib.suppress(OSError):
                print(text, flush=True)

    def advance(self, step: int) -> None:
        """``step`` updates are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, split: str, values: dict[str, float]) -> None:
        """A row of metrics."""
        text = line(step, self._steps, split, values)
        if self._bar is not None and split == "train":
            self._bar.update(self._task, completed=step, metrics=text)
        elif self._shows:
            # Rows of evaluation have no rate, and no time left.
            remaining = (self._steps - step) / values["steps_per_s"] if values.get("steps_per_s") else 0
            self.say(f"{text}  {duration(remaining)} left" if remaining else text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _bar(steps: int, start: int) -> tuple[Any, Any]:
    # Imported where a bar is drawn, since rich takes long to import.
    from rich import progress, table

    # The text last, which alone is cut where the terminal is narrow.
    whole = table.Column(no_wrap=True)
    rest = table.Column(no_wrap=True, overflow="ellipsis", ratio=1)
    bar = progress.Progress(
        progress.BarColumn(bar_width=20, table_column=whole),
        progress.TimeRemainingColumn(table_column=whole.copy()),
        progress.TextColumn("{task.fields[metrics]}", table_column=rest),
        expand=True,
    )
    task = bar.add_task("train", total=steps, completed=start, metrics=f"train {start}/{steps}")
    bar.start()
    return bar, task
