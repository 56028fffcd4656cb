"""DiT, the diffusion transformer (Peebles & Xie 2023), with the state_dict keys of the published checkpoints."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sda_fast.models.embedding import timestep_embedding
from sda_fast.ops import gate_residual, modulate


def _modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """norm(x) (1 + scale) + shift; x [N, T, C], shift and scale [N, C]."""
    if x.is_cuda and not torch.is_grad_enabled():
        x = x.contiguous()  # the first block's lie as the convolution left them
        return modulate(x, shift, scale, norm.eps, dtype)
    return (norm(x) * (1 + scale[:, None]) + shift[:, None]).to(dtype)


def _gate_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y; x, y [N, T, C], gate [N, C], in x's dtype."""
    if x.is_cuda and not torch.is_grad_enabled():
        return gate_residual(x.contiguous(), gate, y)
    return (x + gate[:, None] * y).to(x.dtype)


def sincos_position_embedding(dim: int, grid_size: int) -> Tensor:
    """Fixed 2-D position features, float32 [1, grid_size**2, dim]: columns in the first half, rows in the second."""

    def features(positions: Tensor) -> Tensor:
        frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        angles = positions.reshape(-1, 1) * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    axis = torch.arange(grid_size, dtype=torch.float64)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.cat([features(columns), features(rows)], dim=1).float()[None]


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, timesteps: Tensor) -> Tensor:
        features = timestep_embedding(timesteps, self.frequencies)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class embeddings; the last row is the null class of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int, dropout: float):
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # [N, T, hidden]


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, hidden = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, hidden))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a layer norm whose shift, scale and gate the conditioning gives (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        # x [N, T, hidden], conditioning [N, 6 hidden] = adaLN_modulation(c). In half precision x, to which every block
        # adds, stays in float32: rounded each time, its error would grow with the depth, to three times autocast's.
        dtype = self.attn.qkv.weight.dtype
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = conditioning.chunk(6, dim=1)
        x = _gate_residual(x, gate_a, self.attn(_modulate(self.norm1, x, shift_a, scale_a, dtype)))
        return _gate_residual(x, gate_m, self.mlp(_modulate(self.norm2, x, shift_m, scale_m, dtype)))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        # x [N, T, hidden], conditioning [N, 2 hidden] = adaLN_modulation(c)
        shift, scale = conditioning.chunk(2, dim=1)
        return self.linear(_modulate(self.norm_final, x, shift, scale, self.linear.weight.dtype))


class DiT(nn.Module):
    """Class-conditional diffusion transformer; arguments carry the names of the original.

    `input_size` is the side of the latent (or image) the model works on, `class_dropout_prob > 0` adds the null
    class that classifier-free guidance needs. `classes`: their names, where the checkpoint gives them.
    """

    config: dict[str, Any]
    classes: tuple[str, ...] = ()

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_classes = num_classes
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        position = sincos_position_embedding(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(position, requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        # adaLN-Zero: every block starts as the identity, the output as zero (paper, section 3.2).
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.constant_(module.bias, 0)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder") and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            if "adaLN_modulation" in name or name in ("x_embedder.proj.bias", "final_layer.linear.weight"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        """x [N, in_channels, S, S], timesteps [N] of the original 1000, y int64 [N] -> [N, out_channels, S, S]."""
        return self.denoise(x, self.conditioning(timesteps, y))

    def conditioning(self, timesteps: Tensor, y: Tensor) -> Tensor:
        """All that the blocks want to know of timesteps and classes: what adaLN makes of them, [N, K]."""
        c = self.t_embedder(timesteps) + self.y_embedder(y)
        return torch.cat([layer.adaLN_modulation(c) for layer in (*self.blocks, self.final_layer)], dim=1)

    def denoise(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """`forward` from `conditioning`, [N, K]."""
        *parts, last = conditioning.split(
            [layer.adaLN_modulation[1].out_features for layer in (*self.blocks, self.final_layer)], dim=1
        )
        tokens = self.x_embedder(x) + self.pos_embed
        for block, part in zip(self.blocks, parts, strict=True):
            tokens = block(tokens, part)
        return self._unpatchify(self.final_layer(tokens, last))

    def forward_with_cfg(self, x: Tensor, timesteps: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance on a doubled batch: x is [z; z], y is [labels; null labels].

        As in the original, guidance acts on the first three channels only; both halves of the result carry it.
        """
        half = x[: x.shape[0] // 2]
        return self.guided(self(torch.cat([half, half]), timesteps, y), cfg_scale)

    @staticmethod
    def guided(out: Tensor, cfg_scale: float) -> Tensor:
        """What `forward_with_cfg` returns, from the network's output for the doubled batch."""
        eps, rest = out[:, :3], out[:, 3:]
        conditional, unconditional = eps.unflatten(0, (2, -1))  # a chunk's size would fix the batch in an export
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        # [N, T, p*p*C] -> [N, C, S, S]
        p, side = self.patch_size, self.input_size // self.patch_size
        x = tokens.reshape(tokens.shape[0], side, side, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], self.out_channels, side * p, side * p)
