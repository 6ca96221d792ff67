"""The one cache of compiled programs: what makes a jitted function is called once for equal static arguments.

``jax.jit`` finds a compiled program again only through the same function object. A function that is made anew for each call,
around a model, a score or a sharding, is compiled anew for each call as well, unless its maker is a :func:`program_cache`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, overload

import jax

_MAPS, _MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
Maker = TypeVar("Maker", bound=Callable[..., Any])


@overload
def program_cache(make: Maker) -> Maker: ...
@overload
def program_cache(*, maxsize: int) -> Callable[[Maker], Maker]: ...
def program_cache(make: Any = None, *, maxsize: int = 32) -> Any:
    """Decorator of ``make(*static) -> program``: equal arguments of equal types get the same program.

    maxsize: programs that are kept; beyond it the one that was used longest ago is forgotten, with what it holds. Arguments
    of which one cannot be hashed get a program of their own, which is not kept. ``make.cache_clear()`` forgets all;
    ``make.cache_info()`` is that of ``functools.lru_cache``. Weights are arguments of the program, never of ``make``:
    XLA would store them as constants, and the cache would keep them alive.
    """
    if make is None:
        return functools.partial(program_cache, maxsize=maxsize)
    # 1, 1.0 and True are equal, and programs around them are not.
    cache = functools.lru_cache(maxsize=maxsize, typed=True)(make)

    @functools.wraps(make)
    def cached(*static: Any, **named: Any) -> Any:
        try:
            # Tested before the call: a TypeError that `make` raises must not be taken for an argument without a hash.
            hash((static, tuple(named.values())))
        except TypeError:
            return make(*static, **named)
        return cache(*static, **named)

    # functools.wraps copies the attributes of `make`, which has none of these.
    cached.cache_clear, cached.cache_info = cache.cache_clear, cache.cache_info  # type: ignore[attr-defined]
    return cached


def forget_if_crowded(share: float = 0.5) -> bool:
    """Forget all compiled programs where the process has more than ``share`` of the memory maps that Linux grants it.

    A program of XLA's CPU backend has about five maps as long as it is kept. At the limit, 65530 by default, the next
    compilation ends the process without an exception; a study of hundreds of runs gets there. What is needed again is
    compiled again. Returns whether anything was forgotten; never where there is no such limit.
    """
    try:
        most = int(_MOST_MAPS.read_text())
        count = _MAPS.read_bytes().count(b"\n")
    except (OSError, ValueError):  # not Linux, or not readable
        return False
    if count <= share * most:
        return False
    jax.clear_caches()
    return True
