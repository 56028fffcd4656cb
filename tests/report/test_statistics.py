import math
from statistics import NormalDist

import numpy as np
import pytest

from sda_fast.report import (
    make_row,
    mcnemar,
    mean_interval,
    paired_over_corruptions,
    wilson_interval,
)
from sda_fast.report.results import comparable_pairs
from sda_fast.statistics import same_images


def rows_of(method, outcomes, model="resnet"):
    """One row per line of `outcomes` [corruptions, images]."""
    return [make_row(method, model, f"corruption_{i}", 3, line) for i, line in enumerate(outcomes)]


def pair(both, only_a, only_b, neither):
    """Outcome strings with the given counts in the cells of the two-by-two table."""
    return "1" * (both + only_a) + "0" * (only_b + neither), "1" * both + "0" * only_a + "1" * only_b + "0" * neither


# --- rows and single proportions ---------------------------------------------------------------------------


def test_make_row():
    row = make_row("SDA", "resnet", "fog", 3, np.array([True, False, True, True]))
    low, high = wilson_interval(3, 4)
    assert row == {
        "method": "SDA",
        "model": "resnet",
        "corruption": "fog",
        "severity": 3,
        "images": 4,
        "correct": 3,
        "accuracy": 0.75,
        "low": low,
        "high": high,
        "outcomes": "1011",
    }


@pytest.mark.parametrize("correct", [[], [[True]], [0.5], [2], True])
def test_make_row_refuses(correct):
    with pytest.raises(ValueError, match="correct must"):
        make_row("SDA", "resnet", "fog", 3, correct)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5.1e-5)
    mirrored = wilson_interval(total - correct, total)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5.1e-5)


def test_wilson_bounds_solve_the_score_equation():
    z = NormalDist().inv_cdf(0.95)
    for bound in wilson_interval(13, 40, confidence=0.9):
        assert abs(13 / 40 - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / 40), rel=1e-12)


def test_wilson_edges():
    assert wilson_interval(0, 1)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    for correct, total in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="0 <= correct <= total"):
            wilson_interval(correct, total)
    for confidence in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="between 0 and 1"):
            wilson_interval(1, 5, confidence)


# --- means over corruptions --------------------------------------------------------------------------------


def test_mean_of_one_row_is_its_wilson_interval():
    (row,) = rows_of("SDA", [[1, 1, 0, 1, 0]])
    assert mean_interval([row]) == (0.6, row["low"], row["high"], "Wilson")


def test_mean_of_copies_is_no_narrower():
    # Fifteen times the same outcomes hold no more information than once.
    line = np.arange(200) % 3 > 0
    once = wilson_interval(int(line.sum()), 200)
    mean = mean_interval(rows_of("SDA", [line] * 15))
    assert mean.how == "clustered by image"
    assert mean.mean == pytest.approx(line.mean())
    assert (mean.low, mean.high) == pytest.approx(once, abs=2e-3)
    assert mean.high - mean.low >= once[1] - once[0]


def test_mean_over_different_test_sets_is_bounded():
    a, b = np.arange(300) % 2 > 0, np.arange(100) % 4 > 0
    rows = [make_row("SDA", "resnet", "fog", 3, a), make_row("SDA", "resnet", "snow", 3, b)]
    mean = mean_interval(rows)
    assert mean.how == "bounded over corruptions"
    assert mean.mean == pytest.approx((0.5 + 0.75) / 2)
    half = NormalDist().inv_cdf(0.975) * (math.sqrt(0.25 / 300) + math.sqrt(0.1875 / 100)) / 2
    assert (mean.high - mean.low) / 2 == pytest.approx(half, rel=0.02)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("images", [1, 2, 50])
def test_mean_without_spread_claims_one_test_set(value, images):
    mean = mean_interval(rows_of("SDA", np.full((4, images), value)))
    assert (mean.low, mean.high) == pytest.approx(wilson_interval(value * images, images))


def test_mean_needs_rows():
    with pytest.raises(ValueError, match="at least one row"):
        mean_interval([])


def correlated_outcomes(rng, shape, ease):
    """Outcomes [corruptions, images] that are alike for an image under all corruptions."""
    return rng.normal(size=shape) + rng.normal(size=shape[1]) > -ease


def test_mean_interval_covers():
    # P(N(0, 2) > -ease) is the true accuracy. The interval that takes corruptions for independent fails.
    rng, ease, shape = np.random.default_rng(1), 0.5, (6, 60)
    truth = 0.5 * (1 + math.erf(ease / 2))
    covered = naive = 0
    for _ in range(600):
        outcomes = correlated_outcomes(rng, shape, ease)
        mean = mean_interval(rows_of("SDA", outcomes))
        covered += mean.low <= truth <= mean.high
        low, high = wilson_interval(int(outcomes.sum()), outcomes.size)
        naive += low <= truth <= high
    assert 0.925 < covered / 600 < 0.975
    assert naive / 600 < 0.9


