"""The top 1% of a billion scores on eight devices: seconds, temporary memory and exactness, beside full sorts.

    python benchmarks/selection.py                                   # 1e9 float32 scores: 4 GB, and as much for the check
    python benchmarks/selection.py --entries 1e8 --json selection.json

Scores are normal, one stack of matrices sharded over a 4 x 2 mesh of CPU devices (all on this machine's cores, so nothing
is won by there being eight). ``jft.select.top`` selects the largest over all of them. The same selection is then found from
numpy's partition, and every entry of the mask compared. A full sort is timed on the same scores by ``numpy.sort`` (in place,
one thread), and by ``jax.numpy.sort`` on one device for as many as ``--sort-entries``, since it is slow and takes several
copies. Temporary memory is what XLA reports for the compiled programs, per device, the mask aside.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")  # XLA's CPU thread pool: fewer threads than devices can deadlock collectives

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jft.parallel import make_mesh
from jft.select import threshold, top, uint64

MATRIX = (4096, 4096)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=float, default=1e9, help="scores, rounded up to whole 4096 x 4096 matrices")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--sort-entries", type=float, default=2**24, help="scores that jax.numpy.sort gets")
    parser.add_argument("--repeats", type=int, default=3, help="timed selections, after one that compiles")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    return parser.parse_args()


def draw(layers: int) -> jax.Array:
    """Normal scores, each shard from a seed of its own."""
    sharding = NamedSharding(make_mesh({"fsdp": 4, "tensor": 2}), PartitionSpec(None, "fsdp", "tensor"))
    shape = (layers, *MATRIX)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        sizes = [len(range(*part.indices(n))) for part, n in zip(index, shape, strict=True)]
        seed = [part.start or 0 for part in index]
        return np.random.default_rng(seed).standard_normal(sizes, np.float32)

    return jax.make_array_from_callback(shape, sharding, shard)


def seconds(run) -> tuple[float, object]:
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def temporary(scores: jax.Array, k: int) -> int:
    """The larger temporary memory of the two compiled programs, bytes per device."""
    shape = jax.ShapeDtypeStruct(scores.shape, scores.dtype, sharding=scores.sharding)
    key, shares, _ = jax.eval_shape(lambda x: threshold._shares((x,), uint64.of(k), 0, True), shape)
    programs = (
        threshold._shares.lower((shape,), uint64.of(k), 0, True),
        threshold._mask.lower(shape, key, shares[0], 0, True),
    )
    return max(p.compile().memory_analysis().temp_size_in_bytes for p in programs)


def flat(scores: jax.Array) -> np.ndarray:
    """A copy of all scores, shard after shard."""
    out = np.empty(scores.size, scores.dtype)
    at = 0
    for shard in scores.addressable_shards:
        out[at : at + shard.data.size] = np.asarray(shard.data).reshape(-1)
        at += shard.data.size
    return out


def exact(scores: jax.Array, mask: jax.Array, value: float, k: int) -> bool:
    """Whether the mask is what the k-th largest value says: all above it, and of those equal to it the first."""
    selected, above, ties = 0, 0, []
    for x, m in zip(scores.addressable_shards, mask.addressable_shards, strict=True):
        data, chosen = np.asarray(x.data), np.asarray(m.data)
        higher = data > value
        selected, above = selected + int(chosen.sum()), above + int(higher.sum())
        if (higher & ~chosen).any() or (chosen & (data < value)).any():
            return False
        for place in np.argwhere(data == value):
            whole = tuple(int(i) + (part.start or 0) for i, part in zip(place, x.index, strict=True))
            ties.append((whole, bool(chosen[tuple(place)])))
    taken = [chosen for _, chosen in sorted(ties)]
    return selected == k and taken == [i < k - above for i in range(len(ties))]


def partitioned(scores: jax.Array, mask: jax.Array, value: float, k: int) -> tuple[float, bool]:
    """Seconds of numpy's partition at the k-th largest, and whether its value and the mask are what was found."""
    copy = flat(scores)
    taken, _ = seconds(lambda: copy.partition(scores.size - k))
    return taken, float(copy[scores.size - k]) == value and exact(scores, mask, value, k)


def sorted_seconds(scores: jax.Array) -> float:
    copy = flat(scores)
    return seconds(copy.sort)[0]


def main() -> None:
    args = arguments()
    jax.config.update("jax_num_cpu_devices", 8)
    scores = draw(-(-int(args.entries) // (MATRIX[0] * MATRIX[1])))
    k = int(args.density * scores.size)
    bytes_ = temporary(scores, k)
    first, mask = seconds(lambda: top({"w": scores}, k)["w"])
    times, work = [], time.process_time()
    for _ in range(args.repeats):
        del mask
        taken, mask = seconds(lambda: top({"w": scores}, k)["w"])
        times.append(taken)
    work = (time.process_time() - work) / args.repeats
    value, above, ties = threshold.threshold({"w": scores}, k)
    partition, correct = partitioned(scores, mask, value, k)
    numpy_sort = sorted_seconds(scores)
    few = jnp.asarray(np.random.default_rng(0).standard_normal(int(args.sort_entries), np.float32))
    sort = jax.jit(jnp.sort).lower(few).compile()
    jax_sort, _ = seconds(lambda: sort(few))
    found = {
        "entries": scores.size,
        "k": k,
        "devices": len(scores.addressable_shards),
        "passes": {
            "value, at most": 32 // threshold._DIGIT,
            "place among ties, at most": sum(-(-(n - 1).bit_length() // threshold._DIGIT) for n in scores.shape),
            "mask": 1,
        },
        "seconds": {"first, compiling": first, "median": float(np.median(times)), "all": times, "of cores": work},
        "numpy_partition_seconds": partition,
        "numpy_sort_seconds": numpy_sort,
        "jax_sort": {"entries": few.size, "seconds": jax_sort},
        "temporary_bytes_per_device": bytes_,
        "temporary_fraction": bytes_ / (scores.nbytes / 8),
        "value": value,
        "above": above,
        "ties": ties,
        "exact": correct,
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "processor": platform.machine()},
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    report(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def report(found: dict) -> None:
    took, few = found["seconds"], found["jax_sort"]
    per_sort = few["seconds"] / few["entries"] * found["entries"]
    rows = [
        ("entries, selected", f"{found['entries']:,}, {found['k']:,} on {found['devices']} devices"),
        ("passes over the scores", ", ".join(f"{n} for the {what}" for what, n in found["passes"].items())),
        (
            "jft.select.top",
            f"{took['median']:.2f} s, {took['of cores']:.2f} s of cores (first, compiling: {took['first, compiling']:.2f} s)",
        ),
        ("numpy.sort, all", f"{found['numpy_sort_seconds']:.2f} s"),
        ("numpy.partition, all", f"{found['numpy_partition_seconds']:.2f} s"),
        (
            "jax.numpy.sort",
            f"{few['seconds']:.2f} s for {few['entries']:,}: {per_sort:.0f} s for all at that rate",
        ),
        (
            "temporary memory",
            f"{found['temporary_bytes_per_device']:,} B per device, {found['temporary_fraction']:.2%} of its scores",
        ),
        ("the k-th", f"{found['value']}: {found['above']:,} above, {found['ties']} equal"),
        ("exact", "yes, every entry" if found["exact"] else "NO"),
    ]
    for name, text in rows:
        print(f"{name:24}{text}")


if __name__ == "__main__":
    main()
