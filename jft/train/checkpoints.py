"""Checkpoints of what trains, and of the position in the data. The one module that knows Orbax.

A checkpoint holds the state (trained values, optimizer state, step, key), the data position of each process and the run's
identity. The base is not in it: it is named by source and fingerprint. Saving is asynchronous; a checkpoint comes to be
by a rename, so one that a crash cut short is never seen as whole, and is removed by the next start.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jft import delta, files, parallel, tree
from jft.delta import file
from jft.methods.registry import comparable
from jft.parallel.agreement import dotted
from jft.train import digests
from jft.train.state import State
from jft.tree import host

# All other metrics (loss, perplexity) are better when smaller.
HIGHER_IS_BETTER = ("accuracy", "exact_match", "f1", "matthews", "pearson")


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """When to save and what to keep.

    every: steps between checkpoints, the last step included; 0: one after every ``minutes`` without (0: none), so that a long
    run does not depend on its last second. On being asked to stop a run always saves. keep: how many of the
    newest stay. best: also keep the best by this metric of evaluation (``loss``, ``accuracy``...), which must be evaluated
    wherever a checkpoint is written; the run then ends with that state in place of the last. accept: go on though data,
    tokenizer, objective or settings of the optimizer have changed since the checkpoint.
    """

    every: int = 0
    keep: int = 2
    best: str = ""
    accept: bool = False
    minutes: float = 30.0

    def __post_init__(self):
        if not self.minutes >= 0:
            raise ValueError(f"checkpoint.minutes is {self.minutes}; it is at least 0, which is for none")
        if self.every < 0 or self.keep < 1:
            raise ValueError(f"checkpoint.every is {self.every} and keep {self.keep}; they are at least 0 and 1")


AGREE = 64  # steps after which several processes agree on whether a checkpoint is due by the clock
FINISH = 5.0  # seconds for a write that has begun, where the run ends for another process
SHOWN = 8  # differences named in an error


class Changed(ValueError):
    """The run in the workdir is another one: the same name, but not the same base, method, optimizer or data."""


# Not what a run is: a longer run, other rows of metrics and other checkpoints go on from the same state.
FREE = ("steps", "checkpoint", "log", "profile", "eval", "eval_data", "distributed")
# What a state may go on under, where the user says so. Another optimizer has another state.
ACCEPTABLE = ("data.", "content.", "optimizer.", "objective.")
# They follow from the config: shown where nothing of that has changed.
DERIVED = ("base.", "batch.", "trained.")


def _acceptable(key: str) -> bool:
    key = re.sub(r"^fleet\.[^.]+\.", "", key)
    return f"{key}.".startswith(ACCEPTABLE) and key != "optimizer.name"


def _config_changes(saved: Any, now: Any) -> dict[str, tuple[Any, Any]]:
    """Keys of the configs that differ and may decide the run, with both values."""
    if not isinstance(saved, Mapping) or not isinstance(now, Mapping):
        return {}
    # Both through JSON: what Orbax gives back has tuples where it was given lists.
    old, new = (dotted(json.loads(json.dumps(x))) for x in (saved, now))
    keys = [k for k in sorted(old.keys() | new.keys()) if k.split(".")[0] not in FREE and old.get(k) != new.get(k)]
    return {k: (old.get(k, "nothing"), new.get(k, "nothing")) for k in keys}


def _content(saved: Any, now: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The identities without what one alone says of content, and without the path of a tokenizer whose content is known."""
    # A fleet's are those of its members.
    if isinstance(saved.get("fleet"), Mapping) and isinstance(now.get("fleet"), Mapping):
        pairs = {k: _content(saved["fleet"][k], now["fleet"][k]) for k in saved["fleet"].keys() & now["fleet"].keys()}
        old, new = ({**x["fleet"], **{k: pair[i] for k, pair in pairs.items()}} for i, x in enumerate((saved, now)))
        return {**saved, "fleet": old}, {**now, "fleet": new}
    both = bool(saved.get("content")) and bool(now.get("content"))
    known = both and "tokenizer" in saved["content"] and "tokenizer" in now["content"]
    sides = []
    for side in (saved, now):
        side = dict(side) if both else {k: v for k, v in side.items() if k != "content"}
        if known and isinstance(side.get("data"), Mapping):
            side["data"] = {k: v for k, v in side["data"].items() if k != "tokenizer"}
        sides.append(side)
    return sides[0], sides[1]


WORDS = {
    "content.tokenizer": "the tokenizer's content has changed (vocabulary, rules, special tokens or template)",
    "content.rows": "the data's content or order has changed",
}


def _shown(key: str, old: Any, new: Any) -> str:
    # Hashes tell a person nothing.
    word = next((text for name, text in WORDS.items() if key.endswith(name)), None)
    return f"  {word}" if word else f"  {key}: {old!r} -> {new!r}"


