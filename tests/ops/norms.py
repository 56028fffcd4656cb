"""What the tests of group_norm_silu share: arguments, the registered operators, the tolerance rule."""

import torch

from sda_fast import ops
from sda_fast.reference import group_norm_silu as plain

TINY = 2e-6  # a few last places of float32 numbers near 4: what a tie of luck between two float32 sums may differ by
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments(shape, groups, dtype=torch.float32, layout="contiguous", modulated=True, silu=True, seed=0):
    """Of the registered operator; scale and shift are halves of one tensor, as a network makes them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator)

    x = (3 * normal(*shape) + 2).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = 1 + normal(shape[1]) / 4, normal(shape[1])
    scale, shift = (normal(shape[0], 2 * shape[1]) / 3).to(dtype).chunk(2, dim=1) if modulated else (None, None)
    return x, weight, bias, groups, 1e-5, scale, shift, silu


def forward(*args):
    return torch.ops.sda_fast.group_norm_silu(*args)


def raised(args):
    """The same with an x_bias that is as large as x, in x's dtype where that is float16."""
    x = args[0]
    x_bias = 3 * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(1))
    return *args, x_bias.half() if x.dtype == torch.float16 else x_bias


def backward_arguments(args, mean, rstd):
    """With a dy of each image that is a function of the image, and where there is an x_bias, a residual likewise."""
    x, weight, bias, groups, _, scale, shift, silu, *x_bias = args
    dy = torch.empty_like(x).copy_((5 * x.float()).sin())
    residual = [torch.empty_like(x).copy_((3 * x.float()).cos()) for _ in x_bias]
    return dy, x, weight, bias, mean, rstd, scale, shift, groups, silu, *x_bias, *residual


def backward(*args):
    return torch.ops.sda_fast.group_norm_silu_backward(*args)


def in_double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def exact(args, dy):
    """y and dx in float64, the latter by autograd."""
    x, *rest = in_double(args)
    x.requires_grad_()
    y = plain.group_norm_silu(x, *rest)
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


def error(a, b):
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def check(args, y, dx, dy):
    """The tolerance rule."""
    expected_y, expected_dx = exact(args, dy)
    with ops.backend("plain"):
        plain_y, mean, rstd = forward(*args)
        gradient = backward_arguments(args, mean, rstd)
        plain_dx = backward(*gradient)
    if len(args) == 9:
        expected_dx = expected_dx + gradient[-1].double()
    for ours, simple, expected in ((y, plain_y, expected_y), (dx, plain_dx, expected_dx)):
        assert ours.dtype == args[0].dtype
        assert ours.shape == args[0].shape
        assert error(ours, expected) <= 2 * error(simple, expected) + TINY


def odd_views():
    """(name, x): views of larger tensors without a copy; images apart, channel slices, other ranks."""
    wide = torch.randn(4, 12, 6, 5, generator=torch.Generator().manual_seed(3))
    last = wide.contiguous(memory_format=torch.channels_last)
    many = torch.randn(4, 12, 16, 8, generator=torch.Generator().manual_seed(4))
    many = many.contiguous(memory_format=torch.channels_last)
    return {
        "apart": wide[::2, :8],
        "slice": wide[:, 4:],
        "channels_last slice": last[:, 4:],
        "channels_last apart": last[::2],
        "tokens": wide.flatten(2),
        "channels_last tokens": last.flatten(2),
        "vectors": wide[:, :, 0, 0].contiguous(),
        "volume": wide.unflatten(3, (5, 1)),
        "channels_last slice of many pixels": many[:, 4:],
        "many pixels": many,
    }


def odd_arguments(x):
    channels = x.shape[1]
    groups = 4 if channels % 4 == 0 else 1
    return x, torch.linspace(0.5, 2, channels), torch.linspace(-1, 1, channels), groups, 1e-5, None, None, True


def split(*args):
    return torch.ops.sda_fast.group_norm_silu_backward_split(*args)


def split_arguments(args, first):
    _, mean, rstd = forward(*args)
    *gradient, x_bias, residual = backward_arguments(args, mean, rstd)
    return *gradient, first, x_bias, residual
