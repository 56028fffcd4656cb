"""What is measured: models by preset, of random weights where none are given, and their steps."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sda_fast.diffusion import LowPass
from sda_fast.engines import DiTStep, GuidedStep, Precision, Step, UnguidedStep
from sda_fast.errors import SdaError
from sda_fast.models import ADM, DiT, load_adm, load_dit, with_phase_convolutions
from sda_fast.models.presets import ADM_PRESETS, DIT_PRESETS
from sda_fast.weights import weights_path

PRESETS: dict[str, tuple[type[ADM] | type[DiT], str]] = {
    "photos": (ADM, ""),
    "adm-256-uncond": (ADM, "imagenet256"),
    "dit-xl-2-256": (DiT, "dit-xl-2"),
}  # what is built, and the preset of `sda_fast.models` that says how
# For trying what takes no time: class and configuration, by the kind of model.
TINY: dict[str, tuple[type[ADM] | type[DiT], dict[str, Any]]] = {
    "adm": (
        ADM,
        {"image_size": 16, "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
        | {"attention_resolutions": (2,), "num_head_channels": 32},
    ),
    "dit": (DiT, {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 10}),
}
FACTOR = 4  # D, the low-pass filter's reduction, as published


def load_model(preset: str, weights: str | Path | None = None, seed: int = 0) -> ADM | DiT:
    """The model of a preset: of a checkpoint, of `photos` the shipped one, else `random_model`.

    Raises SdaError for a preset that is not known, or a checkpoint that does not fit.
    """
    kind, name = _preset(preset)
    if preset == "photos":
        return load_adm(weights or weights_path("photos:adm"))
    if weights is not None:
        return load_adm(weights, name) if kind is ADM else load_dit(weights, name)
    return random_model(*architecture(preset), seed)


def architecture(preset: str) -> tuple[type[ADM] | type[DiT], dict[str, Any]]:
    """Class and configuration of a preset's model, without making one of the large ones."""
    kind, name = _preset(preset)
    if preset == "photos":
        return kind, load_adm(weights_path("photos:adm")).config
    return kind, (ADM_PRESETS if kind is ADM else DIT_PRESETS)[name]


def _preset(preset: str) -> tuple[type[ADM] | type[DiT], str]:
    if preset not in PRESETS:
        raise SdaError(f"preset {preset!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[preset]


def random_model(kind: type[ADM] | type[DiT], config: dict[str, Any], seed: int = 0) -> ADM | DiT:
    """A model of random weights through which activations and gradients stay of order one; a function of the seed.

    What training starts from zero, and would make the network the identity, is drawn as well: matrices and kernels
    with the deviation that keeps a variance, vectors with 0.1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(**config)
        for parameter in model.parameters():
            if not parameter.any():
                fan_in = parameter[0].numel()
                nn.init.normal_(parameter, std=fan_in**-0.5 if parameter.dim() > 1 else 0.1)
    model.config = dict(config)
    return model


def make_step(model: ADM | DiT, precision: Precision, guided: bool = True, phase_convolutions: bool = False) -> Step:
    """The step of a model; a DiT has neither the low-pass gradient (`guided`) nor `models.with_phase_convolutions`."""
    if isinstance(model, DiT):
        return DiTStep(model, 1.0, precision)
    if phase_convolutions:
        model = with_phase_convolutions(model)
    return GuidedStep(model, LowPass(model.image_size, FACTOR), precision) if guided else UnguidedStep(model, precision)


@contextmanager
def fake_step(
    kind: type[ADM] | type[DiT],
    config: dict[str, Any],
    precision: Precision,
    batch: int,
    *,
    guided: bool = True,
    phase_convolutions: bool = False,
    device: str = "cpu",
) -> Iterator[tuple[Step, tuple[Tensor, ...]]]:
    """A step and its example without memory behind them, to be counted inside the `with`."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(device):
            model = kind(**config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copying a model does
            step = make_step(model, precision, guided, phase_convolutions)
        yield step, step.example(batch)
