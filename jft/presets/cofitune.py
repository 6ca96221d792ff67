"""CoFiTune: modules in a range of layers, found by search, and a soft mask of the units that matter to the base."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jft import tree
from jft.dot import dot
from jft.methods import Card
from jft.methods.layer_search import better, stacks
from jft.methods.parametrise import InPlace
from jft.methods.plan import Method
from jft.methods.registry import register
from jft.methods.select import Select
from jft.methods.update_rules import Rule
from jft.models.core import Hooks
from jft.select.activations import fingerprint, hookable, real, rows
from jft.select.calibration import Calibration
from jft.select.layers import Between, Choice, Table, table_of
from jft.tree import Patterns, patterns

Array = jax.Array
# The pattern of a weight in its layer, and the units whose importance scales its columns.
UNITS = (
    (r"mlp/up/w", "mlp/channels"),
    (r"mlp/down/w", "mlp/outputs"),
    (r"attn/q/w", "attn/heads"),
    (r"attn/(?:k|v)/w", "attn/kv_heads"),
)
Size = Literal["signed", "absolute"]


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The sum over the examples of a batch of their gradients in gates of 1, or of the gradients' sizes.

    The gradient is that of the divergence between two passes with different noise, summed over an example's real tokens.
    """

    model: Any
    rate: float
    size: Size

    def __call__(self, params: Any, batch: Any, key: Array, gates: Any) -> Any:
        # ``sums`` passes every batch the same key.
        key = jax.random.fold_in(key, fingerprint(batch))
        size = len(rows(batch))
        # A gate for each example, so that one backward pass gives the gradients of each: examples do not meet.
        each = jax.tree.map(lambda g: jnp.repeat(g[:, None], size, axis=1), gates)
        gradients = jax.grad(lambda gates: self.divergence(params, batch, key, gates))(each)
        of = jnp.abs if self.size == "absolute" else lambda g: g
        return jax.tree.map(lambda g: jnp.sum(of(g), axis=1), gradients)

    def divergence(self, params: Any, batch: Any, key: Array, gates: Any) -> Array:
        """``sum over real tokens of KL(p || q)``, p and q the predictions of the two passes; gates ``[L, B, units]``."""
        one, other = (self._outputs(params, batch, k, gates) for k in jax.random.split(key))
        p, q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (one, other))
        return jnp.sum(jnp.sum(jnp.exp(p) * (p - q), axis=-1) * real("", p.shape[:-1], batch))

    def _outputs(self, params: Any, batch: Any, key: Array, gates: Any) -> Array:
        def product(name: str, x: Array, w: Any, state: Any) -> tuple[Array, Any]:
            if name == "layers/attn/o":
                gate = state["heads"]
                by_head = x.reshape(*x.shape[:-1], gate.shape[-1], -1)
                y = by_head * gate.reshape(len(gate), *(1,) * (x.ndim - 2), -1, 1).astype(x.dtype)
                return dot(_dropped(state["key"], self.rate, y.reshape(x.shape)), w), None
            if name == "layers/mlp/down":
                y = dot(x * _broad(state["channels"], x), w)
                return y * _broad(state["outputs"], y), None
            return dot(x, w), None

        def value(name: str, h: Array, state: Any) -> tuple[Array, Any]:
            return (_dropped(state, self.rate, h) if name == "layers/mlp/out" else h), None

        layers = gates["layers/attn/o"]["heads"].shape[0]
        attention, mlp = (jax.random.key_data(jax.random.split(k, layers)) for k in jax.random.split(key))
        # A key for each layer: the hooks' state is sliced with the layers, so that each draws its own noise.
        state = {**gates, "layers/attn/o": {**gates["layers/attn/o"], "key": attention}, "layers/mlp/out": mlp}
        return self.model.apply(params, batch, Hooks(product, value, state))[0]


def _dropped(key: Array, rate: float, x: Array) -> Array:
    keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _broad(gate: Array, x: Array) -> Array:
    """A gate ``[B, units]`` of ``x[B, ..., units]``."""
    return gate.reshape(len(gate), *(1,) * (x.ndim - 2), -1).astype(x.dtype)


