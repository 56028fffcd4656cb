"""What a network does at one step, as functions of tensors alone: the graphs that engines run.

Weights are frozen and shapes fixed. What depends on the timestep only (`conditioning`, `coefficients`) comes in as one
row of a table, so that one graph serves every step of any schedule.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sda_fast.diffusion import LowPass
from sda_fast.diffusion.guidance import Guided, guide
from sda_fast.errors import SdaError
from sda_fast.models.adm import ADM
from sda_fast.models.dit import DiT

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Step(nn.Module):
    """inputs, outputs: the names of `forward`'s tensors, in order, all float32. precision: of most of the network."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: Precision

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs for `batch` images, of the right shapes, dtypes and device, with values as in use."""
        raise NotImplementedError  # the subclasses' own


class GuidedStep(Step):
    """The ADM forward and the unnormalised low-pass gradient back through it (`diffusion.guidance.guide`).

    x: x_t, float32 [N, C, n, n]. conditioning: float32 [1, K], the row of `ADM.conditioning` for the timestep.
    coefficients: float32 [1, 8], that of `Schedule.step_table`. reference_down: float32 [N, C, n/D, n/D].
    Returns the tensors of `Guided`, float32.
    """

    inputs = ("x", "conditioning", "coefficients", "reference_down")
    outputs = Guided._fields

    position: Tensor

    def __init__(self, adm: ADM, lowpass: LowPass, precision: Precision = "fp32"):
        super().__init__()
        self.adm, self.lowpass, self.precision = adm_in(adm, precision), lowpass, precision
        device = adm.device
        self.register_buffer("position", torch.zeros(2, dtype=torch.int64, device=device))

    def forward(
        self, x: Tensor, conditioning: Tensor, coefficients: Tensor, reference_down: Tensor
    ) -> tuple[Tensor, ...]:
        terms = guide(
            lambda x: self.adm.denoise(x, conditioning),
            self.lowpass,
            x,
            reference_down,
            coefficients,
            self.position,
            scale_cotangent=self.precision == "fp16",
        )
        return tuple(terms)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        x, conditioning = _adm_example(self.adm, batch)
        coefficients = x.new_tensor([[1.25, 0.75, 0.1, 0.9, -5.0, -4.5, 1.0, 100.0]])
        return x, conditioning, coefficients, self.lowpass.down(x.clamp(-1, 1))


class UnguidedStep(Step):
    """The ADM forward alone: x and conditioning as in `GuidedStep`, the network's output float32 [N, C or 2C, n, n]."""

    inputs = ("x", "conditioning")
    outputs = ("out",)

    def __init__(self, adm: ADM, precision: Precision = "fp32"):
        super().__init__()
        self.adm, self.precision = adm_in(adm, precision), precision

    def forward(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor]:
        return (self.adm.denoise(x, conditioning),)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        return _adm_example(self.adm, batch)


class DiTStep(Step):
    """The DiT under classifier-free guidance; cfg_scale 1.0 runs the conditional model alone.

    x: float32 [N, C, S, S]. conditioning: float32 [N, K], `DiT.conditioning` of each image's timestep and class;
    with guidance [2, N, K], the second half that of the null class. Returns float32 [N, C or 2C, S, S].
    """

    inputs = ("x", "conditioning")
    outputs = ("out",)

    def __init__(self, dit: DiT, cfg_scale: float = 1.0, precision: Precision = "fp32"):
        super().__init__()
        self.dit, self.cfg_scale, self.precision = dit_in(dit, precision), cfg_scale, precision

    def forward(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor]:
        if self.cfg_scale == 1.0:
            return (self.dit.denoise(x, conditioning),)
        out = self.dit.denoise(torch.cat([x, x]), conditioning.flatten(0, 1))
        return (self.dit.guided(out, self.cfg_scale)[: x.shape[0]],)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        dit = self.dit
        device = dit.pos_embed.device
        x = _noise((batch, dit.in_channels, dit.input_size, dit.input_size), device)
        with torch.no_grad():
            conditioning = dit.conditioning(
                torch.full((batch,), 500, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
            )
        return x, conditioning if self.cfg_scale == 1.0 else conditioning.expand(2, -1, -1).contiguous()


class ClassifierStep(Step):
    """A classifier: images float32 [N, 3, H, W] in [-1, 1] to logits, float32 [N, K]."""

    inputs = ("images",)
    outputs = ("logits",)

    def __init__(self, model: nn.Module, size: int, precision: Precision = "fp32"):
        super().__init__()
        self.dtype, self.size, self.precision = dtype_of(precision), size, precision
        self.model = _frozen(model if precision == "fp32" else copy.deepcopy(model).to(self.dtype))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.model(images.to(self.dtype)).float(),)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        device = next(self.model.parameters()).device
        return (_noise((batch, 3, self.size, self.size), device).clamp(-1, 1),)


def dtype_of(precision: str) -> torch.dtype:
    """Raises SdaError for a precision that is not known."""
    if precision not in DTYPES:
        raise SdaError(f"precision {precision!r} is not known; choose one of {', '.join(DTYPES)}")
    return DTYPES[precision]


def adm_in(adm: ADM, precision: str) -> ADM:
    """The ADM with its torso in a precision; as published, embedding, norms and last layer stay in float32."""
    dtype = dtype_of(precision)
    if dtype != torch.float32:
        adm = copy.deepcopy(adm)
        for blocks in (adm.input_blocks, adm.middle_block, adm.output_blocks):
            _convert(blocks, dtype)
    return _frozen(adm)


def dit_in(dit: DiT, precision: str) -> DiT:
    """The DiT with its blocks' products in a precision; what they add to, conditioning, last layer stay in float32."""
    dtype = dtype_of(precision)
    if dtype != torch.float32:
        dit = copy.deepcopy(dit)
        _convert(dit.blocks, dtype)
    return _frozen(dit)


def _convert(modules: nn.Module, dtype: torch.dtype) -> None:
    for name, module in modules.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv1d | nn.Linear) and not ("emb_layers" in name or "adaLN" in name):
            for own, parameter in list(module.named_parameters(recurse=False)):
                # Set anew, since module.to() cannot convert the fake weights that a ledger counts on.
                setattr(module, own, nn.Parameter(parameter.to(dtype), requires_grad=False))


def _frozen(module: Any) -> Any:
    # A step differentiates for the image alone, and the operators serve frozen weights.
    return module.eval().requires_grad_(False)


def _noise(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _adm_example(adm: ADM, batch: int) -> tuple[Tensor, Tensor]:
    device = adm.device
    x = _noise((batch, adm.in_channels, adm.image_size, adm.image_size), device)
    with torch.no_grad():
        return x, adm.conditioning(torch.tensor([500], device=device))
