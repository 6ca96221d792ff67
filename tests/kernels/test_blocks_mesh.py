"""Products with selected blocks on a mesh: equal to those on one device, and only blocks travel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jft import parallel
from jft.delta import BlockLayout
from jft.kernels.blocks import cell_spmm
from jft.kernels.blocks_forms import Axes
from jft.models.core import on_mesh

T, D, F, B, N = 32, 64, 96, 8, 2

MUTATIONS = (
    ("jft/kernels/blocks_forms.py", "names, scatter_dimension=axis", "names, scatter_dimension=1 - axis"),
    ("jft/kernels/blocks_forms.py", "return jax.lax.psum(y, cut.own[0]) if cut.own[0] else y", "return y"),
    ("jft/kernels/blocks_forms.py", "g = jax.lax.psum(g, cut.summed) if cut.summed else g", "g = g"),
    ("jft/kernels/blocks_forms.py", "all_gather(values, names, axis=axis", "all_gather(values, names, axis=1 - axis"),
    ("jft/delta/blocks.py", "self.mesh_axes.transposed()", "self.mesh_axes"),
)  # fmt: skip

MESHES = {
    "fsdp of rows, tensor of columns": ({"data": 2, "fsdp": 2, "tensor": 2}, ("fsdp",), ("tensor",)),
    "tensor of rows, fsdp of columns": ({"data": 2, "fsdp": 2, "tensor": 2}, ("tensor",), ("fsdp",)),
    "fsdp alone": ({"fsdp": 8}, ("fsdp",), ()),
    "two axes of rows": ({"data": 2, "fsdp": 2, "tensor": 2}, ("data", "fsdp"), ("tensor",)),
    "rows and columns over tokens": ({"data": 2, "fsdp": 2, "tensor": 2}, ("fsdp",), ("data",)),
}


def cells(grid, rng):
    """``at``, values, and the weight they make; one slot is padding."""
    inside = D // B // grid[0], F // B // grid[1]
    at = np.stack([
        np.stack([np.stack(np.divmod(rng.permutation(inside[0] * inside[1])[:N], inside[1]), 1) for _ in range(grid[1])])
        for _ in range(grid[0])
    ]).astype(np.int32)  # fmt: skip
    at[0, 0, 1] = inside[0] + 1, 0
    values = rng.standard_normal((*grid, N, B, B)).astype(np.float32)
    return at, values, (at[..., 0] < inside[0])


def whole(at, values, present, grid):
    w = np.zeros((grid[0], D // B // grid[0], B, grid[1], F // B // grid[1], B))
    for i, j, n in zip(*np.nonzero(present), strict=True):
        w[i, at[i, j, n, 0], :, j, at[i, j, n, 1]] = values[i, j, n]
    return w.reshape(D, F)


@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh_only_blocks_travel(name):
    shape, rows, columns = MESHES[name]
    mesh = parallel.make_mesh(shape)
    rng = np.random.default_rng(0)
    grid = tuple(int(np.prod([mesh.shape[n] for n in names] or [1])) for names in (rows, columns))
    at, values, present = cells(grid, rng)
    x, dy = (rng.standard_normal(s).astype(np.float32) for s in ((T, D), (T, F)))
    w = whole(at, values, present, grid)
    axes = Axes(parallel.BATCH_AXES, rows, columns)
    lie = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))
    tensor = lambda names: names if names == ("tensor",) else None
    xs, dys = lie(x, ("data", "fsdp"), tensor(rows)), lie(dy, ("data", "fsdp"), tensor(columns))
    placed, held = lie(at, rows, columns), lie(values, rows, columns)

    @jax.jit
    def both(x, dy, at, values):
        layout = BlockLayout(B, B, axes)
        with on_mesh(mesh):
            y, pull = jax.vjp(lambda x, values: layout.product(x, at, values, (D, F)), x, values)
            transposed, at, values = layout.transposed(at, values)
            return y, *pull(dy), transposed.product(dy, at, values, (F, D))

    y, dx, dvalues, back = both(xs, dys, placed, held)
    np.testing.assert_allclose(back, dy @ w.T, atol=1e-4)
    np.testing.assert_allclose(y, x @ w, atol=1e-4)
    np.testing.assert_allclose(dx, dy @ w.T, atol=1e-4)
    gradient = (x.T.astype(np.float64) @ dy).reshape(grid[0], -1, B, grid[1], F // B // grid[1], B)
    i, j, n = np.nonzero(present)
    expected = gradient[i, at[i, j, n, 0], :, j, at[i, j, n, 1]]
    np.testing.assert_allclose(np.asarray(dvalues)[present], expected, atol=1e-4)
    assert not np.asarray(dvalues)[~present].any()
    assert dvalues.sharding.is_equivalent_to(held.sharding, dvalues.ndim)
    # x, dy, y and dx are of T rows, on 4 or 8 devices; whatever is gathered is of blocks.
    text = both.lower(xs, dys, placed, held).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\][^ ]* all-gather", text)
    assert gathered and all(g.endswith((f"{B},{B}", f"{N},2")) for g in gathered), gathered


def test_where_tokens_do_not_divide_the_result_is_the_same():
    mesh = parallel.make_mesh({"fsdp": 8})
    rng = np.random.default_rng(0)
    at, values, present = cells((8, 1), rng)
    x = rng.standard_normal((T - 1, D)).astype(np.float32)

    def product(x, at, values):
        with on_mesh(mesh):
            return cell_spmm(x, at, values, F, Axes(parallel.BATCH_AXES, ("fsdp",), ()))

    y = jax.jit(product)(x, jnp.asarray(at), jnp.asarray(values))
    np.testing.assert_allclose(y, x @ whole(at, values, present, (8, 1)), atol=1e-4)
