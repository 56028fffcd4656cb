"""Fixtures for all tests: the reference numbers in tests/data (their README says where they come from), tiny random
models, folders of random pictures, and the command line."""

import json
import signal
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parent / "data"

Reference = tuple[dict[str, Tensor], dict[str, Any]]


def _load_reference(name: str) -> Reference:
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.offset_keys()}, json.loads(file.metadata()["json"])


@pytest.fixture(scope="session")
def load_reference() -> Callable[[str], Reference]:
    """load_reference(name) -> (tensors by name, configuration) of tests/data/<name>.safetensors."""
    return _load_reference


@pytest.fixture(scope="session")
def load_weights() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """load_weights(tensors) -> the state dict in a reference file, float32, original keys."""

    def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = "weights/"
        return {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}

    return weights


CLASSES = ("ant", "bee", "cow")
ADM_CONFIG = {
    "image_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "num_head_channels": 32,
}
DIT_CONFIG = {
    "input_size": 16,
    "patch_size": 4,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "num_classes": len(CLASSES),
}
CLASSIFIERS = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "patch_size": 1}),
}


@dataclass(frozen=True)
class TinyModels:
    """Checkpoints of tiny random models for 16x16 images of the three `classes`; `save` makes further ones."""

    adm: Path
    dit: Path
    resnet: Path
    convnext: Path
    classes: tuple[str, ...]
    save: Callable[..., Path]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Random models as this package's checkpoint files; what training starts from zero is not zero."""
    from sda_fast.models import ADM, DiT, create_classifier, save_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    kinds = {"adm": (ADM, ADM_CONFIG), "dit": (DiT, DIT_CONFIG)}

    def save(kind: str, name: str, seed: int = 0, names: Sequence[str] = (), **changes: Any) -> Path:
        """kind: "adm", "dit" or a classifier; names: the DiT's classes; changes: of the configuration."""
        torch.manual_seed(seed)
        if kind in kinds:
            make, config = kinds[kind]
            config = {**config, **changes}
            model: torch.nn.Module = make(**config)
            metadata = {"kind": kind, "config": config, "classes": list(names)}
        else:
            architecture, options = CLASSIFIERS[kind]
            model = create_classifier(architecture, CLASSES, options, **{"input_size": 16, **changes})
            metadata = {"kind": "classifier", "config": model.config}
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        return save_checkpoint(folder / f"{name}.safetensors", model, metadata)

    files = {name: save(name, name, names=CLASSES) for name in ("adm", "dit", "resnet", "convnext")}
    return TinyModels(**files, classes=CLASSES, save=save)


@pytest.fixture(scope="session")
def write_images() -> Callable[..., Path]:
    """write_images(folder, names, size=(16, 16)): random pictures, each a function of its name; returns the folder."""

    def write(folder: Path, names: Iterable[str], size: tuple[int, int] = (16, 16)) -> Path:
        for name in names:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            coarse = Image.fromarray(rng.integers(256, size=(5, 5, 3), dtype=np.uint8))
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize(size, Image.Resampling.BICUBIC).save(path)
        return folder

    return write


@pytest.fixture(scope="session")
def pictures() -> Callable[[Path], dict[str, bytes]]:
    """pictures(folder): the bytes of every PNG below it by relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}

    return read


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Shells start commands in the background with Ctrl-C ignored, and processes inherit that; tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The number of CPU threads that the stages compute with: it shows in the last bits, and the tests run side by
    side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Said:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """cli("align", "--input", folder, ...): runs `sda-fast` in this process."""
    from sda_fast.cli.app import run

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["sda-fast", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run()
        captured = capfd.readouterr()
        code = end.value.code
        return Said(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return call
