"""Which prompts are held out: decided by a hash of their id, so that the answer never depends on their order."""

import zlib


def is_held_out(prompt_id: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out ``share`` (in [0, 1]) of all prompts."""
    return zlib.crc32(prompt_id.encode()) % 10_000 < share * 10_000
