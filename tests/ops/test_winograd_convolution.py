"""winograd_convolution: conv2d in real numbers, the same bits whatever shares the batch, within bfloat16's rounding."""

import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import conv2d

from sda_fast import ops
from sda_fast.bench.step import relative_error
from sda_fast.errors import SdaError
from sda_fast.ops.winograd_convolution import pack_kernels, runs, unpack_kernels, winograd_convolution
from sda_fast.reference import winograd_convolution as plain

# (N, C, K, H, W): some tiles beside those that fill the registers, none, several blocks, of several images
SHAPES = [
    (1, 16, 64, 2, 2),
    (2, 32, 64, 2, 4),
    (3, 48, 128, 10, 6),
    (2, 32, 64, 4, 22),
    (1, 16, 64, 10, 2),
    (2, 256, 64, 16, 18),
    (1, 16, 192, 40, 64),
    (3, 16, 32, 6, 10),
    (40, 32, 96, 4, 4),
]

COMPILED = pytest.mark.skipif(not runs(), reason="this processor has no AVX512-BF16 instructions")


@pytest.fixture(params=["cpp", "plain"])
def backend(request):
    if request.param == "cpp" and not runs():
        pytest.skip("this processor has no AVX512-BF16 instructions")
    with ops.backend(request.param):
        yield request.param


