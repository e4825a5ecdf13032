"""Images of prompts beside the records that name them."""

import hashlib
import os
from pathlib import Path

from PIL import Image


def save_image(image: Image.Image | str, folder: Path) -> str:
    """Path of an image as seen from a folder; one that is no file becomes one there, named by its content.

    Args:
        image: opened, or its path.
        folder: of the records.

    Raises:
        OSError: the disk is full, or gone.
    """
    if isinstance(image, str):
        return os.path.relpath(os.path.realpath(image), os.path.realpath(folder))
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    content = f"{image.mode} {image.size}".encode() + image.tobytes()
    file = folder / "images" / f"{hashlib.sha256(content).hexdigest()[:24]}.png"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        part = file.with_name(f".{file.name}")
        with part.open("wb") as target:
            image.save(target, format="PNG")
            target.flush()
            os.fsync(target.fileno())  # before any record names it
        part.replace(file)
    return f"images/{file.name}"
