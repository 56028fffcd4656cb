"""Where weights lie: a path, or "photos:NAME" for a model of the testbed that ships with the package."""

from pathlib import Path

from sda_fast.errors import SdaError

SHIPPED = Path(__file__).parent / "photos" / "weights"


def weights_path(name: str | Path) -> Path:
    """The file a weights option means. Raises SdaError if it does not exist; damaged ones show when read."""
    text = str(name)
    if text.startswith("photos:"):
        path = SHIPPED / f"{text.removeprefix('photos:')}.safetensors"
        if not path.is_file():
            known = ", ".join(sorted(f"photos:{file.stem}" for file in SHIPPED.glob("*.safetensors"))) or "none"
            raise SdaError(f"{text} does not ship with this package; known are {known}")
        return path
    if not Path(text).is_file():
        raise SdaError(f'checkpoint {text} does not exist; give a file, or "photos:NAME" for a shipped one')
    return Path(text)
