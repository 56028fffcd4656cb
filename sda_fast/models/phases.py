"""Nearest upsampling by two and the 3x3 convolution after it, as one 2x2 convolution of the small image.

An output pixel of even row sees rows r - 1, r, r of the small image, one of odd row r, r, r + 1: of nine products per
output pixel four remain, with sums of the kernel's entries. Each of the four phases (even or odd row and column) has a
kernel of its own. Exact in real numbers; the sums are rounded to the weights' dtype, so results differ in last bits.
"""

import torch
from torch import Tensor, nn

from sda_fast.errors import SdaError


class PhaseConvolution(nn.Conv2d):
    """x [N, C, H, W] to what `conv` makes of its nearest upsampling, [N, out, 2H, 2W].

    weight [4 out, C, 2, 2]: the phases (even, even), (even, odd), (odd, even), (odd, odd) one after the other.
    """

    def __init__(self, conv: nn.Conv2d):
        if conv.kernel_size != (3, 3) or conv.padding != (1, 1) or conv.stride != (1, 1) or conv.groups != 1:
            raise SdaError(f"{conv} cannot be split into phases: it must be 3x3 with padding 1, stride 1 and one group")
        biased = conv.bias is not None
        super().__init__(conv.in_channels, 4 * conv.out_channels, 2, padding=1, bias=biased, device="meta")
        self.weight = nn.Parameter(_phase_kernels(conv.weight.detach()), requires_grad=False)
        if conv.bias is not None:
            self.bias = nn.Parameter(conv.bias.detach().repeat(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        y = super().forward(x)  # [N, 4 out, H + 1, W + 1]
        # The first tap of an even row lies above the pixel, of an odd one on it: odd ones begin one row later. Columns
        # likewise.
        even, odd = (
            torch.stack([row[:, :, :, :width], other[:, :, :, 1:]], dim=4)
            for row, other in _pairs(y[:, :, :height], y[:, :, 1:])
        )
        result = torch.stack([even, odd], dim=3).reshape(x.shape[0], -1, 2 * height, 2 * width)
        channels_last = not y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)
        return result.contiguous(memory_format=torch.channels_last) if channels_last else result


def _pairs(upper: Tensor, lower: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two phases of even rows, then those of odd rows."""
    first, second, _, _ = upper.chunk(4, dim=1)
    _, _, third, fourth = lower.chunk(4, dim=1)
    return [(first, second), (third, fourth)]


def _phase_kernels(weight: Tensor) -> Tensor:
    """[out, C, 3, 3] to [4 out, C, 2, 2]; summed in float32 at least, rounded once."""
    even = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
    odd = [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    taps = torch.tensor([even, odd], dtype=dtype, device=weight.device)  # [phase, tap, entry]
    kernels = torch.einsum("pai,qbj,ocij->pqocab", taps, taps, weight.to(dtype))
    return kernels.reshape(-1, weight.shape[1], 2, 2).to(weight.dtype)
