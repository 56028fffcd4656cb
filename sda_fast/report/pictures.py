"""Images side by side: as one labelled PNG, and as a table of pictures for the report."""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sda_fast.files import write_bytes

Pixels = NDArray[np.uint8]
INK, PAPER = (28, 28, 30), (255, 255, 255)
MARGIN, GAP, FONT_SIZE, LABEL_WIDTH, LONGEST_WORD = 12, 6, 14, 150, 40


@dataclass(frozen=True)
class Picture:
    """One image of a picture table: uint8 [H, W, 3], what it shows in words, and a line below it.

    `right` says whether the prediction that `label` names is right; None where it is no prediction.
    """

    pixels: Pixels
    alt: str
    label: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class PictureTable:
    """Pictures in titled columns and rows, every row as long as `columns`."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Picture, ...]], ...]
    note: str = ""


def table_grid(table: PictureTable, path: str | os.PathLike[str]) -> Path:
    """A picture table as one PNG, by `picture_grid`; small patches are enlarged to about 96 pixels."""
    columns = [(title, [row[i].pixels for _, row in table.rows]) for i, title in enumerate(table.columns)]
    largest = max(max(image.shape[:2]) for _, images in columns for image in images)
    return picture_grid(columns, [title for title, _ in table.rows], path, scale=max(1, 96 // largest))


def picture_grid(
    columns: Sequence[tuple[str, Sequence[Pixels]]],
    row_titles: Sequence[str],
    path: str | os.PathLike[str],
    scale: int = 3,
) -> Path:
    """Write a PNG of images side by side: one (title, images) per column, one row title per image.

    Images are uint8 [H, W, 3], of any sizes, enlarged `scale` times by nearest neighbour so that every pixel
    of a 32x32 patch can be seen as it is. Raises ValueError for other arrays or if a column's length differs
    from the number of row titles.
    """
    _check_grid(columns, row_titles, scale)
    font = _font()
    rows = range(len(row_titles))
    widths = [scale * max(image.shape[1] for image in images) for _, images in columns]
    heights = [scale * max(images[row].shape[0] for _, images in columns) for row in rows]
    titles = [_wrapped(title, font, width) for (title, _), width in zip(columns, widths, strict=True)]
    labels = [_wrapped(title, font, LABEL_WIDTH) for title in row_titles]
    line = _line_height(font)
    widths = [max(w, _text_width(title, font)) for w, title in zip(widths, titles, strict=True)]
    heights = [max(h, line * len(label)) for h, label in zip(heights, labels, strict=True)]
    label_width = max(_text_width(label, font) for label in labels)
    lefts = _offsets(MARGIN + (label_width + 2 * GAP if label_width else 0), widths)
    title_height = line * max(map(len, titles))
    tops = _offsets(MARGIN + title_height + GAP, heights)

    canvas = Image.new("RGB", (lefts[-1] - GAP + MARGIN, tops[-1] - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, (_, images) in enumerate(columns):
        centre = lefts[column] + widths[column] // 2
        bottom_aligned = MARGIN + title_height - line * len(titles[column])
        _draw_lines(draw, titles[column], (centre, bottom_aligned), font, anchor="ma")
        for row in rows:
            image = images[row].repeat(scale, axis=0).repeat(scale, axis=1)
            left = centre - image.shape[1] // 2
            canvas.paste(Image.fromarray(image), (left, tops[row] + (heights[row] - image.shape[0]) // 2))
    for row in rows:
        middle = tops[row] + (heights[row] - line * len(labels[row])) // 2
        _draw_lines(draw, labels[row], (MARGIN + label_width, middle), font, anchor="ra")
    stream = io.BytesIO()
    canvas.save(stream, "PNG")
    return write_bytes(stream.getvalue(), path)


def _check_grid(columns: Sequence[tuple[str, Sequence[Pixels]]], row_titles: Sequence[str], scale: int) -> None:
    if not columns or not row_titles:
        raise ValueError("a picture grid needs at least one column and one row")
    if scale < 1 or int(scale) != scale:
        raise ValueError(f"scale must be a whole number of at least 1, not {scale}")
    for title, images in columns:
        if len(images) != len(row_titles):
            raise ValueError(f"column {title!r} has {len(images)} images for {len(row_titles)} rows")
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise ValueError(f"column {title!r}: images must be uint8 [H, W, 3], not {image.dtype} {image.shape}")


def _font() -> ImageFont.FreeTypeFont:
    """The sans-serif font that comes with matplotlib: the same labels on every machine, accents included."""
    import matplotlib

    folder = Path(matplotlib.get_data_path())
    return ImageFont.truetype(folder / "fonts/ttf/DejaVuSans.ttf", FONT_SIZE)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces and, within a word too wide for a line, after _ / -.

    A part that is still wider has a line of its own, cut to LONGEST_WORD characters.
    """
    lines = [""]
    for word in "".join(c if c.isprintable() else " " for c in text).split():
        parts = [word] if font.getlength(word) <= width else re.findall(r"[^_/-]*[_/-]+|[^_/-]+", word)
        space = " " if lines[-1] else ""
        for part in parts:
            if len(part) > LONGEST_WORD:
                part = part[: LONGEST_WORD - 1] + "…"
            if font.getlength(lines[-1] + space + part) <= width:
                lines[-1] += space + part
            else:
                lines.append(part)
            space = ""
    return lines[1:] if len(lines) > 1 and not lines[0] else lines


def _text_width(lines: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    return max(int(np.ceil(font.getlength(line))) for line in lines)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent


def _offsets(start: int, sizes: Sequence[int]) -> list[int]:
    """Where each of consecutive boxes begins, GAP apart, and lastly where a further one would."""
    offsets = [start]
    for size in sizes:
        offsets.append(offsets[-1] + size + GAP)
    return offsets


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    at: tuple[int, int],
    font: ImageFont.FreeTypeFont,
    anchor: str,
) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * _line_height(font)), line, INK, font, anchor)
