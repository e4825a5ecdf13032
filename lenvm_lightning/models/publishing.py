"""Publishing a length value model on the Hugging Face hub, with its model card."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..errors import CheckpointError
from . import adapters
from .hub import push_folder
from .hub_files import Source
from .lenvm_config import LenVMConfig
from .model_card import CARD_FILE, model_card, stored_card
from .processors import load_processor


class Publishing:
    """The card of a model and its way to the hub: a part of `LengthValueModel`, which has what is named here."""

    backbone: PreTrainedModel
    config: LenVMConfig
    source: Source | None
    save_pretrained: Callable[..., None]

    def card(self, license: str | None = None) -> ModelCard:
        """The model card: that of the directory it was loaded from, else one of what the model remembers.

        Args:
            license: what its front matter says of the license; where None, as `model_card` finds it.
        """
        card = stored_card(self.source) if self.source is not None else None
        if card is None:
            return model_card(self.config, license=license)
        if license is not None:
            card.data["license"] = license
        return card

    def push_to_hub(self, repo_id: str, *, processor: Any = None, card: ModelCard | None = None, **options: Any) -> str:
        """Publish it on the Hugging Face hub: what `save_pretrained` writes, with its model card as README.md.

        transformers' mixin of this name is not used: it would put a card of its own in place of the one with the
        metrics, and leave the tokenizer behind.

        Args:
            repo_id: such as `me/my-lenvm`.
            processor: tokenizer or processor to publish with it; where None, the one beside the weights that were
                loaded or trained further, if there is one.
            card: the model card; `card()` where None.
            options: for `push_folder` (private, token, revision, create_pr, commit_message, commit_description).

        Returns:
            Address of the commit.

        Raises:
            CheckpointError: the hub cannot be reached or refuses, or adapters whose base is a folder of this machine.
        """
        if adapters.is_adapted(self.backbone):
            adapters.refuse_local_base(self.backbone, str(self.config.backbone))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, processor or self._processor())
            (card or self.card()).save(Path(folder) / CARD_FILE)
            return push_folder(Path(folder), repo_id, **options)

    def _processor(self) -> Any:
        """Tokenizer or processor of the model it was loaded from, or else trained from; None where there is none."""
        place = self.source or self.config.backbone
        try:
            return load_processor(place) if place is not None else None
        except CheckpointError:  # a published directory may be weights alone
            return None
