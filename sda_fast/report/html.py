"""The report: one self-contained HTML file that needs no network, no script and no other file."""

import base64
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sda_fast.files import write_bytes
from sda_fast.report.tables import Table, accuracy_table
from sda_fast.statistics import Row

Png = str | os.PathLike[str] | bytes
Figure = tuple[str, Png] | tuple[str, Png, str]  # caption, picture, and what it shows to those who cannot see it
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_report(
    path: str | os.PathLike[str],
    title: str,
    rows: Sequence[Row],
    comparisons: Table | Iterable[Table] = (),
    figures: Iterable[Figure] = (),
    settings: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    commands: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Path:
    """Write the report and return its path. Parts that are empty are left out.

    comparisons: tables of `comparison_table`. figures: (caption, PNG file or its bytes) or, with a text that
    replaces the picture for a reader who cannot see it, (caption, png, text). settings, environment: nested
    dicts, printed by section. Every text is escaped. The file depends on the arguments alone, it carries no
    date. Raises ValueError for a figure that is no PNG or without rows, OSError if a figure cannot be read and
    SdaError if the report cannot be written; then no file is left behind, or the earlier one stays.
    """
    import jinja2  # here and not above: who only wants a table need not wait for it

    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("sda_fast.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = engine.from_string(source).render(
        title=title,
        accuracies=accuracy_table(rows, layout="auto"),
        comparisons=[comparisons] if isinstance(comparisons, Table) else list(comparisons),
        figures=[_figure(figure) for figure in figures],
        settings=_sections(settings or {}),
        environment=_sections(environment or {}),
        commands=list(commands),
        notes=list(notes),
    )
    return write_bytes(page.encode(), path)


def _figure(figure: Figure) -> dict[str, Any]:
    """Caption, alternative text, size in pixels and data URI of one picture."""
    caption, png, *rest = figure
    data = png if isinstance(png, bytes) else Path(png).read_bytes()
    if data[:8] != PNG_SIGNATURE or len(data) < 24:
        raise ValueError(f"the figure {caption!r} is not a PNG picture")
    width, height = struct.unpack(">II", data[16:24])  # first fields of the first chunk, IHDR
    uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return {
        "caption": caption,
        "alt": rest[0] if rest else caption,
        "width": width,
        "height": height,
        "uri": uri,
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
