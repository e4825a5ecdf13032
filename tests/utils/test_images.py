"""Images of strangers: formats that are known, pixels as people see them, and a sentence for everything else."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lenvm_lightning.errors import DataError
from lenvm_lightning.utils.images import FORMATS, ImageFolders, allowed_folders, open_image, open_regular

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n"


def as_file(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """What tells whether a program called gs was started."""
    (tmp_path / "bin").mkdir()
    program, started = tmp_path / "bin" / "gs", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return started


# -- what is seen -----------------------------------------------------------------------------------------------------


def test_images_are_rgb_opened_or_not(tmp_path):
    grey = Image.new("L", (3, 2), 7)
    grey.save(tmp_path / "grey.png")
    for given in (grey, str(tmp_path / "grey.png"), (tmp_path / "grey.png").read_bytes()):
        found = open_image(given)
        assert (found.mode, found.size, found.getpixel((0, 0))) == ("RGB", (3, 2), (7, 7, 7))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_known_format_is_read_whatever_its_name(tmp_path, kind):
    (tmp_path / "a.dat").write_bytes(as_file(Image.new("RGB", (8, 8), "red"), kind))
    red, green, blue = open_image(str(tmp_path / "a.dat")).getpixel((3, 3))
    assert red > 250
    assert max(green, blue) < 5


def test_transparency_stays_where_it_is_wanted():
    see_through = as_file(Image.new("RGBA", (2, 2), (1, 2, 3, 4)))
    assert open_image(see_through, as_rgb=False).getpixel((0, 0)) == (1, 2, 3, 4)
    assert open_image(see_through).getpixel((0, 0)) == (1, 2, 3)


def test_16_bits_are_scaled_to_8():
    grey = np.array([[0, 128, 129, 257, 25_700, 65_535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        found = np.asarray(open_image(as_file(Image.fromarray(grey), kind)))
        assert found[0, :, 0].tolist() == [0, 0, 1, 1, 100, 255]
    assert open_image(Image.fromarray(grey), as_rgb=False).mode == "L"


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "fractions"), (np.int32, "whole numbers")])
def test_pixels_of_no_known_range_are_refused(dtype, kind):
    image = Image.fromarray(np.linspace(0, 1, 6, dtype=dtype).reshape(2, 3))
    for given in (image, as_file(image, "TIFF")):
        with pytest.raises(ValueError, match=f"image cannot be read: its pixels are {kind} of 32 bits.*8 or 16 bits"):
            open_image(given)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_are_turned_as_the_camera_was_held(tmp_path, kind):
    image = Image.new("RGB", (16, 8), "black")
    image.paste("white", (0, 0, 8, 8))  # left
    exif = image.getexif()
    exif[0x0112] = 6  # its right edge is down: a quarter turn clockwise
    (tmp_path / "a").write_bytes(as_file(image, kind, exif=exif))
    for given in (str(tmp_path / "a"), Image.open(tmp_path / "a")):
        found = open_image(given)
        assert found.size == (8, 16)
        assert [found.getpixel((4, y))[0] > 128 for y in (3, 12)] == [True, False]
        assert open_image(found).size == (8, 16)  # once, not twice


def test_broken_exif_data_say_nothing():
    for broken in (b"Exif\0\0nothing of the kind", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 40):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert open_image(as_file(Image.new("RGB", (4, 2)), "JPEG", exif=broken)).size == (4, 2)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_images_that_cannot_be_are_named(tmp_path):
    whole = as_file(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)))
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "large.png").write_bytes(as_file(Image.new("RGB", (3, 2))))
    for name, words in (
        ("gone.png", r"gone\.png does not exist"),
        ("torn.png", r"torn\.png cannot be read: it is no image of a known format \(PNG, JPEG,"),
        ("half.png", r"half\.png has 40x40 pixels, more than 5"),
        ("large.png", r"large\.png has 3x2 pixels, more than 5"),
        ("null\0.png", "cannot be read: embedded null byte"),
        ("x" * 300, "cannot be read: File name too long"),
    ):
        with pytest.raises(ValueError, match=words):
            open_image(str(tmp_path / name), max_pixels=5)
    with pytest.raises(ValueError, match=r"half\.png cannot be read: image file is truncated"):
        open_image(str(tmp_path / "half.png"))
    assert open_image(str(tmp_path / "large.png"), max_pixels=6).size == (3, 2)


def test_too_many_pixels_are_refused_before_they_are_decoded():
    for size, words in (
        ((9_000, 9_000), "9000x9000 pixels, more than 50,000,000"),
        ((14_000, 14_000), "196000000 pixels"),
    ):
        with pytest.raises(ValueError, match=words):
            open_image(as_file(Image.new("1", size)))
    texts = PngImagePlugin.PngInfo()
    texts.add_text("a", "x" * 3_000_000, zip=True)
    with pytest.raises(ValueError, match="cannot be read: Decompressed data too large"):
        open_image(as_file(Image.new("RGB", (2, 2)), pnginfo=texts))


@pytest.mark.parametrize("ending", [".png", ".eps", ""])
def test_ghostscript_is_never_started(tmp_path, ghostscript, ending):
    (tmp_path / f"a{ending}").write_bytes(EPS)
    for given in (str(tmp_path / f"a{ending}"), EPS):
        with pytest.raises(ValueError, match="it is no image of a known format"):
            open_image(given)
    with pytest.raises(ValueError, match="EPS is a program"):
        open_image(Image.open(tmp_path / f"a{ending}"))
    assert not ghostscript.exists()


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="cannot be read: it is no regular file"):
            open_image(str(path))
    with pytest.raises(ValueError, match="it is no regular file"):
        open_regular(str(tmp_path))


# -- where they may lie -----------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder of data with an image and links, and a private one beside it."""
    for folder in ("data/in", "private", "data-of-others"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / folder / "a.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "private" / "a.png")
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "private")
    (tmp_path / "data" / "inside.png").symlink_to("in/a.png")
    (tmp_path / "data" / "deep").symlink_to(tmp_path / "private" / "..")
    (tmp_path / "other-name").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("home", ["data", "other-name", "data/../data", "data/in/.."])
