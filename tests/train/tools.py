"""A small model, data and a NumPy reference, shared by the tests of training."""

import jax.numpy as jnp
import numpy as np

WIDTH, HIDDEN, CLASSES = 8, 16, 3


def apply(params, batch):
    """A two-layer perceptron: images [B, 8] -> logits [B, 3]."""
    h = jnp.tanh(batch["images"] @ params["one"]["w"] + params["one"]["b"])
    return h @ params["two"]["w"] + params["two"]["b"]


def parameters(seed=0, dtype=jnp.float32):
    r = np.random.default_rng(seed)

    def layer(rows, columns):
        w = r.normal(size=(rows, columns)) * 0.3
        return {"w": jnp.asarray(w, dtype), "b": jnp.asarray(r.normal(size=columns) * 0.1, dtype)}

    return {"one": layer(WIDTH, HIDDEN), "two": layer(HIDDEN, CLASSES)}


def batches(count=5, size=8, seed=1):
    r = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        x = r.normal(size=(size, WIDTH)).astype(np.float32)
        out.append({"images": x, "labels": x[:, :CLASSES].argmax(1).astype(np.int32)})
    return out


def token_batches(count=4, size=8, length=12, vocab=11, seed=2):
    """Tokens with segments and uneven loss masks: rows differ a lot in how many targets they have."""
    r = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        tokens = r.integers(0, vocab, (size, length)).astype(np.int32)
        lengths = r.integers(3, length + 1, size)
        segments = (np.arange(length)[None] < lengths[:, None]).astype(np.int32)
        segments[0] = np.repeat([1, 2], length // 2)
        mask = (r.random((size, length)) < np.linspace(0.1, 1, size)[:, None]).astype(np.float32)
        out.append({"tokens": tokens, "segments": segments, "loss_mask": mask})
    return out


def bigram(params, batch):
    """Logits [B, T, V] from the token alone."""
    return params["embed"]["table"][batch["tokens"]] @ params["head"]["w"]


def bigram_parameters(vocab=11, width=4, seed=3):
    r = np.random.default_rng(seed)
    return {
        "embed": {"table": jnp.asarray(r.normal(size=(vocab, width)), jnp.float32)},
        "head": {"w": jnp.asarray(r.normal(size=(width, vocab)), jnp.float32)},
    }


def reference_gradient(params, batch):
    """Loss and gradient of the mean cross entropy of :func:`apply`, in float64."""
    p = {k: {n: np.asarray(x, np.float64) for n, x in layer.items()} for k, layer in params.items()}
    x, y = batch["images"].astype(np.float64), batch["labels"]
    h = np.tanh(x @ p["one"]["w"] + p["one"]["b"])
    z = h @ p["two"]["w"] + p["two"]["b"]
    z = z - z.max(1, keepdims=True)
    q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    loss = -np.log(q[np.arange(len(y)), y]).mean()
    dz = (q - np.eye(q.shape[1])[y]) / len(y)
    dh = dz @ p["two"]["w"].T * (1 - h**2)
    return loss, {
        "one/w": x.T @ dh, "one/b": dh.sum(0), "two/w": h.T @ dz, "two/b": dz.sum(0),
    }  # fmt: skip
