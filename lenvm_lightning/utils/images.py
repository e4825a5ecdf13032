"""Images of strangers: which files may be opened, and the one place that opens them."""

import contextlib
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError

MAX_IMAGE_PIXELS = 50_000_000
# Pillow knows many more formats. Some of these start programs (EPS starts Ghostscript), others nobody looks after.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class ImageFolders:
    """Where images may lie that the rows of a data file name by their paths: who wrote the rows is a stranger.

    Attributes:
        home: folder of the data file. Relative paths start here, or at the working directory where there is none.
        allowed: other folders that the user trusts the rows with, see `allowed_folders`.
    """

    home: Path | None
    allowed: tuple[Path, ...] = ()

    @cached_property
    def _roots(self) -> list[Path]:
        homes = [] if self.home is None else [self.home]
        return [Path(os.path.realpath(folder)) for folder in (*homes, *self.allowed)]

    def find(self, path: str) -> str:
        """The real path of an image, with all links followed.

        Args:
            path: as a row names it.

        Raises:
            ValueError: it lies elsewhere; the text says where, and what allows it.
        """
        try:
            real = os.path.realpath((self.home or Path()) / path)
        except ValueError as error:  # a null byte
            raise ValueError(f"image {path!r} is no path: {error}") from error
        if any(Path(real).is_relative_to(root) for root in self._roots):
            return real
        outside = "outside of the folder of the data" if self.home else "and these data have no folder of their own"
        raise ValueError(
            f"image {path} is {real}, {outside}: it is not opened. If the data may have it read, name its folder: "
            "--allow-images-from DIR (in recipes: allow_images_from)"
        )


def allowed_folders(given: str | Sequence[str] | None) -> tuple[Path, ...]:
    """The folders of `allow_images_from`.

    Raises:
        DataError: one of them is none.
    """
    folders = tuple(Path(name).expanduser() for name in ([given] if isinstance(given, str) else given or ()))
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        raise DataError(f"allow_images_from: {', '.join(missing)} is no folder")
    return folders


def opened(image: Image.Image | str | bytes) -> Image.Image | str:
    """An image or its path, where it may be the content of a file.

    Raises:
        ValueError: see `open_image`.
    """
    return open_image(image) if isinstance(image, bytes) else image


def open_image(
    image: Image.Image | str | bytes, max_pixels: int = MAX_IMAGE_PIXELS, *, as_rgb: bool = True
) -> Image.Image:
    """An image as people see it: upright, whatever its EXIF data say of how the camera was held, with 8 bits a channel.

    Args:
        image: opened already, a path, or the content of a file. Files are of one of the `FORMATS`, by their content
            and not by their name.
        max_pixels: width times height above which it is refused before it is decoded.
        as_rgb: as RGB; False = as it is, transparency and all.

    Returns:
        A loaded copy. 16 bits are scaled to 8.

    Raises:
        ValueError: missing, no regular file, of another format, broken, of more than `max_pixels`, or with pixels
            whose range nobody knows; the text says which.
    """
    name = "image" if isinstance(image, Image.Image | bytes) else f"image {image}"
    with contextlib.ExitStack() as opened:
        try:
            if not isinstance(image, Image.Image):
                file = io.BytesIO(image) if isinstance(image, bytes) else opened.enter_context(open_regular(image))
                image = Image.open(file, formats=FORMATS)
            elif image.format == "EPS":  # opened, but not decoded yet
                raise ValueError("EPS is a program, and nobody runs it here")
            width, height = image.size
            if width * height <= max_pixels:
                image = _in_8_bits(_upright(image))
                return image.convert("RGB") if as_rgb else image
        except FileNotFoundError as error:
            raise ValueError(f"{name} does not exist") from error
        except Exception as error:  # decoders of broken files raise whatever their format makes of it
            raise ValueError(f"{name} cannot be read: {_said(error)}") from error
    raise ValueError(f"{name} has {width}x{height} pixels, more than {max_pixels:,}")


def open_regular(path: str) -> io.BufferedReader:
    """Open a file for reading, and nothing that only looks like one: a pipe would keep its reader waiting for ever.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is a folder, a pipe, a device or the like.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError("it is no regular file")
    return os.fdopen(file, "rb")


def _upright(image: Image.Image) -> Image.Image:
    """A loaded copy, turned as its EXIF data say; where these are broken they say nothing."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the parser of EXIF data raises whatever it stumbles over; the pixels are fine
        return image.copy()


def _in_8_bits(image: Image.Image) -> Image.Image:
    """With 8 bits a channel. Pillow itself cuts larger values off: all but the darkest grey turns white.

    Raises:
        ValueError: 32 bits: nobody says which value is white.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65,535 becomes 255
    if image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "fractions"
        raise ValueError(f"its pixels are {kind} of 32 bits, and nobody says which is white: save it with 8 or 16 bits")
    return image


def _said(error: Exception) -> str:
    """What an error says; its kind where that is nothing for people."""
    if isinstance(error, Image.UnidentifiedImageError):
        return f"it is no image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    speaks = type(error) is ValueError or isinstance(error, Image.DecompressionBombError)
    return str(error) if speaks else f"{type(error).__name__}: {error}"
