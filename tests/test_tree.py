"""jft.tree: paths, patterns, fingerprints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jft import tree

PARAMS = {"layers": {"attn": {"q": {"w": np.zeros((2, 4, 4)), "b": np.zeros((2, 4))}}}, "head": {"w": np.ones((4, 3))}}


def test_flatten_and_unflatten_are_inverse():
    flat = tree.flatten(PARAMS)
    assert list(flat) == ["head/w", "layers/attn/q/b", "layers/attn/q/w"]
    assert jax.tree.structure(tree.unflatten(flat)) == jax.tree.structure(PARAMS)


def test_unflatten_refuses_a_path_through_a_leaf():
    with pytest.raises(ValueError, match="'a/b'"):
        tree.unflatten({"a": 1, "a/b": 2})


def test_two_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        tree.flatten({"a/b": np.zeros(1), "a": {"b": np.ones(1)}})


def test_like_keeps_containers_that_are_not_dicts():
    given_tree = [np.zeros(2), (np.ones(1),)]
    out = tree.like(given_tree, {p: x + 1 for p, x in tree.flatten(given_tree).items()})
    assert isinstance(out, list) and isinstance(out[1], tuple)
    np.testing.assert_array_equal(out[1][0], [2.0])


def test_matching_names_the_nearest_paths():
    assert tree.matching(tree.flatten(PARAMS), r"/w$") == ["head/w", "layers/attn/q/w"]
    with pytest.raises(ValueError, match=r"'atn/q/w' matches no weight; nearest paths: .*layers/attn/q/w"):
        tree.matching(tree.flatten(PARAMS), "atn/q/w")
    with pytest.raises(ValueError, match="not a regular expression"):
        tree.matcher("(")


@pytest.mark.parametrize(
    ("path", "stack", "layer"),
    [
        ("layers/attn/q/w", "layers", None),
        ("text/layers/mlp/up/w", "text/layers", None),
        ("encoder/layers/mlp/down/b", "encoder/layers", None),
        ("memory/layers/layers/w", "memory/layers", None),  # the first
        ("layers/3/kernel", "layers", ("layers/3", 3)),
        ("layers_3/kernel", None, ("layers_3", 3)),
        ("encoder/blocks/12/mlp/w", None, ("encoder/blocks/12", 12)),
        ("h/0/h/1/w", None, ("h/0", 0)),
        ("block_7", None, ("block_7", 7)),
        ("sublayers/attn/w", None, None),
        ("layers_norm/w", None, None),
        ("my-layers/w", None, None),
        ("player_3/w", None, None),
        ("layers_3x/w", None, None),
        ("layers", None, None),  # nothing below it
        ("head/w", None, None),
    ],
)
def test_the_stack_and_the_layer_of_a_path(path, stack, layer):
    assert tree.stack_of(path) == stack
    assert tree.layer_of(path) == layer


def test_stacks_and_their_lengths():
    shapes = {"embed/table": (5, 4), "text/layers/b": (2, 4), "text/layers/w": (2, 4, 4), "vision/layers/w": (3, 4, 4)}
    leaves = {p: jax.ShapeDtypeStruct(shape, jnp.float32) for p, shape in shapes.items()}
    assert tree.stacks(leaves) == {"text/layers": 2, "vision/layers": 3}
    assert tree.stacks({}) == {}


def test_partition_and_combine():
    first, second = tree.partition(PARAMS, tree.matcher("^head"))
    assert list(tree.flatten(first)) == ["head/w"]
    assert jax.tree.structure(tree.combine(first, second)) == jax.tree.structure(PARAMS)


def test_counts():
    assert tree.count(PARAMS) == 2 * 16 + 2 * 4 + 12
    assert tree.nbytes(PARAMS) == 8 * tree.count(PARAMS)
    assert tree.count({"big": jax.ShapeDtypeStruct((70000, 40000), jnp.bfloat16)}) == 2_800_000_000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "complex64", "float16"])
def test_fingerprint_does_not_depend_on_sharding(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (16, 8)), dtype)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", "b")))
    assert tree.fingerprint({"x": x}) == tree.fingerprint({"x": placed}) == tree.fingerprint({"x": np.asarray(x)})


@settings(max_examples=25, deadline=None)
@given(row=st.integers(0, 7), column=st.integers(0, 7), bit=st.integers(0, 31))
def test_fingerprint_sees_any_single_bit(row, column, bit):
    x = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    y = x.copy()
    y.view(np.uint32)[row, column] ^= np.uint32(1 << bit)
    assert tree.fingerprint({"x": x}) != tree.fingerprint({"x": y})


def test_fingerprint_sees_order_names_and_types():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    seen = {
        tree.fingerprint(t)
        for t in (
            {"x": x},
            {"x": x[::-1]},
            {"x": x.reshape(3, 2)},
            {"y": x},
            {"x": x.astype(np.float16)},
            {"x": x[:, ::-1]},
        )
    }
    assert len(seen) == 6


def test_keys_differ_by_path_and_not_by_order():
    key = jax.random.key(0)
    assert (jax.random.key_data(tree.key_for(key, "a")) != jax.random.key_data(tree.key_for(key, "b"))).any()
