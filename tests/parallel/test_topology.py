import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jft.parallel import MemoryBudgetError, check, device_budget, plan, topology_mesh

pytestmark = pytest.mark.peers


def lowered(batch):
    mesh = topology_mesh("v5e:2x2", {"fsdp": 2, "tensor": 2})
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    x = jax.ShapeDtypeStruct((batch, 1024), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def loss(w, x):
        return jnp.square(jnp.tanh(jnp.sin(jnp.tanh(x @ w) @ w) @ w).astype(jnp.float32)).sum()

    return jax.jit(lambda w, x: w - 0.1 * jax.grad(loss)(w, x), donate_argnums=0).lower(w, x)


def test_a_step_is_planned_for_chips_that_are_not_there():
    pytest.importorskip("libtpu")
    found = plan(lowered(32768))
    assert found.arguments == 1024 * 1024 * 2 // 4 + 32768 * 1024 * 2 // 2
    assert found.aliased == 1024 * 1024 * 2 // 4
    assert found.temporaries > 32768 * 1024 * 2 // 2


def test_a_step_that_the_compiler_refuses_still_has_a_figure():
    pytest.importorskip("libtpu")
    mesh = topology_mesh("v5e:2x2")
    budget = device_budget(mesh.devices.flat[0])
    assert budget == 16 * 2**30
    found = plan(lowered(2**22))
    assert found.total > budget
    with pytest.raises(MemoryBudgetError, match=r"batch 64 \(1\.0 GiB\)"):
        check(found, budget, [("batch 64", 2**30)])


def test_an_unknown_topology_is_named():
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="topology 'v99:2x2' cannot be described"):
        topology_mesh("v99:2x2")
