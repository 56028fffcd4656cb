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
    quiet: bool | None = None,
) -> dict[str, Any]:
    """Write `<output>/clean/<class>/<index>.png` and `<output>/<corruption>/<severity>/<class>/<index>.png`.

    A patch's corruption depends on its class, its index, the corruption and the severity alone, so a larger
    `per_class` adds to the folder. Raises SdaError for unknown corruptions and settings out of range.
    """
    for name in corruptions:
        if name not in CORRUPTIONS:
            raise SdaError(f"corruption {name!r} is not known; choose from {', '.join(CORRUPTIONS)}")
    if not 1 <= severity <= 5:
        raise SdaError(f"--severity {severity} is out of range: 1 is the weakest, 5 the strongest")
    patches = {label: held_out_patches(label, per_class) for label in CLASSES}
    out = open_output(output, "photos", {"severity": severity, "corruptions_library": library_version()})
    total = per_class * len(CLASSES) * (1 + len(corruptions))
    with progress(total, "writing patches", quiet) as reporter:
        for label in CLASSES:
            for index, patch in enumerate(patches[label]):
                name = f"{label}/{index:03d}"
                if not out.done(f"clean/{name}"):
                    write_png(patch, out.path(f"clean/{name}"))
                reporter.advance()
                for corruption in corruptions:
                    key = f"{corruption}/{severity}/{name}"
                    if not out.done(key):
                        write_png(corrupt(patch, corruption, severity, identity("corrupt", key)), out.path(key))
                    reporter.advance()
    out.finish({"per_class": per_class, "corruptions": list(corruptions)})
    return {"images": total, "output": str(output)}
