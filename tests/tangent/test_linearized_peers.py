"""f_lin against torch.func.jvp on transformers models with the same weights."""

import copy

import jax
import numpy as np
import pytest

import jft
from jft.models.hf.registry import family_named
from tests.models import hf_tools, parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# torch's own forward mode is written with what it deprecates.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")]

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(SIZES, vocab_size=37, max_position_embeddings=32, pad_token_id=None, bos_token_id=None, eos_token_id=None)
CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", dict(TEXT, num_key_value_heads=2)),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(TEXT, num_key_value_heads=2, head_dim=4, sliding_window=4)),
    "bert": ("BertModel", "BertConfig", dict(TEXT)),
    "vit": ("ViTModel", "ViTConfig", dict(SIZES, image_size=8, patch_size=4, num_channels=3)),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_tangents_equal_torch_func_jvp(name):
    cls, config, options = CASES[name]
    base = parity.shaken(getattr(transformers, cls)(getattr(transformers, config)(**options)))
    tuned = parity.shaken(copy.deepcopy(base), seed=1, by=0.05)
    family = family_named(base.config.model_type)
    model = parity.load(base, family)
    params, moved = (hf_tools.from_torch(x, family, model.config) for x in (base, tuned))
    tau = jft.TaskVector.between(params, moved)

    rng = np.random.default_rng(0)
    given = rng.standard_normal((2, 3, 8, 8)).astype(np.float32) if name == "vit" else rng.integers(0, 37, (2, 9))
    weights = dict(base.named_parameters())
    tangents = {k: v.detach() - weights[k].detach() for k, v in tuned.named_parameters()}

    def outputs(parameters):
        found = torch.func.functional_call(base, parameters, (torch.tensor(given),))
        return found.logits if hasattr(found, "logits") else found.last_hidden_state

    with torch.no_grad():
        f0, df = torch.func.jvp(outputs, ({k: v.detach() for k, v in weights.items()},), (tangents,))
    batch = {"images": given.transpose(0, 2, 3, 1)} if name == "vit" else {"tokens": given.astype(np.int32)}
    ours0, ours = jax.jit(jft.linearize(model.apply, params).parts)(tau, batch)
    for a, b in ((ours0, f0), (ours, df)):
        b = b.numpy()
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
