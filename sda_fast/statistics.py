"""Result rows and the statistics on them: intervals of accuracies, paired tests between methods.

A row is a JSON-able dict, one per (method, model, corruption, severity):

    method, model, corruption   names
    severity                    int; 0 marks uncorrupted images, which no mean over corruptions includes
    images, correct             counts
    accuracy, low, high         fractions in [0, 1]; low and high bound the 95 % Wilson interval
    outcomes                    one character per image, "1" right or "0" wrong, by sorted relative path
    image_set                   a hash of these paths below the corruption; older rows lack it

Rows of one test set list the same images in the same order, whichever the method or the corruption, unless some
could not be read. That is what makes the tests paired, and what lets an interval over several corruptions respect
that one image wrong under one corruption tends to be wrong under the next.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Row = dict[str, Any]


class MeanAccuracy(NamedTuple):
    """Mean accuracy over corruptions, a fraction, with its interval and how the interval was formed."""

    mean: float
    low: float
    high: float
    how: str


@dataclass(frozen=True)
class PairedTest:
    """Method a against method b on the same images.

    b counts the outcomes that only method a got right, c those that only method b did (McNemar's cells).
    `difference` is accuracy(a) - accuracy(b), a fraction, and [low, high] its interval; p is two-sided.
    """

    test: str
    images: int
    corruptions: int
    b: int
    c: int
    difference: float
    low: float
    high: float
    p: float


def make_row(
    method: str, model: str, corruption: str, severity: int, correct: ArrayLike, names: Sequence[str] | None = None
) -> Row:
    """The row of one evaluation. `correct`: one boolean per image [N], N >= 1, by sorted relative path.

    names: what the images are called under every corruption alike.
    Raises ValueError for anything but a non-empty vector of booleans (or of zeros and ones).
    """
    of = {} if names is None else {"image_set": _digest(names)}
    values = np.asarray(correct)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"correct must be a non-empty vector, not an array of shape {values.shape}")
    if not np.isin(values, (0, 1)).all():
        raise ValueError("correct must hold booleans or zeros and ones only")
    images, right = int(values.size), int(np.count_nonzero(values))
    low, high = wilson_interval(right, images)
    return {
        "method": method,
        "model": model,
        "corruption": corruption,
        "severity": int(severity),
        "images": images,
        "correct": right,
        "accuracy": right / images,
        "low": low,
        "high": high,
        "outcomes": "".join("1" if value else "0" for value in values),
        **of,
    }


def _digest(names: Sequence[str]) -> str:
    # Names of files may hold bytes that are no text.
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def same_images(rows: Sequence[Row]) -> bool:
    """Whether rows have outcomes of the same images, as far as they say which those are."""
    said = {row["image_set"] for row in rows if "image_set" in row}
    counts = {len(row.get("outcomes") or "") for row in rows} | {row["images"] for row in rows}
    return len(counts) == 1 and len(said) <= 1


def wilson_interval(correct: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927), as fractions.

    Keeps its coverage near 0 and 1 and for few images, where the textbook p +- z sqrt(p(1-p)/n) fails.
    `total` may be fractional (an effective number of images). Raises ValueError unless
    0 <= correct <= total and total > 0.
    """
    if not (total > 0 and 0 <= correct <= total):
        raise ValueError(f"need 0 <= correct <= total and total > 0, not {correct} of {total}")
    z = _normal_quantile(confidence)
    p = correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    # The bound at a proportion of 0 or 1 is exact; rounding must not move it.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def mean_interval(rows: Sequence[Row], confidence: float = 0.95) -> MeanAccuracy:
    """Mean accuracy over the corruptions in `rows` (one method, one model), all with equal weight.

    The variance of that mean is taken over images where all rows hold outcomes of the same images: each image's
    mean over corruptions is then one independent observation. Otherwise, because some could not be read, they are
    still mostly the same ones, and the most that the variance can be is taken, as if an image were right or wrong
    under all corruptions: (sum sqrt(p(1-p)/n) / K)^2. Either variance v is turned into an effective number of images
    p(1-p)/v, corrected for the degrees of freedom behind v, and put into Wilson's interval, so that the bounds stay
    inside [0, 1] (the construction of Korn and Graubard 1998, with the score interval in place of the exact one).
    Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("a mean over corruptions needs at least one row")
    if len(rows) == 1:
        low, high = wilson_interval(rows[0]["correct"], rows[0]["images"], confidence)
        return MeanAccuracy(rows[0]["accuracy"], low, high, "Wilson")
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    fewest = min(row["images"] for row in rows)
    total = sum(row["images"] for row in rows)
    clustered = bool(rows[0].get("outcomes")) and same_images(rows)
    if clustered:
        per_image = np.mean([outcome_array(row["outcomes"]) for row in rows], axis=0)
        variance = float(np.var(per_image, ddof=1)) / fewest if fewest > 1 else 0.0
    else:
        errors = (math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["images"]) for row in rows)
        variance = (sum(errors) / len(rows)) ** 2
    if variance <= 1e-15:
        effective = float(fewest)  # no spread seen: claim no more than the fewest independent images
    else:
        effective = mean * (1 - mean) / variance
        if clustered:
            from scipy import stats  # type: ignore[import-untyped]  # here: slow to import

            t = float(stats.t.ppf(0.5 + confidence / 2, df=fewest - 1))
            effective *= (_normal_quantile(confidence) / t) ** 2
        effective = min(effective, float(total))
    low, high = wilson_interval(min(mean, 1.0) * effective, effective, confidence)
    return MeanAccuracy(mean, low, high, "clustered by image" if clustered else "bounded over corruptions")


def mcnemar(outcomes_a: str, outcomes_b: str, confidence: float = 0.95) -> PairedTest:
    """Compare two methods on the same images, one corruption.

    p: McNemar's test (1947) in its exact form, a two-sided binomial test of the discordant images; always
    exact, never the chi-square approximation. Interval: Newcombe's hybrid score interval for paired
    proportions (1998, Statistics in Medicine 17:2635, method 10), which has width even where the methods
    agree on every image; it may exclude 0 at a p slightly above 0.05 or the reverse, being another procedure.
    Raises ValueError for outcomes of different lengths, empty ones, or characters other than 0 and 1.
    """
    from scipy import stats  # here: slow to import

    first, second = outcome_array(outcomes_a), outcome_array(outcomes_b)
    if len(first) != len(second):
        raise ValueError(f"a paired test needs the same images, not {len(first)} and {len(second)} of them")
    n = len(first)
    both = int(np.sum(first & second))
    b, c = int(np.sum(first & ~second)), int(np.sum(~first & second))
    low, high = _newcombe_interval(both, b, c, n - both - b - c, confidence)
    p = float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0
    return PairedTest("exact McNemar", n, 1, b, c, (b - c) / n, low, high, p)


def paired_over_corruptions(rows_a: Sequence[Row], rows_b: Sequence[Row], confidence: float = 0.95) -> PairedTest:
    """Compare two methods over several corruptions of the same images.

    Rows are matched by model, corruption and severity. For every image the difference of outcomes is averaged
    over those; these image-level differences are the independent observations (the cluster-robust view:
    outcomes of one image under many corruptions are not independent), and Student's t over the images gives
    the interval and the two-sided p. A single corruption is `mcnemar`. Where all images have one and the same
    non-zero difference the interval has no width and p is that of the sign-flip test, 2^(1 - images).

    Where the images are not the same under every corruption, because some could not be read, the mean of the
    corruptions' differences is taken, with the most that its error can be, and the normal distribution: "z, bounded";
    `images` are then all outcomes. b and c are totals over all corruptions.

    Raises ValueError if the rows do not match, or two of a corruption differ in images.
    """
    first, second = _by_condition(rows_a), _by_condition(rows_b)
    if not first or first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())
        raise ValueError(f"the two methods were not run under the same corruptions: {odd or 'no rows'}")
    if len(first) == 1:
        ((key, row),) = first.items()
        return mcnemar(row["outcomes"], second[key]["outcomes"], confidence)
    if odd := [key for key in first if not same_images([first[key], second[key]])]:
        raise ValueError(f"a paired test needs the same images, which they are not under {odd[0]}")
    a = [outcome_array(first[key]["outcomes"]) for key in first]
    b = [outcome_array(second[key]["outcomes"]) for key in first]
    differences = [one.astype(float) - other for one, other in zip(a, b, strict=True)]
    only_a, only_b = (int(sum(np.sum(x == sign) for x in differences)) for sign in (1, -1))
    if same_images([*first.values(), *second.values()]):
        found, name, images = _clustered_t(np.stack(differences), confidence), "t over images", len(a[0])
    else:
        found, name, images = _bounded_z(differences, confidence), "z, bounded", sum(map(len, a))
    return PairedTest(name, images, len(first), only_a, only_b, *found)


def outcome_array(outcomes: str) -> NDArray[np.bool_]:
    """ "0110..." as booleans [N]. Raises ValueError if empty or if another character occurs."""
    if not outcomes or set(outcomes) - {"0", "1"}:
        raise ValueError(f"outcomes must be a non-empty string of 0 and 1, not {outcomes[:20]!r}")
    return np.array([character == "1" for character in outcomes])


def _normal_quantile(confidence: float) -> float:
    """z such that a standard normal variable lies in [-z, z] with probability `confidence`."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _clustered_t(differences: NDArray[np.float64], confidence: float) -> tuple[float, float, float, float]:
    """Mean, interval and two-sided p of differences [corruptions, images], clustered by image."""
    from scipy import stats  # here: slow to import

    images = differences.shape[1]
    per_image = differences.mean(axis=0)
    mean = float(differences.mean())
    if images == 1:
        return mean, -1.0, 1.0, 1.0  # one image says nothing about the spread
    error = float(np.std(per_image, ddof=1)) / math.sqrt(images)
    if error < 1e-12:
        return mean, mean, mean, 2.0 ** (1 - images) if abs(mean) > 1e-12 else 1.0
    test = stats.ttest_1samp(per_image, 0.0)
    low, high = test.confidence_interval(confidence)
    return mean, max(-1.0, float(low)), min(1.0, float(high)), float(test.pvalue)


def _bounded_z(differences: Sequence[NDArray[np.float64]], confidence: float) -> tuple[float, float, float, float]:
    """Mean over corruptions, interval and two-sided p of differences, one array [images] for each corruption.

    The error is the mean of the corruptions' errors, as if they went together entirely: it cannot be larger.
    """
    mean = float(np.mean([x.mean() for x in differences]))
    # What one image, or images that all agree, say of the spread is nothing: then no certainty is claimed.
    errors = [float(np.std(x, ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.inf for x in differences]
    error = sum(errors) / len(differences)
    if error < 1e-12:
        return (mean, mean, mean, 1.0) if abs(mean) < 1e-12 else (mean, -1.0, 1.0, 1.0)
    half = _normal_quantile(confidence) * error
    p = 2 * NormalDist().cdf(-abs(mean) / error)
    return mean, max(-1.0, mean - half), min(1.0, mean + half), p


def _newcombe_interval(a: int, b: int, c: int, d: int, confidence: float) -> tuple[float, float]:
    """Newcombe's method 10 for (b - c) / n; a both right, d both wrong."""
    n = a + b + c + d
    p1, p2 = (a + b) / n, (a + c) / n
    low1, high1 = wilson_interval(a + b, n, confidence)
    low2, high2 = wilson_interval(a + c, n, confidence)
    product = (a + b) * (c + d) * (a + c) * (b + d)
    excess = float(a * d - b * c)
    if excess > 0:  # Newcombe's continuity correction of the correlation
        excess = max(excess - n / 2, 0.0)
    phi = excess / math.sqrt(product) if product else 0.0
    below, above = (p1 - low1, high2 - p2), (high1 - p1, p2 - low2)
    down = math.sqrt(max(0.0, below[0] ** 2 - 2 * phi * below[0] * below[1] + below[1] ** 2))
    up = math.sqrt(max(0.0, above[0] ** 2 - 2 * phi * above[0] * above[1] + above[1] ** 2))
    return max(-1.0, p1 - p2 - down), min(1.0, p1 - p2 + up)


def _by_condition(rows: Iterable[Row]) -> dict[tuple[str, str, int], Row]:
    """Rows of one method keyed by (model, corruption, severity)."""
    found: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        key = (row["model"], row["corruption"], row["severity"])
        if key in found:
            raise ValueError(f"two rows for {key}: pass the rows of one method")
        found[key] = row
    return found