def compare(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    what: str,
    configs: tuple[Any, Any] = (None, None),
    accept: bool = False,
    end: str = "undo the change{accept}, or give another workdir",
) -> None:
    """Refuse with :class:`Changed` where the identities differ: ``what``, and each difference as ``key: old -> new``.

    configs: of the saved run and of this one, in whose words differences are said. accept: pass over what :data:`ACCEPTABLE`
    names. end: the way out, with a place for that of ``accept``.
    """
    saved, now = _content(saved, now)
    # Through JSON, which makes lists of tuples and strings of keys, as the saved one went.
    old, new = dotted(comparable(saved)), dotted(comparable(json.loads(json.dumps(now))))
    # "nothing" is what messages show for an absent key, and equals no value that a run saves.
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k, "nothing") != new.get(k, "nothing")]
    if accept:
        keys = [k for k in keys if not _acceptable(k)]
    if keys:
        changed = _config_changes(*configs)
        lines = [_shown(k, *pair) for k, pair in changed.items()]
        # Offered where it would be enough.
        way = ", set checkpoint.accept=True to go on all the same" if all(map(_acceptable, keys)) else ""
        # What the config's words have said, or what follows from them, is not said twice.
        keys = [k for k in keys if not (changed and f"{k}.".startswith(DERIVED)) and k not in changed]
        # What trains follows from the rest, leaf by leaf: shown last, and not to the last leaf.
        keys.sort(key=lambda k: k.startswith("trained."))
        lines += [_shown(k, old.get(k, "nothing"), new.get(k, "nothing")) for k in keys]
        rest = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        changes = "\n".join(lines[:SHOWN] + rest)
        raise Changed(
            f"{what} of another run, so going on in this workdir would be wrong:\n{changes}\n{end.format(accept=way)}"
        )


def finished(workdir: Path, itself: Mapping[str, Any], begin: int, steps: int, every: int) -> int | None:
    """The step at which this very run has ended in ``workdir``, by its task vector, if training from ``begin`` to ``steps``
    would replace that; else None.

    Raises :class:`Changed` where there is nothing to go on from (begin 0), and the task vector is of another run.
    """
    path = workdir / "task_vector.safetensors"
    if not path.is_file():
        return None
    # The header alone: a task vector may be as large as the model.
    manifest = file.inspect(path).manifest
    ended = int(manifest.get("steps", 0))
    if begin:
        # With ``every`` the last step had a checkpoint: that is damaged, and the same steps give the same result.
        return ended if begin < ended and (steps < ended or (steps == ended and not every)) else None
    # A task vector keeps the base as a section, a checkpoint as its fingerprint alone.
    before = {key: manifest.get(key) for key in itself} | {"base": manifest.get("base", {}).get("fingerprint")}
    if "narrowed" in manifest:  # of part of its base: the whole one is not known
        before["base"] = itself["base"]
    compare(before, itself, f"{path} is", end="give another workdir, or remove that file")
    return ended


def newest(directory: Path) -> tuple[int, dict[str, Any] | None, dict[str, jax.ShapeDtypeStruct]]:
    """Of the newest checkpoint in ``directory``: its step, its method's decision, and shapes of the state by path.

    0, None and nothing where there is none.
    """
    # Opened for this alone: what trains must be known before there is a state that `Checkpoints` could restore.
    with ocp.training.Checkpointer(directory.absolute()) as checkpointer:
        last = checkpointer.latest
        if last is None:
            return 0, None, {}
        # The state's metadata gives its shapes; its arrays are read once the layout says where each shard goes.
        run = checkpointer.load_checkpointables(last.step, {"run": None})["run"]
        metadata = checkpointer.checkpointables_metadata().metadata["state"]
    return last.step, run.get("decided"), {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in metadata.items()}