def importance(calibration: Calibration, batches: int, rate: float = 0.003, size: Size = "signed") -> dict[str, Array]:
    """Importance in [0, 1) of each layer's units to what the model knows: ``{"layers/attn/heads": [L, H], ...}``.

    Also ``layers/attn/kv_heads``, of a group of query heads the largest, ``layers/mlp/channels [L, F]`` and
    ``layers/mlp/outputs [L, D]``. A unit has a gate of 1 on what it gives; g is the gradient in it of ``KL(p || p')`` between
    the predictions of two passes with dropout at ``rate``, summed over the real tokens of ``batches``. With z the g of a
    layer's units minus their mean, over their standard deviation (n - 1), importance is ``|tanh z|``. size: ``signed``, as
    CoFiTune's code sums g (Zhang et al. 2024, arXiv:2404.10306), or ``absolute``, z of the mean of ``|g|`` over examples, as
    Ke et al. 2023, arXiv:2302.03241, write it. Dropout falls on the values that the heads
    give, and on what the MLP adds. Raises ``ValueError`` for a rate outside (0, 1) and models without such units.
    """
    model = hookable(calibration)
    # A classifier keeps the configuration of its encoder under ``backbone``.
    config = getattr(model.config, "backbone", model.config)
    _check_noise(rate, size)
    down, heads = calibration.params.get("layers/mlp/down/w"), getattr(config, "heads", 0)
    if down is None or not heads:
        raise ValueError("importance of units is for models with one stack of layers of attention and a plain MLP")
    layers, channels, width = down.shape
    ones = lambda size: jnp.ones((layers, size), jnp.float32)
    gates = {"layers/attn/o": {"heads": ones(heads)}}
    gates["layers/mlp/down"] = {"channels": ones(channels), "outputs": ones(width)}
    compute = _Gradients(model, rate, size)
    # fold_in: not the stream that the calibration's other users draw from.
    sums = calibration.sums(compute, batches, jax.random.fold_in(calibration.key, 1), gates)
    out = {
        "layers/attn/heads": _standard(sums["layers/attn/o"]["heads"]),
        "layers/mlp/channels": _standard(sums["layers/mlp/down"]["channels"]),
        "layers/mlp/outputs": _standard(sums["layers/mlp/down"]["outputs"]),
    }
    groups = getattr(config, "kv_heads", heads)
    out["layers/attn/kv_heads"] = jnp.max(out["layers/attn/heads"].reshape(layers, groups, -1), axis=-1)
    return out


def _check_noise(rate: float, size: str) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"dropout {rate} is not between 0 and 1")
    if size not in ("signed", "absolute"):
        raise ValueError(f"size is {size!r}; choose one of signed, absolute")


def _standard(gradient: Array) -> Array:
    """``|tanh z|``: no count divides the gradients, since z is the same for any multiple of them."""
    # One unit in a layer has no sample deviation; ddof=0 then gives 0, and z is 0.
    spread = jnp.std(gradient, axis=-1, keepdims=True, ddof=min(1, gradient.shape[-1] - 1))
    z = (gradient - jnp.mean(gradient, axis=-1, keepdims=True)) / jnp.where(spread > 0, spread, 1.0)
    return jnp.abs(jnp.tanh(z))


def _unit(path: str) -> str | None:
    """The name of the units whose importance scales the columns of a weight."""
    stack = tree.stack_of(path)
    if stack is None:
        return None
    inside = path.removeprefix(f"{stack}/")
    return next((f"{stack}/{name}" for pattern, name in UNITS if re.fullmatch(pattern, inside)), None)


