"""Images in and out: listing, reading, cropping, quantising, writing and corrupting.

Everything here works on uint8 arrays of shape [H, W, 3] in RGB order; `to_unit` and `to_uint8` are the only
passage to the float tensors in [-1, 1] that the models see.
"""

from sda_fast.data.classes import imagenet_classes, label_indices, read_classes
from sda_fast.data.conditions import below_condition, by_condition, condition_of, describe
from sda_fast.data.corruptions import CORRUPTIONS, corrupt
from sda_fast.data.crops import DiffusionCrop, EvaluationCrop, center_crop, resize_short_side
from sda_fast.data.images import (
    ImageFile,
    Source,
    find_images,
    identity,
    list_images,
    pair,
    read_image,
    shown,
    source_of,
    write_jpeg,
    write_png,
)
from sda_fast.data.prefetch import Prefetcher
from sda_fast.data.quantize import to_uint8, to_unit
from sda_fast.data.readers import DECODERS, Decoder, make_reader, reading_threads
from sda_fast.data.watermarks import watermark
from sda_fast.data.writer import Writer

__all__ = [
    "CORRUPTIONS",
    "DECODERS",
    "Decoder",
    "DiffusionCrop",
    "EvaluationCrop",
    "ImageFile",
    "Prefetcher",
    "Source",
    "Writer",
    "below_condition",
    "by_condition",
    "center_crop",
    "condition_of",
    "corrupt",
    "describe",
    "find_images",
    "identity",
    "imagenet_classes",
    "label_indices",
    "list_images",
    "make_reader",
    "pair",
    "read_classes",
    "read_image",
    "reading_threads",
    "resize_short_side",
    "shown",
    "source_of",
    "to_uint8",
    "to_unit",
    "watermark",
    "write_jpeg",
    "write_png",
]
