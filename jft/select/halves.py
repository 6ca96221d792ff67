"""Half of the matrices and norms of every layer, drawn at random, which half fine-tuning trains or sets back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jft import tree


def halves(shapes: Mapping[str, Sequence[int]], seed: int, draw: int = 0) -> dict[str, tuple[int, ...]]:
    """``{path: layers}``: of the weights under ``layers/`` those in the half that is drawn; ``shapes`` ``[L, ...]`` by path.

    In each layer: half of the attention's matrices (2 of 4); of those of the MLP, 3 where it is gated, two in half of the
    layers and one in the others; half of the norms. A number that is odd is rounded up in half of the layers and down in
    the others, which are drawn as well. A bias goes with its matrix, the matrices of all experts of a layer together. The
    same at any mesh and on any machine; another ``draw``, another half (Hui et al. 2024, arXiv:2404.18466).
    """
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for path in shapes:
        stack = tree.stack_of(path)
        if stack is not None:
            # By module, so that a bias goes with its matrix.
            module = path.rsplit("/", 1)[0]
            groups.setdefault((stack, _kind(module)), {}).setdefault(module, []).append(path)
    if not groups:
        raise ValueError("none of these weights is in a layer, so there is no half of each layer's to draw")
    key = jax.random.fold_in(jax.random.key(seed), draw)
    out: dict[str, tuple[int, ...]] = {}
    for (stack, kind), modules in groups.items():
        # All modules of a stack have as many layers.
        length = int(shapes[next(iter(modules.values()))[0]][0])
        # A key for each group: another group in the model changes no draw.
        mask = _draw(tree.key_for(key, f"{stack} {kind}"), length, len(modules))
        # Sorted: the order of the parameters must not matter.
        for module, column in zip(sorted(modules), mask.T, strict=True):
            for path in modules[module]:
                out[path] = tuple(int(i) for i in np.flatnonzero(column))
    # In the order of the parameters.
    return {p: out[p] for p in shapes if p in out}


def _kind(module: str) -> str:
    """The category of a module of a layer."""
    if module.endswith("norm"):
        return "norms"
    return "mlp" if "/mlp/" in module else "attention"


def _draw(key: jax.Array, length: int, count: int) -> np.ndarray:
    """Bool ``[L, count]``: in each layer half of the modules."""
    unit_key, layer_key = jax.random.split(key)
    # Twice `argsort` is the rank; on the host, where ties and sorts are the same for all backends.
    rank = np.argsort(np.argsort(np.asarray(jax.random.uniform(unit_key, (length, count))), axis=1), axis=1)
    order = np.argsort(np.argsort(np.asarray(jax.random.uniform(layer_key, (length,)))))
    # The odd one is added in half of the layers exactly, not by a coin in each.
    half = count // 2 + (count % 2) * (order < length / 2)
    return rank < half[:, None]
