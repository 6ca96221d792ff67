import jax
import jax.numpy as jnp
import pytest

from jft.parallel import MemoryBudgetError, MemoryEstimate, check, device_budget, estimate, make_mesh, shardings
from jft.parallel.memory import human, parse_bytes


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
        MemoryBudgetError, match=r"20\.0 GiB per device.* 16\.0 GiB; any .*: b \(15\.0 GiB\), c .*, d .*\)$"
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


def test_bytes_as_people_write_them():
    assert [parse_bytes(t) for t in ("512", "80 GB", "1.5TiB", "2kb")] == [512, 80 * 10**9, int(1.5 * 2**40), 2000]
    assert [human(n) for n in (10, 2048, 3 * 2**30, 2**41)] == ["10 B", "2.0 KiB", "3.0 GiB", "2.0 TiB"]
