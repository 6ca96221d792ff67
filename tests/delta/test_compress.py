"""Compression: what each method keeps against NumPy, what it stores in bytes, and its encodings in the algebra."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jft.delta import BitMask, Dense, Entries, LowRank, Product, Quantized, Signs, Sum, TaskVector, Ternary, file, kinds
from jft.delta.singular import svd, truncated
from jft.merge import COMPRESSIONS, compress
from tests.delta.algebra import COMPRESSED, SHAPE, close, make, reference

MUTATIONS = [
    ("jft/merge/compress.py", "_mean(squares, scope, less=1)", "_mean(squares, scope, less=0)"),
    ("jft/merge/compress.py", "jnp.where(support[path], jnp.abs(x), 0)", "jnp.where(support[path], x, 0)"),
    ("jft/merge/compress.py", 'x > 0 if zero == "minus" else x >= 0', "x > 0"),
    ("jft/merge/compress.py", "budget - b * size", "budget - size"),
    ("jft/merge/compress.py", "1 / density if rescale", "density if rescale"),
    ("jft/merge/compress.py", 'jnp.abs(x)) if rescale == "l1"', 'jnp.abs(x)) if rescale == "l2"'),
    ("jft/delta/ternary.py", "jnp.where(self.negative, -scale, scale)", "jnp.where(self.negative, scale, -scale)"),
    ("jft/delta/signs.py", "scale, -scale)", "scale, 0)"),
    ("jft/delta/quantized.py", "map(plane, range(bits - 1))) - plane", "map(plane, range(bits - 1))) + plane"),
    ("jft/delta/quantized.py", "2 ** (bits - 1) - 1\n", "2 ** (bits - 1)\n"),
    ("jft/delta/quantized.py", "better = error < best[0]", "better = error > best[0]"),
    ("jft/delta/singular.py", "s.astype(np.float64) ** 2", "s.astype(np.float64) ** 1"),
]
SHAPES = {
    "embed/w": (9, 13),
    "bias": (5,),
    "scale": (),
    "layers/w": (3, 6, 4),
    "layers/norm": (3, 7),
    "layers/moe/w": (2, 2, 5, 3),
}


def vector(seed=0, shapes=SHAPES):
    """Deltas on a grid, so that there are zeros and equal magnitudes."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: (rng.integers(-9, 10, shape) / 8).astype(np.float32)
    return TaskVector({path: Dense(jnp.asarray(draw(shape))) for path, shape in shapes.items()}, {"seed": 3})


def dense(tau):
    return {path: np.asarray(delta.dense(), np.float64) for path, delta in tau.items()}


def tensors(path, x):
    """The views of ``x`` that are tensors of their own."""
    stack = 0 if "layers" not in path else max(1, x.ndim - 2)
    return [x[index] for index in np.ndindex(*x.shape[:stack])]


def top(x, k):
    """The first ``k`` in order of magnitude, ties in row-major order."""
    mask = np.zeros(x.size, bool)
    mask[np.argsort(-np.abs(x).ravel(), kind="stable")[:k]] = True
    return mask.reshape(x.shape)


def saved(tau, tmp_path):
    """``tau`` after a file, and the bytes of each path in it."""
    tau.save(tmp_path / "tau.safetensors")
    entries = file.inspect(tmp_path / "tau.safetensors").entries
    return TaskVector.load(tmp_path / "tau.safetensors"), {path: entry.nbytes for path, entry in entries.items()}


# --- encodings


@pytest.mark.parametrize("kind", COMPRESSED)
def test_one_encoding(kind, tmp_path):
    """Value, scaling, applying, product, norm, count, jit, and the way through a file."""
    x, other = make(kind, 1), make("dense", 2)
    want = reference(x)
    close(x.dense(), want)
    close(jax.jit(lambda x: (2.0 * x).dense())(x), 2 * want)
    assert type(0.5 * x) is type(x)
    w = jnp.ones(SHAPE, jnp.bfloat16)
    np.testing.assert_allclose(x.apply_to(w, -0.5), 1 - 0.5 * want, rtol=2**-7, atol=2**-8)
    close(x.norm(), np.linalg.norm(want))
    close(x.dot(other), np.sum(want * reference(other)), 100)
    assert np.count_nonzero(want) <= x.nnz <= want.size
    if kind != "product":
        assert x.nnz == np.count_nonzero(want)
    again = kinds()[x.kind].unpack(*x.pack())
    assert jax.tree.structure(again) == jax.tree.structure(x)
    jax.tree.map(np.testing.assert_array_equal, again, x)
    close(x.astype("bfloat16").dense(), want, 2**-4 / 1e-5)
    close(x.stacked().whole(jnp.float32), want)
    tau, _ = saved(TaskVector({"w": x}), tmp_path)
    np.testing.assert_array_equal(tau["w"].dense(), x.dense())


