"""What a fast engine in half precision changes on the photographs testbed: predictions, accuracies, images per second.

Every corrupted patch is projected twice with the same noise, by the eager engine in float32 and by another one, batch
by batch in turn, with one thread. Prints and writes: how many top-1 predictions of the shipped classifiers agree, on
the projections and for DDA; both accuracies with their standard error; images per second of both, compilation not
counted.

    python benchmarks/precision.py --per-class 7 --output benchmarks/results
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROOT

from sda_fast import Projector
from sda_fast.bench.measure import environment
from sda_fast.data import CORRUPTIONS, corrupt, identity, to_uint8, to_unit
from sda_fast.engines import create_engine
from sda_fast.methods.ensembles import combine_scores
from sda_fast.models import load_adm, load_classifier
from sda_fast.photos.dataset import CLASSES, held_out_patches
from sda_fast.photos.testbed import SEVERITY
from sda_fast.weights import weights_path


def targets(per_class: int, corruptions: list[str], first: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The testbed's patches, float32 [N, 3, 32, 32] in [-1, 1], their labels and their identities in the noise.

    Corruption by corruption, of each class those from the number `first` on."""
    patches, labels, identities = [], [], []
    for corruption in corruptions:
        for label, name in enumerate(CLASSES):
            for index, patch in list(enumerate(held_out_patches(name, first + per_class)))[first:]:
                key = f"{corruption}/{SEVERITY}/{name}/{index:03d}"
                patches.append(corrupt(patch, corruption, SEVERITY, identity("corrupt", key)))
                labels.append(label)
                identities.append(identity("align", f"{key}.png"))
    return to_unit(np.stack(patches)), torch.tensor(labels), torch.tensor(identities)


def project(projectors: dict[str, Projector], images: torch.Tensor, seeds: torch.Tensor, batch: int):
    """Projections as the stages keep them (8 bits), and the seconds of every full batch, by engine."""
    projections: dict[str, list[torch.Tensor]] = {name: [] for name in projectors}
    seconds: dict[str, list[float]] = {name: [] for name in projectors}
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        for name, projector in projectors.items():
            begun = time.perf_counter()
            projected = projector(images[part], seeds=seeds[part])
            seconds[name].append(time.perf_counter() - begun)
            projections[name].append(to_unit(to_uint8(projected, "round")))
        print(f"{min(start + batch, len(images))} of {len(images)}", file=sys.stderr, flush=True)
    return {name: torch.cat(parts) for name, parts in projections.items()}, seconds


@torch.no_grad()
def probabilities(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part).softmax(1) for part in images.split(64)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="inductor")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--winograd", action="store_true", help="with the inductor engine's option of that name")
    parser.add_argument("--per-class", type=int, default=7, help="patches of each class and corruption")
    parser.add_argument("--corruption", action="append", help="this one alone; may be repeated")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, help="folder for precision-cpu.json")
    given = parser.parse_args()

    torch.set_num_threads(1)
    adm = load_adm(weights_path("photos:adm"))
    fast = f"{given.engine} {given.precision}{' winograd' if given.winograd else ''}"
    engine = create_engine(given.engine, **({"winograd": True} if given.winograd else {}))
    projectors = {
        "eager fp32": Projector(adm, batch_size=given.batch),
        fast: Projector(adm, engine=engine, precision=given.precision, batch_size=given.batch),
    }
    images, labels, seeds = targets(given.per_class, given.corruption or list(CORRUPTIONS))
    begun = time.perf_counter()
    projectors[fast].network(*projectors[fast].network.step.example(given.batch))
    prepared = time.perf_counter() - begun
    projections, seconds = project(projectors, images, seeds, given.batch)

    full = len(images) // given.batch
    ratios = [a / b for a, b in zip(*(seconds[name][:full] for name in projectors), strict=True)]
    row = {
        "benchmark": "precision",
        "engine": given.engine,
        "precision": given.precision,
        "winograd": given.winograd,
        "images": len(images),
        "batch": given.batch,
        "images_per_second": {name: given.batch / statistics.median(times[:full]) for name, times in seconds.items()},
        "speedup": statistics.median(ratios),
        "prepare_seconds": prepared,
        "classifiers": {},
        **environment("cpu", ROOT),
    }
    for name in ("resnet", "convnext"):
        model = load_classifier(weights_path(f"photos:{name}"))
        original = probabilities(model, images)
        alone = {engine: probabilities(model, x) for engine, x in projections.items()}
        dda = {engine: combine_scores(original, p) for engine, p in alone.items()}
        row["classifiers"][name] = {
            kind: {
                "agree": float((scores["eager fp32"].argmax(1) == scores[fast].argmax(1)).float().mean()),
                "accuracy": {engine: float((p.argmax(1) == labels).float().mean()) for engine, p in scores.items()},
            }
            for kind, scores in (("projection alone", alone), ("DDA", dda))
        }
        for kind, figures in row["classifiers"][name].items():
            a = figures["accuracy"]["eager fp32"]
            figures["standard_error"] = math.sqrt(a * (1 - a) / len(images))
            told = ", ".join(f"{engine} {100 * value:.2f} %" for engine, value in figures["accuracy"].items())
            print(
                f"{name}, {kind}: top-1 agrees for {100 * figures['agree']:.2f} %; accuracy {told}, "
                f"standard error {100 * figures['standard_error']:.2f}"
            )
    rates = ", ".join(f"{name} {rate:.2f}" for name, rate in row["images_per_second"].items())
    print(f"images/s: {rates}; {row['speedup']:.2f}x (median over {full} batches of {given.batch}, in turn)")
    if given.output:
        (given.output / "precision-cpu.json").write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