class Checkpoints:
    """The checkpoints of one run in ``directory``."""

    def __init__(
        self,
        directory: Path,
        options: Checkpointing,
        identity: Mapping[str, Any],
        decided: Any = None,
        config: Any = None,
    ):
        # A copy: `renewed` changes it.
        self.directory, self.options, self.identity = directory, options, dict(identity)
        # config: of the run, for the words of a refusal.
        self.decided, self.config = decided, config
        # The step that is being written, and its write.
        self._write: tuple[int, concurrent.futures.Future] | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._failed = False
        # Since the last checkpoint.
        self._since = time.monotonic()
        _quiet()
        self._probe(0)
        self._checkpointer = self._open()

    def _open(self) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(self.options.keep)]
        # Kept beside the newest, from which an interrupted run goes on.
        if name := self.options.best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[name],
                    reverse=name not in HIGHER_IS_BETTER,
                    n=1,
                    # Else every checkpoint of a stop between evaluations would stay for ever.
                    keep_checkpoints_without_metrics=False,
                )
            )
        return ocp.training.Checkpointer(
            self.directory.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(keep),
        )

    def _refuse(self, step: int, reason: str) -> OSError:
        self._failed = True
        whole = next((f.name for f in digests.steps(self.directory) if not digests.examine(f).damage), None)
        good = f"the last good checkpoint is that of step {whole}" if whole else "there is no checkpoint yet"
        return OSError(
            f"the checkpoint of step {step} cannot be written to {self.directory}: {reason}; {good}. Make room, or the "
            "directory writable, and run the same again"
        )

    def _probe(self, step: int) -> None:
        """Refuse at once where no file can be made: Orbax would wait for minutes for the directory."""
        if jax.process_index():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            files.write_text(probe := self.directory / ".probe", "x")
            probe.unlink()
        except OSError as error:
            raise self._refuse(step, error.strerror or str(error)) from None

    def _finish(self, response: Any, step: int) -> None:
        """Wait for the write of ``step``, and write its digest beside it."""
        response.result()
        if jax.process_index() == 0:
            digests.write(self.directory / str(step), step)

    def check(self) -> None:
        """Raise ``OSError`` for a write in the background that has failed, in one line."""
        # Alone, since one process of several must not stop before the others.
        if self._write is not None and self._write[1].done() and jax.process_count() == 1:
            self._wait()

    def _wait(self) -> None:
        """Wait for the write in the background. Raises ``OSError`` where it failed, with its leftovers removed."""
        if self._write is None:
            return
        (step, write), self._write = self._write, None
        try:
            write.result()
        # Whatever Orbax and TensorStore raise: they have no class of their own for a disk.
        except Exception as error:
            digests.clear(self.directory)
            raise self._refuse(step, _reason(error)) from None

    def saved(self) -> str:
        """What this run has saved, where it ends without its loop: a write that has begun may end first."""
        # The first process completes it; without that one nothing does.
        if self._write is not None and jax.process_index() == 0:
            concurrent.futures.wait([self._write[1]], FINISH)
        found = digests.steps(self.directory)
        # Those with a digest are not read: they were whole, and the start that goes on reads them.
        whole = next((f.name for f in found if (f / digests.NAME).is_file() or not digests.examine(f).damage), None)
        return (
            f"the last checkpoint in {self.directory} is that of step {whole}" if whole else "no checkpoint was saved"
        )

    def renewed(self, identity: Mapping[str, Any], decided: Any = None) -> None:
        """Take over the identity and decision of the run after a reselection, for all checkpoints from now on."""
        self.identity |= identity
        self.decided = self.decided if decided is None else decided

    def due(self, step: int, steps: int) -> bool:
        """Whether a checkpoint is to be written after ``step`` of ``steps`` updates."""
        if self.options.every:
            # At the last step too: a longer run may go on from there.
            return step % self.options.every == 0 or step == steps
        late = bool(self.options.minutes) and time.monotonic() - self._since >= 60 * self.options.minutes
        return (
            late if jax.process_count() == 1 else step % AGREE == 0 and parallel.exchange("checkpoint.minutes", late)[0]
        )

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def restore_best(self, shapes: State) -> tuple[State, dict[str, float]]:
        """The state and evaluation of the best checkpoint by ``options.best``; see :meth:`restore`."""
        name = self.options.best
        # Closing waits for checkpoints that are still being written; a closed checkpointer cannot load, hence the new one.
        self._wait()
        self._checkpointer.close()
        self._checkpointer = self._open()
        scored = {c.step: c.metrics for c in self._checkpointer.checkpoints if c.metrics and name in c.metrics}
        scored = {s: m for s, m in scored.items() if not digests.examine(self.directory / str(s)).damage}
        if not scored:
            raise ValueError(f"no checkpoint in {self.directory} has the metric {name!r}; evaluation gives others")
        # Of equals both take the first, the earliest step.
        order = max if name in HIGHER_IS_BETTER else min
        step = order(scored, key=lambda s: scored[s][name])
        return self.restore(shapes, step)[0], dict(scored[step])

    def save(
        self,
        state: State,
        step: int,
        position: Any,
        metrics: Mapping[str, float] | None = None,
        settled: Mapping[str, delta.Encoding] | None = None,
    ) -> None:
        """Write a checkpoint of ``state`` in the background; ``position`` is that of this process's data.

        settled: values that stay in weights while others train (:mod:`jft.train.reselection`).

        The state is copied before this returns, so it may be donated to the next step. At a step that has one, nothing
        is done.
        """
        # The state before a bad step may have been saved when it was due, and Orbax refuses a step twice.
        if any(c.step == step for c in self._checkpointer.checkpoints):
            return
        if metrics and self.options.best and self.options.best not in metrics:
            raise ValueError(f"checkpoint.best is {self.options.best!r}, but evaluation gives {', '.join(metrics)}")
        self._wait()
        _ignore_closed_loops()
        self._probe(step)
        # Tensors and constants apart: Orbax stores arrays in one item and JSON in another.
        packed = {path: values.pack() for path, values in (settled or {}).items()}
        constants = {path: [settled[path].kind, static] for path, (_, static) in packed.items()} if settled else {}
        inside = {f"{path}:{name}": host(x) for path, (tensors, _) in packed.items() for name, x in tensors.items()}
        # Left out where nothing has settled, as in every run without a schedule.
        arrays = {"settled": inside} if inside else {}
        positions = parallel.exchange("positions of the data", position)
        run = {"identity": self.identity, "positions": positions, "settled": constants, "decided": self.decided}
        run["config"] = self.config
        try:
            response = self._checkpointer.save_checkpointables_async(
                step,
                # Flat by path, as `newest` reads it, whatever classes the states of optax have.
                {"state": tree.flatten(state), "run": run, **arrays},
                # Whether a step is due is decided by `due`, not by a policy of Orbax.
                force=True,
                metrics=dict(metrics) if metrics else None,
            )
        # What is seen before the background begins; on a full disk Orbax's own cleaning up fails as well.
        except Exception as error:
            digests.clear(self.directory)
            raise self._refuse(step, _reason(error)) from None
        self._write = step, self._pool.submit(self._finish, response, step)
        self._since = time.monotonic()

    def restore(self, shapes: State, step: int | None = None) -> tuple[State, Any]:
        """``(state, data position)`` of ``step`` (default the newest), in the shardings of ``shapes``.

        Raises :class:`Changed` where the checkpoint is of another run.
        """
        step = self.latest if step is None else step
        run = self._checkpointer.load_checkpointables(step, {"run": None})["run"]
        # Before the state is read: of another run its shapes would differ, and Orbax's error would name none of the reasons.
        configs = run.get("config"), self.config
        compare(
            run["identity"], self.identity, f"the checkpoints in {self.directory} are", configs, self.options.accept
        )
        positions = run["positions"]
        # One global position, the same on every process, holds for any number of them; the data checks the rest.
        if all(p == positions[0] for p in positions):
            positions = [positions[0]] * jax.process_count()
        if len(positions) != jax.process_count():
            raise Changed(
                f"the checkpoints in {self.directory} hold the data position of {len(positions)} processes, and this run has "
                f"{jax.process_count()}; resume with as many (the mesh may change)"
            )
        # The shapes carry shardings: each process reads its own shards, also after a change of the mesh.
        flat = self._checkpointer.load_checkpointables(step, {"state": tree.flatten(shapes)})["state"]
        return tree.like(shapes, flat), positions[jax.process_index()]

    def settled(self, step: int | None = None) -> dict[str, delta.Encoding]:
        """The values that had settled at ``step`` (default the newest)."""
        step = self.latest if step is None else step
        run = self._checkpointer.load_checkpointables(step, {"run": None})["run"]
        if not run.get("settled"):
            return {}
        arrays = self._checkpointer.load_checkpointables(step, {"settled": None})["settled"]
        out = {}
        for path, (kind, static) in run["settled"].items():
            tensors = {n.removeprefix(f"{path}:"): np.asarray(x) for n, x in arrays.items() if n.startswith(f"{path}:")}
            out[path] = delta.kinds()[kind].unpack(tensors, static)
        return out

    def close(self) -> None:
        """Wait for unfinished writes. Raises ``OSError`` where one failed."""
        try:
            self._wait()
        finally:
            self._pool.shutdown()
            # After a failure, which was told, it would raise the same again in its own words.
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._checkpointer.close()


@functools.cache
def _ignore_closed_loops() -> None:
    """Keep TensorStore from printing a traceback for each write that ends after a save has failed.

    It tells the event loop of the save, which Orbax has closed by then. All else goes to the hook that was there.
    """
    hook = sys.unraisablehook

    def report(unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    sys.unraisablehook = report


def _reason(error: BaseException) -> str:
    """What the operating system said, from inside the messages of Orbax and TensorStore."""
    # Of a chain the first that the system raised: later ones are of cleaning up.
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < 20:
        chain.append(before)
    error = next((e for e in chain if isinstance(e, OSError) or "OS error" in str(e)), error)
    found = re.search(r"OS error \d+: ([^\]]+)|\[Errno \d+\] ([^:]+)", str(error))
    return (found[1] or found[2]).strip() if found else (str(error).splitlines() or [type(error).__name__])[0][:200]


def _quiet() -> None:
    """Keep Orbax from logging tracebacks of what is raised here in one line."""
    log = logging.getLogger("absl")
    if _not_orbax not in log.filters:
        log.addFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
