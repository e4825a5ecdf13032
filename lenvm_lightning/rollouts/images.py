"""Images of prompts beside the records that name them."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from ..errors import DataError
from ..utils.images import open_image, open_regular

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def save_image(image: Image.Image | str, folder: Path) -> str:
    """Path of an image as seen from a folder that holds it: one from elsewhere is written there, named by its content.

    So records and images can be moved together, and whoever reads the records opens nothing outside of their folder.

    Args:
        image: opened, or its path.
        folder: of the records.

    Raises:
        OSError: the disk is full, or gone.
        DataError: the file is not there any more.
    """
    if isinstance(image, str):
        found, root = Path(os.path.realpath(image)), Path(os.path.realpath(folder))
        return str(found.relative_to(root)) if found.is_relative_to(root) else _copied(image, folder)
    image = open_image(image, as_rgb=False)
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    content = f"{image.mode} {image.size}".encode() + image.tobytes()
    name = f"{hashlib.sha256(content).hexdigest()[:24]}.png"
    return _written(folder, name, lambda target: image.save(target, format="PNG"))


def _copied(image: str, folder: Path) -> str:
    try:
        source = open_regular(image)
    except (OSError, ValueError) as error:
        raise DataError(f"image {image} was there when the prompts were read, and is not any more: {error}") from error
    with source:
        ending = Path(image).suffix.lower()
        name = hashlib.file_digest(source, "sha256").hexdigest()[:24] + (ending if ending in _ENDINGS else "")
        source.seek(0)
        return _written(folder, name, lambda target: shutil.copyfileobj(source, target))


def _written(folder: Path, name: str, write: Callable[[BinaryIO], None]) -> str:
    """Path of a file as seen from the folder, which is written unless it is there already, and is whole where it is."""
    file = folder / "images" / name
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        part = file.with_name(f".{file.name}")
        with part.open("wb") as target:
            write(target)
            target.flush()
            os.fsync(target.fileno())  # before any record names it
        part.replace(file)
    return f"images/{file.name}"
