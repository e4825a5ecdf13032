"""What was asked, beside what was answered: the prompts of an evaluation, for whoever looks at single texts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..rollouts.generators.interface import Prompt
from ..utils.locked_folder import write_whole

FILE = "prompts.jsonl"


def write_prompts(folder: Path, by_system: Mapping[str, Sequence[Prompt]]) -> None:
    """Write the prompts of all systems, once for those that were asked the same; nothing where they have images.

    Args:
        folder: of the results.
        by_system: as each was asked.
    """
    systems: dict[int, list[str]] = {}
    for system, prompts in by_system.items():
        systems.setdefault(id(prompts), []).append(system)  # the same object for all that are asked the same
    lines = []
    for names in systems.values():
        for prompt in by_system[names[0]]:
            if prompt.images:
                return
            asked = {"systems": names, "prompt_id": prompt.prompt_id, "messages": prompt.messages}
            lines.append(json.dumps(asked, ensure_ascii=False) + "\n")
    write_whole(folder / FILE, "".join(lines))
