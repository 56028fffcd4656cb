"""to_uint8: the same bytes from every backend, layout and batch."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sda_fast import ops
from sda_fast.errors import SdaError
from sda_fast.ops.to_uint8 import to_uint8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("round", "truncate")
SHAPES = [(2, 3, 8, 8), (3, 3, 5, 7), (1, 1, 1, 1), (2, 4, 33, 35), (0, 3, 4, 4), (2, 3, 0, 4), (1, 3, 37, 61)]


def values(shape, dtype, seed=0):
    """Around [-1, 1], with ties, the neighbours of ties, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator) * 2.4 - 1.2
    ties = (torch.randint(0, 256, shape, generator=generator).double() + 0.5) / 127.5 - 1
    x = torch.where(torch.rand(shape, generator=generator) < 0.5, ties.float(), x)
    edges = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, -0.0, 1.0, -1.0])
    x.flatten()[: len(edges)] = edges[: x.numel()]
    return x.to(dtype)


def layouts(x):
    """x in every layout: contiguous, channels_last, channels of more, images apart."""
    wide = torch.full((2 * x.shape[0], 2 * x.shape[1], *x.shape[2:]), 0.5, dtype=x.dtype, device=x.device)
    wide[::2, : x.shape[1]] = x
    last = wide.to(memory_format=torch.channels_last)
    return [x, x.to(memory_format=torch.channels_last), wide[::2, : x.shape[1]], last[::2, : x.shape[1]]]


def plain(x, mode):
    with ops.backend("plain"):
        return to_uint8(x, mode)


def test_plain_is_the_formula():
    x = values((2, 3, 40, 50), torch.float32).nan_to_num(0)
    by_hand = ((x + 1) / 2).mul(255).add(0.5).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    assert torch.equal(plain(x, "round"), by_hand)
    by_hand = (127.5 * x + 128.0).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    assert torch.equal(plain(x, "truncate"), by_hand)


@pytest.mark.parametrize("mode", MODES)
def test_backends_agree(interpret, mode):
    calls, expected = [], []
    for dtype in DTYPES:
        for shape in SHAPES:
            for x in layouts(values(shape, dtype)):
                cpp = to_uint8(x, mode)
                assert cpp.shape == (shape[0], *shape[2:], shape[1])
                assert cpp.is_contiguous()
                assert torch.equal(cpp, plain(x, mode))
                assert torch.equal(to_uint8(x, mode, out=torch.full_like(cpp, 77)), cpp)
                calls.append(("sda_fast.ops", "to_uint8", (x, mode), {"out": torch.full_like(cpp, 77)}))
                expected.append(cpp)
    for triton, cpp in zip(interpret(calls), expected, strict=True):
        assert torch.equal(triton, cpp)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half(dtype):
    x = torch.arange(2**16).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)
    for mode in MODES:
        assert torch.equal(to_uint8(x, mode), plain(x, mode))


def test_an_image_is_alone_in_the_world(backend):
    x = values((7, 3, 19, 23), torch.float32)
    batch = to_uint8(x)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    assert torch.equal(to_uint8(x[order]), batch[order])
    for i in range(7):
        assert torch.equal(to_uint8(x[i : i + 1])[0], batch[i])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(one_thread, threads):
    x = values((5, 3, 231, 257), torch.float32)
    one = to_uint8(x)
    torch.set_num_threads(threads)
    assert torch.equal(to_uint8(x), one)
    assert torch.equal(to_uint8(x), one)


def test_opcheck():
    for x in layouts(values((2, 3, 4, 5), torch.bfloat16)):
        torch.library.opcheck(torch.ops.sda_fast.to_uint8.default, (x, False))
        out = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
        torch.library.opcheck(torch.ops.sda_fast.to_uint8_out.default, (x, True, out))


def test_tracing_and_compiling():
    def stored(x):
        return to_uint8(x * 2, "truncate")

    x = values((2, 3, 4, 5), torch.float32)
    traced = make_fx(stored)(x)
    assert any(node.target is torch.ops.sda_fast.to_uint8.default for node in traced.graph.nodes)
    assert torch.equal(traced(x), stored(x))
    assert torch.equal(torch.compile(stored, fullgraph=True, backend="aot_eager")(x), stored(x))


MISTAKES = {
    "mode is 'nearest'; .* choose one of them": dict(mode="nearest"),
    "x is torch.float64": dict(x=torch.zeros(2, 3, 4, 5, dtype=torch.float64)),
    "x has shape \\(3, 4, 5\\); pass to_uint8 images": dict(x=torch.zeros(3, 4, 5)),
    "pass x.contiguous\\(\\)": dict(x=torch.zeros(2, 3, 5, 4).transpose(2, 3)),
    "2\\^30": dict(x=torch.zeros(1).expand(1, 3, 2**15, 2**15)),
    "out is torch.int8; pass to_uint8 one in uint8": dict(out=torch.zeros(2, 4, 5, 3, dtype=torch.int8)),
    "out has shape \\(2, 3, 4, 5\\)": dict(out=torch.zeros(2, 3, 4, 5, dtype=torch.uint8)),
    "strides \\(60, 1, 4, 20\\); .* a contiguous one": dict(
        out=torch.zeros(2, 3, 5, 4, dtype=torch.uint8).permute(0, 3, 2, 1)
    ),
    "out lies on meta and x on cpu; pass": dict(out=torch.zeros(2, 4, 5, 3, dtype=torch.uint8, device="meta")),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    with pytest.raises(SdaError, match=message):
        to_uint8(**{"x": torch.zeros(2, 3, 4, 5), **MISTAKES[message]})


def test_there_is_no_cuda_version():
    with pytest.raises(SdaError, match="only cpp, triton, plain"), ops.backend("cuda"):
        to_uint8(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles(compile_triton, capability):
    from sda_fast.kernels.to_uint8 import compilations

    for kernel, signature, constexprs, options in compilations():
        cubin, resources = compile_triton(kernel, signature, constexprs, capability, **options)
        assert cubin.startswith(b"\x7fELF")
        assert (resources.spills, resources.stack) == (0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_device(dtype):
    for shape in [*SHAPES, (16, 3, 256, 256)]:
        for x in layouts(values(shape, dtype)):
            for mode in MODES:
                with ops.backend("triton"):
                    assert torch.equal(to_uint8(x.cuda(), mode).cpu(), to_uint8_cpu(x, mode))


def to_uint8_cpu(x, mode):
    with ops.backend("cpp"):
        return to_uint8(x, mode)
