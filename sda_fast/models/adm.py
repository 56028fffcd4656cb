"""ADM, the ablated diffusion UNet (Dhariwal & Nichol 2021), with the state_dict keys of the published checkpoints."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sda_fast.models.embedding import timestep_embedding
from sda_fast.models.phases import PhaseConvolution
from sda_fast.ops import group_norm_silu


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def _normalise(
    norm: nn.Module, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = True
) -> Tensor:
    """silu(norm(x) (1 + scale) + shift), x [N, C, ...], scale and shift [N, C]; without SiLU where not `silu`.

    One operator where the weights are frozen; PyTorch's own ones where they are trained, and for contiguous images on
    the CPU, where these are faster on small ones (benchmarks/bench_group_norm_silu.py).
    """
    assert isinstance(norm, nn.GroupNorm)
    others = [t for t in (norm.weight, norm.bias, scale, shift) if t is not None]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in others)
    if not trained and x.dtype != torch.float64 and not (x.device.type == "cpu" and x.is_contiguous()):
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, scale, shift, silu)
    h = norm(x)
    if scale is not None and shift is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return (F.silu(h) if silu else h).to(x.dtype)


def _zero(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Upsample(nn.Module):
    """Nearest neighbour by two, then a 3x3 convolution if `use_conv`, which may be a `phases.PhaseConvolution`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.conv, PhaseConvolution):
            return self.conv(x)
        if x.is_contiguous():
            # In these operators a graph traced with an open batch stays one that ONNX can express.
            n, c, height, width = x.shape
            x = x[:, :, :, None, :, None].expand(n, c, height, 2, width, 2).reshape(n, c, 2 * height, 2 * width)
        else:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """A 3x3 convolution of stride two if `use_conv`, else a 2x2 mean."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Two convolutions around the timestep embedding; `resample` (up, down or none) sits before the first."""

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int,
        dropout: float,
        use_scale_shift_norm: bool,
        resample: type[Upsample] | type[Downsample] | None = None,
    ):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resample = None if resample is None else resample(channels, use_conv=False)
        self.in_layers = nn.Sequential(_norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            _norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        # x [N, C, H, W], conditioning [N or 1, emb_out] = emb_layers(emb) -> [N, out, H', W']
        norm, _, conv = self.in_layers
        h = _normalise(norm, x)
        if self.resample is not None:
            h, x = h if isinstance(conv, PhaseConvolution) else self.resample(h), self.resample(x)
        h = conv(h)
        conditioning = conditioning.expand(h.shape[0], -1)  # len() would fix the batch in a traced graph
        norm, _, dropout, conv = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = conditioning.chunk(2, dim=1)
            h = _normalise(norm, h, scale, shift)
        else:
            h = _normalise(norm, h + conditioning[:, :, None, None].to(h.dtype))
        return self.skip_connection(x) + conv(dropout(h))


def _pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of one tap (the published checkpoints have these) as the matrix product it is: x [N, T, C]."""
    assert isinstance(conv, nn.Conv1d)
    # Contiguous, or torch multiplies image by image with copies of the weights, and a traced graph holds every copy.
    return F.linear(x.contiguous(), conv.weight[:, :, 0], conv.bias)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels. The published checkpoints keep q, k, v of a head together ("legacy" order)."""

    def __init__(self, channels: int, num_heads: int, use_new_attention_order: bool):
        super().__init__()
        self.num_heads = num_heads
        self.use_new_attention_order = use_new_attention_order
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        h = _normalise(self.norm, x, silu=False).flatten(2).transpose(1, 2)  # [N, T, C]
        qkv = _pointwise(self.qkv, h)  # [N, T, 3C]
        if self.use_new_attention_order:
            q, k, v = qkv.reshape(n, -1, 3, self.num_heads, c // self.num_heads).unbind(2)
        else:
            q, k, v = qkv.reshape(n, -1, self.num_heads, 3, c // self.num_heads).unbind(3)
        h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        h = h.transpose(1, 2).reshape(n, -1, c)  # [N, T, C]
        return x + _pointwise(self.proj_out, h).transpose(1, 2).reshape(n, c, height, width)


class Block(nn.Sequential):
    """A sequence whose residual blocks each take the next piece of the conditioning."""

    def forward(self, x: Tensor, conditioning: Iterator[Tensor]) -> Tensor:  # type: ignore[override]  # one more
        for layer in self:
            x = layer(x, next(conditioning)) if isinstance(layer, ResBlock) else layer(x)
        return x


class ADM(nn.Module):
    """The UNet of guided-diffusion; predicts the noise and, where `out_channels` is twice `in_channels`, a variance.

    Arguments carry the names of the original. `attention_resolutions` holds downsampling factors (32, 16, 8 for
    the 256x256 model: 256/8, 256/16, 256/32), `num_head_channels=-1` means that `num_heads` counts.
    """

    config: dict[str, Any]

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        model_channels: int = 256,
        out_channels: int = 6,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (8, 16, 32),
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4, 4),
        conv_resample: bool = True,
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_classes = model_channels, num_classes
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        emb_channels = 4 * model_channels

        def res(channels: int, out: int, resample: type[Upsample] | type[Downsample] | None = None) -> ResBlock:
            return ResBlock(channels, emb_channels, out, dropout, use_scale_shift_norm, resample)

        def attention(channels: int, heads: int) -> AttentionBlock:
            heads = heads if num_head_channels == -1 else channels // num_head_channels
            return AttentionBlock(channels, heads, use_new_attention_order)

        def resize(channels: int, kind: type[Upsample] | type[Downsample]) -> nn.Module:
            return res(channels, channels, kind) if resblock_updown else kind(channels, conv_resample)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        channels = first = int(channel_mult[0] * model_channels)
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips, factor = [channels], 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(channels, int(mult * model_channels))]
                channels = int(mult * model_channels)
                if factor in attention_resolutions:
                    layers.append(attention(channels, num_heads))
                self.input_blocks.append(Block(*layers))
                skips.append(channels)
            if level != len(channel_mult) - 1:
                self.input_blocks.append(Block(resize(channels, Downsample)))
                skips.append(channels)
                factor *= 2

        self.middle_block = Block(res(channels, channels), attention(channels, num_heads), res(channels, channels))

        self.output_blocks = nn.ModuleList([])
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [res(channels + skips.pop(), int(mult * model_channels))]
                channels = int(mult * model_channels)
                if factor in attention_resolutions:
                    layers.append(attention(channels, heads_up))
                if level and i == num_res_blocks:
                    layers.append(resize(channels, Upsample))
                    factor //= 2
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(_norm(channels), nn.SiLU(), _zero(nn.Conv2d(first, out_channels, 3, padding=1)))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x [N, in_channels, H, W] in about [-1, 1] plus noise, timesteps [N] of the original 1000, y int64 [N] labels.

        Returns [N, out_channels, H, W]: the predicted noise, then the variance channels in [-1, 1] where learned.
        """
        return self.denoise(x, self.conditioning(timesteps, y))

    def conditioning(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """All that the network wants to know of timesteps and labels: what every residual block is given, [N, K].

        It depends on nothing else, so that the steps of a schedule can share one table.
        """
        if y is not None and self.num_classes is None:
            raise ValueError("this ADM is unconditional: leave y out")
        dtype = next(self.time_embed.parameters()).dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        if self.num_classes is not None:
            if y is None:
                raise ValueError(f"this ADM is class-conditional: pass y, int64 labels below {self.num_classes}")
            emb = emb + self.label_emb(y)
        return torch.cat([block.emb_layers(emb) for block in self._residual_blocks()], dim=1)

    def denoise(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """`forward` from `conditioning` [N, K], or [1, K] where all images are at one timestep."""
        sizes = [block.emb_layers[1].out_features for block in self._residual_blocks()]
        parts = iter(conditioning.split(sizes, dim=1))
        h, skips = x.to(self.torso_dtype), []
        for block in self.input_blocks:
            h = block(h, parts)
            skips.append(h)
        h = self.middle_block(h, parts)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), parts)
        return self.out[2](_normalise(self.out[0], h.to(x.dtype)))

    @property
    def torso_dtype(self) -> torch.dtype:
        """Of everything between the image and the last norm; embedding and output stay in float32, as published."""
        return next(self.input_blocks.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _residual_blocks(self) -> list[ResBlock]:
        # In the order in which `denoise` runs them.
        return [m for m in self.modules() if isinstance(m, ResBlock)]


def with_phase_convolutions(adm: ADM) -> ADM:
    """A copy of the ADM that shares its weights, but for the convolutions right after an upsampling. For inference."""
    adm = copy.deepcopy(adm, {id(p): p for p in adm.parameters()})
    for module in adm.modules():
        if isinstance(module, ResBlock) and isinstance(module.resample, Upsample):
            norm, silu, conv = module.in_layers
            assert isinstance(conv, nn.Conv2d)
            module.in_layers = nn.Sequential(norm, silu, PhaseConvolution(conv))
        elif isinstance(module, Upsample) and module.conv is not None:
            module.conv = PhaseConvolution(module.conv)
    return adm
