import jax
import jax.numpy as jnp
import pytest

from jft import compiled
from jft.compiled import forget_if_crowded, program_cache


def scaling(**options):
    """A cached maker of ``x -> factor * x``, and the list of programs that were made."""
    made = []

    def make(factor, *, dtype=None):
        """Jitted ``x -> factor * x``."""
        made.append(factor)
        return jax.jit(lambda x: (jnp.float32(factor[0] if isinstance(factor, list) else factor) * x).astype(dtype))

    return (program_cache(**options) if options else program_cache)(make), made


def test_equal_arguments_share_a_program():
    make, made = scaling()
    assert make(2) is make(2) and make(3) is not make(2)
    assert made == [2, 3]
    assert make(3)(jnp.ones(2)).tolist() == [3, 3]


def test_equal_values_of_two_types_do_not():
    make, made = scaling()
    assert make(1) is not make(1.0) and make(1) is not make(True)
    assert list(map(type, made)) == [int, float, bool]


def test_named_arguments_count():
    make, _ = scaling()
    assert make(2, dtype="int32") is make(2, dtype="int32") is not make(2)
    assert make(2, dtype="int32")(jnp.ones(2)).dtype == jnp.int32


@pytest.mark.parametrize("static", [dict(args=([2.0],)), dict(args=(2.0,), dtype=[]), dict(args=(([2.0],),))])
def test_what_cannot_be_hashed_gets_a_program_of_its_own(static):
    make, made = scaling()
    args, named = static["args"], {k: v for k, v in static.items() if k != "args"}
    assert make(*args, **named) is not make(*args, **named)
    assert len(made) == 2 and make.cache_info().currsize == 0


def test_the_number_of_programs_is_bounded():
    make, made = scaling(maxsize=2)
    first = make(1)
    make(2)
    assert make(1) is first
    make(3)  # 2 was used longest ago
    assert make(1) is first
    make(2)
    assert made == [1, 2, 3, 2] and make.cache_info().currsize == 2
    assert scaling()[0].cache_info().maxsize == 32


def test_an_error_of_the_maker_comes_through_and_nothing_is_kept():
    calls = []

    @program_cache
    def make(size):
        calls.append(size)
        raise TypeError(f"no program for {size}")

    for _ in range(2):
        with pytest.raises(TypeError, match="no program for 3"):
            make(3)
    assert calls == [3, 3]


def test_forgotten_programs_are_made_anew():
    make, made = scaling()
    first = make(2)
    make.cache_clear()
    assert make(2) is not first and made == [2, 2]


def test_a_maker_keeps_its_name_and_docstring():
    make, _ = scaling()
    assert make.__name__ == "make" and "factor * x" in make.__doc__


def test_programs_are_forgotten_where_they_crowd_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_MAPS", tmp_path / "maps")
    monkeypatch.setattr(compiled, "_MOST_MAPS", tmp_path / "most")
    assert not forget_if_crowded()  # no such files: not Linux
    program = jax.jit(lambda x: x + 1)
    program(jnp.ones(3))
    (tmp_path / "most").write_text("100\n")
    for count, forgets in ((50, False), (51, True)):
        (tmp_path / "maps").write_text("7f00-7f01 r-xp\n" * count)
        assert forget_if_crowded() == forgets
        assert (program._cache_size() == 0) == forgets
