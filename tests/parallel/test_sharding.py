import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jft import tree
from jft.parallel import make_mesh, shardings, specs


def shapes(**flat):
    return tree.unflatten({p.replace("__", "/"): jax.ShapeDtypeStruct(s, jnp.float32) for p, s in flat.items()})


LLAMA = shapes(
    embed__table=(1024, 256),
    layers__attn_norm__scale=(128, 256),
    layers__attn__q__w=(4, 256, 256),
    layers__attn__k__w=(4, 256, 64),
    layers__attn__q__b=(4, 8192),
    layers__attn__o__w=(4, 256, 256),
    layers__mlp__gate__w=(4, 256, 512),
    layers__mlp__down__w=(4, 512, 256),
    final_norm__scale=(256,),
    head__w=(256, 1024),
)


def test_llama():
    assert specs(LLAMA, make_mesh({"fsdp": 4, "tensor": 2})) == {
        "embed/table": P("tensor", "fsdp"),
        "layers/attn_norm/scale": P(),
        "layers/attn/q/w": P(None, "fsdp", "tensor"),
        "layers/attn/k/w": P(None, "fsdp", "tensor"),
        "layers/attn/q/b": P(None, "tensor"),
        "layers/attn/o/w": P(None, "tensor", "fsdp"),
        "layers/mlp/gate/w": P(None, "fsdp", "tensor"),
        "layers/mlp/down/w": P(None, "tensor", "fsdp"),
        "final_norm/scale": P(),
        "head/w": P("fsdp", "tensor"),
    }


def test_experts_and_odd_vocabulary():
    params = shapes(
        layers__mlp__experts__gate__w=(2, 8, 64, 128),
        layers__mlp__experts__down__w=(2, 8, 128, 64),
        embed__table=(50257, 768),
        head__w=(768, 50257),
    )
    assert specs(params, make_mesh({"fsdp": 2, "tensor": 4})) == {
        "layers/mlp/experts/gate/w": P(None, "tensor", "fsdp"),
        "layers/mlp/experts/down/w": P(None, "tensor", None, "fsdp"),
        "embed/table": P(None, ("fsdp", "tensor")),
        "head/w": P(("fsdp", "tensor")),
    }
    three = shapes(layers__mlp__experts__gate__w=(2, 3, 64, 128))
    assert specs(three, make_mesh({"fsdp": 2, "tensor": 4})) == {
        "layers/mlp/experts/gate/w": P(None, None, "fsdp", "tensor")
    }


def test_an_axis_that_does_not_divide_is_left_out():
    params = shapes(layers__attn__q__w=(4, 250, 256), head__w=(250, 255))
    assert specs(params, make_mesh({"fsdp": 4, "tensor": 2})) == {
        "layers/attn/q/w": P(None, None, "tensor"),
        "head/w": P(),
    }


def test_other_trees_get_their_largest_axis_over_fsdp():
    params = shapes(params__Dense_0__kernel=(100, 4096), params__Conv__kernel=(3, 3, 64, 63), layers__x=(512, 64, 8))
    assert specs(params, make_mesh({"fsdp": 8})) == {
        "params/Dense_0/kernel": P(None, "fsdp"),
        "params/Conv/kernel": P(None, None, "fsdp"),
        "layers/x": P(None, "fsdp"),
    }


def test_small_leaves_are_replicated_unless_told():
    params = shapes(layers__attn__q__w=(2, 64, 64), embed__table=(64, 64))
    mesh = make_mesh({"fsdp": 8})
    assert set(specs(params, mesh).values()) == {P()}
    assert specs(params, mesh, small=0)["embed/table"] == P(None, "fsdp")
    assert specs(params, mesh, rules=[("q/w$", (None, "fsdp"))])["layers/attn/q/w"] == P(None, None, "fsdp")


def test_every_sharding_is_valid_and_every_axis_divides():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(
        jax.tree.map(lambda s: jnp.arange(np.prod(s.shape), dtype=s.dtype).reshape(s.shape), LLAMA),
        shardings(LLAMA, mesh),
    )
    assert placed["layers"]["attn"]["q"]["w"].addressable_shards[0].data.shape == (4, 128, 128)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("qq/w$", ("fsdp",))], "matches no weight; nearest"),
        ([("q/w$", ("model",))], "names mesh axis 'model'; the mesh has data, fsdp, tensor"),
        ([("q/w$", ("fsdp", None, None, "tensor"))], "names 4 axes, but 'layers/attn/q/w' has shape"),
    ],
)
def test_wrong_rules_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        specs(LLAMA, make_mesh(), rules)
