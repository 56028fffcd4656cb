"""The files of a study: rows, tables, bars and one HTML page."""

from pathlib import Path

from sda_fast.files import write_json
from sda_fast.report import accuracy_bars, accuracy_table, comparison_table, to_text, write_report, write_tables
from sda_fast.report.approximations import with_approximations
from sda_fast.report.run import environment
from sda_fast.studies.compare import Result, of_usual_stream
from sda_fast.studies.config import StudyConfig
from sda_fast.studies.tables import ablation_tables, comparison_tables, pairs, stream_tests

TITLES = {"compare": "Methods compared", "ablate": "The parts of SDA"}


def write_study(result: Result, config: StudyConfig, *, command: str) -> tuple[str, dict[str, str]]:
    """Write results.json, results.md, bars.png, report.html and CSV files of tests into `<output>/<study>/`.

    comparisons.csv has the paired tests for every single corruption (exact McNemar) and over all; streams.csv those of
    methods that learn from their stream, under each. Returns the tables as
    text for a terminal and the files by kind.
    """
    folder = Path(config.output) / result.study
    rows = of_usual_stream(result.rows, result.usual)
    tables = ablation_tables(result, config) if result.study == "ablate" else comparison_tables(result)
    tables = with_approximations(tables, result.settings, rows)
    accuracies = accuracy_table(rows, layout="tall")
    found = {
        "study": result.study,
        "command": command,
        "environment": environment(),
        "settings": result.settings,
        "seconds": result.seconds,
        "rows": result.rows,
    }
    files = {
        "rows": write_json(found, folder / "results.json"),
        "tables": write_tables(folder / "results.md", [*tables, *accuracies]),
        "bars": accuracy_bars(rows, folder / "bars.png"),
    }
    compared = pairs(rows, "DDA", "SDA") if result.study == "ablate" else pairs(rows)
    if compared:
        tests = comparison_table(rows, compared, per_corruption=True)
        files["comparisons"] = write_tables(folder / "comparisons.csv", tests)
    if tests_by_stream := stream_tests(result.rows, ("Source", "SDA")):
        files["streams"] = write_tables(folder / "streams.csv", tests_by_stream)
    files["report"] = write_report(
        folder / "report.html",
        TITLES[result.study],
        rows,
        comparisons=tables,
        figures=[("Accuracy per corruption, with 95 % intervals.", files["bars"])],
        settings=result.settings,
        environment=environment(),
        commands=[command],
    )
    return to_text([*tables, *accuracies]), {kind: str(path) for kind, path in files.items()}
