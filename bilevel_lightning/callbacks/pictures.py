"""Rows of small images with a line of text above each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

GAP = 0.12


class Picture(NamedTuple):
    """One image, (channels, height, width) with values in [0, 1], and the text above it."""

    image: Tensor
    text: str
    color: str


def draw(rows: Sequence[Sequence[Picture]], title: str, *, cmap: str, size: tuple[float, float]) -> Figure:
    """Draws rows of pictures.

    All lie in one pair of axes: as many axes as images take much longer to draw.

    Args:
        rows: the pictures; rows may differ in length.
        title: one line above all.
        cmap: matplotlib's colour map for images of one channel.
        size: width and height of one picture with its text, in inches.
    """
    columns, height = max(map(len, rows)), size[1] / size[0]  # in widths of an image with its gap
    figure = Figure(figsize=(size[0] * columns + 0.4, size[1] * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title, size=10)
    axes: Any = figure.subplots()
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            pixels = picture.image.permute(1, 2, 0).squeeze(-1).numpy()
            bottom = -height * i
            axes.imshow(pixels, cmap=cmap, vmin=0, vmax=1, extent=(j, j + 1 - GAP, bottom, bottom + 1 - GAP))
            place = (j + (1 - GAP) / 2, bottom + 1 - 0.8 * GAP)
            axes.text(*place, picture.text, size=9, color=picture.color, ha="center", va="bottom")
    axes.set(xlim=(-GAP, columns), ylim=(-height * (len(rows) - 1) - GAP, height))
    axes.axis("off")
    return figure
