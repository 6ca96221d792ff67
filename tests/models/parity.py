"""One comparison of a jft model with a transformers model: outputs, then the gradient of every parameter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jft
from jft import tree
from jft.models import Model
from tests.models import hf_tools

OUTPUT, GRADIENT = 2e-4, 1e-3  # absolute; relative to the largest entry of the parameter's gradient


def shaken(torch_model, seed: int = 0, by: float = 0.2):
    """The model in evaluation mode with noise on every parameter, so that no term is near zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in torch_model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator))
    torch_model.set_attn_implementation("eager")
    return torch_model.eval()


def load(torch_model, family) -> Model:
    """The jft model of a torch model, as its checkpoint would be read."""
    raw = hf_tools.config_dict(torch_model) | {"architectures": [type(torch_model).__name__]}
    own = {x.data_ptr(): name for name, x in reversed(torch_model.state_dict().items())}  # tied copies are not saved
    tensors = {name: x for name, x in torch_model.state_dict().items() if own[x.data_ptr()] == name}
    names = frozenset(hf_tools.on_disk(torch_model, tensors))
    config = family.from_hf(raw)
    return Model(family.refine(config, names) if family.refine else config)


def agree(torch_model, family, model, torch_outputs, outputs) -> tuple[float, float]:
    """Asserts equal outputs and gradients of one random linear loss; returns the largest errors.

    torch_outputs and ``outputs(params)`` are lists of arrays of equal shapes.
    """
    params = hf_tools.from_torch(torch_model, family, model.config)
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(x.shape).astype(np.float32) for x in torch_outputs]

    def loss(params):
        out = outputs(params)
        return sum(jnp.sum(w * x) for w, x in zip(weights, out, strict=True)), out

    (_, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    import torch

    sum((torch.tensor(w) * x).sum() for w, x in zip(weights, torch_outputs, strict=True)).backward()
    error = max(
        float(np.abs(np.asarray(a) - b.detach().numpy()).max()) for a, b in zip(ours, torch_outputs, strict=True)
    )
    theirs = hf_tools.grads(torch_model, family, model.config)
    largest = max(float(np.abs(x).max()) for x in tree.flatten(theirs).values())
    worst = {}
    for path, a in tree.flatten(gradients).items():
        b = tree.flatten(theirs)[path]
        # exactly-zero gradients (key biases) are rounding noise on both sides
        worst[path] = float(np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-4 * largest))
    print(f"{type(torch_model).__name__}: outputs {error:.1e}, gradients {max(worst.values()):.1e}")
    assert error < OUTPUT
    assert max(worst.values()) < GRADIENT, sorted(worst.items(), key=lambda x: -x[1])[:5]
    return error, max(worst.values())


def forward_matches_reverse(f, params) -> None:
    """``<w, J t> = <J^T w, t>``: forward mode runs, and agrees with the gradients that are checked against torch."""
    tangent = jax.tree.map(lambda x: 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    out, derivative = jax.jvp(f, (params,), (tangent,))
    weights = jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    (pulled,) = jax.vjp(f, params)[1](weights)
    forward = jnp.sum(weights * derivative)
    reverse = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(pulled), jax.tree.leaves(tangent), strict=True))
    np.testing.assert_allclose(forward, reverse, rtol=1e-3, atol=1e-4)


def unchanged_by_execution(model, params, batch) -> None:
    """Outputs and gradients are those of the plain run with remat and with layers unrolled."""

    def loss(model):
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(jnp.sin(model.apply(p, batch)))))(params)

    plain = jax.tree.leaves(loss(model))
    for how in ({"remat": "full", "unroll": 0}, {"remat": "dots", "unroll": 2}):
        for a, b in zip(jax.tree.leaves(loss(model.with_(**how))), plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def round_trip(torch_model, auto, directory, **options):
    """What transformers loads after jft has loaded the torch model's checkpoint and saved it again; jft's in between.

    Returns ``(transformers' model, jft's model, its params)``; loading what was saved must give the same once more.
    """
    torch_model.save_pretrained(directory / "theirs")
    model, params = jft.load(directory / "theirs", dtype="float32", **options)
    jft.save(model, params, directory / "ours")
    again, same = jft.load(directory / "ours", dtype="float32")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    return auto.from_pretrained(directory / "ours", attn_implementation="eager").eval(), model, params