# --- paired comparisons ------------------------------------------------------------------------------------


def test_mcnemar_by_hand():
    # Five discordant images, all for a: p = 2 / 2^5. One of five: p = 2 (1 + 5) / 2^5.
    test = mcnemar(*pair(3, 5, 0, 2))
    assert (test.b, test.c, test.images, test.corruptions) == (5, 0, 10, 1)
    assert test.difference == 0.5
    assert test.p == pytest.approx(2 / 32)
    assert mcnemar(*pair(3, 4, 1, 2)).p == pytest.approx(12 / 32)
    assert mcnemar(*pair(3, 2, 2, 2)).p == 1.0


def test_mcnemar_interval_of_newcombe():
    # Newcombe 1998, Statistics in Medicine 17:2635, the example 36, 12, 2, 0 under method 10.
    test = mcnemar(*pair(36, 12, 2, 0))
    assert (test.low, test.high) == pytest.approx((0.0569, 0.3404), abs=5.1e-5)


def test_mcnemar_is_antisymmetric():
    a, b = pair(20, 9, 4, 7)
    one, other = mcnemar(a, b), mcnemar(b, a)
    assert one.p == other.p
    assert (one.low, one.high, one.difference) == pytest.approx((-other.high, -other.low, -other.difference))


@pytest.mark.parametrize("outcomes", ["1" * 30, "0" * 30, "10" * 15])
def test_mcnemar_of_equals_keeps_a_width(outcomes):
    test = mcnemar(outcomes, outcomes)
    assert (test.b, test.c, test.difference, test.p) == (0, 0, 0.0, 1.0)
    assert -0.2 < test.low < 0 < test.high < 0.2


@pytest.mark.parametrize(("a", "b"), [("", ""), ("01", "011"), ("02", "01"), ("01", "0 ")])
def test_mcnemar_refuses(a, b):
    with pytest.raises(ValueError, match=r"outcomes must be|same images"):
        mcnemar(a, b)


def test_pooled_by_hand():
    # Image means of the difference: 1, 0.5, 0, 0.5. Mean 0.5, standard error sqrt(1/6) / 2.
    a = rows_of("SDA", [[1, 1, 0, 1], [1, 1, 1, 0]])
    b = rows_of("DDA", [[0, 0, 0, 0], [0, 1, 1, 0]])
    test = paired_over_corruptions(a, b)
    error = math.sqrt(1 / 6) / 2
    assert (test.images, test.corruptions, test.b, test.c) == (4, 2, 4, 0)
    assert test.difference == pytest.approx(0.5)
    assert test.high == pytest.approx(min(1.0, 0.5 + 3.182446305 * error))
    assert test.low == pytest.approx(0.5 - 3.182446305 * error)
    t = 0.5 / error
    angle = math.atan(t / math.sqrt(3))  # Student's distribution has a closed form for 3 degrees of freedom
    assert test.p == pytest.approx(1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle)))


def test_pooled_matches_by_name_not_by_position():
    rng = np.random.default_rng(0)
    a, b = rows_of("SDA", rng.random((3, 40)) > 0.4), rows_of("DDA", rng.random((3, 40)) > 0.5)
    assert paired_over_corruptions(a, b) == paired_over_corruptions(a, b[::-1])


def test_pooled_of_one_corruption_is_mcnemar():
    a, b = rows_of("SDA", [[1, 1, 0, 1]]), rows_of("DDA", [[0, 1, 0, 0]])
    assert paired_over_corruptions(a, b) == mcnemar("1101", "0100")


def test_pooled_without_spread():
    same = rows_of("SDA", [[1, 0], [0, 1]])
    assert paired_over_corruptions(same, same).p == 1.0
    ahead = paired_over_corruptions(rows_of("SDA", np.ones((3, 6))), rows_of("DDA", np.zeros((3, 6))))
    assert (ahead.difference, ahead.p) == (1.0, 2.0**-5)
    single = paired_over_corruptions(rows_of("SDA", [[1], [1]]), rows_of("DDA", [[0], [0]]))
    assert (single.low, single.high, single.p) == (-1.0, 1.0, 1.0)


def test_pooled_refuses_what_does_not_match():
    a = rows_of("SDA", np.ones((3, 5)))
    with pytest.raises(ValueError, match="corruption_2"):
        paired_over_corruptions(a, rows_of("DDA", np.ones((2, 5))))
    with pytest.raises(ValueError, match="same images"):
        paired_over_corruptions(a, rows_of("DDA", np.ones((3, 6))))
    with pytest.raises(ValueError, match="two rows"):
        paired_over_corruptions(a + a, a)
    with pytest.raises(ValueError, match="no rows"):
        paired_over_corruptions([], [])


def named(method, outcomes, names):
    return [
        make_row(method, "resnet", f"corruption_{i}", 3, line, of)
        for i, (line, of) in enumerate(zip(outcomes, names, strict=True))
    ]


