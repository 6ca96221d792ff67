"""The eight-task protocol on a CLIP of a few thousand weights: a saved base, frozen zero-shot heads, the encoder trained."""

import json

import jax
import pytest

import jft
from jft.analysis import study
from jft.data.tokenizer import byte_tokenizer
from jft.models import Model
from jft.models.clip import ClipConfig, TextConfig
from jft.models.vision import VisionConfig
from tests.analysis import devices


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with devices.first(1):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "base"
    vision = VisionConfig(
        image=8, patch=4, channels=3, width=16, layers=1, heads=2, hidden=32, eps=1e-5, activation="quick_gelu",
        patch_bias=False, embed_norm=True, family="clip_vision_model",
    )  # fmt: skip
    text = TextConfig(vocab=264, width=16, layers=1, heads=2, hidden=32, positions=40, eos=258)
    model = Model(ClipConfig(vision, text, projection=8))
    jft.save(model, model.init(jax.random.key(0)), folder)
    byte_tokenizer().save(folder)
    return folder


def config(base):
    scans = {"source": "digits", "image": {"size": 8, "channels": 3, "normalize": "clip"}}
    one = study.study(
        base={"source": str(base)},
        head={"kind": "zero_shot"},
        common={"steps": 2, "batch_size": 16, "log": {"every": 1}},
        tasks={
            "upright": {"data": {**scans, "split": "train", "limit": 64}, "templates": ("a photo of a {}.", "a {}.")},
            "parity": {"data": {**scans, "split": "train", "limit": 64, "task": "parity"}},
        },
        methods={
            "full": {"method": {"name": "full"}},
            "linear": {"method": {"name": "linearized", "until": "features"}},
            "posthoc": {"of": "full", "forward": "linearized", "until": "features"},
        },
        arithmetic={"points": 2},
    )
    return study.collection("CLIP", clip=one)


@pytest.mark.slow
def test_only_the_image_encoder_moves(base, tmp_path):
    study.run(config(base), tmp_path, "jft quickstart", say=lambda text: None)
    vectors = [
        jft.TaskVector.load(tmp_path / "clip" / t / method / "task_vector.safetensors")
        for t in ("upright", "parity")
        for method in ("full", "linear")
    ]
    for vector in vectors:
        assert vector.paths
        assert all(path.startswith("vision") for path in vector.paths)
    _, params = jft.load(base, dtype="float32")
    jft.apply(params, sum(vectors))
    results = json.loads((tmp_path / "results.json").read_text())["studies"][0]
    assert [method["forward"] for method in results["methods"]] == ["standard", "linearized", "linearized"]
    assert {run["until"] for run in results["runs"] if run["method"] != "full"} == {"features"}
