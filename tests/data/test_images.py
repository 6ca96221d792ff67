import numpy as np
import pytest
from PIL import Image

from jft import data
from jft.data.images import NORMALISATIONS, ImageSettings, preprocess

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


def test_center_crop_keeps_the_middle():
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255
    assert np.array_equal(preprocess(image, ImageSettings(10, normalize="none")), np.ones((10, 10, 3), np.float32))


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisation(name):
    mean, deviation = NORMALISATIONS[name]
    out = preprocess(np.full((4, 4, 3), 51, np.uint8), ImageSettings(4, normalize=name))
    assert np.allclose(out[0, 0], (0.2 - np.asarray(mean)) / np.asarray(deviation), atol=1e-6)
    assert out.dtype == np.float32


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1), (30, 40, 3), (30, 40, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(shape, channels):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    out = preprocess(image, ImageSettings(8, channels=channels, resize="squash"))
    assert out.shape == (8, 8, channels)


def test_random_crops_depend_on_the_generator_alone():
    settings = ImageSettings(16, crop="random", flip=True, area=(0.3, 1.0))
    draw = lambda seed: preprocess(PICTURE, settings, np.random.default_rng(seed))
    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    assert np.array_equal(preprocess(PICTURE, settings), preprocess(PICTURE, ImageSettings(16)))


def test_float_scans_survive_at_their_size():
    scan = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8, 1)
    assert np.allclose(preprocess(scan, ImageSettings(8, channels=1)), scan, atol=1 / 255)


def test_image_folder(tmp_path):
    for name, value in (("b", 10), ("a", 200)):
        (tmp_path / "train" / name / "deep").mkdir(parents=True)
        for i in range(3):
            Image.new("L", (12, 9), value + i).save(tmp_path / "train" / name / "deep" / f"{i}.png")
    settings = {"source": "image_folder", "root": str(tmp_path), "split": "train"}
    loader = data.build(settings, batch_size=4, image_size=6, train=False)
    assert loader.classes == ("a", "b")
    batches = list(loader)
    assert np.concatenate([b["labels"][b["valid"]] for b in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    named = data.build({**settings, "classes": {"a": "ant", "b": "bee"}}, batch_size=2, image_size=6)
    assert named.classes == ("ant", "bee")
    with pytest.raises(data.DataError, match="needs preprocessing: set image"):
        data.build(settings, batch_size=4)
    (tmp_path / "train" / "a" / "deep" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(data.DataError, match=r"broken\.png: not a readable image"):
        list(data.build(settings, batch_size=4, image_size=6, train=False))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"size": 0}, "image.size must be a positive"),
        ({"size": 4, "crop": "centre"}, "Did you mean 'center'"),
        ({"size": 4, "normalise": "clip"}, "image has no setting 'normalise'. Did you mean 'normalize'"),
        ({"size": 4, "area": 0.5}, "image.area must be two numbers"),
        ({"size": 4, "area": (0.5, 2)}, "image.area must be two rising"),
        ({"crop": "random"}, "size .* is missing"),
    ],
)
def test_wrong_settings(image, message):
    with pytest.raises(data.DataError, match=message):
        data.build({"source": "digits", "image": image}, batch_size=4)


@pytest.mark.peers
def test_evaluation_is_clips():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    peer = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
    theirs = peer(Image.fromarray(PICTURE.repeat(8, 0).repeat(8, 1)), return_tensors="np")["pixel_values"][0]
    ours = preprocess(PICTURE.repeat(8, 0).repeat(8, 1), ImageSettings(224, normalize="clip"))
    assert np.allclose(ours, np.moveaxis(np.asarray(theirs), 0, -1), atol=2e-2)
