"""Every kind of step as the ONNX file that TensorRT is given, at full size with random weights.

    python benchmarks/export.py [MODEL ...] [--precision fp32 bf16] [--output benchmarks/results/export.json]

Each file is exported by a process of its own, then checked: by onnx.checker, and against what TensorRT supports
(`onnx_rules`). A row holds {model, precision, batch, nodes, operators, problems, bytes, seconds, peak_gb}; seconds and
peak memory are those of the export, the latter with the model in it. Rows of models that are not asked for
stay. Exits with 1 if a file has problems. adm-256 takes about 7 GB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from onnx_rules import check
from torch import nn

from sda_fast.diffusion import LowPass
from sda_fast.engines import ClassifierStep, DiTStep, GuidedStep, Step, UnguidedStep
from sda_fast.engines.onnx_export import export_onnx
from sda_fast.models import ADM, DiT, create_classifier
from sda_fast.models.presets import ADM_PRESETS, DIT_PRESETS

ROOT = Path(__file__).parents[1]
BATCH = 16
CLASSIFIERS = {"resnet50": "resnet50", "swin-t": "swin_tiny_patch4_window7_224", "convnext-t": "convnext_tiny"}
MODELS = ("adm-256-guided", "adm-256-unguided", "dit-xl-2", *CLASSIFIERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "export.json")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one model, in this process
    options = parser.parse_args()
    if options.here:
        print(json.dumps(export(options.models[0], options.precision[0])))
        return
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    by_name = {(row["model"], row["precision"]): row for row in rows}
    for model in options.models:
        for precision in options.precision:
            command = [sys.executable, __file__, model, "--precision", precision, "--here"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            by_name[model, precision] = row
            shown = {k: v for k, v in row.items() if k != "operators"}
            print(json.dumps(shown), flush=True)
            options.output.write_text("[\n" + ",\n".join(json.dumps(row) for row in by_name.values()) + "\n]\n")
    sys.exit(any(row["problems"] for row in by_name.values()))


def export(model: str, precision: Any) -> dict[str, Any]:
    step = make(model, precision)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        started = time.perf_counter()
        export_onnx(step, path, BATCH)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        operators, problems = check(path)
    return {
        "model": model,
        "precision": precision,
        "batch": BATCH,
        "nodes": operators.total(),
        "operators": dict(operators.most_common()),
        "problems": dict(problems),
        "bytes": size,
        "seconds": round(seconds, 1),
        "peak_gb": round(peak / 1e9, 2),
        "torch": torch.__version__,
    }


def make(model: str, precision: Any) -> Step:
    """The step of a model of MODELS, with random weights; what training starts from zero is not zero."""
    torch.manual_seed(0)
    network: nn.Module
    if model in CLASSIFIERS:
        network = _filled(create_classifier(CLASSIFIERS[model], range(1000)))
        return ClassifierStep(network, 224, precision)
    if model == "dit-xl-2":
        return DiTStep(_filled(DiT(**DIT_PRESETS[model])), cfg_scale=4.0, precision=precision)
    adm = _filled(ADM(**ADM_PRESETS["imagenet256"]))
    return UnguidedStep(adm, precision) if model.endswith("unguided") else GuidedStep(adm, LowPass(256, 4), precision)


def _filled(network: Any) -> Any:
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network


if __name__ == "__main__":
    main()
