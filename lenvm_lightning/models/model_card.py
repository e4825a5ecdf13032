"""The model card of a value model directory: its README.md, with the metrics of its run where the hub looks for them.

Front matter is built with huggingface_hub, whose `model-index` lists what was measured on which data.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from ..errors import CheckpointError
from ..metrics import POSITION_NAMES
from ..utils.plain_yaml import parse_yaml
from ..utils.reading import first_line
from . import embedded
from .hub_files import Source, find_file
from .lenvm_config import LenVMConfig

CARD_FILE = "README.md"
_LICENSE_OF_EMBEDDED = "apache-2.0"  # that of this package, which their weights come with
_NAMED = 3  # generators in the name of the data


def model_card(
    config: LenVMConfig,
    *,
    metrics: Mapping[str, float] | None = None,
    details: str = "",
    license: str | None = None,
) -> ModelCard:
    """A card for a value model.

    Args:
        config: what the model remembers of its training.
        metrics: errors on held-out completions by name, such as `mae_tokens/start` and `mre`; None where none are
            known.
        details: Markdown to end with, such as tables and settings.
        license: identifier such as `apache-2.0`. Where None, that of the backbone if it says so, and none otherwise:
            weights that were trained further stay under the terms of those they come from.
    """
    backbone = config.backbone or "an unknown backbone"
    generators = config.rollouts.get("generators", {})
    notice = next(filter(None, (embedded.notice(name) for name in generators)), None)
    title = f"Length value model on {backbone}"
    data = ModelCardData(
        library_name="lenvm-lightning",
        license=license or (_license_of(config.backbone) if config.backbone else None),
        base_model=config.backbone if config.backbone and _is_hub_id(config.backbone) else None,
        tags=["length-value-model", *(["tiny-world"] if notice else [])],
        model_name=title,
        eval_results=_eval_results(metrics or {}, list(generators), notice) or None,
    )
    if data.eval_results is None:
        del data.model_name  # it is the name of a model-index that is not there
    counted = "how many tokens of the completion are still to come (EOS included)"
    if config.until is not None:
        counted = f"how many tokens are left to the one that completes {_quoted(config.until)}, not to the end"
    quoted = f"> {notice}\n\n" if notice else ""
    text = f"""# {title}

{quoted}Predicts at every token {counted}, for the
generator and the sampling settings of its training rollouts (see `lenvm_config.json`).

```python
from lenvm_lightning import LengthValueModel
lenvm = LengthValueModel.from_pretrained("path/to/this/directory")
remaining = lenvm.remaining(lenvm(input_ids=ids, attention_mask=mask))  # (B, T) tokens
```

{details}"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n")


def stored_card(source: Source) -> ModelCard | None:
    """The card of a model directory or hub repository as it stands there; None where it has none.

    Raises:
        CheckpointError: its front matter cannot be read.
    """
    path = find_file(source, CARD_FILE)
    if path is None:
        return None
    _front_matter(path)  # what is too much for us is too much for the hub's reader, too
    try:
        return ModelCard(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # entries of a wrong type, which the hub's reader takes as they are
        raise _unreadable(path, error) from error


def _front_matter(path: Path) -> dict[str, Any]:
    """What stands between the two `---` at the top of a card; empty where nothing does.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        block = REGEX_YAML_BLOCK.search(path.read_text(encoding="utf-8-sig"))
        found = parse_yaml(block[2]) if block is not None else None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if found is not None and not isinstance(found, dict):
        raise _unreadable(path, ValueError(f"it must be a mapping, found {type(found).__name__}"))
    return found or {}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the front matter of {path} cannot be read: {first_line(error)} Correct or delete that file."
    )


def _eval_results(metrics: Mapping[str, float], generators: list[str], notice: str | None) -> list[EvalResult]:
    """Prompt-boundary MRE and the MAE in tokens at each position, as far as they were measured."""
    names = {f"mae_tokens/{position}": f"MAE in tokens, {name}" for position, name in POSITION_NAMES.items()}
    names["mre"] = "MRE, prompt boundary"
    writers = ", ".join(generators[:_NAMED]) + (", …" if len(generators) > _NAMED else "")
    dataset = f"held-out completions of {writers or 'an unknown generator'}"
    return [
        EvalResult(
            task_type="length-prediction",
            task_name="Remaining tokens at every token",
            dataset_type="rollouts",
            dataset_name=f"{dataset} ({notice})" if notice else dataset,
            metric_type=key.partition("_")[0],
            metric_name=name,
            metric_value=metrics[key],
        )
        for key, name in names.items()
        if math.isfinite(metrics.get(key, math.nan))
    ]


def _quoted(text: str) -> str:
    """As code in Markdown, on one line."""
    return f"`{json.dumps(text, ensure_ascii=False)[1:-1].replace('`', chr(0x2BB))}`"


def _is_hub_id(source: str) -> bool:
    """Whether a name can be a repository on the hub, and is not a folder here."""
    if "/" not in source or Path(source).exists():
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _license_of(backbone: str) -> str | None:
    """What the card in the backbone's folder says; nothing is asked of the hub."""
    if embedded.is_embedded(backbone):
        return _LICENSE_OF_EMBEDDED
    card = Path(backbone) / CARD_FILE
    try:
        license = _front_matter(card).get("license") if card.is_file() else None
    except CheckpointError as error:  # no reason to lose what was trained
        print(f"note: no licence is known, {error}", file=sys.stderr)
        return None
    return license if isinstance(license, str) else None
