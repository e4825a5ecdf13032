"""Figures without a screen."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(columns: int = 1, width: float = 4.8, height: float = 3.6) -> "tuple[Figure, Any]":
    """Return a figure that no window shows, and its axes: one, or an array of several side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for axis in np.ravel(axes):
        axis.grid(alpha=0.3)
    return figure, axes


def as_png(figure: "Figure") -> bytes:
    """Return a figure as a PNG, the same bytes whenever it shows the same."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def as_pixels(figure: "Figure") -> np.ndarray:
    """Return a figure as pixels. Shape (height, width, 3), uint8."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(as_png(figure))).convert("RGB"))
