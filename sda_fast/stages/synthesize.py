"""Stage "synthesize": labelled images from the class-conditional model, one folder per class."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sda_fast.data import Writer, identity, to_uint8
from sda_fast.engines import Precision
from sda_fast.errors import SdaError
from sda_fast.models import DiT, load_dit
from sda_fast.models.vae import load_vae, vae_file
from sda_fast.sampler import Sampler
from sda_fast.stages.batch_size import BatchSize, execution_batch, record_smaller
from sda_fast.stages.batches import Work, plan, run_batches
from sda_fast.stages.failures import counting_what_is_done
from sda_fast.stages.manifest import Output, file_sha256, open_output
from sda_fast.stages.ranks import is_first, ranks, wait_for_all


@dataclass(frozen=True)
class SynthesizeSettings:
    """Everything that changes a synthetic image; all of it stands in the manifest. Names are those of `Sampler`.

    batch_size: it changes last bits only; "auto" takes what fits into memory.
    """

    respacing: str = "250"
    cfg_scale: float = 1.0
    clip: bool = False
    engine: str = "eager"
    precision: Precision = "fp32"
    batch_size: BatchSize = 10
    seed: int = 0


# The way out where images of an earlier run would be trained on beside those of this one.
OTHERS = "give the number and the classes that it was made with, another output, or delete it"


def synthesize(
    output: str | Path,
    dit: str | Path,
    per_class: int = 50,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    settings: SynthesizeSettings | None = None,
    *,
    preset: str | None = None,
    vae: str | Path | None = None,
    exactly: bool = False,
    device: str = "cpu",
    workers: int = 1,
    quiet: bool | None = None,
) -> dict[str, Any]:
    """Write `per_class` images of every class as `<output>/<class>/<index>.png`; returns a summary.

    classes: names of the model's classes in order; files of this package know theirs. only: the classes to make,
    by default all. vae: diffusers' AutoencoderKL (folder or weights file), for a DiT of latents. An image depends on
    its class, its index and the settings alone, so a later call with a larger `per_class` or other classes adds to the
    folder. exactly: whether the folder may hold nothing else. Resumes where an earlier run stopped.

    Raises SdaError for wrong weights, classes and settings, and for images that must not be there, before any is made.
    """
    settings = settings or SynthesizeSettings()
    # Wrong settings must fail before the folder is made.
    _, names = check_synthesize(dit, per_class, classes, only, settings, preset, vae, device)
    vae = None if vae is None else vae_file(vae)
    out = open_output(output, "synthesize", synthesize_record(dit, vae, settings, names))

    keys = synthetic_keys(only or names, per_class)
    if exactly:
        out.require_no_others(keys, OTHERS)
    batch_size = execution_batch(
        out, settings.batch_size, lambda: make_sampler(load_dit(dit, preset).to(device), settings), workers
    )
    todo = plan([[key] for key in keys], out.done, batch_size)
    foreseen = todo if workers == 1 and ranks() is None else []  # else no worker knows which batch is its last
    with counting_what_is_done(keys, out.done):
        run_batches(
            todo,
            _make_work,
            (dit, preset, vae, settings, batch_size, names, device, out, foreseen[-1:]),
            label="synthesis",
            total=len(keys),
            workers=workers,
            quiet=quiet,
        )
    if is_first():
        out.finish({"per_class": per_class, "images": len(keys)})
    wait_for_all()
    return {"images": len(keys), "synthesized": sum(len(b) for b in todo), "output": str(output)}


def check_synthesize(
    dit: str | Path,
    per_class: int,
    classes: Sequence[str] | None,
    only: Sequence[str] | None,
    settings: SynthesizeSettings,
    preset: str | None,
    vae: str | Path | None,
    device: str,
) -> tuple[DiT, list[str]]:
    """The DiT on the meta device and the names of its classes. Raises SdaError for what `synthesize` would refuse.

    Only keys and shapes of the weights are looked at, so it costs neither time nor memory.
    """
    if per_class < 1:
        raise SdaError(f"--per-class {per_class} is out of range: give at least 1")
    model = load_dit(dit, preset).to("meta")
    names = _class_names(model, classes, dit)
    unknown = [name for name in only or () if name not in names]
    if unknown:
        raise SdaError(f"class {unknown[0]!r} is none of the model's {len(names)} ({', '.join(names[:3])}, ...)")
    if (model.in_channels != 3) != (vae is not None):
        latents, way_out = (
            ("latents", "give --vae, the autoencoder that decodes them")
            if vae is None
            else ("pixels", "leave --vae out")
        )
        raise SdaError(f"DiT {dit} works on {latents} ({model.in_channels} channels): {way_out}")
    network = make_sampler(model, settings).network
    network.engine.check(network.step, torch.device(device))
    if vae is not None:
        load_vae(vae)
    return model, names


def synthetic_keys(classes: Sequence[str], per_class: int) -> list[str]:
    """What the images are called, `<class>/<index>`."""
    return [f"{name}/{index:05d}" for name in dict.fromkeys(classes) for index in range(per_class)]


def synthesize_record(
    dit: str | Path, vae: Path | None, settings: SynthesizeSettings, names: Sequence[str]
) -> dict[str, Any]:
    """What the manifest says of synthetic images; weights are read for it."""
    weights = {"dit": file_sha256(dit)}
    if vae is not None:
        weights["vae"] = file_sha256(vae)
    return {**asdict(settings), "classes": list(names), "weights": weights}


def make_sampler(dit: DiT, settings: SynthesizeSettings, batch_size: int | None = None) -> Sampler:
    """The sampler these settings describe, in batches of `batch_size` or else as they say.

    Raises SdaError for settings out of range.
    """
    if batch_size is None and settings.batch_size != "auto":
        batch_size = settings.batch_size
    return Sampler(**{"dit": dit, **asdict(settings), "batch_size": batch_size})


def _class_names(model: DiT, classes: Sequence[str] | None, dit: str | Path) -> list[str]:
    names = list(classes or model.classes)
    if not names:
        raise SdaError(f"DiT {dit} does not name its classes: give them with --classes FILE, one name per line")
    if len(names) != model.num_classes:
        raise SdaError(
            f"{len(names)} class names were given, but DiT {dit} has {model.num_classes} classes: "
            "give one name per class, in order"
        )
    for name in names:
        if "/" in name or name.startswith("."):
            raise SdaError(f"class {name!r} cannot name a folder of images: use names without / and leading .")
    return names


def _make_work(
    dit: str | Path,
    preset: str | None,
    vae: Path | None,
    settings: SynthesizeSettings,
    batch_size: int,
    names: list[str],
    device: str,
    out: Output,
    last: list[list[str]],
) -> Work:
    sampler, write = make_sampler(load_dit(dit, preset).to(device), settings, batch_size), Writer()
    decoder = None if vae is None else load_vae(vae).to(device)

    def work(keys: list[str]) -> None:
        labels = [names.index(key.split("/")[0]) for key in keys]
        seeds = [identity("synthesize", key) for key in keys]
        images = sampler(labels, seeds=seeds)
        record_smaller(out, batch_size, sampler.batch_size)
        if decoder is not None:
            with torch.no_grad():
                images = decoder.decode(images)
        arrays = to_uint8(images, "truncate")
        write.flush()
        for key, array in zip(keys, arrays, strict=True):
            write(array, out.path(key))
        if not last or keys == last[0]:
            write.flush()

    return work