def test_images_beside_their_data_are_found(places, home):
    real = str(places / "data" / "in" / "a.png")
    for start in (Path(home), places / home):
        folders = ImageFolders(start)
        for path in ("in/a.png", "inside.png", "in/../in/./a.png", "../data/in/a.png", real, "folder/../data/in/a.png"):
            assert folders.find(path) == real
        assert folders.find("in/gone.png") == str(places / "data" / "in" / "gone.png")  # opening it says that it is not


@pytest.mark.parametrize(
    "path",
    [
        "/etc/hostname", "../private/a.png", "in/../../private/a.png", "link.png", "folder/a.png", 
        "folder/../private/a.png", "deep/private/a.png", "../data-of-others/a.png", "..", "/", "~/a.png/../../../x",
    ],
)  # fmt: skip
def test_images_elsewhere_are_named_with_what_allows_them(places, path):
    for start in (Path("data"), places / "data"):
        with pytest.raises(
            ValueError, match=r"^image .* is /.*, outside of the folder of the data: .*--allow-images-from DIR"
        ) as told:
            ImageFolders(start).find(path)
        assert f"image {path} is " in str(told.value)
    assert ImageFolders(Path("data"), (Path("/"),)).find(path)


def test_folders_can_be_allowed(places):
    private = str(places / "private" / "a.png")
    for given in ("private", ["private"], [str(places / "data" / "folder"), "data-of-others"]):
        folders = ImageFolders(Path("data"), allowed_folders(given))
        assert folders.find("link.png") == folders.find("../private/a.png") == folders.find(private) == private
    assert allowed_folders(None) == ()
    with pytest.raises(DataError, match=r"allow_images_from: nowhere, data/in/a\.png is no folder"):
        allowed_folders(["private", "nowhere", "data/in/a.png"])


def test_data_without_a_folder_have_only_those_that_are_allowed(places):
    with pytest.raises(ValueError, match="and these data have no folder of their own"):
        ImageFolders(None).find("data/in/a.png")
    assert ImageFolders(None, (Path("data"),)).find("data/in/a.png") == str(places / "data" / "in" / "a.png")
    with pytest.raises(ValueError, match=r"is no path: .*null byte"):
        ImageFolders(Path("data")).find("a\0b")
