"""Classification of texts with an encoder (BERT, RoBERTa, DistilBERT ...), all weights and a new head.

    jft train --config=configs/encoder_classification.py --workdir=runs/cls --config.data.files=train.csv \
        --config.eval_data.files=test.csv
    jft eval --workdir=runs/cls

The CSV files have columns "text" and "label"; the classes are the labels that the training data has. What is set for data
holds for eval_data too. Learning rate, batch size and three epochs are those recommended for BERT (Devlin et al. 2018,
arXiv:1810.04805, appendix A.3). Rows are padded to a few lengths, not to max_length.
BitFit trains the biases and the head: --config.method.name=bitfit --config.method.also='("^classifier/",)'
--config.optimizer.lr=1e-3.
"""

from ml_collections import ConfigDict

from jft.train.config import default


def get_config() -> ConfigDict:
    config = default()
    config.epochs, config.batch_size = 3.0, 32
    config.model.source = "google-bert/bert-base-uncased"
    config.model.classes = -1
    config.data = {
        "source": "csv",
        "files": "train.csv",
        "task": "classification",
        "text": "text",
        "label": "label",
        "max_length": 128,
    }
    config.eval_data = {"files": "test.csv"}
    config.eval.every = 500
    config.optimizer.lr, config.optimizer.weight_decay = 2e-5, 0.01
    config.optimizer.schedule, config.optimizer.warmup = "linear", 300
    config.checkpoint.every = 500
    return config
