"""What was asked, beside what was answered: the prompts of an evaluation, for whoever looks at single texts."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..rollouts.generators.interface import Prompt
from ..utils.locked_folder import write_whole

FILE = "prompts.jsonl"


def write_prompts(folder: Path, by_system: Mapping[str, Iterable[Prompt]]) -> None:
    """Write the prompts of all systems, each once for those that were asked the same.

    Args:
        folder: of the results.
        by_system: as each was asked. Images are left out, and only said to have been there.
    """
    lines: dict[str, dict[str, object]] = {}
    for system, prompts in by_system.items():
        for prompt in prompts:
            asked = {"prompt_id": prompt.prompt_id, "messages": prompt.messages, "images": len(prompt.images)}
            line = lines.setdefault(json.dumps(asked), {"systems": [], **asked})
            line["systems"].append(system)  # type: ignore[attr-defined]
    write_whole(folder / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values()))
