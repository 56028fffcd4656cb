"""What `jacobian_free`, fewer steps and weaker guidance change on the photographs testbed.

Every corrupted patch is projected with the same noise by each variant, batch by batch in turn, with one thread and one
engine. Prints and writes, for each: seconds per image; accuracies of the projection alone, of DDA and, with
--finetuned, of SDA, whose models have learnt from exact projections; and their paired difference from the exact one
(the paper's fifty steps and strength, on the same engine and precision), Student's t over images. --first leaves out
the patches on which settings were chosen.

    python benchmarks/approximations.py --first 3 --per-class 12 --output benchmarks/results
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import ROOT
from precision import probabilities, project, targets

from sda_fast import Projector
from sda_fast.bench.measure import environment
from sda_fast.data import CORRUPTIONS
from sda_fast.host_memory import keep_freed_memory
from sda_fast.methods.ensembles import combine_scores
from sda_fast.models import load_adm, load_classifier
from sda_fast.photos.testbed import SEVERITY
from sda_fast.statistics import make_row, mean_interval, paired_over_corruptions
from sda_fast.weights import weights_path

CLASSIFIERS = ("resnet", "convnext")
EXACT = "exact"
STEPS = {n: {"respacing": str(2 * n), "start": n} for n in (25, 15, 10)}
VARIANTS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "scale 3": {"scale": 3.0},
    **{f"{n} steps": settings for n, settings in STEPS.items()},
    "jacobian-free": {"jacobian_free": True},
    "jacobian-free, scale 3": {"jacobian_free": True, "scale": 3.0},
    **{f"jacobian-free, {n} steps": {"jacobian_free": True, **settings} for n, settings in STEPS.items()},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="inductor")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--per-class", type=int, default=12, help="patches of each class and corruption")
    parser.add_argument("--first", type=int, default=0, help="patches of each class left out before them")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="beside the exact one; default: all")
    parser.add_argument("--finetuned", action="append", default=[], help="CLASSIFIER=FILE; may be repeated")
    parser.add_argument("--batch", type=int, default=42)
    parser.add_argument("--output", type=Path, help="folder for approximations-cpu.json")
    given = parser.parse_args()
    finetuned = {}
    for item in given.finetuned:
        classifier, _, file = item.partition("=")
        if classifier not in CLASSIFIERS:
            parser.error(f"--finetuned {item} is not of the form CLASSIFIER=FILE, CLASSIFIER being resnet or convnext")
        finetuned[classifier] = load_classifier(file)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)

    keep_freed_memory()  # as commands do
    torch.set_num_threads(1)
    adm = load_adm(weights_path("photos:adm"))
    chosen = [EXACT, *(name for name in VARIANTS if name != EXACT and name in (given.variant or VARIANTS))]
    common = {"engine": given.engine, "precision": given.precision, "batch_size": given.batch}
    projectors = {name: Projector(adm, **VARIANTS[name], **common) for name in chosen}
    networks: dict[bool, Any] = {}
    for projector in projectors.values():  # compiled once
        projector.network = networks.setdefault(projector.jacobian_free, projector.network)
        projector.network(*projector.network.step.example(given.batch))
    images, labels, seeds = targets(given.per_class, list(CORRUPTIONS), given.first)
    projections, seconds = project(projectors, images, seeds, given.batch)

    figures: dict[str, Any] = {
        name: {"settings": VARIANTS[name], "seconds_per_image": sum(seconds[name]) / len(images), "accuracy": {}}
        for name in chosen
    }
    for classifier in CLASSIFIERS:
        model = load_classifier(weights_path(f"photos:{classifier}"))
        original = probabilities(model, images)
        outcomes: dict[str, dict[str, list[Any]]] = {}
        for name, x in projections.items():
            alone = probabilities(model, x)
            scores = {"projection alone": alone, "DDA": combine_scores(original, alone)}
            if classifier in finetuned:
                scores["SDA"] = combine_scores(original, probabilities(finetuned[classifier], x))
            for kind, values in scores.items():
                correct = (values.argmax(1) == labels).reshape(len(CORRUPTIONS), -1).numpy()
                outcomes.setdefault(kind, {})[name] = [
                    make_row(name, classifier, corruption, SEVERITY, right)
                    for corruption, right in zip(CORRUPTIONS, correct, strict=True)
                ]
        for kind, by_name in outcomes.items():
            for name, rows in by_name.items():
                test = asdict(paired_over_corruptions(rows, by_name[EXACT]))
                figures[name]["accuracy"].setdefault(classifier, {})[kind] = {
                    "mean": mean_interval(rows).mean,
                    "difference": {key: test[key] for key in ("difference", "low", "high", "p")},
                }
    for name, row in figures.items():
        told = [f"{name}: {row['seconds_per_image']:.3f} s/image"]
        for classifier, kinds in row["accuracy"].items():
            for kind, value in kinds.items():
                d = {key: 100 * number for key, number in value["difference"].items()}
                change = f" ({d['difference']:+.1f}, {d['low']:+.1f} to {d['high']:+.1f})" if name != EXACT else ""
                told.append(f"{classifier} {kind} {100 * value['mean']:.1f} %{change}")
        print("; ".join(told))
    if given.output:
        record = {
            "benchmark": "approximations",
            **{key: getattr(given, key) for key in ("engine", "precision", "per_class", "first", "batch", "finetuned")},
            "images": len(images),
            "variants": figures,
            **environment("cpu", ROOT),
        }
        (given.output / "approximations-cpu.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
