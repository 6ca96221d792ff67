"""The cost of one training step by method: FLOPs and bytes of the compiled program, and seconds of interleaved steps.

FLOPs and memory are the compiler's own account of the step that :func:`jft.finetune` runs, with layers unrolled, since XLA
counts a scan's body once. Seconds are medians over rounds in which every method makes one step: whatever else the machine
does, it does to all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jft import methods, parallel, tree
from jft.bench import cycles
from jft.bench.shapes import MODELS
from jft.methods import Method, Plan, select
from jft.models import Execution, Model
from jft.names import nearest
from jft.select import scores
from jft.train import feed, reselection, step
from jft.train.objectives import objective
from jft.train.optimizers import optimizer
from jft.train.state import hold

OPTIMIZER = {"name": "adamw", "lr": 1e-4}


@dataclasses.dataclass(frozen=True)
class Setting:
    """model: a name of :data:`jft.bench.shapes.MODELS`. batch x tokens: of a step. steps: rounds that are timed (0: none).

    topology, mesh: compile for these TPU chips in place of the devices that are here.
    """

    model: str = "smollm2-135m"
    batch: int = 16
    tokens: int = 256
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "plain"
    logits_chunk: int = 0
    unroll: int = 0
    steps: int = 0
    topology: str = ""
    mesh: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        """``ValueError`` for what cannot be measured."""
        if self.model not in MODELS:
            raise ValueError(
                f"model {self.model!r} is unknown{nearest(self.model, MODELS)}; it is one of {', '.join(MODELS)}"
            )
        if self.topology and self.steps:
            raise ValueError(f"nothing can be run on the topology {self.topology}, whose chips are not here: steps=0")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one method. trained: values; density: their share of all weights. flops of a step on all devices.

    flops are None where XLA would count a loop's body once: layers in a scan, chunks of logits, and on TPUs products with
    shards that arrive.
    optimizer_bytes: gradients, masters and moments, on all devices; full_bytes: what they are of full fine-tuning.
    peak: bytes on each device, all told; temporaries: those of the program. rounds: seconds of each timed step, seconds their
    median, or None. fits: the compiler did not refuse; where it did, temporaries and peak are what it said, a lower bound,
    and arguments are not told (0). estimate: seconds by the cycles of XLA's TPU compiler (:mod:`jft.bench.cycles`).
    """

    method: str
    trained: int
    density: float
    flops: float | None
    optimizer_bytes: int
    arguments: int
    temporaries: int
    peak: int
    seconds: float | None = None
    rounds: tuple[float, ...] = ()
    fits: bool = True
    estimate: float | None = None

    def times(self, other: Cost) -> float:
        """The median over rounds of this step's seconds over those of ``other``: the machine may drift between rounds."""
        return statistics.median(
            seconds / other_seconds for seconds, other_seconds in zip(self.rounds, other.rounds, strict=True)
        )


class Candidate:
    """A method on the setting's model: its compiled step, and, to be timed (with ``params``), what it holds."""

    def __init__(self, setting: Setting, name: str, options: Mapping[str, Any], mesh: Any, params: Any = None):
        execution = Execution(
            dtype=jnp.dtype(setting.dtype),
            remat=setting.remat,  # type: ignore[arg-type]
            attention=setting.attention,  # type: ignore[arg-type]
            unroll=setting.unroll,
            logits_chunk=setting.logits_chunk,
        )
        model = Model(MODELS[setting.model](), execution)
        method = by_chance(methods.method(name, **options))
        self.shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.dtype(setting.dtype)))
        plan = method.plan(self.shapes, model)
        lm = objective("lm")
        self.recipe = step.Recipe(
            step.apply_for(lm, model, mesh), plan, lm, optimizer(OPTIMIZER).unscheduled(), dtype=execution.dtype
        )
        if params is None:
            grids = reselection.grids(plan, self.shapes, mesh)
            self.selection = select.expected(plan, tree.flatten(self.shapes), grids)
        else:
            self.selection = drawn(plan, params, model, mesh)
        self.update = step.compile_step(self.recipe, self.shapes, self.selection, mesh)
        self.counts_flops = not (setting.unroll or setting.topology or setting.logits_chunk)
        self.chip = cycles.CHIPS.get(setting.topology.split(":")[0])
        self.batch = {"tokens": jax.ShapeDtypeStruct((setting.batch, setting.tokens), np.int32)}

    def cost(self, label: str) -> Cost:
        """The cost of the compiled step, or the lower bound with which the compiler refused it."""
        flops, fits, estimate = None, True, None
        try:
            compiled = self.update.compiled(self.batch)
            memory = parallel.estimate(compiled)
            if self.counts_flops:
                # XLA counts the part of one device.
                flops = (step.flops(compiled) or 0.0) * self.update.layout.devices
            estimate = self._estimate(compiled)
        except Exception as error:
            lower_bound = parallel.refusal(error)
            if lower_bound is None:
                raise
            memory, fits = lower_bound, False
        state = self.update.holdings.state
        trained, size = tree.count(state.trained), tree.count(self.shapes)
        return Cost(
            label,
            trained,
            trained / size,
            flops,
            # Twice: the master copies, and their gradients.
            2 * tree.nbytes(state.trained) + tree.nbytes(state.opt_state),
            memory.arguments,
            memory.temporaries,
            memory.total,
            fits=fits,
            estimate=estimate,
        )

    def _estimate(self, compiled: Any) -> float | None:
        try:
            return cycles.seconds(compiled.as_text(), self.chip) if self.chip else None
        except jax.errors.JaxRuntimeError:  # libtpu does not read back all that it has compiled for a v5p
            return None

    def ready(self, params: Any) -> Callable[[Any], None]:
        """A function that makes one step and waits for it."""
        update = self.update
        holdings = hold(update, params, self.selection, seed=0)

        def run(batch: Any) -> None:
            # The step donates its state: only what it returned last is valid.
            nonlocal holdings
            holdings, out = update(holdings, feed.put(batch, update.layout), np.float32(1e-4), np.asarray(True))
            jax.block_until_ready((holdings, out))

        return run


