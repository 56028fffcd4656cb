"""Stage "finetune": adapt a classifier to the aligned synthetic images; the second half of SDA's first stage."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sda_fast.data import ImageFile, label_indices, list_images, read_image, reading_threads, shown
from sda_fast.errors import SdaError
from sda_fast.models import load_classifier, save_checkpoint
from sda_fast.models.checkpoints import read_checkpoint
from sda_fast.models.classifiers import with_drop_path
from sda_fast.stages.augment import make_augmentation
from sda_fast.stages.manifest import file_sha256, open_output
from sda_fast.stages.ranks import Ranks, is_first, processes_here, ranks, wait_for_all
from sda_fast.stages.recipes import Recipe, recipe_for
from sda_fast.stages.training import STATE, train

MODEL = "model.safetensors"


def finetune(
    input: str | Path,
    output: str | Path,
    model: str | Path,
    recipe: str | Recipe | None = None,
    *,
    drop_path: float | None = None,
    micro_batch: int | None = None,
    stop_after: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    quiet: bool | None = None,
) -> dict[str, Any]:
    """Fine-tune a classifier on the labelled images below `input` (`.../<class>/<file>`); returns a summary.

    `recipe` is one of `RECIPES`, "paper" or "code" by name (with what else is given in place of its values, as
    `recipe_for` explains) or a `Recipe` as it is. `workers`: processes that read images beside each training process;
    the result does not depend on it. By default there are some for a GPU and none for the CPU.

    Writes `<output>/model.safetensors`, a file of this package. BatchNorm statistics move with the data, as in the
    original. Resumes after the last whole epoch, with the very result of a run that was not interrupted. Of several
    processes (torchrun) each computes some parts of every batch; the batch and what is drawn stay the same.
    Raises SdaError for unknown class folders, wrong weights and other settings than those of a run begun before.
    """
    if seed < 0:
        raise SdaError(f"--seed {seed} is out of range: give at least 0")
    others = ranks()
    files = _list(input, others)
    classifier = load_classifier(model)
    labels = label_indices(files, classifier.classes)
    if isinstance(recipe, Recipe):
        if (drop_path, micro_batch, stop_after) != (None, None, None):
            raise SdaError("drop_path, micro_batch and stop_after go with a recipe's name: set them in the Recipe")
    else:
        architecture = classifier.config["architecture"]
        recipe = recipe_for(recipe, architecture, drop_path=drop_path, micro_batch=micro_batch, stop_after=stop_after)
    _require_parts(recipe, others)
    trained = classifier if recipe.drop_path is None else with_drop_path(classifier, recipe.drop_path)
    settings = {
        "recipe": asdict(recipe),
        "seed": seed,
        "images": len(files),
        "weights": {"model": file_sha256(model)},
        "data": _content_hash(files, others),
    }
    out = open_output(output, "finetune", settings)
    target = out.folder / MODEL
    summary = {"images": len(files), "epochs": recipe.last_epoch, "output": str(target)}
    state = out.folder / STATE  # goes last: with it beside the model, a run was stopped between the two
    finished = target.exists() and not state.exists()
    if finished if others is None else others.share(finished):
        return summary

    shapes = _shapes(files, others)
    augment = make_augmentation(recipe, trained.input_size, [file.name for file in files], shapes)
    workers = _readers(device) if workers is None else workers
    losses = train(trained.to(device), files, labels, augment, recipe, seed, out, workers, quiet)
    if is_first():
        _, metadata = read_checkpoint(model)
        metadata = metadata or {"kind": "classifier", "config": classifier.config}  # the file is another library's
        save_checkpoint(target, trained.cpu(), metadata)
        out.finish({**summary, "loss_per_epoch": losses})
        (out.folder / STATE).unlink(missing_ok=True)
    wait_for_all()
    return {**summary, "loss": losses[-1]}


def _list(input: str | Path, others: Ranks | None) -> list[ImageFile]:
    """The images, as the first process sees the folder."""
    names = [file.name for file in list_images(input)] if is_first() else []
    if others is not None:
        names = others.share(names)
    if len(names) < 2:
        raise SdaError(f"--input {input} holds a single image: fine-tuning needs at least two")
    return [ImageFile(Path(input), name) for name in names]


def _require_parts(recipe: Recipe, others: Ranks | None) -> None:
    if others is not None and others.size > recipe.parts:
        parts = f"{recipe.parts} part{'s' * (recipe.parts > 1)}"
        raise SdaError(
            f"a batch of {recipe.batch_size} has {parts}, too few for {others.size} processes: start fewer, "
            "or give a smaller --micro-batch"
        )


def _readers(device: str) -> int:
    """Reading processes for each training process: all cores between them for GPUs; a CPU has no core to spare."""
    return reading_threads(processes_here()) if torch.device(device).type == "cuda" else 0


def _content_hash(files: Sequence[ImageFile], others: Ranks | None) -> str:
    """One hash of all names, which hold the labels, and contents."""
    digest = hashlib.sha256()
    for file, content in zip(files, _of_each(lambda file: file_sha256(file.path), files, others), strict=True):
        digest.update(f"{file.name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _shapes(files: Sequence[ImageFile], others: Ranks | None) -> list[list[int]]:
    """Height and width of every image; each is read once.

    Raises SdaError naming all that cannot be read: without them it would become another model.
    """
    found = _of_each(_shape, files, others)
    bad = {shown(file.name): shape for file, shape in zip(files, found, strict=True) if isinstance(shape, str)}
    if bad:
        first, *rest = bad
        also = f" (so are {len(rest)} others: {', '.join(rest)})" if rest else ""
        raise SdaError(f"{bad[first].removesuffix('.')}{also}.")
    return found


def _shape(file: ImageFile) -> list[int] | str:
    try:
        return list(read_image(file.path).shape[:2])
    except SdaError as error:
        return str(error)


def _of_each(work: Callable[[ImageFile], Any], files: Sequence[ImageFile], others: Ranks | None) -> list[Any]:
    """`work` of every file, which must be JSON-able: in threads, each process doing its share."""
    mine = files if others is None else files[others.rank :: others.size]
    with ThreadPoolExecutor(reading_threads(processes_here())) as pool:
        done = list(pool.map(work, mine))
    if others is None:
        return done
    result: list[Any] = [None] * len(files)
    for rank, part in enumerate(others.gather(done)):
        result[rank :: others.size] = part
    return result
