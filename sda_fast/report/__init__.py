"""Evaluation results as tables, statistics, pictures and one self-contained HTML file. Imports no torch."""

from sda_fast.report.bars import accuracy_bars
from sda_fast.report.corruption_error import check_baseline, mce_table, read_baseline
from sda_fast.report.html import write_report
from sda_fast.report.paper import paper_table, write_evaluation
from sda_fast.report.pictures import Picture, PictureTable, picture_grid
from sda_fast.report.tables import Cell, Table, accuracy_table, comparison_table
from sda_fast.report.writers import to_csv, to_markdown, to_text, write_tables
from sda_fast.statistics import (
    MeanAccuracy,
    PairedTest,
    Row,
    make_row,
    mcnemar,
    mean_interval,
    paired_over_corruptions,
    wilson_interval,
)

__all__ = [
    "Cell",
    "MeanAccuracy",
    "PairedTest",
    "Picture",
    "PictureTable",
    "Row",
    "Table",
    "accuracy_bars",
    "accuracy_table",
    "check_baseline",
    "comparison_table",
    "make_row",
    "mce_table",
    "mcnemar",
    "mean_interval",
    "paired_over_corruptions",
    "paper_table",
    "picture_grid",
    "read_baseline",
    "to_csv",
    "to_markdown",
    "to_text",
    "wilson_interval",
    "write_evaluation",
    "write_report",
    "write_tables",
]