def by_chance(method: Method) -> Method:
    """``method`` with random scores: which parts are selected changes no cost, and looking for them would."""
    score = method.select.score
    if score is None or hasattr(score, "share"):  # one that chooses by itself, and may draw as well
        return method
    return dataclasses.replace(method, select=dataclasses.replace(method.select, score=scores.Random()))


def drawn(plan: Plan, params: Any, model: Model, mesh: Any = None) -> dict[str, Any]:
    """The selection of a plan of :func:`by_chance`."""
    if not plan.selects:
        return {}
    calibration = _Drawing(plan.selects, tree.flatten(params), jax.random.key(1), model, plan.structured)
    return select.choose(plan, calibration, reselection.grids(plan, params, mesh))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """A calibration for random scores."""

    paths: tuple[str, ...]
    params: Mapping[str, Any]
    key: Any
    model: Model
    structured: bool

    def lead(self, path: str) -> int:
        return tree.lead(path, self.params[path].ndim, self.structured)


def measure(
    setting: Setting, candidates: Sequence[tuple[str, Mapping[str, Any]]], say: Callable[[str], None] = lambda _: None
) -> list[Cost]:
    """The cost of each ``(method, options)``; ``say`` is told of each as it is compiled."""
    shape = dict(setting.mesh) or None
    mesh = parallel.topology_mesh(setting.topology, shape) if setting.topology else None
    mesh = parallel.make_mesh(shape) if mesh is None and shape else mesh
    costs: dict[str, Cost] = {}
    timed = []
    params = None
    if setting.steps:
        model = Model(MODELS[setting.model](), Execution(dtype=jnp.dtype(setting.dtype)))
        params = model.init(jax.random.key(0), jnp.dtype(setting.dtype))
    for name, options in candidates:
        label = " ".join([name, *(f"{k}={v}" for k, v in options.items())])
        candidate = Candidate(setting, name, options, mesh, params)
        costs[label] = candidate.cost(label)
        say(f"{label}: compiled")
        if setting.steps:
            timed.append((label, candidate.ready(params)))
    for label, rounds in _race(timed, setting).items():
        costs[label] = dataclasses.replace(costs[label], seconds=statistics.median(rounds), rounds=tuple(rounds))
    return list(costs.values())


def _race(ready: Sequence[tuple[str, Callable[[Any], None]]], setting: Setting) -> dict[str, list[float]]:
    """Seconds of the steps of each, one a round, after one that is not timed."""
    rng = np.random.default_rng(0)
    vocab = MODELS[setting.model]().vocab
    times: dict[str, list[float]] = {label: [] for label, _ in ready}
    for n in range(setting.steps + 1 if ready else 0):
        batch = {"tokens": rng.integers(0, vocab, (setting.batch, setting.tokens)).astype(np.int32)}
        for label, run in ready:
            begin = time.perf_counter()
            run(batch)
            # The first round warms up caches and is not timed.
            if n:
                times[label].append(time.perf_counter() - begin)
    return times
