"""The report: one self-contained HTML file that needs no network, no script and no other file."""

import base64
import io
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from sda_fast.files import write_bytes
from sda_fast.report.bars import bars_svg, bars_text
from sda_fast.report.pictures import PictureTable, Pixels
from sda_fast.report.results import by_model, first_stream
from sda_fast.report.tables import Table, accuracy_table, stream_tables
from sda_fast.statistics import Row

Png = str | os.PathLike[str] | bytes
Figure = tuple[str, Png] | tuple[str, Png, str]  # caption, picture, and what it shows to those who cannot see it
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Inches of 96 pixels: the page at its full width, and a phone's. A chart is drawn for each, so that nobody has to
# enlarge it or to scroll.
WIDE, NARROW = 10.0, 3.5


def write_report(
    path: str | os.PathLike[str],
    title: str,
    rows: Sequence[Row],
    comparisons: Table | Iterable[Table] = (),
    figures: Iterable[Figure] = (),
    pictures: Iterable[PictureTable] = (),
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    commands: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Path:
    """Write the report and return its path. Parts that are empty are left out.

    rows: of any methods, models, corruptions and streams (`by_model`); each model has a table and bars of its own. Of
    several streams, the first has them, one more table compares the streams and all their tables can be unfolded.
    comparisons: tables of `comparison_table`. figures: (caption, PNG file or its bytes) or, with a text that
    replaces the picture for a reader who cannot see it, (caption, png, text). pictures: tables of images. settings,
    environment: nested dicts, printed by section. Every text is escaped. The file depends on the arguments alone,
    it carries no date. Raises ValueError for a figure that is no PNG or without rows, OSError if a figure cannot be
    read and SdaError if the report cannot be written; then no file is left behind, or the earlier one stays.
    """
    import jinja2  # here and not above: who only wants a table need not wait for it

    embedded = [_figure(figure) for figure in figures]
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("sda_fast.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    main, streams = first_stream(rows), stream_tables(rows)
    page = engine.from_string(source).render(
        title=title,
        accuracies=list(zip(accuracy_table(main, layout="auto"), _charts(main), strict=True)),
        streams=streams,
        by_stream=accuracy_table(rows, layout="auto") if streams else [],
        comparisons=[comparisons] if isinstance(comparisons, Table) else list(comparisons),
        figures=embedded,
        pictures=list(pictures),
        picture_uri=_picture_uri,
        settings=_sections(settings or {}),
        environment=_sections(environment or {}),
        commands=list(commands),
        notes=list(notes),
    )
    return write_bytes(page.encode(), path)


def _charts(rows: Sequence[Row]) -> list[dict[str, str]]:
    """For each model, its bars as data URIs for a wide and a narrow page, and what they show in words."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return [
        {
            "title": results.title,
            "wide": _uri(bars_svg(results, methods, WIDE), "svg+xml"),
            "narrow": _uri(bars_svg(results, methods, NARROW), "svg+xml"),
            "alt": bars_text(results),
        }
        for results in by_model(rows)
    ]


def _picture_uri(pixels: Pixels) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", optimize=True)
    return _uri(stream.getvalue(), "png")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _figure(figure: Figure) -> dict[str, Any]:
    """Caption, alternative text, size in pixels and data URI of one picture."""
    caption, png, *rest = figure
    data = png if isinstance(png, bytes) else Path(png).read_bytes()
    if data[:8] != PNG_SIGNATURE or len(data) < 24:
        raise ValueError(f"the figure {caption!r} is not a PNG picture")
    width, height = struct.unpack(">II", data[16:24])  # first fields of the first chunk, IHDR
    return {
        "caption": caption,
        "alt": rest[0] if rest else caption,
        "width": width,
        "height": height,
        "uri": _uri(data, "png"),
    }


def _sections(values: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, [(name, value)]) of a nested dict: loose values first under no heading, then each sub-dict.

    What is nested deeper has its path as name, joined by dots.
    """
    loose = [(str(key), _value(value)) for key, value in values.items() if not isinstance(value, Mapping)]
    sections = [("", loose)] if loose else []
    for key, value in values.items():
        if isinstance(value, Mapping):
            sections.append((str(key), list(_flat(value))))
    return sections


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _value(value)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(map(_value, value)) or "none"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return str(value)
