"""torch models to jft parameters and back, through a family's table; for parity tests."""

from __future__ import annotations

import itertools
import json

import numpy as np

from jft import tree


def config_dict(torch_model) -> dict:
    """What config.json of this model would hold."""
    return json.loads(torch_model.config.to_json_string(use_diff=False))


def _tensor(tensors, source, layer, expert):
    for name in (source.name, *source.aliases):
        filled = name.format(layer=layer, expert=expert)
        if filled in tensors:
            return filled, tensors[filled]
    raise KeyError(f"{source.name} (layer {layer}, expert {expert}) is not among {sorted(tensors)[:80]}")


def _gather(tensors, source, shape):
    """One leaf, stacked over layers and experts; and the names of the tensors it was read from."""
    names = []
    places = {"layer": 0, "expert": 0}
    if source.other is not None and not any(n.format(**places) in tensors for n in (source.name, *source.aliases)):
        source = source.other

    def one(layer=None, expert=None):
        name, x = _tensor(tensors, source, layer, expert)
        assert x.shape == tuple(source.shape), (name, x.shape, source.shape)
        names.append(name)
        view = source.view(x)
        assert np.shares_memory(view, x), f"{name}: the view of {source.name} is a copy"
        return source.out(view) if source.out else view

    if "{layer}" not in source.name:
        return one(), names
    layers = range(shape[0])
    if "{expert}" not in source.name:
        return np.stack([one(i) for i in layers]), names
    return np.stack([np.stack([one(i, e) for e in range(shape[1])]) for i in layers]), names


def from_tensors(tensors, family, config, dtype=None) -> dict:
    """jft parameters from ``{hf name: numpy array}``; every leaf must be found in its shape, every tensor be used."""
    import re

    import jax

    shapes = tree.flatten(jax.eval_shape(lambda k: config.init(k, np.float32), jax.random.key(0)))
    table = family.table(config)
    assert set(table) == set(shapes), set(table) ^ set(shapes)
    flat, used = {}, set()
    for path, source in table.items():
        leaf, names = _gather(tensors, source, shapes[path].shape)
        assert leaf.shape == shapes[path].shape, (path, leaf.shape, shapes[path].shape)
        flat[path] = np.ascontiguousarray(leaf, dtype)
        used.update(names)
    rest = [n for n in tensors if n not in used and not any(re.fullmatch(p, n) for p in family.ignored)]
    assert not rest, f"tensors nobody reads: {rest}"
    return tree.unflatten(flat)


def on_disk(torch_model, tensors) -> dict:
    """Tensors by their in-memory names, as they are named in a checkpoint (transformers may rename on saving)."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted = revert_weight_conversion(torch_model, dict(tensors))
    return {k: v.detach().cpu().numpy() for k, v in reverted.items()}


def from_torch(torch_model, family, config, dtype=None) -> dict:
    """The model's weights as jft parameters, read by the names its checkpoint has on disk."""
    return from_tensors(on_disk(torch_model, torch_model.state_dict()), family, config, dtype)


def grads(torch_model, family, config, dtype=None) -> dict:
    """The torch gradients (after ``backward``) as a jft tree; zero where a parameter got none."""
    import torch

    named = dict(itertools.chain(torch_model.named_parameters(remove_duplicate=False), torch_model.named_buffers()))
    tensors = {}
    for name in torch_model.state_dict():
        p = named[name]
        tensors[name] = p.grad if p.grad is not None else torch.zeros_like(p)
    return from_tensors(on_disk(torch_model, tensors), family, config, dtype)


def worst(a, b) -> dict[str, float]:
    """Per path: max |a - b| relative to max |b|, or to 1e-4 of the largest leaf where b should be zero but for rounding."""
    a, b = tree.flatten(a), tree.flatten(b)
    assert set(a) == set(b)
    floor = 1e-4 * max(np.abs(x).max() for x in b.values())
    return {p: float(np.abs(np.asarray(a[p]) - b[p]).max() / max(np.abs(b[p]).max(), floor)) for p in a}