def tensors(shape, seed=0):
    """x, weight and bias of the size at which y is of order one."""
    images, channels, kernels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, channels, height, width, generator=generator).bfloat16()
    weight = torch.randn(kernels, channels, 3, 3, generator=generator) * (9 * channels) ** -0.5
    return x.to(memory_format=torch.channels_last), weight, torch.randn(kernels, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_real_numbers_it_is_conv2d(shape):
    x, weight, bias = (tensor.double() for tensor in tensors(shape))
    y = plain.winograd_convolution(x, plain.transform_kernels(weight), bias)
    torch.testing.assert_close(y, conv2d(x, weight, bias, padding=1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding(backend, shape):
    """Its error is at most three times that of conv2d: the transformed pixels and kernels are rounded as well."""
    x, weight, bias = tensors(shape)
    exact = conv2d(x.double(), weight.double(), bias.double(), padding=1)
    direct = conv2d(x, weight.bfloat16(), bias.bfloat16(), padding=1)
    y = winograd_convolution(x, pack_kernels(weight), bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, exact) <= 3 * relative_error(direct, exact)


@COMPILED
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree(shape):
    """They round the same numbers; sums in another order can change the last bit of y."""
    x, weight, bias = tensors(shape)
    packed = pack_kernels(weight)
    for offset in (None, bias, bias.bfloat16()):
        y = winograd_convolution(x, packed, offset)
        with ops.backend("plain"):
            other = winograd_convolution(x, packed, offset)
        torch.testing.assert_close(y, other, rtol=2**-7, atol=1e-5)
        assert (y != other).float().mean() <= 1e-2


@COMPILED
@pytest.mark.parametrize("kernels", [32, 64])
def test_a_tile_does_not_depend_on_how_many_there_are(kernels):
    x, weight, _ = tensors((13, 16, kernels, 2, 2))
    packed = pack_kernels(weight)
    every = winograd_convolution(x, packed)
    with ops.backend("plain"):
        torch.testing.assert_close(every, winograd_convolution(x, packed), rtol=2**-7, atol=1e-5)
    for images in range(1, 13):
        assert torch.equal(winograd_convolution(x[:images], packed), every[:images])


@COMPILED
def test_layouts():
    x, weight, _ = tensors((3, 32, 64, 6, 8))
    packed = pack_kernels(weight)
    y = winograd_convolution(x, packed)
    wide = torch.full((6, 64, 8, 10), 7.0).bfloat16().to(memory_format=torch.channels_last)
    wide[::2, 16:48, 1:7, 2:] = x
    for same in (x.contiguous(), wide[::2, 16:48, 1:7, 2:], x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        assert torch.equal(same, x)
        assert torch.equal(winograd_convolution(same, packed), y)


@COMPILED
def test_an_image_is_alone_in_the_world():
    x, weight, bias = tensors((7, 32, 64, 14, 10))
    packed = pack_kernels(weight)
    batch = winograd_convolution(x, packed, bias)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    assert torch.equal(winograd_convolution(x[order], packed, bias), batch[order])
    for i in range(7):
        assert torch.equal(winograd_convolution(x[i : i + 1], packed, bias)[0], batch[i])


@COMPILED
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(one_thread, threads):
    x, weight, bias = tensors((2, 64, 128, 32, 32))
    packed = pack_kernels(weight)
    one = winograd_convolution(x, packed, bias)
    torch.set_num_threads(threads)
    assert torch.equal(winograd_convolution(x, packed, bias), one)
    assert torch.equal(winograd_convolution(x, packed, bias), one)


def test_nothing(backend):
    _, weight, _ = tensors((1, 16, 64, 2, 2))
    packed = pack_kernels(weight)
    assert winograd_convolution(torch.zeros(0, 16, 4, 4).bfloat16(), packed).shape == (0, 64, 4, 4)
    assert winograd_convolution(torch.zeros(2, 16, 0, 4).bfloat16(), packed).shape == (2, 64, 0, 4)


def test_a_nan_reaches_its_neighbours_alone(backend):
    """Those of the tiles that see it, as every transform adds it to numbers of its tile."""
    x, weight, _ = tensors((1, 16, 64, 8, 8))
    x[0, 3, 0, 0] = torch.nan
    lost = winograd_convolution(x, pack_kernels(weight)).isnan()[0].all(0)
    assert lost[:2, :2].all()
    assert not lost[2:].any()
    assert not lost[:, 2:].any()


def test_packing_loses_no_kernel():
    weight = tensors((1, 32, 192, 2, 2))[1]
    assert torch.equal(unpack_kernels(pack_kernels(weight)), plain.transform_kernels(weight.double()).bfloat16())


def test_without_the_instructions_the_plain_version_runs(monkeypatch):
    module = sys.modules[winograd_convolution.__module__]  # in sda_fast.ops the function has its name
    monkeypatch.setattr(module, "runs", lambda: False)
    x, weight, _ = tensors((1, 16, 64, 4, 4))
    packed = pack_kernels(weight)
    y = winograd_convolution(x, packed)
    with ops.backend("plain"):
        assert torch.equal(winograd_convolution(x, packed), y)
    with ops.backend("cpp"), pytest.raises(SdaError, match="no AVX512-BF16 instructions; choose plain"):
        winograd_convolution(x, packed)


def test_opcheck():
    x, weight, bias = tensors((2, 16, 64, 4, 6))
    for offset in (None, bias):
        torch.library.opcheck(torch.ops.sda_fast.winograd_convolution.default, (x, pack_kernels(weight), offset))
    torch.library.opcheck(torch.ops.sda_fast.winograd_convolution.default, (x.contiguous(), pack_kernels(weight), None))


def test_tracing_and_compiling():
    x, weight, _ = tensors((2, 16, 64, 4, 6))
    packed = pack_kernels(weight)

    def twice(x):
        return winograd_convolution(x * 2, packed)

    traced = make_fx(twice)(x)
    assert any(n.target is torch.ops.sda_fast.winograd_convolution.default for n in traced.graph.nodes)
    assert torch.equal(traced(x), twice(x))
    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), twice(x))


X, WEIGHT, BIAS = tensors((2, 16, 64, 4, 6))
PACKED = pack_kernels(WEIGHT)
MISTAKES = {
    "x has shape \\(16, 4, 6\\); pass winograd_convolution \\[N, 16, H, W\\]": dict(x=X[0]),
    "x has shape \\(2, 16, 3, 6\\); .* H and W even": dict(x=X[:, :, :3]),
    "x has shape \\(2, 8, 4, 6\\)": dict(x=X[:, :8]),
    "x is torch.float32; pass winograd_convolution one in bfloat16": dict(x=X.float()),
    "packed has shape \\(64, 16, 3, 3\\); pass winograd_convolution what pack_kernels returned": dict(packed=WEIGHT),
    "packed is torch.float32": dict(packed=PACKED.float()),
    "packed lies on meta and x on cpu": dict(packed=PACKED.to("meta")),
    "bias has shape \\(32,\\)": dict(bias=BIAS[:32]),
    "bias is torch.float64": dict(bias=BIAS.double()),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    arguments = {"x": X, "packed": PACKED, "bias": BIAS, **MISTAKES[message]}
    with pytest.raises(SdaError, match=message):
        winograd_convolution(**arguments)


@pytest.mark.parametrize("shape", [(48, 16, 3, 3), (64, 8, 3, 3), (64, 16, 1, 1), (64, 16, 3)])
def test_kernels_that_do_not_fit(shape):
    with pytest.raises(SdaError, match="use conv2d for others"):
        pack_kernels(torch.zeros(shape))
