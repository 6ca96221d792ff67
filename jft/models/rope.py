"""Rotary position embeddings and the ways of stretching them to longer contexts."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864): ``(x_i, x_{i + R/2})`` turns by ``position * theta^(-2i/R)``.

    theta: base. fraction: share of the head size that turns (R = int(fraction * K)); the rest passes through.
    kind, how frequencies change for contexts longer than in pretraining:

    * ``default``: not at all.
    * ``linear``: divided by ``factor`` (Chen et al. 2023, arXiv:2306.15595).
    * ``dynamic``: theta grows with the length once that exceeds ``max_positions`` (NTK-aware scaling). The length is that
      of each token's own segment, so that nothing depends on what shares a batch or a row; transformers takes the longest
      of the batch.
    * ``llama3``: wavelengths above ``original_positions / low_frequency`` are stretched by ``factor``, those below
      ``original_positions / high_frequency`` kept, in between interpolated.
    * ``yarn``: interpolated below ``beta_slow`` turns within ``original_positions``, kept above ``beta_fast``, a ramp in
      between, and attention scaled by ``attention_factor`` (Peng et al. 2023, arXiv:2309.00071). ``mscale`` and
      ``mscale_all_dim`` are DeepSeek's way of setting that factor; ``truncate`` rounds the ramp's ends.
    * ``longrope``: each frequency divided by its entry of ``short``, or of ``long`` in segments longer than
      ``original_positions``, and attention scaled (Ding et al. 2024, arXiv:2402.13753).

    original_positions: context length of pretraining; None: the model's ``max_positions``. attention_factor: None for the
    papers' formulas.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float | None = None
    original_positions: int | None = None
    low_frequency: float | None = None
    high_frequency: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """``ValueError`` for a kind that is unknown or lacks its numbers."""
        needs: dict[str, tuple[str, ...]] = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor",),
            "llama3": ("factor", "low_frequency", "high_frequency"),
            "yarn": (),
            "longrope": ("short", "long"),
        }
        if self.kind not in needs:
            raise ValueError(f"rope kind {self.kind!r} is unknown; choose one of {', '.join(needs)}")
        for name in needs[self.kind]:
            if not getattr(self, name):
                raise ValueError(f"rope kind {self.kind!r} needs {name}; got {getattr(self, name)!r}")

    def size(self, head_size: int) -> int:
        """R, how many of the head's K values turn."""
        return int(self.fraction * head_size)

    def tables(self, positions: Array, segments: Array, head_size: int, max_positions: int) -> tuple[Array, Array]:
        """Cosines and sines float32 ``[B, T, R/2]`` for int positions and segments ``[B, T]``, attention factor included."""
        frequencies = self._frequencies(positions, segments, self.size(head_size), max_positions)
        angles = positions[..., None].astype(jnp.float32) * frequencies
        scale = self._attention_factor(max_positions)
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale

    def _frequencies(self, positions: Array, segments: Array, size: int, max_positions: int) -> Array:
        # NumPy's float64: constants of the program, rounded to float32 once.
        exponents = np.arange(0, size, 2) / size
        plain = self.theta**-exponents
        original = self.original_positions or max_positions
        if self.kind == "dynamic":
            length = jnp.maximum(_lengths(positions, segments), max_positions).astype(jnp.float32)[..., None]
            factor = self.factor or 1.0
            # 1 at ``max_positions``, so that shorter sequences turn as in pretraining.
            growth = (factor * length / max_positions - (factor - 1)) ** (size / (size - 2))
            return jnp.asarray(plain, jnp.float32) * growth ** jnp.asarray(-exponents, jnp.float32)
        if self.kind == "longrope":
            for name, factors in (("short", self.short), ("long", self.long)):
                if len(factors) != len(plain):
                    raise ValueError(f"longrope's {name} factors are {len(factors)}, but {len(plain)} frequencies turn")
            short, long = (jnp.asarray(plain / np.asarray(f), jnp.float32) for f in (self.short, self.long))
            return jnp.where(_lengths(positions, segments)[..., None] > original, long, short)
        if self.kind == "llama3":
            plain = self._llama3(plain, original)
        elif self.kind == "yarn":
            plain = self._yarn(plain, size, original, max_positions)
        return jnp.asarray(plain / self._linear, jnp.float32)

    @property
    def _linear(self) -> float:
        return self.factor or 1.0 if self.kind == "linear" else 1.0

    def _llama3(self, plain: np.ndarray, original: int) -> np.ndarray:
        low, high = float(self.low_frequency or 1), float(self.high_frequency or 1)
        turns = original * plain / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return plain * (keep + (1 - keep) / (self.factor or 1.0))

    def _yarn(self, plain: np.ndarray, size: int, original: int, max_positions: int) -> np.ndarray:
        def dimension(turns: float) -> float:
            return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast or 32), dimension(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # ``size - 1`` although there are ``size / 2`` frequencies: YaRN's code has it so, and models were trained with it.
        low, high = max(low, 0), min(high, size - 1)
        # Equal ends would divide by zero; the constant is that of YaRN's code.
        ramp = np.clip((np.arange(len(plain)) - low) / (high - low or 0.001), 0.0, 1.0)
        return plain * (1 - ramp) + plain * ramp / self._stretch(max_positions)

    def _stretch(self, max_positions: int) -> float:
        return self.factor or max_positions / (self.original_positions or max_positions)

    def _attention_factor(self, max_positions: int) -> float:
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        stretch = self._stretch(max_positions)
        # The formulas below are for longer contexts, and would shrink attention here.
        if stretch <= 1:
            return 1.0
        if self.kind == "longrope":
            return math.sqrt(1 + math.log(stretch) / math.log(self.original_positions or max_positions))
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * math.log(stretch) + 1) / (0.1 * self.mscale_all_dim * math.log(stretch) + 1)
        return 0.1 * math.log(stretch) + 1


def _lengths(positions: Array, segments: Array) -> Array:
    """For each token, 1 + the largest position of its segment, int ``[B, T]``."""
    same_segment = segments[:, :, None] == segments[:, None, :]
    return 1 + jnp.max(jnp.where(same_segment, positions[:, None, :], 0), axis=-1)


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """``x[B, T, H, K]`` with its first R values of each head turned, in float32, in the dtype of ``x``."""
    cos, sin = (t[:, :, None, :].astype(jnp.promote_types(x.dtype, jnp.float32)) for t in tables)
    half = cos.shape[-1]
    first, second = x[..., :half].astype(cos.dtype), x[..., half : 2 * half].astype(cos.dtype)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
