"""group_norm_silu: all backends against float64, the gradient against autograd, hard numbers, odd layouts."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from sda_fast import _core, ops
from sda_fast.errors import SdaError
from sda_fast.models import ADM
from sda_fast.models.checkpoints import ADM_PRESETS
from sda_fast.ops._layout import norm_layout
from sda_fast.ops.group_norm_silu import group_norm_silu
from sda_fast.reference import group_norm_silu as plain

MODULE = "sda_fast.ops.group_norm_silu"
TINY = 2e-6  # a few last places of float32 numbers near 4: what a tie of luck between two float32 sums may differ by
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

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


def split(*args):
    return torch.ops.sda_fast.group_norm_silu_backward_split(*args)


def split_arguments(args, first):
    _, mean, rstd = forward(*args)
    *gradient, x_bias, residual = backward_arguments(args, mean, rstd)
    return *gradient, first, x_bias, residual


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


@pytest.mark.parametrize("name", odd_views())
def test_odd_views(name):
    args = raised(odd_arguments(odd_views()[name]))
    y, mean, rstd = forward(*args)
    gradient = backward_arguments(args, mean, rstd)
    check(args, y, backward(*gradient), gradient[0])
    view = args[0]  # neither dense nor as the gradient lies
    assert torch.equal(backward(*gradient[:-1], view), backward(*gradient[:-1], view.clone()))
    dy = gradient[0].transpose(-1, -2).contiguous().transpose(-1, -2)  # in no format of its own
    assert torch.equal(backward(dy, *gradient[1:]), backward(*gradient))
    expanded = torch.ones(()).expand(y.shape)
    assert torch.equal(backward(expanded, *gradient[1:]), backward(expanded.clone(), *gradient[1:]))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
@pytest.mark.parametrize("backend", ["plain", "cpp"])
def test_empty(shape, backend):
    args = arguments(shape, 4)
    with ops.backend(backend):
        y, mean, rstd = forward(*args)
        dx = backward(*backward_arguments(args, mean, rstd))
    assert y.shape == dx.shape == shape
    assert mean.shape == rstd.shape == (shape[0], 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes_every_element_and_no_other(layout):
    x, weight, bias, *_ = arguments((2, 8, 5, 3), 4, layout=layout)
    wide = torch.full((4, 8, 5, 3), float("nan")).contiguous(memory_format=LAYOUTS[layout])
    mean, rstd = torch.full((2, 2, 4), float("nan"))
    parameters = _core.NormParameters(weight.data_ptr(), bias.data_ptr(), 0, 0, 0, 0, 0, 4, True)
    layouts = [_core.NormLayout(*norm_layout(t, "t")) for t in (x, wide[::2])]
    pointers = [t.data_ptr() for t in (x, wide, mean, rstd)]
    workspace = torch.full((_core.group_norm_silu_cpu_workspace(layouts[0], 1),), 255, dtype=torch.uint8)
    assert (workspace.numel() == 0) == (layout == "contiguous")
    _core.group_norm_silu_cpu(*pointers, _core.float32, *layouts, parameters, 1e-5, workspace.data_ptr(), 1)
    assert torch.equal(wide[::2], group_norm_silu(x, weight, bias, 4))
    assert mean.isfinite().all()
    assert rstd.isfinite().all()
    assert wide[1::2].isnan().all()
    wide.fill_(float("nan"))
    pointers = [x.data_ptr(), x.data_ptr(), wide.data_ptr(), 0, mean.data_ptr(), rstd.data_ptr()]
    layouts = [layouts[0], *layouts, layouts[0]]
    workspace.fill_(255)
    _core.group_norm_silu_backward_cpu(*pointers, _core.float32, *layouts, parameters, workspace.data_ptr(), 1)
    assert wide[::2].isfinite().all()
    assert wide[1::2].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    args = raised(arguments((2, 8, 5, 3), 4, layout=layout))
    _, mean, rstd = forward(*args)
    torch.library.opcheck(torch.ops.sda_fast.group_norm_silu_backward.default, backward_arguments(args, mean, rstd))
    torch.library.opcheck(torch.ops.sda_fast.group_norm_silu_backward_split.default, split_arguments(args, 3))
    args[0].requires_grad_()
    torch.library.opcheck(torch.ops.sda_fast.group_norm_silu.default, args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autograd_tracing_and_compiling(layout):
    x, weight, bias, *_, x_bias = raised(arguments((2, 8, 5, 3), 4, layout=layout))

    def step(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = group_norm_silu(x, weight, bias, 4, x_bias=x_bias)
            return torch.autograd.grad((y * y).sum(), x)[0]

    leaf = x.double().requires_grad_()
    y = plain.group_norm_silu(leaf, weight.double(), bias.double(), 4, x_bias=x_bias.double())
    expected = torch.autograd.grad((y * y).sum(), leaf)[0]
    assert error(step(x), expected) < 1e-5
    traced = make_fx(step)(x)
    targets = [node.target for node in traced.graph.nodes]
    assert torch.ops.sda_fast.group_norm_silu_backward.default in targets
    assert torch.equal(traced(x), step(x))
    compiled = torch.compile(lambda x: group_norm_silu(x * 2, weight, bias, 4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), group_norm_silu(x * 2, weight, bias, 4))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(group_norm_silu(x * 2, weight, bias, 4).sum(), x)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "x_bias"])
def test_only_x_is_differentiated(name):
    x, weight, bias, groups, eps, scale, shift, silu, x_bias = raised(arguments((2, 8, 4, 4), 4))
    parameters = dict(weight=weight, bias=bias, scale=scale, shift=shift, x_bias=x_bias)
    parameters[name] = parameters[name].clone().requires_grad_()
    with pytest.raises(SdaError, match=f"{name} requires a gradient"):
        group_norm_silu(x, groups=groups, eps=eps, silu=silu, **parameters)
    with torch.no_grad():
        group_norm_silu(x, groups=groups, eps=eps, silu=silu, **parameters)
    weight, bias, scale, shift, x_bias = parameters.values()
    y, _, _ = forward(x, weight, bias, groups, eps, scale, shift, silu, x_bias)
    if name != "shift":
        with pytest.raises(SdaError, match=f"{name} requires a gradient"):
            y.sum().backward()


MISTAKES = {
    "pass group_norm_silu \\[N, C, ...\\]": dict(x=torch.zeros(3)),
    "x is torch.float64; .* one in float32, bfloat16 or float16": dict(x=torch.zeros(2, 8, 4, 4, dtype=torch.float64)),
    "groups is 3; choose a number that divides the 8 channels": dict(groups=3),
    "groups is 0": dict(groups=0),
    "eps is -1.0; choose": dict(eps=-1.0),
    "weight has shape \\(7,\\); .* pass group_norm_silu one of shape \\(8,\\)": dict(weight=torch.ones(7)),
    "bias is torch.float16; pass group_norm_silu one in float32": dict(bias=torch.zeros(8, dtype=torch.float16)),
    "scale has shape \\(2, 8, 1, 1\\)": dict(scale=torch.zeros(2, 8, 1, 1)),
    "shift has shape \\(1, 8\\)": dict(shift=torch.zeros(1, 8)),
    "x_bias has shape \\(1, 8\\)": dict(x_bias=torch.zeros(1, 8)),
    "weight lies on meta and x on cpu; pass both on one device": dict(weight=torch.ones(8, device="meta")),
    "pass x.contiguous": dict(x=torch.zeros(2, 8, 5, 4).transpose(2, 3)),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    given = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.ones(8), "bias": torch.zeros(8), "groups": 4}
    with pytest.raises(SdaError, match=message):
        group_norm_silu(**{**given, **MISTAKES[message]})


def test_mistakes_in_the_backward_pass():
    args = raised(arguments((2, 8, 4, 4), 4))
    _, mean, rstd = forward(*args)
    dy, *rest, residual = backward_arguments(args, mean, rstd)
    with pytest.raises(SdaError, match=r"dy is torch.float16 .*; pass it as x is"):
        backward(dy.half(), *rest)
    with pytest.raises(SdaError, match=r"residual is torch.float32 \(1, 8, 4, 4\) on cpu; pass it as x is"):
        backward(dy, *rest, residual[:1])
    rest[3] = mean[:1]
    with pytest.raises(SdaError, match="pass what the forward pass returned"):
        backward(dy, *rest)


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
