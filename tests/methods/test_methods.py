"""Plans: what trains, what is kept, what the model sees, what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jft
from jft import tree
from jft.dot import dot
from jft.models.core import Hooks
from jft.train.checkpoints import Changed, compare
from tests.methods import toy

KEY = jax.random.key(0)
PRESETS = {
    "full": {},
    "pattern": {"include": "up/w$"},
    "bitfit": {},
    "last_k_layers": {"k": 2},
    "lora": {"rank": 2},
    "embeddings_and_output": {},
}


def plan_of(name, model=None, params=None, **options):
    model = model or toy.model()
    params = model.init(KEY) if params is None else params
    plan = jft.method(name, **options).plan(params, model)
    return model, params, plan, *plan.init(KEY, params)


def setup_preset(name):
    if name == "embeddings_and_output":  # the toy model has a head and no table
        model = toy.model()
        params = model.init(KEY) | {"embed": {"table": jnp.ones((3, 8))}}
        return plan_of(name, model, params)
    return plan_of(name, **PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_at_the_start_the_model_is_the_base_exactly(name):
    model, params, plan, kept, trained = setup_preset(name)
    x = toy.batch()
    expected = jax.jit(model.apply)(params, x)
    np.testing.assert_array_equal(jax.jit(lambda k, t: model.apply(plan.bind(k, t), x))(kept, trained), expected)
    merged = plan.merged(params, kept, trained)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


@pytest.mark.parametrize("name", PRESETS)
def test_encoded_change_is_merged_minus_base(name):
    _, params, plan, kept, trained = setup_preset(name)
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), trained)
    base, merged = tree.flatten(params), tree.flatten(plan.merged(params, kept, moved))
    encoded = plan.encode(params, kept, moved)
    assert set(encoded) == set(trained)
    for path, w in base.items():
        change = encoded[path].dense() if path in encoded else np.zeros(w.shape)
        np.testing.assert_allclose(np.asarray(merged[path]) - np.asarray(w), change, atol=2e-7)


@pytest.mark.parametrize("name", PRESETS)
def test_gradients_equal_those_of_the_dense_model(name):
    """The gradient of each trained leaf, against that of the merged dense weight (chain rule for the factors)."""
    model, params, plan, kept, trained = setup_preset(name)
    trained = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(KEY, x.shape), trained)
    x = toy.batch()
    loss = lambda p: jnp.sum(jnp.sin(model.apply(p, x)))
    dense = tree.flatten(jax.grad(loss)(plan.merged(params, kept, trained)))
    grads = jax.jit(jax.grad(lambda t: loss(plan.bind(kept, t))))(trained)
    for path, grad in grads.items():
        g = np.asarray(dense[path], np.float64)
        if name == "lora":
            a, b = (np.asarray(trained[path][k], np.float64) for k in "ab")
            np.testing.assert_allclose(grad["a"], g @ np.swapaxes(b, -1, -2), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(grad["b"], np.swapaxes(a, -1, -2) @ g, rtol=1e-4, atol=1e-5)
        elif name == "last_k_layers":
            np.testing.assert_allclose(np.concatenate(grad), g[2:], rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_allclose(grad, g, rtol=1e-4, atol=1e-5)


@pytest.mark.optimized
def test_frozen_layers_have_no_backward_pass():
    """Training the last of 8 layers costs much less than training them all, in compiled FLOPs."""
    model = toy.model(layers=8, width=64).with_(unroll=0)
    x = toy.batch(64, width=64)

    def flops(name, **options):
        _, _, plan, kept, trained = plan_of(name, model, **options)
        grad = jax.jit(jax.grad(lambda t, k: jnp.sum(model.apply(plan.bind(k, t), x))))
        return grad.lower(trained, kept).compile().cost_analysis()["flops"]

    assert flops("last_k_layers", k=1) < 0.5 * flops("full")
    assert flops("lora", rank=1) < 0.75 * flops("full")


def test_scattered_layers_train_and_the_rest_keeps_its_bits():
    from jft.methods import InPlace, Method, Select

    model = toy.model(layers=5)
    params = model.init(KEY)
    plan = Method(Select(include=("up/w",), layers=(0, 2, -1)), InPlace()).plan(params, model)
    kept, trained = plan.init(KEY, params)
    assert list(trained) == ["layers/up/w"]
    moved = jax.tree.map(lambda x: x + 1, trained)
    merged = plan.merged(params, kept, moved)
    change = np.asarray(merged["layers"]["up"]["w"] - params["layers"]["up"]["w"])
    np.testing.assert_allclose(change.mean((1, 2)), [1, 0, 1, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(change[[1, 3]], 0)
    reads = Hooks(value=lambda name, h, _: (h, h if name == "layers/in" else None))
    y, read = model.apply(plan.bind(kept, moved), toy.batch(), reads)
    assert read["layers/in"].shape == (5, 3, 8)
    np.testing.assert_allclose(y, model.apply(merged, toy.batch()), rtol=1e-6, atol=1e-6)


def test_lora_scales_and_rates():
    _, _, plan, _, trained = plan_of("lora", rank=4, alpha=8, rank_stabilised=True, b_rate=16)
    assert plan.leaves["layers/up/w"].scale == 8 / 2
    assert plan.scales(trained)["layers/up/w"] == {"a": 1.0, "b": 16}
    assert set(trained) == {"layers/up/w", "layers/down/w"}
    assert trained["layers/up/w"]["a"].shape == (4, 8, 4) and trained["layers/up/w"]["b"].shape == (4, 4, 16)
    assert float(jnp.abs(trained["layers/up/w"]["a"]).max()) <= 8**-0.5


def test_trained_values_are_float32_masters_cast_where_they_are_used():
    model = toy.model()
    params = tree.cast(model.init(KEY), jnp.bfloat16)
    _, _, plan, kept, trained = plan_of("full", model, params)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(plan.bind(kept, trained, jnp.bfloat16))} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(plan.merged(params, kept, trained))} == {jnp.dtype("bfloat16")}


def test_also_and_freeze():
    _, _, _, _, trained = plan_of("lora", also="^head/", freeze="down")
    assert set(trained) == {"layers/up/w", "head/w"}


def test_specs_follow_the_weight():
    _, params, plan, _, trained = plan_of("lora", rank=2, also="^head/")
    weights = {p: P() for p in tree.flatten(params)} | {"layers/up/w": P(None, "fsdp", "tensor"), "head/w": P("fsdp")}
    kept, specs = plan.specs(weights, params)
    assert specs["layers/up/w"] == {"a": P(None, "fsdp", None), "b": P(None, None, "tensor")}
    assert specs["head/w"] == P("fsdp") and kept["head/w"] is None
    assert jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, P)) == jax.tree.structure(trained)


def test_equal_plans_hash_alike():
    one, two = plan_of("lora", rank=2)[2], plan_of("lora", rank=2)[2]
    assert one == two and hash(one) == hash(two)
    assert one != plan_of("lora", rank=3)[2]


def test_hooks_edit_products():
    model = toy.model()
    params, x = model.init(KEY), toy.batch()
    doubled = Hooks(product=lambda name, x, w, s: (dot(x, w) * (1 if s is None else s), None), state={"head": 2.0})
    np.testing.assert_allclose(model.apply(params, x, doubled)[0], 2 * model.apply(params, x), rtol=1e-6)
    per_layer = Hooks(
        product=lambda name, x, w, s: (dot(x, w) if s is None else dot(x, w) * s, None),
        state={"layers/down": jnp.asarray([1.0, 0.0, 0.0, 0.0])},
    )
    first = jax.tree.map(lambda w: w[:1], params["layers"])
    np.testing.assert_allclose(
        model.apply(params, x, per_layer)[0], model.apply(params | {"layers": first}, x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lorra", {}, r"'lorra' is unknown \(did you mean 'lora'\?\)"),
        ("lora", {"rnk": 3}, r"no option 'rnk' \(did you mean 'rank'\?\)"),
        ("lora", {"rank": 0}, "rank of at least 1"),
        ("lora", {"include": "attn"}, "'attn' matches no weight"),
        ("pattern", {"include": "up/w", "freeze": "up"}, "selects no weight"),
        ("pattern", {"include": "("}, "not a regular expression"),
    ],
)
def test_wrong_use_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        plan_of(name, **options)


def test_layers_of_weights_outside_layers_are_refused():
    """Else everything would be frozen, and the run would end with the base."""
    method = jft.methods.Method(jft.methods.Select(include=("^head",), layers=(-1,)), jft.methods.InPlace())
    model = toy.model()
    with pytest.raises(ValueError, match="selects no weight"):
        method.plan(model.init(KEY), model)


def test_every_preset_documents_itself():
    for entry in jft.methods.entries().values():
        assert entry.summary and entry.paper
        assert isinstance(entry.build(), jft.methods.Method)


@pytest.mark.parametrize("name", ["full", "bitfit", "lora", "fish_mask"])
def test_include_narrows_and_exclude_adds(name):
    model = toy.model()
    params = model.init(KEY)
    selected = lambda **options: set(jft.method(name, **options).plan(params, model).leaves)
    assert selected(include="up") == selected(include=["up", "layers/up"]) == {p for p in selected() if "up" in p}
    assert selected(exclude="up") == {p for p in selected() if "up" not in p} < selected()
    assert jft.method(name, exclude="up").options["exclude"] == "up"


def test_include_of_what_the_preset_leaves_out_is_refused():
    with pytest.raises(ValueError, match="'up/w' matches no weight"):
        plan_of("bitfit", include="up/w")


def test_runs_of_before_compare_by_the_patterns_of_their_preset():
    """Options that presets had themselves were recorded with their defaults."""
    facts = lambda name, **options: {"method": {"name": name, "options": options}}
    heads = list(jft.method("fish_mask").select.exclude)
    compare(facts("fish_mask", include=[""], exclude=heads), facts("fish_mask"), "the checkpoint is")
    compare(facts("lora", include="up", exclude=[]), facts("lora", include=["up"]), "the checkpoint is")
    compare({"seed": 1}, {"seed": 1}, "the checkpoint is")
    for changed in ({"include": ["up"]}, {"exclude": ["up"]}):
        with pytest.raises(Changed, match=r"options\.(include|exclude)"):
            compare(facts("lora"), facts("lora", **changed), "the checkpoint is")
        with pytest.raises(Changed, match=r"options\.(include|exclude)"):
            compare(facts("lora", include=[""], exclude=[]), facts("lora", **changed), "the checkpoint is")


def test_an_option_that_came_later_is_none():
    """A checkpoint of before a preset had an option goes on, unless the option is used."""
    options = {k: v for k, v in jft.method("sara").options.items() if v is None or isinstance(v, int | str)}
    later = next(name for name, value in options.items() if value is None)
    facts = lambda options: {"method": {"name": "sara", "options": options}}
    before = {k: v for k, v in options.items() if k != later}
    compare(facts(before), facts(options), "the checkpoint is")
    with pytest.raises(Changed, match=later):
        compare(facts(before), facts({**options, later: 3}), "the checkpoint is")
