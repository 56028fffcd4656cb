"""One hundred images through the stages at full size, with random weights: DiT-XL/2, VAE, ADM-256, ResNet-50.

    python benchmarks/pipeline.py [--device cuda|cpu] [--engine NAME] [--tiny] [--minutes N] [--output FOLDER]

Through the functions behind the commands: `synthesize` draws images at 250 steps and decodes them, `align` projects as
many JPEGs made for the purpose by 50 guided steps, `evaluate` scores a ResNet-50 on these and their projections.
A row per stage goes to <output>/pipeline.jsonl. After --minutes no stage begins, and a line names what is left; the
same call goes on from there, also inside a stage that was killed: then its row is of the images made in the last call.
After the last stage, a call begins anew. Weights and images stay in --work.
Without diffusers nothing is decoded: `synthesize` then is the Sampler alone, and its row says so.
"""

import argparse
import gc
import json
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import random_checkpoints
import torch
from decode import write_photos
from harness import ROOT

from sda_fast.bench import TINY, random_model
from sda_fast.bench.measure import environment, wait
from sda_fast.data import imagenet_classes
from sda_fast.engines import ENGINES, Precision
from sda_fast.files import write_json
from sda_fast.models import load_dit
from sda_fast.models.checkpoints import save_checkpoint
from sda_fast.models.classifiers import create_classifier
from sda_fast.stages.align import AlignSettings, align
from sda_fast.stages.evaluate import evaluate
from sda_fast.stages.synthesize import SynthesizeSettings, make_sampler, synthesize

