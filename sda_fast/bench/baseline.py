"""The other side of a comparison: a step as published, exact for parity and at its published cost for time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sda_fast import reference
from sda_fast.bench.measure import tf32
from sda_fast.bench.models import FACTOR
from sda_fast.diffusion import LowPass
from sda_fast.models import ADM, DiT
from sda_fast.reference.guidance import guidance

TIMESTEP = 500  # that of `Step.example`
PUBLISHED_BATCH = 10  # SDA's, on a GPU
_DEFAULTS = {"in_channels": 3, "out_channels": 6, "use_scale_shift_norm": True, "resblock_updown": True}  # the ADM's
SCALES = (1.25, 0.75)  # x_0 = a x_t - b eps of the step timed; any numbers cost the same


def published(model: ADM | DiT) -> nn.Module:
    """The published UNet with the ADM's own weights, not copied; a DiT is its own original."""
    if isinstance(model, DiT):
        return model.requires_grad_(False)
    with torch.device("meta"):
        unet = reference.UNet(**{**_DEFAULTS, **model.config}).eval()
    unet.load_state_dict(model.state_dict(), assign=True)
    return unet.requires_grad_(False)


def plain_outputs(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    images: Sequence[int],
    guided: bool,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """What the step of a model must return for these images of `inputs`, the example's, by plain operations in float32
    (or autocast). Image by image, because the whole batch may need more memory than there is.
    """
    x, *rest = inputs
    rows = []
    for i in images:
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
            if guided:
                _, coefficients, reference_down = rest
                rows.append(_guided(network, x[i : i + 1], coefficients, reference_down[i : i + 1]))
            else:
                with torch.no_grad():
                    rows.append((_run(network, x[i : i + 1]).float(),))
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def _guided(network: nn.Module, x: Tensor, coefficients: Tensor, reference_down: Tensor) -> tuple[Tensor, ...]:
    leaf = x.detach().requires_grad_()
    out = _run(network, leaf).float()
    with torch.autocast(x.device.type, enabled=False):
        down, _, gram = LowPass(x.shape[-1], FACTOR).matrices(x)
        position = torch.zeros(2, dtype=torch.int64, device=x.device)
        cotangent, squares, _ = guidance(x, out.detach(), reference_down, down, gram, coefficients, position)
    (through_network,) = torch.autograd.grad(out[:, : x.shape[1]], leaf, cotangent)
    return out.detach(), cotangent, through_network, squares


def _run(network: nn.Module, x: Tensor) -> Tensor:
    timesteps = torch.full((len(x),), TIMESTEP, device=x.device)
    if isinstance(network, DiT):
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with torch.enable_grad():  # without, a GPU runs this package's kernels, which are what is compared
            return network(x, timesteps, labels).detach()
    return network(x, timesteps)


def published_step(model: ADM | DiT, guided: bool, batch: int, device: str) -> tuple[Callable[[], Any], int, str]:
    """A call at the published cost, its batch, and what it is.

    ADM: the UNet in float32 on the CPU, on a GPU with its torso in float16 and in the published batch; with guidance,
    two low-pass filterings and the gradient of their difference's norm. DiT: float32, on a GPU with TF32, as its
    sampling script asks for. Noise and posterior, a few operations by element, are left out on both sides.
    """
    gpu = device != "cpu"
    network = published(model)
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, DiT):
        shape = (batch, model.in_channels, model.input_size, model.input_size)
        x = torch.randn(shape, generator=generator).to(device)

        def sample() -> None:
            with torch.no_grad(), tf32(gpu):
                _run(network, x)

        return sample, batch, f"DiT, eager {'tf32' if gpu else 'fp32'}, batch {batch}"
    batch = PUBLISHED_BATCH if gpu else batch
    x = torch.randn((batch, model.in_channels, model.image_size, model.image_size), generator=generator).to(device)
    images = x.clamp(-1, 1)
    if gpu:
        network.convert_torso(torch.float16)  # type: ignore[operator]  # of UNet
    network.requires_grad_(True)  # as published

    def project() -> None:
        with tf32(True):  # PyTorch's default for convolutions
            if not guided:
                with torch.no_grad():
                    _run(network, x)
                return
            leaf = x.detach().requires_grad_()
            x0 = (SCALES[0] * leaf - SCALES[1] * _run(network, leaf)[:, : x.shape[1]]).clamp(-1, 1)
            difference = reference.low_pass(images, FACTOR) - reference.low_pass(x0, FACTOR)
            torch.autograd.grad(torch.linalg.vector_norm(difference), leaf)

    return project, batch, f"published UNet, eager {'fp16' if gpu else 'fp32'}, batch {batch}"
