"""group_norm_silu: all backends against float64, the gradient against autograd, hard numbers, odd layouts."""

import pytest
import torch
from norms import (
    DTYPES,
    LAYOUTS,
    arguments,
    backward,
    backward_arguments,
    check,
    error,
    exact,
    forward,
    in_double,
    odd_arguments,
    odd_views,
    raised,
    split,
    split_arguments,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sda_fast.errors import SdaError
from sda_fast.models import ADM
from sda_fast.models.checkpoints import ADM_PRESETS
from sda_fast.reference import group_norm_silu as plain

MODULE = "sda_fast.ops.group_norm_silu"

# (shape, groups): of the UNet, ragged, one channel per group, one pixel, one group, a group wider than a tile.
CASES = [
    ((2, 64, 16, 16), 32),
    ((1, 768, 8, 8), 32),
    ((3, 96, 7, 5), 32),
    ((2, 32, 9, 1), 32),
    ((2, 64, 1, 1), 32),
    ((1, 6, 61, 47), 1),
    ((1, 640, 5, 3), 2),
    ((1, 32, 128, 80), 32),
    ((2, 64, 32, 32), 32),
]
# (C, side) of every norm in the ADM of 256 x 256 pixels.
ADM_SHAPES = [(256, side) for side in (64, 128, 256)] + [(512, side) for side in (16, 32, 64, 128, 256)]
ADM_SHAPES += [(768, 64), (768, 128), *((1024, side) for side in (8, 16, 32, 64))]
ADM_SHAPES += [(1536, 16), (1536, 32), (2048, 8), (2048, 16)]
# What the interpreter, which is slow, can do in seconds.
ADM_INTERPRETED = [(1024, 8), (2048, 8), (512, 16)]
SMALL_CASES = [((2, 16, 4, 4), 8), ((1, 24, 7, 5), 8), ((2, 8, 1, 1), 8), ((1, 520, 3, 3), 1), ((1, 4, 60, 40), 2)]

KINDS = ["large mean", "outlier first", "constant", "large half"]
ORDERS = {
    "batch": list(range(7)),
    "again": list(range(7)),
    "shuffled": [6, 2, 0, 5, 1, 4, 3],
    "first": [0],
    "last": [6],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp(dtype, layout):
    for i, (shape, groups) in enumerate(CASES):
        for modulated, silu in ((True, True), (i % 2 == 0, False)):
            flat = arguments(shape, groups, dtype, layout, modulated, silu)
            for args in (flat, raised(flat)):
                y, mean, rstd = forward(*args)
                assert y.is_contiguous(memory_format=LAYOUTS[layout])
                gradient = backward_arguments(args, mean, rstd)
                dx = backward(*gradient)
                assert dx.is_contiguous(memory_format=LAYOUTS[layout])
                check(args, y, dx, gradient[0])


class Norms(TorchDispatchMode):
    """Notes the (C, side) of every image that is normalised."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "group_norm" in str(function) and args[0].dim() == 4:
            self.shapes.add(tuple(args[0].shape[1:3]))
        return function(*args, **(kwargs or {}))


def test_the_shapes_of_the_adm_are_known():
    norms = Norms()
    with torch.device("meta"), torch.no_grad(), norms:
        ADM(**ADM_PRESETS["imagenet256"])(torch.empty(1, 3, 256, 256), torch.empty(1, dtype=torch.int64))
    assert norms.shapes == set(ADM_SHAPES)


def octet(channels, side, dtype, layout):
    """Arguments for 4 of 32 groups, and for all of them: eight times the same ones."""
    x, weight, bias, _, eps, scale, shift, silu = arguments((1, channels // 8, side, side), 4, dtype)
    part = (x, weight, bias, 4, eps, scale, shift, silu)
    whole = [t.repeat(*[1] * (t.dim() > 1), 8, *[1] * (t.dim() - 2)) for t in (x, weight, bias, scale, shift)]
    x, weight, bias, scale, shift = whole
    return part, (x.contiguous(memory_format=LAYOUTS[layout]), weight, bias, 32, eps, scale, shift, silu)


def check_octet(part, y, dx):
    """The tolerance rule for the first 4 groups, and the same bits in all the others."""
    channels = part[0].shape[1]
    _, mean, rstd = forward(*part)
    check(part, y[:, :channels], dx[:, :channels], backward_arguments(part, mean, rstd)[0])
    for result in (y, dx):
        first, *others = result.contiguous().split(channels, dim=1)
        assert len(others) == 7
        assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", torch.float32), ("channels_last", torch.bfloat16)])
@pytest.mark.parametrize(("channels", "side"), ADM_SHAPES)
def test_cpp_at_the_shapes_of_the_adm(channels, side, layout, dtype):
    part, whole = octet(channels, side, dtype, layout)
    y, mean, rstd = forward(*whole)
    check_octet(part, y, backward(*backward_arguments(whole, mean, rstd)))


@pytest.fixture(scope="module")
def interpreted(interpret):
    """By name: the arguments, (y, mean, rstd), the arguments of the backward pass, dx; in two processes in all."""
    cases = dict(triton_cases())
    forwards = interpret((MODULE, "_forward", args, {}) for args in cases.values())
    gradients = [backward_arguments(args, *r[1:]) for args, r in zip(cases.values(), forwards, strict=True)]
    backwards = interpret((MODULE, "_backward", args, {}) for args in gradients)
    return dict(zip(cases, zip(cases.values(), forwards, gradients, backwards, strict=True), strict=True))


SPLIT_CASES = {
    (layout, channels, side, first): raised(arguments((2, channels, 7, side), 8, dtype, layout))
    for layout in LAYOUTS
    # In one tile, in several, at a group's edge and within a group; parts that no wide access takes; one channel.
    for dtype, channels, side, first in (
        (torch.float32, 16, 5, 8),
        (torch.float32, 48, 8, 40),
        (torch.bfloat16, 48, 5, 16),
        (torch.bfloat16, 16, 8, 8),
        (torch.float16, 528, 5, 264),
        (torch.float32, 16, 5, 6),
        (torch.float32, 8, 5, 1),
        (torch.bfloat16, 8, 8, 7),
    )
}


@pytest.mark.parametrize("case", SPLIT_CASES)
def test_split(case):
    layout, channels, _, first = case
    *gradient, _, x_bias, residual = split_arguments(SPLIT_CASES[case], first)
    parts = split(*gradient, first, x_bias, residual)
    assert [p.shape[1] for p in parts] == [first, channels - first]
    assert all(p.is_contiguous(memory_format=LAYOUTS[layout]) for p in parts)
    assert torch.equal(torch.cat(parts, 1), backward(*gradient, x_bias, residual))
    for wrong in (0, channels):
        with pytest.raises(SdaError, match=f"first is {wrong}; choose a number of channels between 0 and the"):
            split(*gradient, wrong, x_bias, residual)


def test_split_in_triton(interpret):
    gradients = [split_arguments(args, first) for (*_, first), args in SPLIT_CASES.items()]
    found = interpret((MODULE, "_backward_split", args, {}) for args in gradients)
    whole = interpret((MODULE, "_backward", (*args[:10], *args[11:]), {}) for args in gradients)
    for (layout, *_, first), parts, dx in zip(SPLIT_CASES, found, whole, strict=True):
        assert parts[0].shape[1] == first
        assert all(p.is_contiguous(memory_format=LAYOUTS[layout]) for p in parts)
        assert torch.equal(torch.cat(parts, 1), dx)


def triton_cases():
    for layout in LAYOUTS:
        for case in SMALL_CASES:
            yield ("small", *case, layout), arguments(*case, layout=layout)
        for case in SMALL_CASES:
            yield ("raised", *case, layout), raised(arguments(*case, layout=layout))
        yield ("half", layout), raised(arguments(*SMALL_CASES[1], torch.float16, layout, modulated=False))
        yield ("bfloat16", layout), arguments(*SMALL_CASES[0], torch.bfloat16, layout, silu=layout == "contiguous")
    for channels, side in ADM_INTERPRETED:
        yield ("adm", channels, side), octet(channels, side, torch.bfloat16, "channels_last")[1]
    for kind in KINDS:
        yield ("hard", kind), hard(kind, 4)
    for name in ("apart", "channels_last slice", "channels_last tokens"):
        yield ("view", name), odd_arguments(odd_views()[name])
    x, weight, bias, *rest, scale, shift, silu = arguments((7, 6, 5, 3), 3)
    for name, order in ORDERS.items():
        yield ("order", name), (x[order], weight, bias, *rest, scale[order], shift[order], silu)


def test_triton(interpreted):
    for name, (args, (y, mean, rstd), gradient, dx) in interpreted.items():
        if name[0] in ("small", "raised", "half", "bfloat16", "view"):
            _, expected_mean, expected_rstd = forward(*args)
            assert error(mean, expected_mean) < 1e-6
            assert error(rstd / expected_rstd, torch.ones(1)) < 1e-6
            check(args, y, dx, gradient[0])


@pytest.mark.parametrize(("channels", "side"), ADM_INTERPRETED)
def test_triton_at_the_shapes_of_the_adm(interpreted, channels, side):
    part, _ = octet(channels, side, torch.bfloat16, "channels_last")
    _, (y, _, _), _, dx = interpreted["adm", channels, side]
    check_octet(part, y, dx)


def test_hard_numbers_in_triton(interpreted):
    for kind in KINDS:
        args, (y, _, rstd), gradient, dx = interpreted["hard", kind]
        _, exact_rstd = plain.group_norm_statistics(args[0].double(), 4, 1e-5)
        assert error(rstd / exact_rstd, torch.ones(1)) < 1e-5
        assert dx.isfinite().all()
        if kind == "constant":
            check_constant(args, y)
        else:
            check(args, y, dx, gradient[0])


def test_an_image_is_alone_in_triton(interpreted):
    results = {name: (*interpreted["order", name][1], interpreted["order", name][3]) for name in ORDERS}
    for i in range(4):
        batch = results["batch"][i]
        assert torch.equal(results["again"][i], batch)
        assert torch.equal(results["shuffled"][i], batch[ORDERS["shuffled"]])
        assert torch.equal(results["first"][i], batch[:1])
        assert torch.equal(results["last"][i], batch[6:])


def hard(kind, groups=32):
    """float32 or float16 inputs that break careless statistics."""
    x, *rest = arguments((2, 2 * groups, 12, 12), groups)
    if kind == "large mean":
        x = (x - 2) / 3 + 1e4
    if kind == "outlier first":
        x = (x - 2) / 3 + 1e4
        x[:, :, 0, 0] = 0
    if kind == "constant":
        x = torch.full_like(x, 3.3)
    if kind == "large half":
        x = ((x - 2) * 1e4).clamp(-6e4, 6e4).half()
        rest = [r.half() if isinstance(r, torch.Tensor) and r.dim() == 2 else r for r in rest]
    return x, *rest


def check_constant(args, y):
    """Without variance only what is added counts."""
    _, _, bias, *_, scale, shift, _ = args
    u = (bias * (1 + scale) + shift)[:, :, None, None].expand_as(y)
    assert error(y, u * u.sigmoid()) < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_numbers(kind, layout):
    x, *rest = hard(kind)
    args = (x.contiguous(memory_format=LAYOUTS[layout]), *rest)
    y, mean, rstd = forward(*args)
    gradient = backward_arguments(args, mean, rstd)
    dx = backward(*gradient)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    _, exact_rstd = plain.group_norm_statistics(x.double(), 32, 1e-5)
    assert error(rstd / exact_rstd, torch.ones(1)) < 1e-6
    if kind == "constant":
        check_constant(args, y)
        assert error(mean, torch.full_like(mean, 3.3)) == 0
    else:
        check(args, y, dx, gradient[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_everywhere(layout):
    """SiLU and its derivative over the whole range of float32, through an affine map that ignores x."""
    u = torch.cat([torch.logspace(-30, 38, 4000), torch.linspace(0, 110, 4000)])
    u = torch.cat([-u, u, torch.tensor([0.0, float("inf"), float("nan")])])
    channels = len(u)
    x = torch.tensor([-1.0, 1.0, 1.0, -1.0]).reshape(1, 1, 2, 2).repeat(1, channels, 1, 1)
    args = (x.contiguous(memory_format=LAYOUTS[layout]), torch.zeros(channels), u, channels, 1e-5, None, None, True)
    y = forward(*args)[0][0, :, 0, 0]
    expected = u.double() * torch.sigmoid(u.double())
    assert torch.equal(y.isnan(), expected.isnan())
    known = expected.isfinite() & (expected.abs() > 1e-36)
    assert (y[known].double() / expected[known] - 1).abs().max() < 4 * 2.0**-23
    rest = expected.isfinite() & ~known
    assert (y[rest].double() - expected[rest]).abs().max() <= 1e-36


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adjoint(layout):
    """<J v, w> = <v, J^T w>, J by autograd of the plain version in float64."""
    args = arguments((2, 64, 9, 7), 32, layout=layout)
    _, mean, rstd = forward(*args)
    gradient = backward_arguments(args, mean, rstd)
    x, *rest = in_double(args)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
    # By differentiating twice: torch.func.jvp loads code that torch itself has deprecated, and warns.
    _, jv = torch.autograd.functional.jvp(lambda x: plain.group_norm_silu(x, *rest), x, v)
    w, product = gradient[0].double(), backward(*gradient).double()
    assert abs((jv * w).sum() - (v * product).sum()) < 1e-6 * jv.norm() * w.norm()


def test_plain_backward_is_autograds():
    args = in_double(arguments((2, 12, 5, 3), 4))
    mean, rstd = plain.group_norm_statistics(args[0], 4, 1e-5)
    gradient = in_double(backward_arguments(args, mean, rstd))
    assert error(plain.group_norm_silu_backward(*gradient), exact(args, gradient[0])[1]) < 1e-13


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 64, 9, 5), (7, 32, 128, 80)])
def test_an_image_is_alone_in_the_world(backend, shape, layout):
    x, weight, bias, *rest, scale, shift, silu = arguments(shape, 32, torch.bfloat16, layout)

    def both(order):
        args = (x[order], weight, bias, *rest, scale[order], shift[order], silu)
        y, mean, rstd = forward(*args)
        return torch.stack([y, backward(x[order].flip(-1), x[order], weight, bias, mean, rstd, *args[5:7], 32, silu)])

    batch = both(list(range(7)))
    order = [6, 2, 0, 5, 1, 4, 3]
    assert torch.equal(both(order), batch[:, order])
    for i in (0, 3, 6):
        assert torch.equal(both([i]), batch[:, [i]])
        assert torch.equal(both([i]), batch[:, [i]])  # and again


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 64, 40, 40), (1, 96, 75, 67), (5, 64, 32, 32)])
def test_threads_do_not_matter(shape, layout):
    args = arguments(shape, 32, layout=layout)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, mean, rstd = forward(*args)
            results.append((y, mean, rstd, backward(*backward_arguments(args, mean, rstd))))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("direction", ["", "_backward"])
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles(compile_triton, capability, direction):
    import importlib

    module = importlib.import_module(f"sda_fast.kernels.group_norm_silu{direction}")
    for kernel, signature, constants, options in module.compilations():
        cubin, resources = compile_triton(kernel, signature, constants, capability, **options)
        assert cubin.startswith(b"\x7fELF")
        assert (resources.spills, resources.stack) == (0, 0), (kernel, constants)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_device(dtype, layout):
    for shape, groups in [*CASES, ((2, 256, 128, 128), 32)]:
        flat = arguments(shape, groups, dtype, layout)
        for args in (flat, raised(flat)):
            there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
            y, mean, rstd = forward(*there)
            gradient = backward_arguments(args, mean.cpu(), rstd.cpu())
            dx = backward(*[a.cuda() if isinstance(a, torch.Tensor) else a for a in gradient])
            check(args, y.cpu(), dx.cpu(), gradient[0])
            assert torch.equal(forward(*there)[0], y)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 64, 16, 16), (7, 96, 7, 5), (7, 256, 64, 64)])
def test_an_image_is_alone_on_the_device(shape, layout):
    """In odd shapes the images of a batch are aligned differently: their sums must be the same nevertheless."""
    args = arguments(shape, 32, torch.bfloat16, layout, modulated=False)
    x, *rest = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
    batch = forward(x, *rest)
    for i in range(7):
        alone = forward(x[i : i + 1].clone(memory_format=torch.preserve_format), *rest)
        view = forward(x[i : i + 1], *rest)
        for k in range(3):
            assert torch.equal(alone[k][0], batch[k][i])
            assert torch.equal(view[k][0], batch[k][i])


@pytest.mark.gpu
@pytest.mark.parametrize("case", SPLIT_CASES)
def test_split_on_the_device(case):
    args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in split_arguments(SPLIT_CASES[case], case[-1])]
    assert torch.equal(torch.cat(split(*args), 1), backward(*args[:10], *args[11:]))
