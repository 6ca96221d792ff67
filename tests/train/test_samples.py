"""Questions and answers out of batches, the score of exact answers, and what is refused before a run starts."""

import jax
import numpy as np
import pytest

import jft
from jft.data.tokenizer import byte_tokenizer
from jft.models.decoder import DecoderConfig
from jft.models.vision import VisionConfig
from jft.train.samples import Samples, questions
from jft.train.training import Linearized
from tests.train.tools import bigram, bigram_parameters, token_batches

MUTATIONS = [
    ("jft/train/samples.py", "yield ids[:first], ids[first:end]", "yield ids[:first], ids[first : end + 1]"),
    ("jft/train/samples.py", "for row in np.flatnonzero(valid):", "for row in range(len(tokens)):"),
    ("jft/train/samples.py", "here = segments[row] == segment", "here = segments[row] > 0"),
    (
        "jft/train/training.py",
        "self.plan.outputs(self.function, *params",
        "self.plan.outputs(self.function, *params[::-1]",
    ),
]


def test_questions():
    """Of packed rows every sequence; of several turns the first; none where nothing comes before the targets."""
    tokens = np.arange(1, 13)[None].repeat(3, 0)
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0], [1] * 12, [1] * 12])
    mask = np.zeros((3, 12))
    mask[0, [2, 3, 6, 7, 8]] = 1
    mask[1, [0, 1]] = 1
    mask[2, [3, 4, 8]] = 1
    found = [
        (q.tolist(), a.tolist()) for q, a in questions([{"tokens": tokens, "segments": segments, "loss_mask": mask}])
    ]
    assert found == [([1, 2], [3, 4]), ([6], [7, 8, 9]), ([1, 2, 3], [4, 5])]
    only = {"tokens": tokens, "loss_mask": mask, "valid": np.array([False, False, True])}
    assert [a.tolist() for _, a in questions([only])] == [[4, 5]]


def test_exact_match():
    """A model that says each token's successor answers half of the questions."""
    tokenizer = byte_tokenizer()

    def successor(params, batch):
        # After "d" the text ends.
        nexts = np.where(np.arange(264) == ord("d"), tokenizer.eos_id, np.arange(264) + 1)
        return (
            jax.nn.one_hot(params["next"][batch["tokens"]], 264)
            if params
            else jax.nn.one_hot(nexts, 264)[batch["tokens"]]
        )

    rows = [("ab", "cd"), ("b", "ce"), ("a", "bcd"), ("cc", "c")]
    tokens = np.zeros((4, 6), np.int32)
    mask = np.zeros((4, 6))
    segments = np.zeros((4, 6), np.int32)
    for i, (question, answer) in enumerate(rows):
        ids = [*(question + answer).encode(), tokenizer.eos_id]
        tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
        mask[i, len(question) : len(ids)] = 1
    batch = {"tokens": tokens, "segments": segments, "loss_mask": mask}
    samples = Samples(exact_match=4, max_tokens=5, tokenizer=tokenizer)
    assert samples.scores(successor, {}, [batch]) == {"exact_match": 0.5}
    assert Samples(exact_match=3, max_tokens=5, tokenizer=tokenizer).scores(successor, {}, [batch]) == {
        "exact_match": 2 / 3
    }


def test_a_linearized_model():
    """It is asked as it is trained, not as its weights would have it: the sum of f and its derivative."""
    params, batch = bigram_parameters(), token_batches(1, size=8)[0]
    options = {"eval_data": [batch], "tokenizer": byte_tokenizer(), "log": {"progress": False}, "objective": "lm"}
    options |= {"samples": {"exact_match": 2, "max_tokens": 2, "prompts": ["\x01\x02"]}, "optimizer": {"lr": 0.5}}
    run = jft.finetune(bigram, params, [batch], steps=1, method=jft.method("linearized"), **options)
    assert run.evaluation["exact_match"] in (0.0, 0.5, 1.0)
    f_lin = jft.linearize(bigram, params)
    logits = f_lin(run.task_vector, {"tokens": np.array([[2]])})
    said = Linearized(run.plan, bigram, None)
    kept = run._kept
    np.testing.assert_allclose(
        said((kept, run.state.trained), {"tokens": np.array([[2]])}), logits, rtol=1e-4, atol=1e-5
    )
    merged = bigram(run.params, {"tokens": np.array([[2]])})
    assert np.abs(merged - logits).max() > 1e-2


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (jft.Model(DecoderConfig(9, 8, 1, 2)), {"prompts": ["a"]}, "need a tokenizer"),
        (jft.Model(DecoderConfig(9, 8, 1, 2)), {"exact_match": 2, "tokenizer": 1}, "and there is none"),
        (jft.Model(VisionConfig()), {"prompts": ["a"], "tokenizer": 1}, "VisionConfig is none"),
    ],
)
def test_refused_before_the_run(model, options, message):
    with pytest.raises(ValueError, match=message):
        Samples(**options).check(model, None)


def test_options():
    with pytest.raises(ValueError, match="exact_match is -1"):
        Samples(exact_match=-1)
    assert not Samples() and Samples(prompts=["a"]).prompts == ("a",)