@dataclasses.dataclass(frozen=True)
class SoftMask(Rule):
    """Gradients times ``1 - importance`` of the unit they belong to (Zhang et al. 2024, arXiv:2404.10306).

    Columns of up go by the MLP's channel, those of down by the output, those of q, k and v by the head (keys and values by
    the most important query head that reads them); whatever else trains, gate, o and biases among it, is left alone.
    Importance: :func:`importance`, over ``batches`` with ``dropout``, once, at the base. Memory: ``1 - importance`` for each
    unit. Raises ``ValueError`` where no matrix that trains has units.
    """

    batches: int = 8
    dropout: float = 0.003
    size: Size = "signed"

    def __post_init__(self) -> None:
        """Refuse noise that is none."""
        _check_noise(self.dropout, self.size)

    def init(self, trained: Mapping[str, Any]) -> Any:
        """Ones."""
        # [L, 1, O]: the scale is of columns, and broadcasts over rows.
        ones = lambda x: jnp.ones((x.shape[0], 1, x.shape[2]), x.dtype)
        scales = {p: jax.tree.map(ones, x) for p, x in trained.items() if _unit(p)}
        if not scales:
            raise ValueError("soft_mask is for q, k, v, up and down, and none of them trains; give soft_mask=False")
        return scales

    def measure(self, plan: Any, calibration: Calibration, memory: Any) -> Any:
        """What the base says of its units."""
        importances = importance(calibration, self.batches, self.dropout, self.size)
        out = {}
        for path in memory:
            units = importances[_unit(path) or ""]
            scale = 1.0 - jnp.repeat(units, calibration.params[path].shape[-1] // units.shape[1], axis=1)
            # ``collect`` cuts the scale as the leaf is cut, where only some layers train.
            out[path] = plan.leaves[path].collect(None, scale[:, None])
        return out

    def gradient(self, plan: Any, kept: Any, trained: Any, gradient: Any, memory: Any) -> tuple[Any, Any]:
        """The gradient, scaled."""
        scaled = {p: jax.tree.map(jnp.multiply, gradient[p], memory[p]) for p in memory}
        return {**gradient, **scaled}, memory


@dataclasses.dataclass(frozen=True)
class RangeSearch(Choice):
    """CoFiTune's coarse step: a search over ranges of layers and modules by what tuning them evaluates to.

    Level by level: the ranges that ``parts`` cut the depth into (halves, then quarters) are tried inside the range found
    before, all modules together; then, in that range, each group of ``modules``. Where nothing is better than what the
    level before found, that stays. Every candidate is trained from the base for ``steps``.
    """

    steps: int
    metric: str = "loss"
    parts: tuple[int, ...] = (2, 4)
    modules: tuple[tuple[str, ...], ...] = ()
    from_data = True

    def __call__(self, calibration: Calibration) -> Table:
        lengths = stacks(calibration)
        best = {s: list(range(n)) for s, n in lengths.items()}
        # The first level is compared with nothing, so its best range is taken.
        value = -np.inf
        for parts in self.parts:
            cuts = [{s: _part(n, i, parts) for s, n in lengths.items()} for i in range(parts)]
            # Finer ranges are tried inside the best coarser one alone, which is what keeps the search short.
            inside = [c for c in cuts if all(set(c[s]) <= set(best[s]) for s in c)]
            scores = [self._worth(calibration, table_of(calibration, c)) for c in inside]
            if scores and max(scores) > value:
                value, best = max(scores), inside[int(np.argmax(scores))]
        table = table_of(calibration, best)
        tables = [narrowed(table, group) for group in self.modules]
        scores = [self._worth(calibration, t) for t in tables]
        return tables[int(np.argmax(scores))] if scores and max(scores) > value else table

    def _worth(self, calibration: Calibration, table: Table) -> float:
        return better(self.metric, calibration.evaluate(calibration.tuned(self.steps, table=table)))


def _part(length: int, i: int, parts: int) -> list[int]:
    return list(range(length * i // parts, length * (i + 1) // parts))


def narrowed(table: Table, modules: Iterable[str]) -> Table:
    """The rows of a table whose path matches any of ``modules``."""
    matching = {p: layers for p, layers in table.items() if any(re.search(m, p) for m in modules)}
    if not matching:
        raise ValueError(f"no weight of the chosen layers matches {', '.join(modules)}")
    return matching


DEPTH, MODULES = (0.25, 0.5), (r"mlp/(up|down)/",)
GROUPS = ((r"attn/",), (r"mlp/up/",), (r"mlp/down/",), (r"mlp/(up|down)/",))
CARD = Card(
    formula="up and down of layers floor(L / 4) to floor(L / 2) - 1 train; gradients of a unit's columns times 1 - |tanh z|, z "
    "over the units of a layer (n - 1) of the summed signed gradient g in a gate of 1 on the unit, of KL(p || p') between two "
    "passes with dropout .003",
    follows="the authors' code (the same z in ContinualLM); size='absolute' is Ke et al. 2023, whom the paper follows: "
    "the mean of |g| over examples",
    check="gate gradients of every unit by differences in a float64 NumPy decoder with the same dropout masks, importance "
    "from them, and steps of Adam; the released layers; the search over a table of values",
    code="rattlesnakey/CoFiTune@a8e37f2, src/softmask_utils.py, src/softmask_llama.py and pipeline_sft.sh",
    departs="dropout falls on the values that heads give, not on attention's weights, which no hook reads; padding does not "
    "count, in the code it does; of grouped keys and values the most important query head counts, the code has none; "
    "batches=8, the code takes all of the data; the search does not try the half of the depth in the middle",
    defaults={
        "depth": ("found by search", (0.25, 0.5)),
        "modules": ("found by search", "up_proj, down_proj"),
        "dropout": ("-", 0.003),
        "size": ("absolute", "signed"),
        "batches": ("-", "all"),
    },
)


@register("cofitune", paper="Zhang et al. 2024, arXiv:2404.10306", card=CARD)
def cofitune(
    depth: tuple[float, float] = DEPTH,
    modules: Patterns = MODULES,
    search: int = 0,
    metric: str = "loss",
    groups: Sequence[Sequence[str]] = GROUPS,
    soft_mask: bool = True,
    batches: int = 8,
    dropout: float = 0.003,
    size: Size = "signed",
) -> Method:
    """Train the MLP's up and down projections of the second quarter of the layers, gently where units matter to the base.

    depth, modules: what trains, by depth from 0 to 1 and by pattern; the defaults are the code's. search: steps for each
    candidate of a search instead, over halves, then quarters of the depth, then ``groups`` of modules, by ``metric`` of an
    evaluation on the run's ``eval_data`` (give it both the new skill and the old ones: the paper scores their sum). soft_mask:
    gradients are scaled by 1 minus the importance of their unit, found over ``batches`` of the training data from two passes
    with ``dropout``; size: of signed gradients, as in the code, or of their sizes (:class:`SoftMask`). Raises ``ValueError``
    for options of a search without one and the reverse, and for those of the soft mask without it.
    """
    options = {"depth": (depth, DEPTH), "modules": (modules, MODULES)}
    if search:
        _refuse(options, f"search={search} finds layers and modules; leave it out, or give groups")
    else:
        _refuse(
            {"metric": (metric, "loss"), "groups": (groups, GROUPS)},
            "it is of a search, and search is 0; give its steps",
        )
    if not soft_mask:
        noise = {"batches": (batches, 8), "dropout": (dropout, 0.003), "size": (size, "signed")}
        _refuse(noise, "it is of the soft mask, and soft_mask is False; leave it out")
    rule = SoftMask(batches, dropout, size) if soft_mask else None
    if search:
        choice = RangeSearch(search, metric, modules=tuple(map(tuple, groups)))
        return Method(Select((r"(attn|mlp)/(q|k|v|o|up|gate|down)/",), layers=choice), InPlace(), rule=rule)
    return Method(Select(patterns(modules), layers=Between(*depth)), InPlace(), rule=rule)


def _refuse(options: Mapping[str, tuple[Any, Any]], why: str) -> None:
    """Refuse options ``{name: (value, default)}`` that would do nothing."""
    for name, (value, default) in options.items():
        if _plain(value) != _plain(default):
            raise ValueError(f"cofitune's {name}={value!r} would do nothing: {why}")


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
