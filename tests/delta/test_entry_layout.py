"""Single entries written layer by layer, as a TPU does, and all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jft.delta import EntryLayout

LAYOUT = EntryLayout()


def drawn(*lead):
    """A weight ``[*lead, 8, 6]``, 4 entries and one of padding in each of two cells of it, and values for them."""
    rng = np.random.default_rng(0)
    at = np.zeros((*lead, 2, 1, 5, 2), np.int32)
    for where in np.ndindex(*lead, 2, 1):
        at[where] = [*zip(*np.divmod(np.sort(rng.permutation(24)[:4]), 6), strict=True), (4, 0)]
    w, values = rng.normal(size=(*lead, 8, 6)), rng.normal(size=at.shape[:-1])
    return jnp.asarray(w, jnp.float32), jnp.asarray(at), jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize("lead", [(3,), (3, 2)])
def test_layers_in_turn_are_all_at_once(lead):
    w, at, values = drawn(*lead)
    want = LAYOUT.put(w, at, values)
    np.testing.assert_array_equal(LAYOUT._put_in_turn(w, at, values), want)
    np.testing.assert_array_equal(LAYOUT.gather(want, at)[..., :4], values[..., :4])
    g = jax.random.normal(jax.random.key(0), w.shape)
    pulled = (
        jax.vjp(lambda w, v, put=put: put(w, at, v), w, values)[1](g) for put in (LAYOUT.put, LAYOUT._put_in_turn)
    )
    jax.tree.map(np.testing.assert_array_equal, *pulled)


def test_members_write_into_copies_of_a_shared_weight():
    w, at, values = drawn(3)
    both = jax.vmap(lambda v: LAYOUT.put(w, at, v))(jnp.stack([values, 2 * values]))
    np.testing.assert_array_equal(both[1], LAYOUT.put(w, at, 2 * values))


@pytest.mark.peers
def test_on_a_tpu_one_layer_is_copied_and_not_the_stack():
    pytest.importorskip("libtpu")
    from jax.sharding import NamedSharding, PartitionSpec

    from jft.parallel import estimate, topology_mesh

    one = NamedSharding(topology_mesh("v5e:2x2"), PartitionSpec())
    shapes = [((16, 1024, 1024), jnp.bfloat16), ((16, 1, 1, 1024, 2), jnp.int32), ((16, 1, 1, 1024), jnp.float32)]
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in shapes]
    found = estimate(jax.jit(LAYOUT.put, donate_argnums=0, out_shardings=one).lower(*given).compile())
    layer = 2 * 1024**2
    assert found.aliased == 16 * layer
    assert found.temporaries < 4 * layer
