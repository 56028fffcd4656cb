"""The images a report shows: before and after projection, and under Grad-CAM as in the paper's Figure 4.

They are chosen by their place in the sorted list, whatever was predicted of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from sda_fast.data import EvaluationCrop, ImageFile, center_crop, list_images, read_image, to_unit
from sda_fast.errors import SdaError
from sda_fast.report.grad_cam import class_activation, overlay
from sda_fast.report.pictures import Picture, PictureTable, Pixels

SIDE = 160  # pixels; larger images are shown reduced to it, as a report of full-size ones would be too heavy
Item = TypeVar("Item")
TITLES = {"diffpure": "DiffPure", "dda": "projected"}


class Example(NamedTuple):
    """A test image and, where the target holds uncorrupted images, the original it was made of."""

    title: str
    file: ImageFile
    original: ImageFile | None

    @property
    def words(self) -> str:
        """Title and class, for captions and for who cannot see the picture."""
        return self.title if self.title == self.file.class_name else f"{self.title}, {self.file.class_name}"


def choose_examples(target: str | Path, limit: int = 15) -> list[Example]:
    """One image of each corruption, another class each time; of a single corruption, or none, some images."""
    groups: dict[str, list[ImageFile]] = {}
    for file in list_images(target):
        groups.setdefault("/".join(file.name.split("/")[:-2]), []).append(file)
    clean = {_place(file): file for file in (groups.pop("clean", []) if len(groups) > 1 else [])}
    by_corruption: dict[str, list[str]] = {}
    for name in groups:
        corruption, _, severity = name.rpartition("/")
        by_corruption.setdefault(corruption if corruption and severity.isdigit() else name, []).append(name)
    # Of several severities the middle one.
    groups = {names[len(names) // 2]: groups[names[len(names) // 2]] for names in by_corruption.values()}
    if len(groups) == 1:
        (files,) = groups.values()
        chosen = [(file.class_name, file) for file in spread(files, min(5, limit))]
    else:
        parts = [(name, files[i * len(files) // len(groups)]) for i, (name, files) in enumerate(groups.items())]
        chosen = [(name.replace("/", " ").replace("_", " "), file) for name, file in parts][:limit]
    return [Example(title, file, clean.get(_place(file))) for title, file in chosen]


def before_after(examples: Sequence[Example], projections: Mapping[str, str | Path]) -> PictureTable:
    """Each example beside its projections (folders by kind) and, where there is one to each, its original."""
    columns = _columns(examples, projections)
    images = {title: [read_image(path) for path in paths] for title, paths in columns.items()}
    projected = set(columns) - {"original", "corrupted"}
    rows = []
    for i, example in enumerate(examples):
        # The diffusion model sees the central square; what stands beside its projection is cut alike.
        size = min(SIDE, *(min(column[i].shape[:2]) for column in images.values()))
        pictures = [
            Picture(center_crop(column[i], size), f"{example.words}: {title}") for title, column in images.items()
        ]
        rows.append((example.title, tuple(pictures)))
    caption = "Test images before and after projection" if projected else "Test images"
    return PictureTable(caption, tuple(columns), tuple(rows))


def grad_cam_panels(
    name: str,
    source: str | Path,
    finetuned: str | Path | None,
    examples: Sequence[Example],
    projections: Mapping[str, str | Path],
    *,
    resize: bool = True,
) -> PictureTable:
    """Grad-CAM of a classifier called `name`: originals, corrupted and projected images under the source model, and
    projections under the fine-tuned one (weights as `load_classifier` takes them).

    resize: as in `evaluate`. Raises SdaError as `class_activation` and `load_classifier` do.
    """
    from sda_fast.models import load_classifier
    from sda_fast.weights import weights_path

    model = load_classifier(weights_path(source))
    paths = _columns(examples, {kind: folder for kind, folder in projections.items() if kind == "dda"})
    conditions = [(f"{title}, source model", model, files) for title, files in paths.items()]
    if finetuned is not None and "projected" in paths:
        conditions.append(("projected, fine-tuned model", load_classifier(finetuned), paths["projected"]))
    crop = EvaluationCrop(model.input_size, model.resize if resize else model.input_size)
    columns, layer = [], ""
    for title, classifier, files in conditions:
        images = np.stack([crop(read_image(file)) for file in files])
        heat, predicted, layer = class_activation(classifier, to_unit(images))
        column = []
        for i, example in enumerate(examples):
            label = classifier.classes[predicted[i]]
            right = label == example.file.class_name
            alt = f"{example.words}: Grad-CAM of {title}, predicted {label}, {'right' if right else 'wrong'}"
            column.append(Picture(_under_heat(images[i], heat[i]), alt, label, right))
        columns.append(column)
    note = (
        f"What weighs in the class that {name} predicts, named below each image: red most, blue least; taken at "
        f"{layer}. Projected images as DDA shows them to the source model and SDA to the fine-tuned one, whose votes "
        "are then added to the source model's on the corrupted image. Images were chosen by position, not by outcome."
    )
    rows = [(example.words, row) for example, row in zip(examples, zip(*columns, strict=True), strict=True)]
    return PictureTable(f"Grad-CAM of {name}", tuple(title for title, _, _ in conditions), tuple(rows), note)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, evenly spaced; all of them if they are fewer."""
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def _columns(examples: Sequence[Example], projections: Mapping[str, str | Path]) -> dict[str, list[Path]]:
    """The files of each column, by its title."""
    columns = {"corrupted": [example.file.path for example in examples]}
    originals = [example.original.path for example in examples if example.original is not None]
    if len(originals) == len(examples):
        columns = {"original": originals, **columns}
    for kind in [*(k for k in TITLES if k in projections), *(k for k in projections if k not in TITLES)]:
        made = {file.key: file.path for file in list_images(projections[kind])}
        missing = [example.file.name for example in examples if example.file.key not in made]
        if missing:
            raise SdaError(f"{projections[kind]} has no projection of {missing[0]}: align it first")
        columns[TITLES.get(kind, kind)] = [made[example.file.key] for example in examples]
    return columns


def _under_heat(image: Pixels, heat: np.ndarray) -> Pixels:
    """The overlay at SIDE pixels: the image enlarged pixel by pixel or reduced, the heat smoothly."""
    side = image.shape[0]
    size = SIDE // side * side if side < SIDE else SIDE
    resample = Image.Resampling.NEAREST if side < SIDE else Image.Resampling.BICUBIC
    shown = np.asarray(Image.fromarray(image).resize((size, size), resample))
    return overlay(shown, np.asarray(Image.fromarray(heat).resize((size, size), Image.Resampling.BILINEAR)))


def _place(file: ImageFile) -> str:
    """Class and name without suffix, which an image has in common with its corrupted versions."""
    return "/".join(file.key.split("/")[-2:])
