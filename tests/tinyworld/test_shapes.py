import pytest
from sums import assert_solutions_are_right

from lenvm_lightning.tinyworld import shapes


def test_solutions_are_right():
    assert_solutions_are_right(shapes)


def test_image_shows_the_things():
    things = (shapes.Thing("red", "square", "large", 0, 2), shapes.Thing("blue", "circle", "small", 1, 0))
    image = shapes.paint(shapes.ShapesProblem(3, things, "count"))
    assert image.size == (84, 84)
    assert image.getpixel((70, 14)) == shapes.COLORS["red"]
    assert image.getpixel((60, 4)) == shapes.COLORS["red"]
    assert image.getpixel((14, 42)) == shapes.COLORS["blue"]
    assert image.getpixel((4, 32)) == image.getpixel((42, 42)) == (255, 255, 255)


def test_digits_look_different():
    def paint(digit: int) -> bytes:
        return shapes.paint(shapes.ShapesProblem(3, (shapes.Thing("red", str(digit), "small", 0, 0),), "sum")).tobytes()

    assert len({paint(digit) for digit in range(10)}) == 10


@pytest.mark.parametrize(("form", "target", "answer"), [
    ("count", (), "3"), ("count", ("red",), "2"), ("count", ("triangle",), "0"), ("count", ("large",), "1"),
    ("more", ("red", "blue"), "red"), ("more", ("blue", "red"), "red"), ("more", ("green", "yellow"), "equal"),
])  # fmt: skip
def test_answers_about_shapes(form, target, answer):
    things = (
        shapes.Thing("red", "square", "large", 0, 0),
        shapes.Thing("red", "circle", "small", 0, 1),
        shapes.Thing("blue", "circle", "small", 2, 2),
    )
    assert shapes.ShapesProblem(3, things, form, target).answer == answer


def test_sum_of_digits():
    things = tuple(shapes.Thing("red", digit, "small", 0, i) for i, digit in enumerate("352"))
    assert shapes.ShapesProblem(3, things, "sum").answer == "10"
