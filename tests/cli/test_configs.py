"""Every config that is shipped passes the check of what it is for."""

from pathlib import Path

import jax
import pytest

from jft import methods
from jft.analysis import study
from jft.cli import options
from jft.train import Optimizer, optimizer
from jft.train.config import check

CONFIGS = Path(__file__).parents[2] / "configs"
STUDIES = (
    "quickstart",
    "clip_eight",
    "comparison",
    "comparison:rates",
    "tangent",
    "tangent:rates",
    "merging",
    "merging:digits",
)
RUNS = (
    "decoder_sft",
    "encoder_classification",
    "llm",
    *(f"smollm2{which}" for which in ("", ":pairs.jsonl", ":chain_sum")),
    *(f"llm:{m},{how}" for m in ("qwen3-8b", "gemma-2-2b") for how in ("full", "lora")),
    *(f"llm:qwen2.5-7b,{how}" for how in ("block_sparse", "lift", "spiel", "s2ft", "rosa", "half", "masks")),
)


def spec(name: str) -> str:
    file, colon, argument = name.partition(":")
    return f"{CONFIGS / file}.py{colon}{argument}"


@pytest.mark.parametrize("name", RUNS)
def test_runs(name):
    said = check(options.load(spec(name)))
    methods.method(**said.method)
    assert isinstance(optimizer(vars(said.optimizer)), Optimizer)
    assert said.data["source"]


def test_derived_keys_follow_overrides():
    config = options.load(spec("smollm2:pairs.jsonl"))
    for key, value in (("data.files", "other.jsonl"), ("data.max_length", "64")):
        options.override(config, key, value)
    said = check(config)
    assert (said.eval_data["files"], said.eval_data["max_length"]) == ("other.jsonl", 64)


@pytest.mark.parametrize("name", STUDIES)
def test_studies(name):
    study.check(options.load(spec(name)).to_dict())


def test_every_parameter_of_clip_eight_decays():
    """As in the authors' code, whose AdamW has all of the image encoder's."""
    recipe = optimizer(options.load(spec("clip_eight")).studies.clip.common.optimizer.to_dict())
    shapes = {
        p: jax.ShapeDtypeStruct((2,), "float32") for p in ("vision/patch/w", "vision/cls", "vision/final_norm/bias")
    }
    assert recipe.weight_decay == 0.1 and recipe.decayed(shapes) == shapes.keys()


def test_no_config_is_left_out():
    named = {name.partition(":")[0] for name in (*STUDIES, *RUNS)}
    found = {path.stem for path in CONFIGS.glob("*.py")}
    assert {stem for stem in found if not stem.startswith("quickstart_")} == named


def test_a_wrong_name_is_refused():
    with pytest.raises(ValueError, match="'qwen9' is not one of"):
        options.load(spec("llm:qwen9"))
