"""What Lightning says that nobody asked, kept off the screen."""

import logging
import os
import warnings

import torch

_TALKATIVE = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
)
_UNASKED = (
    "litlogger",
    "litmodels",
    "TPU available",
    "GPU available",
    "Seed set to",
    "`weights_only` was",
    "Loading `",
)


def quieten() -> None:
    """Leave the screen to what matters: what we print, warnings that need an answer, the progress bar."""
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    if not torch.cuda.is_available():  # where DeepSpeed is installed, transformers imports it to save any model
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it says that it found no other
    for text in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # on_train_start sets the mode right after
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Trying to infer the `batch_size`.*",
        ".*`ModelCheckpoint`.*",
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # nobody changes logits in place
        ".*on epoch level in distributed setting to accumulate the metric.*",  # the metrics are summed over ranks
    ):
        warnings.filterwarnings("ignore", message=text)
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_not_advertising)


def _not_advertising(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _UNASKED)
