"""group_norm_silu as it is called: odd layouts, empty batches, registration, autograd, tracing, mistakes."""

import pytest
import torch
from norms import (
    LAYOUTS,
    arguments,
    backward,
    backward_arguments,
    check,
    error,
    forward,
    odd_arguments,
    odd_views,
    raised,
    split_arguments,
)
from torch.fx.experimental.proxy_tensor import make_fx

from sda_fast import _core, ops
from sda_fast.errors import SdaError
from sda_fast.ops._layout import norm_layout
from sda_fast.ops.group_norm_silu import group_norm_silu
from sda_fast.reference import group_norm_silu as plain


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
