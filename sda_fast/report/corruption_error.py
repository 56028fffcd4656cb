"""The mean corruption error (Hendrycks & Dietterich 2019): errors as shares of a baseline's, corruption by corruption.

    CE_c = sum_s E_{c,s} / sum_s B_{c,s}        mCE = mean_c CE_c

E is a method's error rate under corruption c at severity s, B the baseline's. The published measure takes the fifteen
corruptions of ImageNet-C at five severities and AlexNet for baseline; the same over fewer is another figure.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from sda_fast.errors import SdaError
from sda_fast.report.results import Column, ModelResults, by_model
from sda_fast.report.tables import MISSING, Cell, Table
from sda_fast.statistics import Row

Baseline = Mapping[Column, float]  # error rate by corruption and severity
ALEXNET = "alexnet"
PUBLISHED = 75  # conditions behind the published measure

# AlexNet's error rates on ImageNet-C at severities 1 to 5, as published with the data set.
_ALEXNET = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}


def read_baseline(name: str | Path) -> dict[Column, float]:
    """The errors of "alexnet" on ImageNet-C, or those in a JSON file, {"fog": {"5": 0.945, ...}, ...} as fractions.

    Raises SdaError for a file that cannot be read, is of another form, or holds what is no error rate above 0.
    """
    if str(name) == ALEXNET:
        return {(corruption, s): rate for corruption, rates in _ALEXNET.items() for s, rate in enumerate(rates, 1)}
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        baseline = {(c, int(s)): float(rate) for c, rates in content.items() for s, rate in rates.items()}
    except OSError as error:
        raise SdaError(f"--mce {name} cannot be read ({error.strerror}): give alexnet or a JSON file") from error
    except (ValueError, TypeError, AttributeError) as error:
        form = '{"fog": {"5": 0.945}}'
        raise SdaError(f"--mce {name} is not of the form {form} ({error}): mend it there") from error
    for (corruption, severity), rate in baseline.items():
        if not 0 < rate <= 1:
            where = f"{corruption} at severity {severity}"
            raise SdaError(f"--mce {name}: {rate} for {where} is no error rate in (0, 1]: mend it there")
    return baseline


def check_baseline(name: str | Path, baseline: Baseline, conditions: Iterable[Column], classes: Iterable[str]) -> None:
    """Raises SdaError for conditions the baseline has no error of, and for AlexNet's on other classes than ImageNet's.

    classes: those that are evaluated. Uncorrupted images (severity 0) have no part in it.
    """
    corrupted = [column for column in conditions if column[1] != 0]
    if not corrupted:
        raise SdaError("--mce is for folders of the form <corruption>/<severity>/<class>: leave it out")
    for corruption, severity in corrupted:
        if (corruption, severity) not in baseline:
            raise SdaError(f"--mce {name} has no error for {corruption} at severity {severity}: give a file that does")
    if str(name) == ALEXNET:
        from sda_fast.data import imagenet_classes

        if foreign := set(classes) - set(imagenet_classes()):
            raise SdaError(
                f"--mce alexnet is of ImageNet's classes, and {min(foreign)} is none: give a file with a baseline's "
                "errors on these classes"
            )


def corruption_errors(rows: Sequence[Row], baseline: Baseline) -> dict[str, float]:
    """CE of each corruption in the rows of one method and model, fractions of the baseline's; severity 0 aside."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["severity"] != 0:
            expected = baseline[row["corruption"], row["severity"]]
            errors.setdefault(row["corruption"], []).append((1 - row["accuracy"], expected))
    return {name: sum(e for e, _ in pairs) / sum(b for _, b in pairs) for name, pairs in errors.items()}


def mce_table(rows: Sequence[Row], baseline: Baseline, name: str | Path) -> list[Table]:
    """One table per model: CE per corruption and mCE in percent, methods as columns; lower is better.

    name: of the baseline. A method lacking a condition has no mCE. Raises ValueError as `by_model` does.
    """
    return [_mce_table(results, baseline, name) for results in by_model(rows)]


def _mce_table(results: ModelResults, baseline: Baseline, name: str | Path) -> Table:
    conditions = [column for column in results.columns if column[1] != 0]
    complete = {m: results.rows(m) for m in results.methods if len(results.rows(m)) == len(conditions)}
    errors = {method: corruption_errors(rows, baseline) for method, rows in complete.items()}
    corruptions = list(dict.fromkeys(corruption for corruption, _ in conditions))
    lines = {c: {method: own[c] for method, own in errors.items()} for c in corruptions}
    lines["mCE"] = {method: mean(own.values()) for method, own in errors.items()}
    body = []
    for label, values in lines.items():
        best = min(values.values()) if len(values) > 1 else None
        cells = [
            Cell(f"{100 * values[m]:.1f}", best=values[m] == best) if m in values else Cell(MISSING)
            for m in results.methods
        ]
        body.append((Cell(label.replace("_", " ")), *cells))
    records = [
        {"model": results.model, "method": method, "corruption": label, "ce": value, "baseline": str(name)}
        for label, values in lines.items()
        for method, value in values.items()
    ]
    which = "AlexNet's (over all thousand classes)" if str(name) == ALEXNET else f"those in {name}"
    severities = ", ".join(map(str, results.severities))
    note = f"Errors as shares of {which}, summed over severities {severities}; the lowest is marked."
    if str(name) != ALEXNET or len(conditions) != PUBLISHED:
        note += " Not the published mCE, which is over fifteen corruptions at five severities, against AlexNet."
    return Table(
        f"Corruption error of {results.model} in percent of the baseline's, and its mean (mCE)",
        ("corruption", *results.methods),
        tuple(body),
        tuple(records),
        summary_rows=1,
        note=note,
    )
