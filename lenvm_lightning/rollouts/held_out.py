"""Which prompts are held out: those whose split says so, or a share by a hash of their id, whatever their order."""

import zlib

_HELD_OUT = ("test", "val", "dev", "eval")


def role_of(split: str | None) -> str | None:
    """Whether a split of this name is for ``train`` or ``test``; None where its name does not say."""
    if split is None:
        return None
    return "test" if split.startswith(_HELD_OUT) else "train" if split.startswith("train") else None


def is_held_out(prompt_id: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out ``share`` (in [0, 1]) of all prompts."""
    return zlib.crc32(prompt_id.encode()) % 10_000 < share * 10_000
