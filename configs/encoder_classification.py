"""Classification of texts with an encoder (BERT, RoBERTa, DistilBERT ...), all weights and a new head.

    jft train --config=configs/encoder_classification.py --workdir=runs/cls --config.data.files=train.csv \
        --config.eval_data.files=test.csv --config.data.classes='("negative", "positive")' \
        --config.eval_data.classes='("negative", "positive")'
    jft eval --workdir=runs/cls

The CSV files have columns "text" and "label", a label being a class name or its index. Learning rate, batch size and
three to four epochs are those recommended for BERT (Devlin et al. 2018, arXiv:1810.04805, appendix A.3).
BitFit trains the biases and the head: --config.method.name=bitfit --config.method.also='("^classifier/",)'
--config.optimizer.lr=1e-3.
"""

from ml_collections import ConfigDict

from jft.train.config import default


def get_config() -> ConfigDict:
    config = default()
    config.steps, config.batch_size = 3000, 32
    config.model.source = "google-bert/bert-base-uncased"
    config.model.classes = -1
    data = {
        "source": "csv",
        "task": "classification",
        "text": "text",
        "label": "label",
        "classes": 2,
        "max_length": 128,
    }
    config.data = {**data, "files": "train.csv"}
    config.eval_data = {**data, "files": "test.csv"}
    config.eval.every = 500
    config.optimizer.lr, config.optimizer.weight_decay = 2e-5, 0.01
    config.optimizer.schedule, config.optimizer.warmup = "linear", 300
    config.checkpoint.every = 500
    return config
