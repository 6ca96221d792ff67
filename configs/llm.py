"""Language models as a user of the hub starts them: a model and a method by name.

    jft train --config=configs/llm.py:qwen2.5-0.5b,lora --workdir=runs/qwen --config.data.files=chat.jsonl
    jft train --config=configs/llm.py:llama-3.1-8b,full --workdir=gs://BUCKET/llama --config.mesh.fsdp=-1

chat.jsonl has {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]} on each line; the
model's own chat template renders it and the loss is over the assistant's turns. Without a method: LoRA. Other data, as
configs/decoder_sft.py shows, go in by --config.data.KEY. Weights are bfloat16, what trains has float32 masters.
"""

from ml_collections import ConfigDict

from jft.train.config import default

MODELS = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "gemma-2-2b": "google/gemma-2-2b-it",
    "gemma-3-1b": "google/gemma-3-1b-it",
}
# preset and learning rate; low-rank factors take about ten times the rate of full fine-tuning.
METHODS = {
    "full": ({"name": "full"}, 1e-5),
    "lora": ({"name": "lora", "rank": 16, "alpha": 32.0}, 1e-4),
}


def get_config(which: str = "qwen2.5-0.5b,lora") -> ConfigDict:
    model, _, method = which.partition(",")
    method = method or "lora"
    for name, known in ((model, MODELS), (method, METHODS)):
        if name not in known:
            raise ValueError(f"configs/llm.py:{which}: {name!r} is not one of {', '.join(known)}")
    config = default()
    config.steps, config.batch_size, config.accumulate = 1000, 32, 4
    config.model.source = MODELS[model]
    config.model.dtype = config.model.param_dtype = "bfloat16"
    config.model.remat = "full"
    config.data = {
        "source": "jsonl",
        "files": "chat.jsonl",
        "task": "sft",
        "messages": "messages",
        "max_length": 2048,
        "pack": "first_fit",
    }
    options, config.optimizer.lr = METHODS[method]
    config.method = options
    config.optimizer.schedule, config.optimizer.warmup, config.optimizer.end = "cosine", 50, 0.1
    config.checkpoint.every = 200
    return config
