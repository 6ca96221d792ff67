"""Presets that train parts inside weights, against NumPy: what they choose, and one and three steps of what they do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jft
from jft import parallel, tree
from jft.dot import dot
from jft.methods import select
from jft.models import DecoderConfig, Hooks, Model
from jft.models.memory import Memory
from jft.models.moe import Experts
from jft.select import heads, scores
from jft.select.memory import accesses, slot_counts
from jft.train import run_config
from jft.train.calibration import RunCalibration
from jft.train.objectives import LanguageModel
from tests.methods import decoder

DATA = decoder.batches()
L, H, G, K, F = 4, 4, 2, 2, 12
O, V, DOWN, UP, GATE = (f"layers/{n}/w" for n in ("attn/o", "attn/v", "mlp/down", "mlp/up", "mlp/gate"))  # noqa: E741


@pytest.fixture(scope="module")
def params():
    return decoder.parameters()


def best(score, count):
    """Bool mask of the ``count`` largest of each row; ties: the lower."""
    order = np.argsort(-score, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def draws(params):
    """The uniform numbers of each weight, as the random score makes them."""

    @jax.jit
    def draw():
        key = jax.random.fold_in(tree.key_for(jax.random.key(0), "random scores"), 0)
        return {p: jax.random.uniform(tree.key_for(key, p), w.shape) for p, w in tree.flatten(params).items()}

    return {p: np.asarray(x, np.float64) for p, x in draw().items()}


def test_s2ft_by_default_trains_random_rows_of_o_and_down(params):
    drawn = draws(params)
    heads = best(drawn[O].sum(2).reshape(L, H, K).sum(2), 1)
    channels = best(drawn[DOWN].sum(2), 2)
    masks = {O: np.repeat(heads, K, 1)[:, :, None], DOWN: channels[:, :, None]}
    decoder.check(jft.method("s2ft", o=0.25, down=0.2), lambda n, w: masks, params, DATA)


def coupled(params):
    """Groups of heads and channels by magnitude, for all four fractions."""
    w = {p: np.abs(x) for p, x in decoder.wide(params).items()}
    groups = best(w[O].sum(2).reshape(L, G, -1).sum(2), 1)
    return groups, best(w[DOWN].sum(2), 3), best(w[DOWN].sum(2), 6)


S2FT = {"o": 0.5, "v": 0.9, "down": 0.25, "up": 0.5, "score": scores.Magnitude()}


def test_s2ft_couples_weights_and_groups_of_queries(params):
    groups, few, many = coupled(params)
    masks = {
        O: np.repeat(groups, H // G * K, 1)[:, :, None], V: np.repeat(groups, K, 1)[:, None],
        DOWN: few[:, :, None], UP: many[:, None], GATE: many[:, None],
    }  # fmt: skip
    assert (many | ~few).all()
    decoder.check(jft.method("s2ft", **S2FT), lambda n, w: masks, params, DATA, steps=(3,))


def test_s2ft_is_training_of_a_contiguous_slice_of_the_permuted_model(params):
    """The paper's own way: permute heads and channels until the chosen come first, train that slice, permute back."""
    groups, few, many = coupled(params)
    base = decoder.wide(params)
    first = lambda mask: np.argsort(~mask, axis=1, kind="stable")
    wide = lambda order, size: (order[:, :, None] * size + np.arange(size)).reshape(L, -1)
    order = first(groups)
    queries, values, channels = wide(order, H // G * K), wide(order, K), first(few * 2 + many > 0)
    channels = np.argsort(-(few * 2 + many), axis=1, kind="stable")
    rows = lambda w, i: np.take_along_axis(w, i[:, :, None], 1)
    columns = lambda w, i: np.take_along_axis(w, i[:, None], 2)
    how = {
        "layers/attn/q/w": (columns, queries), "layers/attn/k/w": (columns, values), V: (columns, values),
        O: (rows, queries), DOWN: (rows, channels), UP: (columns, channels), GATE: (columns, channels),
    }  # fmt: skip
    permuted = {p: how[p][0](w, how[p][1]) if p in how else w for p, w in base.items()}
    same = decoder.loss_and_gradient(base, DATA[0])[0], decoder.loss_and_gradient(permuted, DATA[0])[0]
    np.testing.assert_allclose(*same, rtol=1e-12)
    contiguous = {p: np.zeros(w.shape, bool) for p, w in base.items() if p in (O, V, DOWN, UP, GATE)}
    contiguous[O][:, : H // G * K], contiguous[V][..., :K], contiguous[DOWN][:, :3] = True, True, True
    contiguous[UP][..., :6], contiguous[GATE][..., :6] = True, True
    tuned = decoder.followed(tree.unflatten(permuted), lambda n, w: contiguous, 3, DATA)
    back = {p: how[p][0](w, np.argsort(how[p][1], axis=1)) if p in how else w for p, w in tuned.items()}
    result = tree.flatten(decoder.run(jft.method("s2ft", **S2FT), 3, params, DATA).params)
    for path, w in back.items():
        np.testing.assert_allclose(result[path], w, atol=1e-5, err_msg=path)


def test_smt(params):
    base = decoder.wide(params)
    each = [decoder.gradient(base, b) for b in DATA[:3]]
    total = {p: sum(g[p] for g in each) for p in base}
    masks = {}
    for part, density in (("layers/attn/", 0.2), ("layers/mlp/", 0.3)):
        paths = [p for p in base if p.startswith(part) and p.endswith("/w")]
        score = {p: _blocks(np.abs(total[p])).mean((2, 4)) for p in paths}
        flat = np.concatenate([score[p].ravel() for p in paths])
        mask = best(flat, int(density * flat.size))
        for p, piece in zip(paths, np.split(mask, np.cumsum([score[p].size for p in paths])[:-1]), strict=True):
            masks[p] = np.repeat(np.repeat(piece.reshape(score[p].shape), 4, 1), 4, 2)
    method = jft.method("smt", attention=0.2, mlp=0.3, block=(4, 4), batches=3)
    decoder.check(method, lambda n, w: masks, params, DATA)


def _blocks(x):
    return x.reshape(x.shape[0], x.shape[1] // 4, 4, x.shape[2] // 4, 4)


MIXTURE = DecoderConfig(vocab=13, width=8, layers=2, heads=2, hidden=8, experts=Experts(5, 2, 6), init_std=0.4)


@pytest.mark.parametrize("kind", ["token", "gate"])
def test_esft(kind):
    params, model = decoder.parameters(MIXTURE), Model(MIXTURE)
    probabilities = np.concatenate([_routing(model, params, b) for b in DATA[:2]], axis=1)
    top2 = best(probabilities, 2)
    gates = np.where(top2, probabilities, 0)
    gates /= gates.sum(-1, keepdims=True)
    use = top2.mean(1) / 2 if kind == "token" else gates.mean(1)
    chosen = np.zeros(use.shape, bool)
    for layer, row in enumerate(use):
        for i in np.argsort(-row, kind="stable"):
            if row[chosen[layer]].sum() >= 0.5:
                break
            chosen[layer, i] = True
    masks = {f"layers/mlp/experts/{n}/w": chosen[:, :, None, None] for n in ("gate", "up", "down")}
    assert 0 < chosen.sum() < chosen.size
    method = jft.method("esft", p=0.5, kind=kind, batches=2)
    steps = (1, 3) if kind == "token" else (1,)
    decoder.check(method, lambda n, w: masks, params, DATA, model, MIXTURE, steps=steps)


@functools.partial(jax.jit, static_argnums=0)
def _router(model, params, batch):
    """Logits ``[L, B, T, E]`` of all experts for every token."""

    def product(name, x, w, state):
        y = dot(x, w)
        return y, y if name.endswith("router") else None

    return model.apply(params, batch, hooks=Hooks(product=product))[1]["layers/mlp/router"]


def _routing(model, params, batch):
    """Probabilities ``[L, N, E]`` of all experts for every token."""
    logits = np.asarray(_router(model, params, batch), np.float64)
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).reshape(len(e), -1, e.shape[-1])


@pytest.mark.parametrize("mlps", [0, 1])
def test_precise_sft_trains_the_slices_of_the_chosen_heads(mlps, params):
    calibration = RunCalibration(decoder.MODEL, params, [O], LanguageModel(), DATA)
    found = {n: np.asarray(x) for n, x in heads.patching(calibration, 1, mlps=bool(mlps)).items()}
    chosen = best(found["layers/attn/o"].ravel(), 3).reshape(L, H)
    queries, groups = np.repeat(chosen, K, 1), np.repeat(chosen.reshape(L, G, -1).any(2), K, 1)
    masks = {
        "layers/attn/q/w": queries[:, None], "layers/attn/k/w": groups[:, None], V: groups[:, None],
        O: queries[:, :, None],
    }  # fmt: skip
    if mlps:
        layer = best(found["layers/mlp/down"].ravel(), 1)[:, None, None]
        masks |= {UP: layer, GATE: layer, DOWN: layer}
    method = jft.method("precise_sft", heads=0.2, mlps=mlps)
    decoder.check(method, lambda n, w: masks, params, DATA, steps=(3,) if mlps else (1, 3))


REMEMBERS = DecoderConfig(
    vocab=13, width=8, layers=2, heads=2, hidden=8, memory=Memory(25, (1,), heads=2, top_k=3, key_size=4), init_std=0.4
)


reads = functools.partial(jax.jit(accesses, static_argnums=0), Model(REMEMBERS))


def memory_masks(params, batch, background, count):
    counts = np.asarray(reads(params, batch), np.float64)
    known = [np.asarray(reads(params, b)) > 0 for b in background]
    idf = np.log((len(known) + 1) / (np.sum(known, axis=0) + 1))
    return {"memory/table": best(counts / counts.sum() * idf, count)[:, None]}


def test_sparse_memory_chooses_once():
    params, background = decoder.parameters(REMEMBERS), decoder.batches(6, rows=1, seed=7)
    known = slot_counts(Model(REMEMBERS), params, background)
    masks = memory_masks(params, DATA[0], background, 4)
    method = jft.method("sparse_memory", slots=4, background=known)
    decoder.check(method, lambda n, w: masks, params, DATA, Model(REMEMBERS), REMEMBERS)


@pytest.mark.slow
def test_sparse_memory_chooses_for_every_batch():
    """Plain descent on the slots of the batch that comes next, at the weights of that moment."""
    params, background = decoder.parameters(REMEMBERS), decoder.batches(6, rows=1, seed=7)
    data = decoder.batches(4, rows=1, length=4)
    method = jft.method("sparse_memory", slots=4, background=slot_counts(Model(REMEMBERS), params, background), every=1)
    # The table changes no query of the layers before it, and there is one memory layer: reads are those of the base.
    masks_at = lambda n, w: memory_masks(params, data[n], background, 4)
    seen = [masks_at(n, None)["memory/table"][:, 0] for n in range(3)]
    assert (seen[0] != seen[1]).any()
    result = decoder.check(
        method, masks_at, params, data, Model(REMEMBERS), REMEMBERS, steps=(3,), kind=decoder.Descent
    )
    assert result.task_vector.paths == ["memory/table"]


def test_a_background_from_a_file(tmp_path):
    params = decoder.parameters(REMEMBERS)
    known = slot_counts(Model(REMEMBERS), params, DATA[:2])
    np.savez(tmp_path / "known.npz", counts=known.counts, batches=known.batches, size=known.size)
    method = jft.method("sparse_memory", slots=3, background=str(tmp_path / "known.npz"))
    calibration = RunCalibration(Model(REMEMBERS), params, ["memory/table"], LanguageModel(), DATA)
    assert np.asarray(method.select.score(calibration)["memory/table"]).shape == (25,)
    other = jft.method("sparse_memory", background=type(known)(np.zeros(9), np.zeros(9), 1))
    with pytest.raises(ValueError, match="counts 9 slots, and the memory has 25"):
        other.select.score(calibration)


def test_a_run_is_told_by_what_does_not_change_between_processes():
    method = jft.method("precise_sft")
    said = run_config._json(method.options)
    assert said["counterfactual"] == "jft.select.heads.rolled" and "0x" not in str(said)


def test_what_a_step_is_compiled_for_before_there_are_weights(params):
    plan = jft.method("s2ft", o=0.25, down=0.25).plan(params, decoder.MODEL)
    found = select.expected(plan, tree.flatten(params), {})
    assert {p: x.shape for p, x in found.items()} == {O: (L, 1, 2), DOWN: (L, 1, 3)}


def test_wrong_choices_are_refused(params):
    for options, message in (
        ({"name": "s2ft", "o": 1.5}, "fraction of attn/o is 1.5"),
        ({"name": "s2ft", "o": 0, "down": 0}, "trains nothing"),
        ({"name": "smt", "attention": 0, "mlp": 0}, "trains nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            jft.method(**options)
    calibration = RunCalibration(decoder.MODEL, params, [O], LanguageModel(), DATA)
    with pytest.raises(ValueError, match="has no experts to score"):
        jft.method("esft").select.score(calibration)


def test_a_zero_slice_of_a_weight_costs_one_slot_of_padding(params):
    """Heads of one layer alone: the others have padding, and nothing of theirs moves."""
    only = np.zeros((L, H), bool)
    only[1, 2] = True
    mask = jnp.asarray(np.repeat(only, K, 1))
    at = jft.select.Row().locate(mask, 1)
    assert at.shape == (L, 1, K) and (np.asarray(at)[[0, 2, 3]] >= H * K).all()


MESHED = {
    "s2ft": (decoder.CONFIG, {"o": 0.5, "v": 0.5, "down": 0.5, "up": 0.5}),
    "esft": (MIXTURE, {"p": 0.5}),
    "sparse_memory": (REMEMBERS, {"slots": 4}),
    "cofitune": (decoder.CONFIG, {"depth": (0.25, 0.75), "batches": 1}),
    "half_finetuning": (decoder.CONFIG, {"every": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHED)
def test_the_same_on_eight_devices(name):
    config, options = MESHED[name]
    params, model = decoder.parameters(config), Model(config)
    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
    one, many = (decoder.run(jft.method(name, **options), 2, params, DATA, model, mesh=m) for m in (None, mesh))
    assert one.task_vector.paths == many.task_vector.paths
    alone, sharded = (jax.device_get(decoder.dense(run.task_vector.deltas)) for run in (one, many))
    for path, a in alone.items():
        b = sharded[path]
        assert np.array_equal(a != 0, b != 0), path
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=path)
