"""RandLoRA: scales of random matrices against float64 NumPy from the paper's formula, and against peft."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import delta
from jft.methods import Method, Select
from jft.parallel import make_mesh
from jft.presets.randlora import RandLoRA
from tests.delta.test_random_bases import drawn
from tests.methods import decoder, leaf, stack

MUTATIONS = (
    ("jft/presets/randlora.py", "shape[-2] <= shape[-1]", "shape[-2] < shape[-1]"),
    ("jft/presets/randlora.py", "return -(-min(shape[-2:]) // self.rank)", "return min(shape[-2:]) // self.rank"),
    ("jft/presets/randlora.py", "jnp.full((*lead, n, along), 1 / along", "jnp.full((*lead, n, along), 1 / rows"),
    ("jft/presets/randlora.py", '"lam": jnp.zeros(', '"lam": jnp.ones('),
    ("jft/presets/randlora.py", "self.alpha / self.rank /", "self.alpha / self.rank**0.5 /"),
    ("jft/presets/randlora.py", "if self.by_bases else 1.0", "if not self.by_bases else 1.0"),
    ("jft/presets/randlora.py", "rank: int = 32", "rank: int = 64"),
    ("jft/presets/randlora.py", "float(20 * rank", "float(2 * rank"),
    ("jft/presets/randlora.py", "matrices=None, origin=None", "matrices=None"),
    ("jft/presets/randlora.py", "(..., None, _along(weight.shape))", "(..., None, None)"),
    ("jft/presets/randlora.py", "Select(linear_only=True)", "Select((r'/w$',))"),
)
RANK = 4
MATRICES = {stack.UP: (6, 8), stack.DOWN: (8, 6)}  # [I, O]: the scales run along the inputs, along the outputs


class ByHand:
    """``W = W0 + s sum_n B_n diag(lam_n) A diag(gamma_n)`` of the matrices of every layer, B along their longer side."""

    def __init__(self, base, keys, rank, scale):
        self.base, self.scale, self.bases, self.start = base, scale, {}, {}
        for path, own in keys.items():
            rows, columns = base[path].shape[1:]
            long, short = max(rows, columns), min(rows, columns)
            n = int(np.ceil(short / rank))
            a = np.stack([drawn(key, 0, (rank, short)) for key in own])
            b = np.stack([drawn(key, 1, (long, n, rank)) for key in own])
            self.bases[path] = a, b, rows <= columns
            self.start[path, "lam"] = np.zeros((len(own), n, rank))
            self.start[path, "gamma"] = np.full((len(own), n, short), 1 / short)

    def weights(self, values):
        out = dict(self.base)
        for path, (a, b, turned) in self.bases.items():
            change = np.einsum("lDnk,lnk,lkd,lnd->lDd", b, values[path, "lam"], a, values[path, "gamma"])
            out[path] = out[path] + self.scale * (np.swapaxes(change, 1, 2) if turned else change)
        return out

    def gradient(self, values, of_weights):
        """Of the scales, from ``of_weights(w)``, that of the weights."""
        g, out = of_weights(self.weights(values)), {}
        for path, (a, b, turned) in self.bases.items():
            dw = self.scale * (np.swapaxes(g[path], 1, 2) if turned else g[path])
            out[path, "lam"] = np.einsum("lDd,lDnk,lkd,lnd->lnk", dw, b, a, values[path, "gamma"])
            out[path, "gamma"] = np.einsum("lDd,lDnk,lnk,lkd->lnd", dw, b, values[path, "lam"], a)
        return out


@functools.cache
def trained(steps, mesh=None, forward=None):
    method = jft.method("randlora", rank=RANK, alpha=6.0, forward=forward)
    log = {"progress": False, "every": 1}
    return stack.run(method, steps, optimizer=decoder.ADAM, mesh=mesh and make_mesh(dict(mesh)), log=log)


def test_three_steps_of_adam():
    run = trained(3)
    assert sorted(run.task_vector.paths) == sorted(MATRICES)
    keys = {p: np.asarray(x.key) for p, x in run.task_vector.items()}
    assert len({tuple(k) for own in keys.values() for k in own}) == 4  # bases of its own for each matrix
    expected = ByHand(stack.wide(stack.parameters()), keys, RANK, 6 / RANK)
    adam = decoder.Adam(expected.start)
    for batch in stack.DATA[:3]:
        adam.step(expected.gradient(adam.w, lambda w, b=batch: stack.gradient(w, b)), dict.fromkeys(adam.w, True))
    stack.check(run, expected.weights(adam.w))
    for path, change in run.task_vector.items():
        np.testing.assert_allclose(change.gamma, adam.w[path, "gamma"], atol=1e-5)
        np.testing.assert_allclose(change.lam, 1.5 * adam.w[path, "lam"], atol=1e-5)


def test_defaults():
    how = jft.method("randlora").train
    assert how == RandLoRA(32, 640.0, False)  # peft's RandLoraConfig: r=32, randlora_alpha=640
    assert jft.method("randlora", rank=8).train.alpha == 160  # its docstring: 20 times the rank
    # Llama 3 8B's up projection at r = 30 (README of the authors' repository): 137 bases, N (d + r) scales.
    w = jax.ShapeDtypeStruct((4096, 14336), jnp.float32)
    kept, start = jax.eval_shape(RandLoRA(30, 60).init, jax.random.key(0), w)
    assert start["gamma"].shape == (137, 4096) and start["lam"].shape == (137, 30) and kept["key"].shape == (2,)
    square = how.change(*how.init(jax.random.key(0), jnp.zeros((4, 4))))
    assert square.axis == -2  # the scales along the inputs, as in peft (min_dim == in_features)


def test_the_change_is_of_full_rank_and_its_file_as_small_as_what_trains(tmp_path):
    run = trained(3)
    for path, x in run.task_vector.items():
        assert isinstance(x, delta.RandomBases)
        assert (np.linalg.matrix_rank(np.asarray(x.dense(), np.float64), tol=1e-5) == 6).all(), path
    values = sum(x.size for x in jax.tree.leaves(run.state.trained))
    assert values == 2 * 2 * 2 * (6 + RANK)  # weights, layers, N = ceil(6 / 4), scales of each
    assert run.task_vector.nbytes == 4 * values + 8 * 4
    run.task_vector.save(tmp_path / "x.safetensors")
    tuned = jft.apply(stack.parameters(), jft.TaskVector.load(tmp_path / "x.safetensors"))
    stack.check(run, stack.wide(tuned), tolerance=2e-6)


def test_on_a_mesh_as_on_one_device():
    """The same keys, draws and steps; what trains along a sharded axis lies as the weight does."""
    one, many = trained(3), trained(3, mesh=(("data", 2), ("fsdp", 2), ("tensor", 2)))
    for path, x in one.task_vector.items():
        np.testing.assert_array_equal(many.task_vector[path].key, x.key)
    stack.check(many, stack.wide(one.params))
    spec = jax.sharding.PartitionSpec
    for shape, axis in (((4, 8, 12), "b"), ((4, 12, 8), "c")):
        kept, found = leaf.specs(RandLoRA(RANK, 1.0), spec("a", "b", "c"), jax.ShapeDtypeStruct(shape, jnp.float32))
        assert found == {"gamma": spec("a", None, axis), "lam": spec("a", None, None)} and kept["key"] == spec(
            "a", None
        )


def test_a_fleet_is_its_members():
    method = jft.method("randlora", rank=RANK, alpha=6.0)
    fleet = [{"name": f"run{seed}", "seed": seed, "method": method} for seed in (0, 1)]
    runs = stack.run(None, 3, fleet=fleet, optimizer=decoder.ADAM)
    assert not np.array_equal(runs[0].task_vector[stack.UP].key, runs[1].task_vector[stack.UP].key)
    stack.check(runs[0], stack.wide(trained(3).params), tolerance=2e-6)


def test_linearized_at_the_base():
    """The loss of the second step is that of the model's expansion at what the first changed."""
    first, second = trained(1, forward="linearized"), trained(2, forward="linearized")
    f_lin = jft.linearize(stack.MODEL.apply, stack.parameters())
    logits = np.asarray(f_lin(f_lin.direction(first.task_vector), stack.DATA[1]), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.mean(np.log(chances[np.arange(len(logits)), stack.DATA[1]["labels"]]))
    np.testing.assert_allclose(second.metrics[1]["loss"], loss, rtol=1e-5)
    assert abs(loss - trained(3).metrics[1]["loss"]) > 1e-4 * loss, "no case: the model is linear"


def test_one_stacked_weight():
    """Structured and plain, forward mode, tasks side by side, bfloat16; the scale over sqrt(N)."""
    how = RandLoRA(2, 4.0, by_bases=True)  # commonsense_reasoning: alpha / r / sqrt(n)
    kept, start = how.init(jax.random.key(4), leaf.w32())
    np.testing.assert_array_equal(leaf.bound(how, kept, start), leaf.w32())
    values = leaf.moved(start)
    wide = {("w", n): np.asarray(x, np.float64) for n, x in values.items()}
    expected = ByHand({"w": leaf.W}, {"w": np.asarray(kept["key"])}, 2, 2 / np.sqrt(3))
    of = expected.gradient(wide, lambda w: {"w": leaf.loss_and_grad(w["w"])[1]})
    leaf.check_gradient(how, kept, values, {"gamma": of["w", "gamma"], "lam": of["w", "lam"]})
    leaf.check_transforms(how, kept, values)
    # Penalties pull to the base: lam to zero, gamma nowhere.
    moved = leaf.change(how, kept, values)
    assert not moved["gamma"].any() and np.array_equal(moved["lam"], values["lam"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jft.method("randlora", rank=0), "rank is 0"),
        (lambda: stack.run(Method(Select(("layers/up/b",)), RandLoRA(2, 1.0)), 1), "holds no matrices"),
        (lambda: RandLoRA(2, 1.0).init(jax.random.key(0), jnp.zeros(5)), "holds no matrices"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.peers
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 10), (10, 6), (6, 6)])
def test_peft(inputs, outputs):
    """Outputs and gradients of its layer, given our bases.

    peft pairs row (k, n) of the scaled A, k first, with a column of B counted n first: its B_n are other columns of the same
    random matrix than their shape says. Ours are laid so that they meet the same rows.
    """
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    rng = np.random.default_rng(0)
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False))
    theirs = peft.get_peft_model(model, peft.RandLoraConfig(r=4, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    w = jnp.asarray(layer.weight.detach().numpy().T)
    how = jft.method("randlora", rank=4).train
    assert how.alpha != 640 and layer.scaling["default"] == 640 / 4
    how = RandLoRA(4, 640.0)
    kept, start = how.init(jax.random.key(1), w)
    for name, mine in (("randlora_lambda", start["lam"].T), ("randlora_gamma", start["gamma"])):
        np.testing.assert_allclose(getattr(layer, name)["default"].detach().numpy(), mine)
    values = {n: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32) for n, x in start.items()}
    a, b = (np.asarray(x) for x in how.change(kept, values).bases)
    layer.randlora_A["default"] = torch.tensor(a[:, None])
    layer.randlora_B["default"] = torch.tensor(np.swapaxes(b, 1, 2).reshape(len(b), -1, 4).copy())
    layer.randlora_lambda["default"].data = torch.tensor(np.array(values["lam"].T))
    layer.randlora_gamma["default"].data = torch.tensor(np.array(values["gamma"]))
    x, c = rng.normal(size=(3, inputs)).astype(np.float32), rng.normal(size=(3, outputs)).astype(np.float32)
    expected = theirs(torch.tensor(x))
    (expected * torch.tensor(c)).sum().backward()
    y, pull = jax.vjp(lambda t: x @ how.bind(kept, t, False), values)
    found = pull(jnp.asarray(c))[0]
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    close(y, expected.detach().numpy())
    close(found["lam"].T, layer.randlora_lambda["default"].grad.numpy())
    close(found["gamma"], layer.randlora_gamma["default"].grad.numpy())
