"""Training images from files to batches: read, augmented and stacked, in this process or in several beside it."""

from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sda_fast.data import ImageFile, read_image
from sda_fast.errors import SdaError
from sda_fast.stages.augment import Augmentation

Item = tuple[int, Any]  # the position of a file, and what its augmentation drew
Loaded = tuple[Tensor, Tensor]  # uint8 [N, S, S, 3], int64 [N]


class TrainingImages(Dataset):
    """Augmented images and labels by `Item`."""

    def __init__(self, files: Sequence[ImageFile], labels: Sequence[int], augment: Augmentation) -> None:
        self._files, self._labels, self._augment = files, labels, augment

    def __getitem__(self, item: Item) -> tuple[Tensor, int] | SdaError:
        i, draw = item
        try:
            return self._augment(read_image(self._files[i].path), draw), self._labels[i]
        except SdaError as error:  # another process's exception would come with its traceback as text
            return error


def load(images: TrainingImages, parts: Iterable[list[Item]], workers: int, pin: bool) -> Generator[Loaded]:
    """The given parts in order, two ahead per worker process; with `workers` 0 when they are asked for.

    Raises SdaError for a file that can no longer be read, and if a worker process dies.
    """
    loader = DataLoader(
        images,
        batch_sampler=parts,
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=pin,
        multiprocessing_context="spawn" if workers else None,
    )
    loaded = iter(loader)
    while True:
        try:
            part = next(loaded)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise SdaError(
                "a process that reads images died, perhaps for lack of memory: run the same command again to go on, "
                "with fewer --workers"
            ) from error
        if isinstance(part, SdaError):
            raise part
        yield part


def _stack(items: list[tuple[Tensor, int] | SdaError]) -> Loaded | SdaError:
    images, labels = [], []
    for item in items:
        if isinstance(item, SdaError):
            return item
        images.append(item[0])
        labels.append(item[1])
    return torch.stack(images), torch.tensor(labels)
