"""Images in and out: listing, reading, cropping, quantising, writing and corrupting.

Everything here works on uint8 arrays of shape [H, W, 3] in RGB order; `to_unit` and `to_uint8` are the only
passage to the float tensors in [-1, 1] that the models see.
"""

from sda_fast.data.corruptions import CORRUPTIONS, corrupt
from sda_fast.data.crops import center_crop, resize_short_side
from sda_fast.data.images import (
    ImageFile,
    identity,
    label_indices,
    list_images,
    pair,
    read_classes,
    read_image,
    write_png,
)
from sda_fast.data.quantize import to_uint8, to_unit

__all__ = [
    "CORRUPTIONS",
    "ImageFile",
    "center_crop",
    "corrupt",
    "identity",
    "label_indices",
    "list_images",
    "pair",
    "read_classes",
    "read_image",
    "resize_short_side",
    "to_uint8",
    "to_unit",
    "write_png",
]
