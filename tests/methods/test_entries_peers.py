"""SHiRA and Super-Tuning against peft on the same weights and the same entries: outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft.methods.select import choose
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from jft.tree import lead

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
RANK, LAYERS = 2, 2
TARGETS = {
    "attn/q": "self_attn.q_proj", "attn/k": "self_attn.k_proj", "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj", "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj",
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 67, (3, 11))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, folder, *jft.load(folder, dtype="float32")


def select(method, model, params):
    plan = jft.method(**method).plan(params, model)
    calibration = RunCalibration(model, params, plan.selects, LanguageModel(), [{"tokens": TOKENS}])
    chosen = choose(plan, calibration, {})
    return plan, *plan.init(jax.random.key(0), params, chosen)


def mask_of(plan, kept, path):
    """``[L, I, O]``."""
    shape = kept[path]["w"].shape
    return np.asarray(plan.granularity(path, shape).mask_of(kept[path]["at"], shape, lead(path, 3, True)))


def dense(plan, kept, values, path):
    """The sparse values of one weight as ``[L, I, O]``, zero elsewhere."""
    found = plan.leaves[path].spread(kept[path], values[path], jnp.zeros(kept[path]["w"].shape))
    return found["own"] if isinstance(found, dict) else found


def moved(plan, kept, trained):
    """Trained values some way from the base, and the sparse part of their change as ``[L, I, O]``."""
    out, changes = {}, {}
    for path, t in trained.items():
        keys = jax.random.split(jax.random.key(len(path)), len(jax.tree.leaves(t)))
        leaves, structure = jax.tree.flatten(t)
        draws = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        out[path] = jax.tree.unflatten(structure, draws)
        changes[path] = np.asarray(dense(plan, kept, out, path) - dense(plan, kept, trained, path))
    return out, changes


def modules(theirs):
    """``{path: peft's layers}``."""
    found = dict(theirs.named_modules())
    return {
        f"layers/{target}/w": [found[f"base_model.model.model.layers.{i}.{name}"] for i in range(LAYERS)]
        for target, name in TARGETS.items()
    }


def compare(model, plan, kept, values, theirs, sparse_gradient):
    """Logits, and gradients of the entries; ``sparse_gradient(layer)`` is peft's as ``[I, O]``. Gives jft's gradient."""
    torch = pytest.importorskip("torch")
    calibration = np.random.default_rng(1).standard_normal((3, 11, 67)).astype(np.float32) / 100
    expected = theirs(torch.tensor(TOKENS)).logits
    (expected * torch.tensor(calibration)).sum().backward()
    kept = plan.commit(kept, values)

    def loss(t):
        logits = model.apply(plan.bind(kept, t), TOKENS)
        return jnp.sum(logits * calibration), logits

    found, logits = jax.grad(loss, has_aux=True)(values)
    np.testing.assert_allclose(logits, expected.detach().numpy(), atol=1e-5)
    for path, layers in modules(theirs).items():
        want = np.stack([sparse_gradient(layer) for layer in layers])
        np.testing.assert_allclose(dense(plan, kept, found, path), want, atol=1e-5, err_msg=path)
    return found


def laid(flat, indices, shape):
    out = np.zeros(shape[0] * shape[1], np.float32)
    out[indices] = flat
    return out.reshape(shape).T


@pytest.mark.parametrize("mask", ["struct", "rand", "wm", "grad", "snip"])
def test_shira(base, mask):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs, _, model, params = base
    plan, kept, trained = select({"name": "shira", "rank": RANK, "mask": mask}, model, params)
    values, changes = moved(plan, kept, trained)
    found = {path: mask_of(plan, kept, path) for path in trained}
    names = {
        id(dict(theirs.named_modules())[f"model.layers.{i}.{name}"]): (f"layers/{target}/w", i)
        for target, name in TARGETS.items() for i in range(LAYERS)
    }  # fmt: skip
    config = peft.ShiraConfig(r=RANK, target_modules=[n.split(".")[1] for n in TARGETS.values()])

    def ours(layer, r, **_):
        path, i = names[id(layer)]
        return torch.tensor(found[path][i].T.astype(np.float32))

    config.mask_fn = ours
    wrapped = peft.get_peft_model(theirs, config)
    try:
        for path, layers in modules(wrapped).items():
            for i, layer in enumerate(layers):
                rows, columns = layer.shira_indices["default"].long()
                layer.shira_weight["default"].data = torch.tensor(changes[path][i].T)[rows, columns]

        def sparse(layer):
            rows, columns = layer.shira_indices["default"].numpy().astype(np.int64)
            shape = tuple(layer.get_base_layer().weight.shape)
            return laid(layer.shira_weight["default"].grad.numpy(), rows * shape[1] + columns, shape)

        compare(model, plan, kept, values, wrapped, sparse)
    finally:
        wrapped.unload()


@pytest.mark.parametrize(("largest", "rank"), [(True, 0), (False, 0), (True, 3)])
def test_super_tuning(base, largest, rank):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs, _, model, params = base
    method = {"name": "super_tuning", "sparsity": 0.96875, "largest": largest, "rank": rank}
    plan, kept, trained = select(method, model, params)
    values, changes = moved(plan, kept, trained)
    config = peft.SupertuningConfig(
        sparsity=0.96875, select_top=largest, r=rank or None, target_modules=[n.split(".")[1] for n in TARGETS.values()]
    )
    wrapped = peft.get_peft_model(theirs, config)
    try:
        for path, layers in modules(wrapped).items():
            for i, layer in enumerate(layers):
                indices = layer.supertuning_indices["default"].numpy()
                there = laid(np.ones(len(indices)), indices, tuple(layer.get_base_layer().weight.shape))
                np.testing.assert_array_equal(there > 0, mask_of(plan, kept, path)[i], err_msg=path)
                layer.supertuning_values["default"].data = torch.tensor(changes[path][i].T.reshape(-1)[indices])
                if rank:
                    a, b = (np.array(values[path]["low_rank"][part][i].T) for part in "ab")
                    layer.supertuning_lora_A["default"].weight.data = torch.tensor(a)
                    layer.supertuning_lora_B["default"].weight.data = torch.tensor(b)

        def sparse(layer):
            values, indices = layer.supertuning_values["default"], layer.supertuning_indices["default"].numpy()
            return laid(values.grad.numpy(), indices, tuple(layer.get_base_layer().weight.shape))

        found = compare(model, plan, kept, values, wrapped, sparse)
        for path, layers in modules(wrapped).items() if rank else ():
            for part, name in (("a", "supertuning_lora_A"), ("b", "supertuning_lora_B")):
                want = np.stack([getattr(layer, name)["default"].weight.grad.numpy().T for layer in layers])
                np.testing.assert_allclose(found[path]["low_rank"][part], want, atol=1e-5, err_msg=path)
    finally:
        wrapped.unload()
