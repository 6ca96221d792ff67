import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jft.parallel import batch_sharding, make_mesh, put_batch


def test_sizes_fill_and_default():
    assert dict(make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(make_mesh({"data": 2, "fsdp": -1, "tensor": 2}).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh({"fsdp": 2}, jax.devices()[:2]).shape) == {"data": 1, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh({"tensor": 4, "expert": 2}).shape) == {"data": 1, "fsdp": 1, "tensor": 4, "expert": 2}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"data": 3, "fsdp": -1}, "3 does not divide the 8 devices"),
        ({"data": 2, "fsdp": 2}, "needs 4 devices, there are 8"),
        ({"data": -1, "fsdp": -1}, "only one axis may be -1"),
        ({"data": 0}, "'data' has size 0"),
        ({"fsdp": 2.0}, "'fsdp' has size 2.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(shape)


def test_put_batch_places_rows():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = {"tokens": np.arange(8 * 3).reshape(8, 3), "labels": np.arange(8), "weight": np.float32(2)}
    placed = put_batch(batch, mesh)
    assert placed["tokens"].sharding == batch_sharding(mesh)
    assert placed["tokens"].sharding.spec == P(("data", "fsdp"))
    assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(2, 3)}
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert put_batch(batch)["tokens"].shape == (8, 3)


def test_put_batch_names_rows_that_do_not_divide():
    with pytest.raises(ValueError, match=r"'tokens' has 6 rows .* multiple of 8"):
        put_batch({"tokens": np.zeros((6, 3))}, make_mesh())