@pytest.mark.parametrize(
    ("first", "second"),
    [*itertools.combinations_with_replacement(("ternary", "signs", "quantized", "product"), 2),
     *itertools.product(("ternary", "product"), ("entries", "low_rank", "sum"))],
)  # fmt: skip
def test_pairs(first, second):
    x, y = make(first, 1), make(second, 2)
    close(x + y, reference(x) + reference(y))
    close(y - x, reference(y) - reference(x))
    close(x.dot(y), np.sum(reference(x) * reference(y)), 100)
    close(y.dot(x), np.sum(reference(x) * reference(y)), 100)


def test_sums_stay_small():
    x = make("ternary", 1)
    assert isinstance(x + make("ternary_of_layers", 2), Entries)
    assert isinstance(x + make("entries", 2), Entries)
    assert isinstance(make("signs", 1) + make("quantized", 2), Sum)


def test_sharded():
    """Eight devices hold a piece each; the deltas are those of one."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tau = vector(1, {"layers/w": (4, 16, 24), "embed/w": (16, 8)})
    place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 2), "a", "b")))
    shards = TaskVector({path: Dense(place(delta.value)) for path, delta in tau.items()})
    for method in ("compeft", "bitdelta", "quantize"):
        one, eight = dense(compress(tau, method)), dense(compress(shards, method))
        for path in one:
            np.testing.assert_allclose(eight[path], one[path], rtol=1e-6, err_msg=method)


# --- methods


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_compeft(density):
    """Equation by equation in float64: one threshold and one scale for the whole vector."""
    tau = vector()
    flat = np.concatenate([x.ravel() for x in dense(tau).values()])
    expected = 1.5 * np.std(flat, ddof=1) * np.sign(flat) * top(flat, int(density * flat.size))
    result = np.concatenate([x.ravel() for x in dense(compress(tau, "compeft", density=density, alpha=1.5)).values()])
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_compeft_with_the_mean_magnitude():
    tau = vector()
    result = dense(compress(tau, "compeft", density=0.3, alpha="stc", scope="tensor"))
    for path, x in dense(tau).items():
        for before, after in zip(tensors(path, x), tensors(path, result[path]), strict=True):
            kept = top(before, int(0.3 * before.size))
            scale = np.abs(before[kept]).mean() if kept.any() else 0
            np.testing.assert_allclose(after, scale * np.sign(before) * kept, rtol=1e-6, err_msg=path)


def test_compeft_takes_what_it_promises(tmp_path):
    """5% of the entries: five bits and a bit of position, one of sign, four bytes of scale."""
    d = 200_000
    tau = TaskVector({"w": Dense(jax.random.normal(jax.random.key(0), (400, 500)))})
    again, nbytes = saved(compress(tau, "compeft", density=0.05), tmp_path)
    n = int(0.05 * d)
    low, sign = math.floor(math.log2(d / n)), 1
    bits = n * (low + 1 + sign) + (d - 1 >> low) + 1
    assert 0 <= nbytes["w"] - 4 - bits / 8 < 8
    # A third of a bit for each weight, within a tenth of the entropy of position and sign.
    entropy = -(0.05 * math.log2(0.05) + 0.95 * math.log2(0.95)) + 0.05
    assert 8 * nbytes["w"] / d < 1.1 * entropy < 0.38
    assert isinstance(again["w"], Ternary)
    assert again["w"].nnz == n


@pytest.mark.parametrize("zero", ["minus", "plus"])
def test_bitdelta(zero, tmp_path):
    tau = vector()
    result = compress(tau, "bitdelta", zero=zero)
    for path, x in dense(tau).items():
        if path in ("bias", "scale", "layers/norm"):
            np.testing.assert_array_equal(result[path].dense(), x)
            continue
        for before, after in zip(tensors(path, x), tensors(path, dense(result)[path]), strict=True):
            positive = before > 0 if zero == "minus" else before >= 0
            np.testing.assert_allclose(after, np.abs(before).mean() * np.where(positive, 1, -1), rtol=1e-6)
    again, nbytes = saved(result, tmp_path)
    assert isinstance(again["layers/w"], Signs)
    assert nbytes["embed/w"] == 9 * 2 + 4
    assert nbytes["layers/w"] == 18 * 1 + 3 * 4


@pytest.mark.parametrize(("bits", "group"), [(8, 128), (4, 3), (2, None)])
def test_quantize(bits, group, tmp_path):
    # No grid here: in float32 half a step may be rounded either way.
    rng = np.random.default_rng(0)
    tau = TaskVector({path: Dense(jnp.asarray(rng.normal(size=shape), jnp.float32)) for path, shape in SHAPES.items()})
    result = compress(tau, "quantize", bits=bits, group=group)
    most = 2 ** (bits - 1) - 1
    for path, x in dense(tau).items():
        after = dense(result)[path]
        if not x.ndim:
            np.testing.assert_array_equal(after, x)
            continue
        for at in range(0, x.shape[-1], group or x.shape[-1]):
            part = x[..., at : at + (group or x.shape[-1])]
            scale = np.abs(part).max(-1, keepdims=True) / most
            q = np.clip(np.round(part / np.where(scale == 0, 1, scale)), -most, most)
            np.testing.assert_allclose(after[..., at : at + part.shape[-1]], q * scale, atol=scale.max() * 1e-6)
            # No entry is farther from its value than half a step.
            assert (np.abs(q * scale - part) <= scale / 2 + 1e-6).all()
    _, nbytes = saved(result, tmp_path)
    rows, columns = SHAPES["embed/w"]
    assert nbytes["embed/w"] == rows * (bits * math.ceil(columns / 8) + 4 * math.ceil(columns / (group or columns)))


def test_search_lowers_the_error():
    """Two bits of Gaussian entries: 0.19 of the square is the least of three levels (Lloyd 1957, Max 1960)."""
    x = jax.random.normal(jax.random.key(0), (64, 256))
    error = lambda **options: float(jnp.mean((Quantized.of(x, 2, 128, **options).dense() - x) ** 2))
    assert error(search=True) < 0.195
    assert error() > 0.4


@pytest.mark.parametrize("rescale", ["none", "density", "l1", "l2"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_magnitude(scope, rescale):
    tau = vector()
    before, after = dense(tau), dense(compress(tau, "magnitude", density=0.3, scope=scope, rescale=rescale))
    pairs = [p for path in before for p in zip(tensors(path, before[path]), tensors(path, after[path]), strict=True)]
    if scope == "model":
        pairs = [tuple(np.concatenate([x.ravel() for x in side]) for side in zip(*pairs, strict=True))]
    for x, y in pairs:
        kept = x * top(x, int(0.3 * x.size))
        norms = [np.abs(kept).sum(), np.linalg.norm(kept)]
        factor = {"none": 1, "density": 1 / 0.3}.get(rescale)
        if factor is None:
            order = {"l1": 1, "l2": 2}[rescale]
            factor = np.linalg.norm(x.ravel(), order) / norms[order - 1] if norms[order - 1] else 1
        np.testing.assert_allclose(y, factor * kept, rtol=1e-6)


def test_random():
    tau = TaskVector({"a/w": Dense(jnp.ones((100, 200))), "b/w": Dense(jnp.ones((100, 200)))})
    result = dense(compress(tau, "random", density=0.25, seed=7))
    kept = result["a/w"] != 0
    np.testing.assert_array_equal(result["a/w"][kept], 4)
    assert abs(kept.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 20_000)
    # By path and seed: another path, another draw; the same seed, the same.
    assert (kept != (result["b/w"] != 0)).any()
    np.testing.assert_array_equal(
        dense(compress(tau.select("a/"), "random", density=0.25, seed=7))["a/w"], result["a/w"]
    )
    assert not dense(compress(tau, "random", density=0.0))["a/w"].any()
    np.testing.assert_array_equal(dense(compress(tau, "random", density=1.0))["a/w"], 1)


def test_delta_come(tmp_path):
    """Ranks by budget, bytes by formula, and less error than as many bytes of factors in 16 bits."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(128, 128)))[0] for _ in range(2))
    x = (u * (np.arange(1, 129) ** -1.2)) @ v.T
    tau = TaskVector({"w": Dense(jnp.asarray(x, jnp.float32)), "b": Dense(jnp.ones(3))})
    result = compress(tau, "delta_come", ranks=(2, 6), ratio=1 / 8)
    parts = result["w"].parts
    assert [(p.a.bits, p.a.shape[1]) for p in parts] == [(8, 2), (3, 6), (2, (128 * 16 // 8 // 2 - 34) // 2)]
    _, nbytes = saved(result, tmp_path)
    assert nbytes["w"] == sum(2 * r * (128 * b // 8 + 4) for b, r in ((8, 2), (3, 6), (2, 47)))
    assert nbytes["w"] < 1.3 * 128 * 128 * 2 / 8
    error = lambda compressed: float((compressed - tau).norm())
    assert error(result) < 0.9 * error(compress(tau, "low_rank", rank=8).astype("bfloat16"))
    assert isinstance(parts[0], Product)
    np.testing.assert_array_equal(result["b"].dense(), 1)


@pytest.mark.parametrize("options", [{"rank": 2}, {"energy": 0.8}, {"rank": 2, "energy": 0.9}])
def test_low_rank(options):
    tau = vector()
    result = compress(tau, "low_rank", **options)
    for path, x in dense(tau).items():
        if path in ("bias", "scale", "layers/norm"):
            np.testing.assert_array_equal(result[path].dense(), x)
            continue
        for before, after in zip(tensors(path, x), tensors(path, dense(result)[path]), strict=True):
            u, s, vt = np.linalg.svd(before, full_matrices=False)
            r = np.argmax(np.cumsum(s**2) >= options.get("energy", 1) * (s**2).sum() * (1 - 1e-6)) + 1
            r = min(r, options.get("rank", len(s)))
            np.testing.assert_allclose(after, (u[:, :r] * s[:r]) @ vt[:r], atol=5e-6, err_msg=path)
    assert isinstance(result["layers/moe/w"], LowRank)


def test_nothing_changes_at_the_other_end():
    """Zero deltas, one column, one entry: no division by zero."""
    shapes = {"zero/w": (5, 4), "column/w": (5, 1)}
    tau = TaskVector({p: Dense(jnp.zeros(s) if p == "zero/w" else jnp.full(s, 0.5)) for p, s in shapes.items()})
    for method in COMPRESSIONS:
        result = compress(tau, method, **({"rank": 1} if method == "low_rank" else {}))
        for path, x in dense(result).items():
            assert np.isfinite(x).all(), (method, path)
            if path == "zero/w":
                assert not x.any(), method


def test_the_manifest_and_what_is_left_out():
    tau = vector()
    result = compress(tau, "bitdelta", include="layers/")
    assert {p for p, d in result.items() if isinstance(d, Signs)} == {"layers/w", "layers/moe/w"}
    assert result.manifest["operation"] == "compress"
    assert result.manifest["compression"]["include"] == "layers/"
    assert result.manifest["parents"][0]["manifest"]["seed"] == 3


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("comepft", {}, "did you mean 'compeft'"),
        ("compeft", {"densty": 0.1}, "did you mean 'density'"),
        ("compeft", {"density": 1.5}, "density must be between 0 and 1, not 1.5"),
        ("compeft", {"alpha": "mean"}, "alpha must be a number or 'stc'"),
        ("magnitude", {"scope": "layer"}, "scope must be one of model, tensor, not 'layer'"),
        ("magnitude", {"rescale": "l3"}, "rescale must be one of"),
        ("bitdelta", {"zero": "none"}, "zero must be one of"),
        ("bitdelta", {"include": "nothing"}, "nothing"),
        ("quantize", {"bits": 1}, "bits must be from 2 to 8, not 1"),
        ("quantize", {"group": 0}, "group must be 1 or more"),
        ("low_rank", {}, "give rank="),
        ("low_rank", {"rank": 0}, "rank must be an integer of 1 or more, not 0"),
        ("low_rank", {"energy": 1.5}, "energy must be above 0"),
        ("delta_come", {"ranks": (2,)}, "ranks must be positive, one for each of bits"),
        ("delta_come", {"ratio": 0}, "ratio must be above 0"),
    ],
)
def test_wrong_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        compress(vector(), method, **options)


def test_masks_need_their_base():
    tau = TaskVector({"w": BitMask.of(jnp.ones((3, 4)))})
    with pytest.raises(ValueError, match=r"'w': compression .*resolve"):
        compress(tau, "compeft")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ternary(*jnp.zeros((2, 1), jnp.int32), jnp.ones(1, bool), jnp.ones(2), (3, 4)), "its first axes"),
        (lambda: Ternary(*jnp.zeros((2, 1), jnp.int32), jnp.ones(1), jnp.float32(1), (3, 4)), "are bools"),
        (lambda: Ternary.unpack({}, {}), "has fields low"),
        (lambda: Signs(jnp.zeros((3, 1), jnp.uint8), jnp.ones(4), (3, 4)), "its first axes"),
        (lambda: Signs.of(jnp.float32(1) > 0, 1.0), "Dense fits it"),
        (
            lambda: Quantized(jnp.zeros((3, 4, 1), jnp.uint8), jnp.ones((3, 2)), (3, 4), 4, 4),
            "in groups of 4 are uint8",
        ),
        (lambda: Quantized.of(jnp.float32(1), 4), "no axis -1"),
        (lambda: Product(make("dense", 1), make("dense", 2)), "factors must be"),
        (lambda: Product.unpack({}, {"parts": []}), "two factors"),
        (lambda: svd(Dense(jnp.ones(3)), rank=1), "no matrix"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_damaged_signs_are_refused():
    tensors, static = make("ternary", 1).pack()
    with pytest.raises(ValueError, match="signs need"):
        Ternary.unpack({**tensors, "negative": tensors["negative"][:-1]}, static)


def test_truncation_of_a_sum_of_factors_forms_no_product(monkeypatch):
    x = Sum((make("low_rank", 1), make("product", 2)))
    want = np.linalg.svd(reference(x), full_matrices=False)
    for cls in (LowRank, Product, Sum):
        monkeypatch.setattr(cls, "dense", lambda self: pytest.fail("a product was formed"))
    low = truncated(x, rank=3)
    close(np.matmul(low.a, low.b), (want[0] * want[1][..., None, :])[..., :3] @ want[2][..., :3, :])


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")  # its own
def test_bitdelta_of_fusionbench(monkeypatch):
    """The signs and the scale of its class, which is that of the authors."""
    import importlib
    import sys
    import types
    from pathlib import Path
    from unittest import mock

    import torch

    folder = Path(sys.prefix) / "fusionbench" / "fusion_bench" / "method" / "bitdelta" / "bitdelta_utils"
    if not folder.is_dir():
        pytest.skip("fusion-bench is not installed; make test-peers does it")
    # Its two files alone: the package needs Triton, whose kernels are of no use here.
    package = types.ModuleType("peer_bitdelta")
    package.__path__ = [str(folder)]
    stand_ins = {"peer_bitdelta": package, "triton": mock.MagicMock(), "triton.language": mock.MagicMock()}
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    diff = importlib.import_module("peer_bitdelta.diff")
    rng = np.random.default_rng(0)
    base, tuned = (torch.tensor(rng.integers(-4, 5, (64, 32)) / 8, dtype=torch.float32) for _ in range(2))
    theirs = diff.BinaryDiff(base, tuned)
    expected = ((diff.unpack(theirs.mask) * 2 - 1) * theirs.coeff).detach().numpy()  # [in, out]
    tau = TaskVector({"w": Dense(jnp.asarray((tuned - base).numpy().T))})
    np.testing.assert_allclose(compress(tau, "bitdelta", zero="plus")["w"].dense(), expected, rtol=1e-6)
