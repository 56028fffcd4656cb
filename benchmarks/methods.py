"""Seconds that each method takes per image, published settings, on the testbed's 32x32 models; like the commands, the
process keeps freed memory.

    python benchmarks/methods.py [--cores N]
"""

import argparse
import time

import torch

from sda_fast import Projector
from sda_fast.host_memory import keep_freed_memory
from sda_fast.methods import METHODS, create, method_class
from sda_fast.methods.vp_sde import SDEPurifier
from sda_fast.models import load_adm, load_classifier, load_dit
from sda_fast.weights import weights_path

IMAGES = {"source": 64, "tent": 64, "memo": 4, "diffusion_tta": 1, "gda": 2}  # the others: 10


def seconds(name: str, classifier: torch.nn.Module, networks: dict[str, torch.nn.Module]) -> float:
    kind = method_class(name)
    options: dict = {need: networks[need] for need in kind.needs}
    if kind.finetuned:
        options["finetuned"] = classifier
    if kind.projection:
        options["projector"] = {"dda": Projector, "diffpure": SDEPurifier}[kind.projection](networks["adm"])
    tta = create(name, classifier, **options)
    images = torch.rand(IMAGES.get(name, 10), 3, 32, 32) * 2 - 1
    if name in ("source", "tent", "memo", "gda"):  # short ones show what is compiled at the first call
        tta(images)
    begin = time.perf_counter()
    tta(images)
    return (time.perf_counter() - begin) / len(images)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=1, help="threads of the process")
    # Once: a process that had fewer threads before shares its cores among several pools of them.
    torch.set_num_threads(parser.parse_args().cores)
    torch.manual_seed(0)
    networks = {"adm": load_adm(weights_path("photos:adm")), "dit": load_dit(weights_path("photos:dit"))}
    for model in ("resnet", "convnext"):
        classifier = load_classifier(weights_path(f"photos:{model}"))
        for name in METHODS:
            print(f"{model:8} {name:13} {seconds(name, classifier, networks):9.4f} s", flush=True)


if __name__ == "__main__":
    main()