def test_rows_are_of_the_same_images_or_not():
    same, other = [["a", "b"], ["a", "b"]], [["a", "b"], ["a", "c"]]
    assert same_images(named("SDA", [[1, 0], [0, 0]], same))
    assert not same_images(named("SDA", [[1, 0], [0, 0]], other))
    assert not same_images(named("SDA", [[1, 0], [0, 0, 1]], [["a", "b"], ["a", "b", "c"]]))
    assert same_images([*named("SDA", [[1, 0], [0, 0]], same), *rows_of("SDA", [[1, 1]])])  # an older row
    assert not same_images([{"images": 2}, *rows_of("SDA", [[1, 1]])])


def test_as_many_but_other_images_are_not_clustered():
    outcomes = np.random.default_rng(0).random((4, 50)) < 0.6
    names = [[str(i) for i in range(50)]] * 3 + [[str(i) for i in range(1, 51)]]
    assert mean_interval(rows_of("SDA", outcomes)).how == "clustered by image"
    assert mean_interval(named("SDA", outcomes, names[:1] * 4)).how == "clustered by image"
    assert mean_interval(named("SDA", outcomes, names)).how == "bounded over corruptions"


def test_pooled_over_different_images_by_hand():
    """Differences of mean 1/4 and 1/2, sample variances 11/12 over 4 images and 1/2 over 2; the errors' mean."""
    a, b = [[1, 1, 0, 0], [1, 0]], [[0, 0, 0, 1], [0, 0]]
    names = [["1", "2", "3", "4"], ["1", "2"]]
    test = paired_over_corruptions(named("SDA", a, names), named("DDA", b, names), confidence=0.6)
    error = (math.sqrt(11 / 12 / 4) + math.sqrt(1 / 2 / 2)) / 2
    z = NormalDist().inv_cdf(0.8)
    assert (test.test, test.images, test.corruptions, test.b, test.c) == ("z, bounded", 6, 2, 3, 1)
    assert test.difference == pytest.approx(0.375)
    assert (test.low, test.high) == (pytest.approx(0.375 - z * error), pytest.approx(0.375 + z * error))
    assert test.p == pytest.approx(2 * NormalDist().cdf(-0.375 / error))


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ([[1, 1], [1]], [[0, 1], [0]], (-1.0, 1.0, 1.0)),  # of one image nothing is known
        ([[1, 1], [0, 1, 1]], [[0, 0], [0, 1, 1]], (-1.0, 1.0, 1.0)),  # nor of images that all agree
        ([[1, 0], [0, 1, 1]], [[1, 0], [0, 1, 1]], (0.0, 0.0, 1.0)),
    ],
)
def test_pooled_over_different_images_without_spread(a, b, found):
    names = [[str(i) for i in range(len(line))] for line in a]
    test = paired_over_corruptions(named("SDA", a, names), named("DDA", b, names))
    assert (test.low, test.high, test.p) == found


def test_a_missing_image_makes_nothing_surer():
    """Outcomes that are the same under every corruption, the worst case; one image could not be read under one."""
    rng, rejected, widths = np.random.default_rng(0), 0, []
    names = [[str(i) for i in range(200)]] * 4 + [[str(i) for i in range(1, 200)]]
    for _ in range(300):
        a, b = rng.random((2, 200)) < 0.6
        rows = [named(m, [line] * 4 + [line[1:]], names) for m, line in (("SDA", a), ("DDA", b))]
        rejected += paired_over_corruptions(*rows).p < 0.05
        bounded, alone = mean_interval(rows[0]), mean_interval(rows[0][:4])
        assert (bounded.how, alone.how) == ("bounded over corruptions", "clustered by image")
        widths.append((bounded.high - bounded.low) / (alone.high - alone.low))
    assert rejected / 300 < 0.08
    assert 0.97 < min(widths) < max(widths) < 1.03


def test_methods_on_other_images_are_not_paired():
    rows = [named(method, [[1, 0], [0, 0]], [["a", "b"], ["a", last]]) for method, last in (("SDA", "b"), ("DDA", "c"))]
    with pytest.raises(
        ValueError, match=r"a paired test needs the same images, which they are not under .*corruption_1"
    ):
        paired_over_corruptions(*rows)
    assert comparable_pairs([*rows[0], *rows[1]]) == []


def test_pooled_interval_covers_and_test_keeps_its_level():
    rng, shape = np.random.default_rng(2), (5, 60)
    covered = rejected = 0
    for _ in range(600):
        # Exchangeable methods: no true difference, but each image favours one of them under all corruptions.
        tilt = rng.normal(size=shape[1])
        ease = rng.normal(size=shape[1])
        a = rng.normal(size=shape) + ease + tilt > 0
        b = rng.normal(size=shape) + ease - tilt > 0
        test = paired_over_corruptions(rows_of("SDA", a), rows_of("DDA", b))
        covered += test.low <= 0 <= test.high
        rejected += test.p < 0.05
    assert 0.925 < covered / 600 < 0.975
    assert covered + rejected == 600  # interval and test are the same statement
