"""Task arithmetic on the eight data sets of Ilharco et al. 2022 (arXiv:2212.04089), with CLIP ViT-B/32.

    jft quickstart --config=configs/clip_eight.py --workdir=runs/clip_eight

The published recipe: the image encoder trains, zero-shot text heads stay frozen; AdamW, learning rate 1e-5, weight decay
0.1 of every parameter, biases and norms among them, batches of 128, gradients clipped at 1, cosine after 500 warm-up steps;
a tenth of each training split is held out to choose the coefficient. The authors' epochs (4 for SVHN to 76 for DTD) come to
about 2000 steps for each data set.
Data come from TFDS (Cars and RESISC45 need a manual download, as TFDS says) and, for GTSRB, from the hub (`jft[hf]`).

What to compare with, ViT-B/32, mean test accuracy over the eight (FusionBench, docs/modelpool/clip_vit.md): pretrained
48.2, fine-tuned 90.3, task arithmetic with coefficient 0.3 68.0. Class names here are those of TFDS and one prompt is
used for all, where the authors have prompts of their own for each data set (`templates` of a task): expect other zero-shot
accuracies. Other bases: --config.studies.clip.base.source=openai/clip-vit-large-patch14.
"""

from ml_collections import ConfigDict

from jft.analysis.study import collection, study

BATCH = 128
# name -> (TFDS data set, training split, published epochs, test split, prompt). EuroSAT and RESISC45 have one
# split there: its last fifth is the test split here. SUN397 is the first of its ten official partitions.
DATASETS = {
    "SUN397": ("sun397/standard-part1-120k", "train", 14, "test", "a photo of a {}."),
    "Cars": ("cars196", "train", 35, "test", "a photo of a {}."),
    "RESISC45": ("resisc45", "train[:80%]", 15, "train[80%:]", "satellite imagery of {}."),
    "EuroSAT": ("eurosat/rgb", "train[:80%]", 12, "train[80%:]", "a centered satellite photo of {}."),
    "SVHN": ("svhn_cropped", "train", 4, "test", 'a photo of the number: "{}".'),
    "GTSRB": ("", "train", 11, "test", 'a zoomed in photo of a "{}" traffic sign.'),
    "MNIST": ("mnist", "train", 5, "test", 'a photo of the number: "{}".'),
    "DTD": ("dtd", "train+validation", 76, "test", "a photo of a {} texture."),
}


def task(name: str, train: str, epochs: int, test: str, prompt: str) -> dict:
    # TFDS has no GTSRB; the hub's copy is the one of FusionBench.
    where = {"source": "tfds", "name": name, "download": True} if name else {"source": "hf", "name": "tanganke/gtsrb"}
    data = {**where, "image": {"size": 224, "normalize": "clip"}}
    return {
        "epochs": float(epochs),
        "data": {**data, "split": train, "holdout": 0.1},
        "eval_data": {"held_out": 0.1},
        "test_data": {"split": test},
        "templates": (prompt,),
    }


def get_config() -> ConfigDict:
    recipe = {
        "name": "adamw",
        "lr": 1e-5,
        "weight_decay": 0.1,
        "decay": ("",),
        "clip": 1.0,
        "schedule": "cosine",
        "warmup": 500,
    }
    clip = study(
        title="CLIP on eight data sets",
        note="The protocol of Ilharco et al. 2022: one encoder, frozen zero-shot heads, one coefficient for all tasks.",
        base={"source": "openai/clip-vit-base-patch32"},
        head={"kind": "zero_shot"},
        common={
            "batch_size": BATCH,
            "model": {"dtype": "bfloat16", "param_dtype": "float32"},
            "optimizer": recipe,
            "checkpoint": {"every": 500},
            "log": {"every": 50},
        },
        tasks={name: task(*values) for name, values in DATASETS.items()},
        # As in arXiv:2305.12827 the image encoder is linearized, and what normalises its features stays as it is.
        methods={
            "full": {"method": {"name": "full"}},
            "linear": {"method": {"name": "linearized", "until": "features"}},
            "posthoc": {"of": "full", "forward": "linearized", "until": "features"},
        },
    )
    return collection("Eight tasks with CLIP", clip=clip)
