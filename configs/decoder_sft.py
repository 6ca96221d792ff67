"""Supervised fine-tuning of a decoder on prompt-response pairs, by default with LoRA.

    jft train --config=configs/decoder_sft.py --workdir=runs/sft --config.data.files=train.jsonl
    jft export --workdir=runs/sft --out=runs/sft/hf

train.jsonl has a JSON object a line with "prompt" and "response" (other names: --config.data.prompt=question). The hub's
data sets: --config.data.source=hf --config.data.name=ORG/NAME --config.data.split=train. Evaluation is on a fiftieth of the
same data that training leaves out (another file: --config.eval_data.files=test.jsonl --config.eval_data.held_out=None
--config.data.holdout=None). The loss is over responses alone.
Expect one task vector of a few MB in the workdir; `jft export` writes the merged model for transformers.
"""

from ml_collections import ConfigDict

from jft.train.config import default


def get_config() -> ConfigDict:
    config = default()
    config.steps, config.batch_size = 1000, 16
    config.model.source = "Qwen/Qwen2.5-0.5B"
    config.model.dtype = config.model.param_dtype = "bfloat16"
    config.model.remat = "dots"
    config.data = {
        "source": "jsonl",
        "files": "train.jsonl",
        "task": "sft",
        "prompt": "prompt",
        "response": "response",
        "max_length": 1024,
        "pack": "first_fit",
        "holdout": 0.02,
    }
    # The same data, of which these are the rows that training leaves out.
    config.eval_data = {"held_out": 0.02}
    config.eval.every = 200
    config.method = {"name": "lora", "rank": 16, "alpha": 32.0}
    config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup = 2e-4, "cosine", 50
    config.checkpoint.every = 200
    return config
