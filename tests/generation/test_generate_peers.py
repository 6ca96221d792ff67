"""Greedy generation against transformers, token for token: every decoder architecture, with and without a delta."""

import copy

import pytest

import jft
from jft.models import Model
from tests.models import hf_tools

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers

from tests.models.test_decoder_peers import CASES, build  # noqa: E402  (skips without torch)

# One case of each architecture, that with windows or caps where there is one; then the ways of stretching positions.
PICKED = ["gpt2-1", "gpt_neox-0", "llama-1", "llama-4", "llama-6", "mistral-0", "qwen2-1", "qwen3-1", "gemma-1", "gemma2-1",
          "gemma3_text-1", "olmo2-0", "phi3-0", "phi3-1", "mixtral-1", "qwen3_moe-1", "olmoe-1"]  # fmt: skip
NEW = 11
PROMPTS = [[5, 11, 2, 30, 7, 7, 19], [3, 8, 1], [12, 9, 31, 4, 4, 22, 17, 6, 2, 35]]


def theirs(peer, prompts, cache):
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = peer.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
    )
    return out[:, width:].tolist()


@pytest.mark.parametrize("name", PICKED)
def test_greedy_tokens(name):
    kind, number = name.rsplit("-", 1)
    peer, family, config = build([c for c in CASES if c[0] == kind][int(number)])
    tuned = copy.deepcopy(peer)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    base, after = (hf_tools.from_torch(model, family, config) for model in (peer, tuned))
    # Where frequencies grow with the length, transformers' cached keys keep those of their own time: a cache that its own
    # model without a cache contradicts. And it takes the longest row for all, so that there is one row.
    grows = config.rope is not None and config.rope.kind in ("dynamic", "longrope")
    prompts = PROMPTS[2:] if grows else PROMPTS
    tau = jft.TaskVector.between(base, after)
    for torch_model, params in ((peer, base), (tuned, jft.apply(base, tau))):
        ours = jft.generate(Model(config), params, prompts, max_tokens=NEW, eos=())
        assert [row.tolist() for row in ours] == theirs(torch_model, prompts, cache=not grows)
