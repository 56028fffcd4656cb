"""Where weights lie: a file, a folder of diffusers, or "photos:NAME" for a model that ships with the package."""

from pathlib import Path

from sda_fast.errors import SdaError

SHIPPED = Path(__file__).parent / "photos" / "weights"


def weights_path(name: str | Path) -> Path:
    """The file a weights option means; of a diffusers pipeline, its DiT's.

    Raises SdaError if it does not exist; damaged ones show when read.
    """
    text = str(name)
    if text.startswith("photos:"):
        path = SHIPPED / f"{text.removeprefix('photos:')}.safetensors"
        if not path.is_file():
            known = ", ".join(sorted(f"photos:{file.stem}" for file in SHIPPED.glob("*.safetensors"))) or "none"
            raise SdaError(f"{text} does not ship with this package; known are {known}")
        return path
    if text.startswith("timm:"):
        raise SdaError(f"{text} is no file yet: sda-fast checkpoints --fetch {text} --output FOLDER writes one")
    if Path(text).is_dir():
        return diffusers_file(text, "transformer")
    if not Path(text).is_file():
        raise SdaError(f'checkpoint {text} does not exist; give a file, or "photos:NAME" for a shipped one')
    return Path(text)


def diffusers_file(folder: str | Path, part: str) -> Path:
    """The weights in a folder that diffusers wrote: of one model, or of a pipeline, whose models are its `part`s.

    Raises SdaError if there are none.
    """
    for place in (Path(folder), Path(folder) / part):
        for suffix in (".safetensors", ".bin"):
            if (path := place / f"diffusion_pytorch_model{suffix}").is_file():
                return path
    raise SdaError(
        f"folder {folder} holds no diffusion_pytorch_model.safetensors, neither itself nor in {part}/: "
        "give a file, or a folder that diffusers wrote"
    )
