"""Tables as plain text for a terminal, as Markdown and as CSV."""

import csv
import io
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from sda_fast.files import write_bytes
from sda_fast.report.tables import Cell, Table


def to_text(tables: Table | Iterable[Table]) -> str:
    """Aligned columns without colours or control characters; the best method of a comparison has a star."""
    return "\n".join(_text(table) for table in _several(tables))


def to_markdown(tables: Table | Iterable[Table]) -> str:
    """GitHub-flavoured Markdown, caption above and note below; the best method is bold."""
    return "\n".join(_markdown(table) for table in _several(tables))


def to_csv(tables: Table | Iterable[Table]) -> str:
    """The records behind the tables, one line each, accuracies and differences as unrounded fractions.

    Raises ValueError if the tables are of different kinds, as their records share no columns.
    """
    records = [record for table in _several(tables) for record in table.records]
    names = list(records[0]) if records else []
    if any(list(record) != names for record in records):
        raise ValueError("accuracy tables and comparison tables need a CSV file each")
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def write_tables(path: str | os.PathLike[str], tables: Table | Iterable[Table]) -> Path:
    """Write tables as .txt, .md or .csv, by the suffix of `path`; ValueError for any other suffix."""
    forms = {".txt": to_text, ".md": to_markdown, ".csv": to_csv}
    suffix = Path(path).suffix.lower()
    if suffix not in forms:
        raise ValueError(f"{os.fspath(path)}: tables are written as .txt, .md or .csv")
    return write_bytes(forms[suffix](tables).encode(), path)


def _several(tables: Table | Iterable[Table]) -> Sequence[Table]:
    return [tables] if isinstance(tables, Table) else list(tables)


def _text(table: Table) -> str:
    # Every figure keeps one place free for the star, so that the decimal points stay in line.
    starred = any(cell.best for line in table.body for cell in line)

    def figure(cell: Cell) -> str:
        return _printable(cell.text) + ("*" if cell.best else " " if starred else "")

    n = table.text_columns
    lines = [[*(_printable(c.text) for c in line[:n]), *(figure(c) for c in line[n:])] for line in table.body]
    blank = " " if starred else ""
    header = [_printable(text) + (blank if i >= n else "") for i, text in enumerate(table.header)]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def aligned(line: Sequence[str]) -> str:
        parts = (t.ljust(w) if i < n else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True)))
        return "  ".join(parts).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    caption = _printable(table.caption) + (" (* best)" if starred else "")
    printed = [caption, rule, aligned(header), rule, *map(aligned, lines), rule]
    if table.summary_rows:
        printed.insert(-1 - table.summary_rows, rule)
    printed += textwrap.wrap(_printable(table.note), max(72, min(len(rule), 100)))
    return "\n".join([*printed, ""])


def _markdown(table: Table) -> str:
    marks = [":--" if i < table.text_columns else "--:" for i in range(len(table.header))]
    lines = [[_escaped(text) for text in table.header], marks]
    for line in table.body:
        lines.append([f"**{_escaped(cell.text)}**" if cell.best else _escaped(cell.text) for cell in line])
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    foot = f"\n{_escaped(table.note)}\n" if table.note else ""
    return f"{_escaped(table.caption)}\n\n{grid}\n{foot}"


def _printable(text: str) -> str:
    """Names come from folders and files: no line break or escape sequence of theirs reaches a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _escaped(text: str) -> str:
    """The text with everything escaped that Markdown would read as markup inside a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", _printable(text))
