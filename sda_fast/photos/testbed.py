"""The testbed as folders: test patches, clean and corrupted, laid out like ImageNet-C."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sda_fast.data import CORRUPTIONS, corrupt, identity, write_png
from sda_fast.data.corruptions import library_version
from sda_fast.errors import SdaError
from sda_fast.photos.dataset import CLASSES, held_out_patches
from sda_fast.stages.manifest import open_output
from sda_fast.stages.progress import progress

SEVERITY = 2  # the source models keep some skill under every corruption; docs/testbed.md has the table


def write_testbed(
    output: str | Path,
    per_class: int = 100,
    corruptions: Sequence[str] = CORRUPTIONS,
    severity: int = SEVERITY,
    *,
    exactly: bool = False,
    quiet: bool | None = None,
) -> dict[str, Any]:
    """Write `<output>/clean/<class>/<index>.png` and `<output>/<corruption>/<severity>/<class>/<index>.png`.

    A patch's corruption depends on its class, its index, the corruption and the severity alone, so a larger
    `per_class` adds to the folder. exactly: whether the folder may hold nothing else. Raises SdaError for unknown
    corruptions, settings out of range, and patches that must not be there, before any is written.
    """
    for name in corruptions:
        if name not in CORRUPTIONS:
            raise SdaError(f"corruption {name!r} is not known; choose from {', '.join(CORRUPTIONS)}")
    if not 1 <= severity <= 5:
        raise SdaError(f"--severity {severity} is out of range: 1 is the weakest, 5 the strongest")
    groups = [("clean", None), *((f"{name}/{severity}", name) for name in corruptions)]
    patches = [
        (f"{group}/{label}/{index:03d}", corruption, patch)
        for label in CLASSES
        for index, patch in enumerate(held_out_patches(label, per_class))
        for group, corruption in groups
    ]
    out = open_output(output, "photos", {"severity": severity, "corruptions_library": library_version()})
    if exactly:
        way_out = "give the options that it was made with, another --output, or delete it"
        out.require_no_others([key for key, _, _ in patches], way_out)
    with progress(len(patches), "writing patches", quiet) as reporter:
        for key, corruption, patch in patches:
            if not out.done(key):
                if corruption is not None:
                    patch = corrupt(patch, corruption, severity, identity("corrupt", key))
                write_png(patch, out.path(key))
            reporter.advance()
    out.finish({"per_class": per_class, "corruptions": list(corruptions)})
    return {"images": len(patches), "output": str(output)}
