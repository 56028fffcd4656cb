"""PNG pictures: a labelled grid of image patches, and bar charts of accuracy."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sda_fast.files import write_bytes
from sda_fast.report.results import ModelResults, by_model
from sda_fast.statistics import Row

Pixels = NDArray[np.uint8]
INK, PAPER = (28, 28, 30), (255, 255, 255)
MARGIN, GAP, FONT_SIZE, LABEL_WIDTH, LONGEST_WORD = 12, 6, 14, 150, 40

# Okabe and Ito's palette, told apart with any colour vision; its black and yellow are left out, the one
# hiding the error bars and the other too faint on white.
COLOURS = ("#999999", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00")
HATCHES = ("", "///", "...", "xxx")  # a further method takes the colours again, hatched


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


def accuracy_bars(rows: Sequence[Row], path: str | os.PathLike[str], chance: float | None = None) -> Path:
    """Write a PNG bar chart: one panel per model, one group of bars per corruption, one bar per method.

    Error bars are 95 % intervals; the mean over corruptions stands apart on the right. `chance`, a fraction,
    adds a dashed line at the accuracy of guessing. Raises ValueError without rows or for duplicate rows.
    """
    from matplotlib.figure import Figure  # slow to import; and without pyplot, which keeps global state

    models = by_model(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    groups = max(len(results.columns) + 1 for results in models)
    width = min(20.0, max(6.4, 1.2 + groups * (0.25 + 0.09 * len(methods))))
    figure = Figure(figsize=(width, 1.0 + 2.5 * len(models)), dpi=150, layout="constrained")
    panels = figure.subplots(len(models), 1, squeeze=False, sharey=True)[:, 0]
    for axes, results in zip(panels, models, strict=True):
        _bar_panel(axes, results, methods, chance)
        if results is not models[-1] and results.columns == models[-1].columns:
            axes.tick_params(labelbottom=False)  # the lowest panel names the groups for all
    bars = [patches for patches in panels[0].containers if hasattr(patches, "patches")]
    handles = [*bars, *panels[0].lines[-1:]] if chance is not None else bars
    names = [handle.get_label() for handle in handles]
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 6), frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return write_bytes(stream.getvalue(), path)


def _bar_panel(axes: Any, results: ModelResults, methods: Sequence[str], chance: float | None) -> None:
    """Draw one model. Methods it lacks keep their place and their colour, so that panels compare."""
    labels = [_clean(results.label(column)) for column in results.columns]
    has_mean = len(results.corrupted) > 1
    positions = np.arange(len(labels) + has_mean, dtype=float)
    if has_mean:
        labels.append("mean")
        positions[-1] += 0.4
        axes.axvline(positions[-1] - 0.7, color="#bbbbbb", linewidth=0.8)
    width = 0.84 / len(methods)
    for i, method in enumerate(methods):
        cells = [results.cells.get((method, column)) for column in results.columns]
        values = [(c["accuracy"], c["low"], c["high"]) if c else (np.nan,) * 3 for c in cells]
        if has_mean:
            mean = results.mean(method) if method in results.methods else None
            values.append((mean.mean, mean.low, mean.high) if mean else (np.nan,) * 3)
        accuracy, low, high = 100 * np.array(values).T
        axes.bar(
            positions + (i - (len(methods) - 1) / 2) * width,
            accuracy,
            width * 0.92,
            label=_clean(method),
            color=COLOURS[i % len(COLOURS)],
            hatch=HATCHES[i // len(COLOURS) % len(HATCHES)],
            yerr=np.maximum(0, [accuracy - low, high - accuracy]),  # the mean's rounding may be a hair below 0
            error_kw={"elinewidth": 0.9, "capsize": 1.8, "capthick": 0.9, "ecolor": "#222222"},
        )
    if chance is not None:
        axes.axhline(100 * chance, color="#222222", linewidth=0.9, linestyle="--", label="chance")
    turned = len(labels) > 5
    axes.set_xticks(positions, labels, rotation=35 if turned else 0, ha="right" if turned else "center")
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(positions[0] - 0.6, positions[-1] + 0.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("accuracy, %")
    axes.set_title(_clean(results.model), loc="left", fontsize="medium", fontweight="bold")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


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


def _clean(text: str) -> str:
    """Without control characters, and with dollar signs escaped, which matplotlib takes for formulas."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


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
