import jax
import jax.numpy as jnp
import pytest

from jft.parallel import MemoryBudgetError, MemoryEstimate, check, device_budget, estimate, make_mesh, shardings
from jft.parallel.memory import host_memory, human, parse_bytes


def compiled(donate=()):
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    return jax.jit(lambda w, x: w + x, donate_argnums=donate).lower(x, x).compile()


@pytest.mark.optimized
def test_estimate_counts_arguments_and_donation():
    size = 256 * 256 * 4
    plain, donated = estimate(compiled()), estimate(compiled((0,)))
    assert plain.arguments == 2 * size
    assert plain.outputs >= size
    assert donated.aliased == size
    assert donated.total == donated.asdict()["total"] == plain.total - size
    assert "arguments 512.0 KiB" in str(plain)


@pytest.mark.optimized
def test_estimate_is_per_device():
    mesh = make_mesh({"fsdp": 8})
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    step = jax.jit(lambda w: w * 2, in_shardings=shardings(w, mesh))
    assert estimate(step.lower(w).compile()).arguments == 1024 * 1024 * 4 // 8


def test_check_names_the_three_cheapest_that_fit():
    need = MemoryEstimate(arguments=10 * 2**30, outputs=0, aliased=0, temporaries=10 * 2**30)
    assert check(need, None) is need
    assert check(need, 2**40, remedies=lambda: pytest.fail("asked though it fits")) is need
    gib = 2**30
    remedies = [("a", 17 * gib), ("b", 15 * gib), ("c", 14 * gib), ("d", 8 * gib), ("e", 2 * gib)]
    with pytest.raises(
        MemoryBudgetError,
        match=r"20\.0 GiB per device.* 16\.0 GiB \(JFT_DEVICE_MEMORY overrides\); any .*: b \(15\.0 GiB\), c .*, d .*\)$",
    ):
        check(need, 16 * gib, remedies)
    with pytest.raises(MemoryBudgetError, match=r"nothing tried fits by itself, nearest: e \(2\.0 GiB\), d .*, c"):
        check(need, gib, remedies)


def test_device_budget(monkeypatch):
    assert device_budget() is None or device_budget() > 0
    monkeypatch.setenv("JFT_DEVICE_MEMORY", "16GiB")
    assert device_budget() == 16 * 2**30
    monkeypatch.setenv("JFT_DEVICE_MEMORY", "much")
    with pytest.raises(ValueError, match="'much' is not a number of bytes"):
        device_budget()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # The machine's own 16 GiB; a limit of this group (version 2), or of one above it; none.
        ("0::/user/job\n", {}, 16),
        ("0::/user/job\n", {"user/job/memory.max": 4, "user/memory.max": 8}, 4),
        ("0::/user/job\n", {"user/job/memory.max": None, "user/memory.max": 3}, 3),
        ("0::/user/job\n", {"user/job/memory.max": 64}, 16),
        # Version 1, of which a container sees the top alone; version 2 beside it has no controllers.
        ("4:cpu,memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": 2}, 2),
        ("4:memory:/docker/x\n0::/\n", {"memory/memory.limit_in_bytes": 5}, 5),
        ("4:cpu:/job\n", {"memory/job/memory.limit_in_bytes": 2}, 16),
    ],
)
def test_memory_of_a_machine_and_its_control_groups(groups, files, expected, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:       {16 * 2**20} kB\nMemFree:        1 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, limit in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("max\n" if limit is None else f"{limit * 2**30}\n")
    assert host_memory(str(tmp_path)) == expected * 2**30
    assert host_memory(str(tmp_path / "nothing")) is None


def test_the_devices_of_a_processor_share_its_memory(monkeypatch):
    monkeypatch.delenv("JFT_DEVICE_MEMORY", raising=False)
    whole = host_memory()
    assert device_budget() == (whole // 8 if whole else None)


def test_bytes_as_people_write_them():
    assert [parse_bytes(t) for t in ("512", "80 GB", "1.5TiB", "2kb")] == [512, 80 * 10**9, int(1.5 * 2**40), 2000]
    assert [human(n) for n in (10, 2048, 3 * 2**30, 2**41)] == ["10 B", "2.0 KiB", "3.0 GiB", "2.0 TiB"]
