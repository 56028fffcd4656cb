"""The ADM UNet (Dhariwal and Nichol 2021, "Diffusion Models Beat GANs"), with the published costs.

Module names and constructor arguments are those of the guided-diffusion checkpoints. What makes the
published network slow is kept on purpose: every normalisation casts to float32 and back, attention is
materialised and its activations are recomputed in the backward pass, and weights require gradients although
only the gradient with respect to the input is ever asked for. One difference is in the baseline's favour:
the original's own checkpointing also computes the gradients of the attention weights, which the
non-reentrant one of PyTorch skips.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ConvT = TypeVar("ConvT", nn.Conv1d, nn.Conv2d)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of the timesteps, cosines first.

    `timesteps` [N], integer or fractional, in steps of the base process; returns float32 [N, dim] (a zero
    column is appended for odd `dim`).
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies.to(timesteps.device)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class GroupNorm32(nn.GroupNorm):
    """GroupNorm with 32 groups, computed in float32: two casts per call in half precision."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


def zero_init(layer: ConvT) -> ConvT:
    """Zero the parameters: a residual branch that ends in this layer begins as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Upsample(nn.Module):
    """Nearest-neighbour x2, with a 3x3 convolution behind it if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Half the size: a 3x3 convolution of stride 2 if `use_conv`, else the mean of 2x2 pixels."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


Resample = type[Upsample] | type[Downsample] | None


class ResBlock(nn.Module):
    """BigGAN-style residual block: x + f(x, emb), where x and f change size together if `resample` is given.

    x [N, channels, H, W], emb float32 [N, emb_channels] -> [N, out_channels, H', W'] in the dtype of x.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        use_scale_shift_norm: bool,
        resample: Resample = None,
    ) -> None:
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.resample = resample(channels, use_conv=False) if resample else nn.Identity()
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        e = self.emb_layers(emb).type(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, x + proj(attend(qkv(norm(x)))), always gradient-checkpointed.

    The 3C channels of `qkv` come in one of two orders. Legacy, that of the published ImageNet models: q, k, v
    of the first head, then of the next one. New: q of all heads, then k, then v.
    """

    def __init__(self, channels: int, num_heads: int, new_order: bool) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels cannot be divided into {num_heads} attention heads")
        self.num_heads = num_heads
        self.new_order = new_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attend, x, use_reentrant=False)

    def attend(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.reshape(n, c, h * w)
        qkv = self.qkv(self.norm(tokens))  # [N, 3C, L]
        heads, d = n * self.num_heads, c // self.num_heads
        if self.new_order:
            q, k, v = (part.reshape(heads, d, h * w) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(heads, 3 * d, h * w).split(d, dim=1)
        # d^-1/4 on either factor instead of d^-1/2 on the product: half precision does not overflow.
        scale = d**-0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = weight.float().softmax(dim=-1).type(weight.dtype)
        a = torch.einsum("bts,bcs->bct", weight, v).reshape(n, c, h * w)
        return (tokens + self.proj_out(a)).reshape(n, c, h, w)


class EmbedSequential(nn.Sequential):
    """A sequence whose residual blocks get the timestep embedding as well."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """eps (and, with twice the channels out, the variance interpolation v) from a noised image.

    `attention_resolutions` are downsample factors (256 / 32, 256 / 16, 256 / 8 become 8, 16, 32); with
    `num_head_channels` given, the number of heads follows from the width and `num_heads*` are ignored.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.model_channels, self.num_classes = image_size, model_channels, num_classes
        self.dtype = torch.float32
        emb_channels = 4 * model_channels
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample

        def res(cin: int, cout: int, resample: Resample = None) -> ResBlock:
            return ResBlock(cin, emb_channels, dropout, cout, use_scale_shift_norm, resample)

        def attention(c: int, heads: int) -> AttentionBlock:
            if num_head_channels != -1:
                heads, rest = divmod(c, num_head_channels)
                if rest:
                    raise ValueError(f"{c} channels cannot be divided into heads of {num_head_channels}")
            return AttentionBlock(c, heads, use_new_attention_order)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        widths = [int(m * model_channels) for m in channel_mult]
        last = len(widths) - 1
        c = widths[0]
        self.input_blocks = nn.ModuleList([EmbedSequential(nn.Conv2d(in_channels, c, 3, padding=1))])
        skips = [c]  # channels of what every input block hands across
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(c, width)]
                c = width
                if 2**level in attention_resolutions:
                    layers.append(attention(c, num_heads))
                self.input_blocks.append(EmbedSequential(*layers))
                skips.append(c)
            if level != last:
                down = res(c, c, Downsample) if resblock_updown else Downsample(c, conv_resample)
                self.input_blocks.append(EmbedSequential(down))
                skips.append(c)

        self.middle_block = EmbedSequential(res(c, c), attention(c, num_heads), res(c, c))

        self.output_blocks = nn.ModuleList()
        for level in range(last, -1, -1):
            for i in range(num_res_blocks + 1):
                layers = [res(c + skips.pop(), widths[level])]
                c = widths[level]
                if 2**level in attention_resolutions:
                    layers.append(attention(c, heads_up))
                if level and i == num_res_blocks:
                    layers.append(res(c, c, Upsample) if resblock_updown else Upsample(c, conv_resample))
                self.output_blocks.append(EmbedSequential(*layers))

        self.out = nn.Sequential(GroupNorm32(c), nn.SiLU(), zero_init(nn.Conv2d(c, out_channels, 3, padding=1)))

    def convert_torso(self, dtype: torch.dtype = torch.float16) -> "UNet":
        """Convolutions of all blocks in `dtype`; all else stays float32, as published for half precision."""
        self.dtype = dtype
        for torso in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in torso.modules():
                if isinstance(module, nn.Conv1d | nn.Conv2d):
                    module.to(dtype)
        return self

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x float32 [N, in_channels, H, W], timesteps [N] of the base process, y int64 [N] labels or None ->
        float32 [N, out_channels, H, W]. Raises ValueError if labels are missing or given for nothing."""
        if (y is None) != (self.num_classes is None):
            raise ValueError("pass y if and only if the model has num_classes")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.type(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))
