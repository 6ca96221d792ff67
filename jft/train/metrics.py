"""Where metrics go: always one JSON object a line, and TensorBoard or Weights & Biases where asked for."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Protocol

from jft import files


@dataclasses.dataclass(frozen=True)
class Logging:
    """What is logged. every: steps between rows. progress: show the run on stdout. tensorboard; wandb: a project's name."""

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
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


class JsonLines:
    """``metrics.jsonl``: a row a line, flushed, so that a reader or a crash finds all that was logged.

    Resuming at ``step`` drops rows beyond it, and a last line that was cut off.
    """

    def __init__(self, path: Path, step: int = 0):
        self.rows: list[dict] = [row for row in read(path) if row["step"] <= step] if step and path.exists() else []
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps({k: _number(v) for k, v in row.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict]:
    """The rows of a ``metrics.jsonl``; a last line that was cut off is left out. Other damage is refused, naming the line."""
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON: {line[:80]!r}") from None
    return rows


class TensorBoard:
    """Scalars as ``split/name`` in ``workdir/tensorboard``."""

    def __init__(self, workdir: Path, step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError(
                "log.tensorboard needs tensorboardX: pip install 'jft[tensorboard]', or turn it off"
            ) from None
        # purge_step hides what an interrupted run logged beyond the checkpoint it resumes from.
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step or None)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
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
        kept = workdir / "wandb_id"
        name = kept.read_text().strip() if kept.exists() else None
        self._run = wandb.init(project=project, dir=str(workdir), id=name, resume="allow")
        kept.write_text(self._run.id)

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
        self._sinks: list[Sink] = []
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
        lines = JsonLines(workdir / "metrics.jsonl", step)
        self.rows = list(lines.rows)
        self._sinks.append(lines)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Log ``values`` of ``split`` (train, eval) after ``step`` updates."""
        row = {"step": step, "split": split, **values}
        self.rows.append(row)
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
