import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jft.delta import BlockLayout, EntryLayout, selected
from jft.parallel import make_mesh
from jft.select import top_each
from jft.select.granularity import Block, Channel, Column, Entry, Expert, Head, Layer, Matrix, Name, Row, spread

HOW = {
    "sum": np.sum,
    "mean": np.mean,
    "max": np.max,
    "l2": lambda x: np.sqrt(np.sum(x**2)),
    "abs_mean": lambda x: np.mean(np.abs(x)),
    "mean_abs": lambda x: np.abs(np.mean(x)),
}

# unit, shape of the weight, leading axes, and for each unit the entries it holds: {unit index: index of the weight}
CASES = {
    "entry": (Entry(), (2, 3, 5), 1, lambda: {i: i for i in np.ndindex(2, 3, 5)}),
    "entry of vectors": (Entry(), (2, 7), 1, lambda: {i: i for i in np.ndindex(2, 7)}),
    "entry of a vector": (Entry(), (7,), 0, lambda: {i: i for i in np.ndindex(7)}),
    "block": (Block(2, 3), (2, 4, 9), 1, lambda: {(n, i, j): np.s_[n, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
                                                  for n, i, j in np.ndindex(2, 2, 3)}),
    "block, fitted": (Block(4, 128), (6, 10), 0, lambda: {(i, 0): np.s_[3 * i : 3 * i + 3] for i in range(2)}),
    "row": (Row(), (2, 3, 4, 5), 2, lambda: {(n, e, i): np.s_[n, e, i] for n, e, i in np.ndindex(2, 3, 4)}),
    "column": (Column(), (2, 4, 5), 1, lambda: {(n, j): np.s_[n, :, j] for n, j in np.ndindex(2, 5)}),
    "channel out": (Channel("rows"), (2, 4, 5), 1, lambda: {(n, i): np.s_[n, i] for n, i in np.ndindex(2, 4)}),
    "query head": (Head(3), (2, 4, 6), 1, lambda: {(n, h): np.s_[n, :, 2 * h : 2 * h + 2] for n, h in np.ndindex(2, 3)}),
    "output head": (Head(2, "rows"), (4, 5), 0, lambda: {(h,): np.s_[2 * h : 2 * h + 2] for h in range(2)}),
    "expert": (Expert(), (2, 3, 4, 5), 2, lambda: {i: i for i in np.ndindex(2, 3)}),
    "matrix": (Matrix(), (2, 4, 5), 1, lambda: {(n,): (n,) for n in range(2)}),
    "matrix alone": (Matrix(), (4, 5), 0, lambda: {(): ()}),
    "layer": (Layer(), (2, 3, 4, 5), 2, lambda: {(n,): (n,) for n in range(2)}),
    "name": (Name(), (2, 4, 5), 1, lambda: {(): ()}),
}  # fmt: skip

# unit, shape, leading axes, grid of cells, and the extents of a cell in what ``at`` numbers
PLACED = {
    "entry": (Entry(), (2, 12, 70), 1, (2, 2), (6, 35)),
    "entry of experts": (Entry(), (2, 3, 4, 64), 2, (1, 2), (4, 32)),
    "entry of vectors": (Entry(), (2, 40), 1, (1, 4), (10,)),
    "entry of a vector": (Entry(), (33,), 0, (1, 1), (33,)),
    "block": (Block(2, 5), (2, 12, 70), 1, (3, 2), (2, 7)),
    "row": (Row(), (2, 12, 10), 1, (4, 2), (3,)),
    "column": (Column(), (2, 12, 10), 1, (4, 2), (5,)),
    "head": (Head(4).fitted((2, 12, 24)), (2, 12, 24), 1, (1, 2), (12,)),
}


@pytest.mark.parametrize("case", CASES)
def test_pool_and_expand(case):
    unit, shape, lead, members = CASES[case]
    score = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    units = unit.units(shape, lead)
    assert set(members()) == set(np.ndindex(*units))
    mask = np.random.default_rng(1).random(units) < 0.5

    @jax.jit
    def pooled_and_expanded(score, mask):
        return {how: unit.pool(score, lead, how) for how in HOW}, unit.expand(mask, shape, lead)

    found, expanded = pooled_and_expanded(score, mask)
    for how, reduce in HOW.items():
        pooled = found[how]
        assert pooled.dtype == jnp.float32
        expected = np.empty(units)
        for index, entries in members().items():
            expected[index] = reduce(score.astype(np.float64)[entries])
        np.testing.assert_allclose(pooled, expected, rtol=1e-6, atol=1e-6)
    wide = np.zeros(shape, bool)
    for index, entries in members().items():
        wide[entries] = mask[index]
    np.testing.assert_array_equal(expanded, wide)


def test_pool_of_bfloat16_adds_in_float32():
    score = np.full((1, 4096), 1 + 2**-7, ml_dtypes.bfloat16)
    np.testing.assert_allclose(Row().pool(jnp.asarray(score), 0), [4096 * (1 + 2**-7)])


@pytest.mark.parametrize("density", [0.0, 0.3])
@pytest.mark.parametrize("case", PLACED)
def test_locate(case, density):
    """``at`` cell by cell: sorted, distinct, padded beyond the cell; and its way back."""
    unit, shape, lead, grid, extents = PLACED[case]
    mask = np.random.default_rng(2).random(unit.units(shape, lead)) < density
    at = np.asarray(unit.locate(jnp.asarray(mask), lead, grid))
    places_ = at if isinstance(unit.layout, EntryLayout | BlockLayout) else at[..., None]
    lines = np.repeat(mask, unit.size, -1) if isinstance(unit, Head) else mask
    counts = tuple(n // e for n, e in zip(lines.shape[lead:], extents, strict=True))
    assert at.dtype == np.int32 and places_.shape[:-2] == (*shape[:lead], *counts)
    numbers, back = jax.jit(lambda at: (unit.counts(at, extents[0]), unit.mask_of(at, shape, lead)))(at)
    most = 1  # a weight of which nothing is selected has a slot of padding
    for cell in np.ndindex(*places_.shape[:-2]):
        start = [c * e for c, e in zip(cell[lead:], extents, strict=True)]
        part = lines[cell[:lead]][tuple(slice(s, s + e) for s, e in zip(start, extents, strict=True))]
        wanted = np.argwhere(part)
        most = max(most, len(wanted))
        np.testing.assert_array_equal(places_[cell][: len(wanted)], wanted)
        rest = places_[cell][len(wanted) :]
        assert (rest[:, 0] >= extents[0]).all() and len(np.unique(rest[:, 0])) == len(rest)
        assert int(np.asarray(numbers)[cell]) == len(wanted)
    assert places_.shape[-2] == most
    slots = int(np.prod(places_.shape[:-1]))
    assert unit.padding(jnp.asarray(at), shape) == pytest.approx(1 - lines.sum() / slots if slots else 0.0)
    np.testing.assert_array_equal(back, mask)


def test_locate_with_a_capacity():
    """More slots are padded; too few are refused, or under ``jit`` keep the first in row-major order."""
    mask = jnp.asarray(np.random.default_rng(3).random((2, 6, 8)) < 0.3)
    exact = Entry().locate(mask, 1)
    most = exact.shape[-2]
    wide = jax.jit(lambda m: Entry().locate(m, 1, capacity=most + 5))(mask)
    np.testing.assert_array_equal(Entry().mask_of(wide, mask.shape, 1), mask)
    np.testing.assert_array_equal(wide, Entry().locate(mask, 1, capacity=most + 5))
    few = jax.jit(lambda m: Entry().locate(m, 1, capacity=2))(mask)
    np.testing.assert_array_equal(few, exact[..., :2, :])
    with pytest.raises(ValueError, match=f"selects {most} parts, more than the capacity of 2"):
        Entry().locate(mask, 1, capacity=2)
    with pytest.raises(ValueError, match="give locate a capacity"):
        jax.jit(lambda m: Entry().locate(m, 1))(mask)


def test_sharded_masks_are_located_where_they_lie():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    mask = np.random.default_rng(4).random((4, 64, 128)) < 0.1
    placed = jax.device_put(mask, NamedSharding(mesh, P("data", "fsdp", "tensor")))
    at = Entry().locate(placed, 1, (2, 2))
    assert at.sharding.is_equivalent_to(NamedSharding(mesh, P("data", "fsdp", "tensor")), at.ndim)
    np.testing.assert_array_equal(at, Entry().locate(jnp.asarray(mask), 1, (2, 2)))
    back = jax.jit(lambda a: Entry().mask_of(a, mask.shape, 1)).lower(at).compile()
    there = selected._locate_jit.lower(placed, (2, 2), 300).compile()
    for text in (back.as_text(), there.as_text()):
        assert not any(f" {word}(" in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    np.testing.assert_array_equal(back(at), mask)
    coarse = Entry().locate(placed, 1, (1, 2))  # a grid that does not follow the shards: right all the same
    np.testing.assert_array_equal(coarse, Entry().locate(jnp.asarray(mask), 1, (1, 2)))


@pytest.mark.optimized
def test_memory_of_locate():
    """Less than the mask itself, where a flat cumulative sum would take 4 bytes per entry."""
    mask = jax.ShapeDtypeStruct((2, 2048, 2048), jnp.bool_)
    memory = selected._locate_jit.lower(mask, (1, 1), 1000).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 2048 * 2048


def test_blocks_fit_what_they_can():
    assert Block().fitted((4, 896, 50257)) == Block(128, 29)
    assert Block().fitted((256, 256), (4, 1)) == Block(64, 128)
    with pytest.raises(ValueError, match="blocks of 128 columns do not divide 192"):
        Block(64, 128, auto=False).fitted((128, 192))
    with pytest.raises(ValueError, match="holds nothing"):
        Block(0, 128)


def test_coupled_heads():
    """S2FT: the heads chosen by one score are columns of v and rows of o, each of its own extent."""
    score = np.asarray([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 1.0, 4.0]], np.float32)
    heads = top_each(score, 2, 1)
    columns = Column().locate(spread(heads, 3), 1)
    rows = Row().locate(spread(heads, 2), 1)
    np.testing.assert_array_equal(columns[:, 0], [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]])
    np.testing.assert_array_equal(rows[:, 0], [[0, 1, 4, 5], [2, 3, 6, 7]])
    np.testing.assert_array_equal(Head(4).fitted((2, 5, 12)).locate(heads, 1), columns)


X = jnp.zeros((2, 4, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Entry().pool(X, 1, "median"), "pool 'median' is unknown"),
        (lambda: Row().pool(jnp.zeros((2, 4)), 1), "at least 2 axes after the leading ones"),
        (lambda: Entry().units((2, 3, 4, 5), 1), "neither of matrices nor of vectors"),
        (lambda: Expert().pool(jnp.zeros((4, 6)), 0), "no axis of experts"),
        (lambda: Head(5).pool(X, 1), "6 columns of a weight of shape"),
        (lambda: Head(3).locate(jnp.ones((2, 3), bool), 1), "take unit.fitted"),
        (lambda: Head(0), "0 heads"),
        (lambda: Head(2, "diagonals"), "axis 'diagonals' is unknown"),
        (lambda: Channel("cols"), "choose rows or columns"),
        (lambda: Block(3, 2, auto=False).pool(X, 1), "blocks of 3 rows do not divide 4"),
        (lambda: Row().expand(jnp.ones((2, 6), bool), (2, 4, 6), 1), r"has shape \(2, 4\), not \(2, 6\)"),
        (lambda: Entry().locate(jnp.ones((2, 4, 6), bool), 1, (3, 1)), "4 x 6 parts do not divide into a grid"),
        (lambda: Matrix().locate(jnp.ones(2, bool), 1), "no places inside"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_layer_that_selects_nothing_costs_slots_of_padding_alone():
    """Two rows of one layer: the others have as many slots, past the end of the weight."""
    mask = np.zeros((4, 8), bool)
    mask[1, 4:6] = True
    at = np.asarray(Row().locate(jnp.asarray(mask), 1))
    assert at.shape == (4, 1, 2) and (at[[0, 2, 3]] >= 8).all() and at[1].tolist() == [[4, 5]]