TINY_VAE = {"block_out_channels": (32, 32), "latent_channels": 4, "sample_size": 16} | {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@dataclass(frozen=True)
class Models:
    """Weights files, what published ones are called, and the names of all classes."""

    dit: Path
    adm: Path
    classifier: Path
    vae: Path | None
    dit_preset: str | None
    adm_preset: str | None
    classes: list[str]


@dataclass(frozen=True)
class Run:
    models: Models
    targets: Path
    results: Path
    images: int
    steps: tuple[str, int]  # respacing of the synthesis, start of the projection
    engine: str
    precision: Precision
    batch_size: int
    device: str


@dataclass(frozen=True)
class Done:
    """What a stage did: its settings, how many images, and when each was finished where that is known."""

    settings: dict[str, Any]
    images: int
    finished: list[float]
    note: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--engine", default="inductor", choices=tuple(ENGINES))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--batch-size", type=int, default=25, help="of --images a divisor, else the last one is padded")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--tiny", action="store_true", help="tiny models, two steps: does it run at all?")
    parser.add_argument("--minutes", type=float, default=7.0, help="begin no stage after this time")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pipeline", help="folder of weights and images")
    parser.add_argument("--output", type=Path, required=True, help="folder that takes the rows")
    options = parser.parse_args()
    begin = time.monotonic()
    run = prepare(options)
    todo = [name for name in STAGES if not row_file(run, name).exists()]
    failed = False
    for i, name in enumerate(todo):
        if time.monotonic() - begin > 60 * options.minutes:
            print("LEFT for another call:", ", ".join(todo[i:]))
            break
        row = {"benchmark": "pipeline", "stage": name, "tiny": options.tiny, **measure(STAGES[name], run)}
        options.output.mkdir(parents=True, exist_ok=True)
        with (options.output / "pipeline.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "failed" in row:
            failed = True
        else:
            write_json(row, row_file(run, name))
        print(line(row), flush=True)
    sys.exit(1 if failed else 0)


def row_file(run: Run, stage: str) -> Path:
    """Where the row of a stage stands once it is measured."""
    return run.results / f"{stage}.json"


def prepare(options: argparse.Namespace) -> Run:
    """What the stages need, made or found, and the folder of their results, begun anew where it is of another run."""
    work = options.work / ("tiny" if options.tiny else "full")
    models = (tiny_models if options.tiny else full_models)(work / "weights")
    if not 1 <= options.images <= len(models.classes):
        sys.exit(
            f"--images {options.images} is out of range: one of each class, of which there are {len(models.classes)}"
        )
    targets = work / f"targets-{options.images}"
    random_checkpoints.write_once(targets, lambda part: write_targets(part / models.classes[0], options.images))

    steps = ("2", 2) if options.tiny else ("250", 50)
    asked = {name: getattr(options, name) for name in ("images", "engine", "precision", "batch_size", "device")}
    run = Run(models, targets, work / "results", steps=steps, **asked)
    here = environment(options.device, ROOT)
    begin_or_go_on(run, {**asked, **{name: here[name] for name in ("device", "torch", "commit")}})
    return run


def begin_or_go_on(run: Run, asked: dict[str, Any]) -> None:
    """Empty the folder of results, unless it holds an unfinished run of what is asked."""
    asked = {**asked, "vae": run.models.vae is not None}
    begun = run.results / "run.json"
    unfinished = begun.exists() and not all(row_file(run, name).exists() for name in STAGES)
    if not unfinished or json.loads(begun.read_text()) != asked:
        shutil.rmtree(run.results, ignore_errors=True)
        write_json(asked, begun)


def full_models(folder: Path) -> Models:
    random_checkpoints.write_diffusion_model(folder / random_checkpoints.DIT, "dit-xl-2-256")
    random_checkpoints.write_diffusion_model(folder / random_checkpoints.ADM, "adm-256-uncond")
    random_checkpoints.write_resnet(folder / random_checkpoints.RESNET)
    vae = write_vae(folder / random_checkpoints.VAE, random_checkpoints.VAE_CONFIG)
    files = (folder / random_checkpoints.DIT, folder / random_checkpoints.ADM, folder / random_checkpoints.RESNET)
    return Models(*files, vae, "dit-xl-2", "imagenet256", imagenet_classes())


def tiny_models(folder: Path) -> Models:
    classes = [f"class{i}" for i in range(TINY["dit"][1]["num_classes"])]
    torch.manual_seed(0)
    made = {name: random_model(*TINY[name]) for name in ("dit", "adm")}
    made["classifier"] = create_classifier("resnet18", classes, input_size=16, resize=16)
    for name, model in made.items():
        save_checkpoint(folder / f"{name}.safetensors", model, {"kind": name, "config": model.config})
    files = (folder / f"{name}.safetensors" for name in made)
    return Models(*files, write_vae(folder / "vae", TINY_VAE), None, None, classes)


def write_vae(path: Path, config: dict[str, Any]) -> Path | None:
    try:
        random_checkpoints.write_vae(path, config)
    except ImportError:
        return None
    return path


def write_targets(folder: Path, images: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_photos(folder, images, threads=2)


def measure(stage: Callable[[Run], Done], run: Run) -> dict[str, Any]:
    """A stage's row, with peak memory on a GPU: the most that was allocated above what stood before."""
    gpu = run.device != "cpu"
    before = torch.cuda.memory_allocated() if gpu else 0
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    here = environment(run.device, ROOT)
    begin = time.perf_counter()
    try:
        done = stage(run)
        wait(run.device)
        seconds = time.perf_counter() - begin
        if not done.images:
            raise RuntimeError("a call before made the last image but no row: run the stages anew for its seconds")
        peak = torch.cuda.max_memory_allocated() - before if gpu else None
        return {**figures(done, seconds, run.batch_size), "peak_bytes": peak, "settings": done.settings, **here}
    except Exception as error:  # whatever it is, the next stage is tried: machines to measure on are rare
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", **here}
    finally:
        gc.collect()
        torch._dynamo.reset()
        if gpu:
            torch.cuda.empty_cache()


def figures(done: Done, seconds: float, batch_size: int) -> dict[str, Any]:
    """Rates in images per second: of the whole stage, and without its first batch, which waits for weights and
    compilation; the latter only where there are further batches."""
    row: dict[str, Any] = {"images": done.images, "seconds": seconds, "images_per_second": done.images / seconds}
    if len(done.finished) > batch_size and (first := done.finished[batch_size - 1]) < (last := done.finished[-1]):
        row["images_per_second_after_first_batch"] = (len(done.finished) - batch_size) / (last - first)
    return row if done.note is None else {**row, "note": done.note}


def synthesize_images(run: Run) -> Done:
    models, started = run.models, time.time()
    settings = SynthesizeSettings(
        respacing=run.steps[0], engine=run.engine, precision=run.precision, batch_size=run.batch_size
    )
    if models.vae is None:
        return sample_latents(run, settings)
    output, only = run.results / "synthetic", models.classes[: run.images]
    presets = {"preset": models.dit_preset, "vae": models.vae}
    synthesize(output, models.dit, 1, models.classes, only, settings, **presets, device=run.device)
    finished = finish_times(output, started)
    return Done(asdict(settings), len(finished), finished)


def sample_latents(run: Run, settings: SynthesizeSettings) -> Done:
    sampler = make_sampler(load_dit(run.models.dit, run.models.dit_preset).to(run.device), settings)
    finished: list[float] = []
    for start in range(0, run.images, run.batch_size):
        labels = range(start, min(start + run.batch_size, run.images))
        sampler(labels, seeds=labels)
        wait(run.device)
        finished += [time.time()] * len(labels)
    return Done(
        asdict(settings), run.images, finished, "diffusers is missing: latents alone, by the Sampler, not decoded"
    )


def align_targets(run: Run) -> Done:
    started, output = time.time(), run.results / "projected"
    settings = AlignSettings(
        start=run.steps[1], engine=run.engine, precision=run.precision, batch_size=run.batch_size
    ).resolved()
    align(run.targets, output, run.models.adm, settings, preset=run.models.adm_preset, device=run.device)
    finished = finish_times(output, started)
    return Done(asdict(settings), len(finished), finished)


def evaluate_targets(run: Run) -> Done:
    """The classifier runs as PyTorch does, in float32, whatever the engine."""
    settings: dict[str, Any] = {"methods": ["source", "dda"], "batch_size": run.batch_size}
    projections = {"dda": run.results / "projected"}
    scores = run.results / "scores"
    rows = evaluate(run.targets, scores, run.models.classifier, None, projections, **settings, device=run.device)
    return Done(settings, rows[0]["images"] if rows else 0, [])


def finish_times(folder: Path, since: float) -> list[float]:
    """When the images below a folder were written, of those written after `since`, in order."""
    times = (path.stat().st_ctime for path in folder.rglob("*.png"))  # their time of writing is their input's
    return sorted(written for written in times if written >= since)


STAGES: dict[str, Callable[[Run], Done]] = {
    "synthesize": synthesize_images,
    "align": align_targets,
    "evaluate": evaluate_targets,
}


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['stage']}: FAILED: {row['failed']}"
    text = f"{row['stage']}: {row['images']} images in {row['seconds']:.1f} s, {row['images_per_second']:.3g} a second"
    if "images_per_second_after_first_batch" in row:
        text += f" ({row['images_per_second_after_first_batch']:.3g} after the first batch)"
    if row["peak_bytes"] is not None:
        text += f", peak {row['peak_bytes'] / 1e9:.2f} GB"
    return f"{text}; {row['note']}" if "note" in row else text


if __name__ == "__main__":
    main()
