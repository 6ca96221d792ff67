"""A run restored from its workdir: config, model, base, and the parameters it ended with."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jft.cli.errors import Parser, UsageError


@dataclasses.dataclass(frozen=True)
class Restored:
    """config: a :class:`jft.train.config.Config`. train, test: loaders; test is None where the config has no eval_data."""

    config: Any
    workdir: Path | None
    model: Any
    base: Any
    train: Any
    test: Any

    @property
    def objective(self) -> Any:
        """The :class:`jft.train.objectives.Objective` of the config, else the one that fits the evaluation data."""
        from jft.train.objectives import infer, objective

        config = self.config
        return objective(
            {"name": config.objective, **config.objective_options} if config.objective else infer(self.test.sample())
        )

    def params(self) -> Any:
        """The final parameters: the base plus the run's task vector."""
        from jft import delta

        return delta.apply(self.base, self.task_vector())

    def task_vector(self) -> Any:
        """The change that the run made. Raises ``ValueError`` where it has not ended yet."""
        from jft import delta

        path = self.workdir / "task_vector.safetensors" if self.workdir else None
        if path is None or not path.is_file():
            raise ValueError(
                f"{path or 'the run'} does not exist: the run is not finished; `jft train` goes on with it"
            )
        return delta.TaskVector.load(path)


def restore(config: Any, workdir: Path | None) -> Restored:
    """The run that ``config`` describes; ``workdir`` is where it ran, None to have its base alone."""
    from jft import parallel
    from jft.train import experiment
    from jft.train.config import check

    train_config = check(config)
    if not train_config.data:
        raise ValueError("config.data is empty; say at least data.source (see jft.data)")
    mesh = parallel.make_mesh(dataclasses.asdict(train_config.mesh))
    train, test = experiment.loaders(train_config, workdir)
    # As the run did it: one device needs no mesh.
    model_mesh = mesh if mesh.size > 1 else None
    model, base = experiment.build_model(
        train_config.model, train_config.seed, model_mesh, train.classes, train.tokenizer
    )
    return Restored(train_config, workdir, model, base, train, test)


def linearized(file: Path) -> str:
    """What a user of the task vector in ``file`` as ordinary weights must know; empty unless it was trained linearized."""
    from jft.delta import file as task_vector_file

    # A run that is not finished has none, which is said elsewhere.
    method = task_vector_file.inspect(file).manifest.get("method") if file.is_file() else None
    # Imported task vectors may have a name alone.
    if not isinstance(method, Mapping) or method.get("forward", "standard") == "standard":
        return ""
    return f"was trained linearized at its base (method {method.get('name')}): no ordinary weights give that function"


def note_linearized(file: str | Path) -> None:
    """Say on standard error that the task vector in ``file`` is another model as ordinary weights, where it is."""
    if trained := linearized(Path(file)):
        print(f"note: {file} {trained}; as weights it is another model", file=sys.stderr)


def start(distributed: Any = None) -> None:
    """Join the other processes of a multi-host run, of which the first alone prints.

    distributed: the section of a config; what it leaves out is as the environment says, also with ``JFT_MULTIHOST=1``.
    """
    from jft import parallel

    options: dict[str, Any] = {}
    if distributed is not None:
        options = dataclasses.asdict(distributed)
        unset = {"coordinator": "", "processes": 0, "process_id": -1, "cluster": False}
        options |= {key: None for key, value in unset.items() if options[key] == value}
    if not parallel.start(**options):
        return
    import jax

    if jax.process_index():
        # By its number, since libraries in C++ write there as well.
        sys.stdout.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def config_of(argv: Sequence[str]) -> str | None:
    """``config.json`` in the ``--workdir`` among ``argv``: the config of a run need not be given again.

    Raises :class:`UsageError` for a workdir that does not exist.
    """
    # Ahead of the real parser: the config decides which overrides that takes.
    early = Parser(add_help=False)
    early.add_argument("--workdir")
    workdir = early.parse_known_args(argv)[0].workdir
    if workdir is None:
        return None
    if not Path(workdir).is_dir():
        raise UsageError(f"workdir {workdir!r} does not exist")
    file = Path(workdir) / "config.json"
    return str(file) if file.is_file() else None
