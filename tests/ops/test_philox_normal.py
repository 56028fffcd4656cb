"""philox_normal: known answers, agreement of all backends, dependence on nothing but the counter."""

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sda_fast import _core, ops
from sda_fast.errors import SdaError
from sda_fast.ops.philox_normal import philox_normal
from sda_fast.reference import philox

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
MAX_ULP = 3  # of the polynomials against the exact formula, rounded; test_box_muller_everywhere is exhaustive

# (shape, seed, identities, step): odd sizes, one element, no image, no element, 64 bits of seed and identity.
CASES = [
    ((2, 3, 8, 8), 0, [0, 1], 0),
    ((3, 3, 5, 7), 2**64 - 1, [2**32, 2**63 - 1, 2**64 - 1], 2**32 - 1),
    ((1, 1, 1, 1), 2**63, [7], 1),
    ((2, 4, 33, 35), 1, [-1, -(2**63)], 3),
    ((0, 3, 4, 4), 5, [], 2),
    ((2, 3, 0, 4), 5, [1, 2], 2),
    ((2, 10), 11, [3, 4], 9),
]


def signed(x):
    return x - 2**64 if x >= 2**63 else x


def ulps(a, b):
    """The distance of two float32 tensors in units in the last place; huge where signs differ."""
    return (a.view(torch.int32).long() - b.view(torch.int32).long()).abs()


def words_cpp(images, blocks, first_block, *, seed, identities, step):
    out = torch.full((images, blocks, 4), -1, dtype=torch.int32)
    ids = torch.tensor([signed(i) for i in identities])
    _core.philox_words_cpu(out.data_ptr(), images, blocks, first_block, seed, ids.data_ptr(), step)
    return out


def words_plain(blocks, first_block, *, seed, identities, step):
    ids = torch.tensor([signed(i) for i in identities])
    counter = torch.arange(first_block, first_block + blocks)
    return philox.philox_words(counter, seed=seed, identities=ids, step=step)


def words_triton_call(images, blocks, first_block, *, seed, identities, step):
    args = (
        torch.full((images, blocks, 4), -1, dtype=torch.int32),
        torch.tensor([signed(i) for i in identities]),
    )
    kwargs = dict(seed=signed(seed), step=step, first_block=first_block)
    return "sda_fast.kernels.philox_normal", "philox_words", args, kwargs


def known_answer_arguments():
    for counter, key, answer in KNOWN_ANSWERS:
        block, step, low, high = (int(word, 16) for word in counter.split())
        key_low, key_high = (int(word, 16) for word in key.split())
        arguments = dict(seed=key_low | key_high << 32, identities=[low | high << 32], step=step)
        yield block, arguments, [int(word, 16) for word in answer.split()]


def test_known_answers(interpret):
    interpreted = interpret(words_triton_call(1, 1, block, **a) for block, a, _ in known_answer_arguments())
    for (block, arguments, answer), triton in zip(known_answer_arguments(), interpreted, strict=True):
        assert words_plain(1, block, **arguments).flatten().tolist() == answer
        for words in (words_cpp(1, 1, block, **arguments), triton):
            assert words.flatten().numpy().view(np.uint32).tolist() == answer


def test_words_agree(interpret):
    arguments = dict(seed=0xFEDCBA9876543210, identities=[5, 2**40 + 3, 2**64 - 2], step=2**31 + 1)
    first_block = 2**32 - 1000
    cpp = words_cpp(3, 1000, first_block, **arguments)
    (triton,) = interpret([words_triton_call(3, 1000, first_block, **arguments)])
    plain = words_plain(1000, first_block, **arguments)
    assert torch.equal(cpp, triton)
    assert np.array_equal(cpp.numpy().view(np.uint32), plain.numpy())


def test_words_beyond_the_counter_are_refused():
    with pytest.raises(ValueError, match="too large"):
        words_cpp(1, 2, 2**32 - 1, seed=0, identities=[0], step=0)


def channels_last(shape):
    return torch.full(shape, float("nan")).to(memory_format=torch.channels_last)


def test_backends_agree(interpret):
    """C++ and Triton give the same bits, in both memory formats; plain lies within MAX_ULP."""
    calls, expected = [], []
    for shape, seed, identities, step in CASES:
        kwargs = dict(seed=seed, identities=identities, step=step)
        cpp = philox_normal(shape, **kwargs, out=torch.full(shape, float("nan")))
        assert cpp.isfinite().all()
        with ops.backend("plain"):
            plain = philox_normal(shape, **kwargs)
        assert plain.shape == cpp.shape == shape
        assert (ulps(cpp, plain) <= MAX_ULP).all()
        calls.append(("sda_fast.ops", "philox_normal", (shape,), kwargs))
        expected.append(cpp)
        if len(shape) == 4:
            assert torch.equal(philox_normal(shape, **kwargs, out=channels_last(shape)), cpp)
            calls.append(("sda_fast.ops", "philox_normal", (shape,), {**kwargs, "out": channels_last(shape)}))
            expected.append(cpp)
    for (_, _, _, kwargs), triton, cpp in zip(calls, interpret(calls), expected, strict=True):
        assert torch.equal(triton, cpp), kwargs


def test_box_muller_everywhere():
    """Every uniform as a radius, and every one as an angle: so the bound of both factors is exhaustive."""
    every = torch.arange(2**23) << 9
    for radius, angle in (
        (every, torch.full_like(every, 0x12345678)),
        (torch.full_like(every, 0x0BADCAFE), every),
    ):
        words = torch.stack((radius, angle), dim=-1)
        raw = words.to(torch.int32)
        out = torch.full(words.shape, float("nan"))
        _core.box_muller_cpu(out.data_ptr(), raw.data_ptr(), len(words))
        assert ulps(out, philox.box_muller(words)).max() <= MAX_ULP


def test_an_image_is_alone_in_the_world(backend):
    shape = (3, 9, 11)
    identities = [4, 2**50, 17, 1, 2**64 - 5, 0, 9]
    batch = philox_normal((7, *shape), seed=3, identities=identities, step=5)
    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    shuffled = philox_normal((7, *shape), seed=3, identities=[identities[i] for i in order], step=5)
    assert torch.equal(shuffled, batch[order])
    for i, identity in enumerate(identities):
        alone = philox_normal((1, *shape), seed=3, identities=[identity], step=5)
        assert torch.equal(alone[0], batch[i])


def test_every_part_of_the_counter_matters():
    base = dict(seed=1, identities=[1], step=1)
    changes = [
        {},
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"identities": [2]},
        {"identities": [1 + 2**32]},
        {"step": 2},
    ]
    draws = torch.stack([philox_normal((1, 4096), **{**base, **change}).flatten() for change in changes])
    correlations = torch.corrcoef(draws) - torch.eye(len(changes))
    assert correlations.abs().max() < 5 / 4096**0.5


def test_wrapped_numbers_are_the_same_numbers():
    unsigned = philox_normal((1, 8), seed=5, identities=[2**64 - 3], step=0)
    assert torch.equal(unsigned, philox_normal((1, 8), seed=5, identities=[-3], step=0))
    assert torch.equal(unsigned, philox_normal((1, 8), seed=5, identities=torch.tensor([-3]), step=0))


def test_moments():
    x = philox_normal((16, 3, 256, 256), seed=2024, identities=range(16), step=0).double()
    n = x.numel()
    assert x.mean().abs() < 4 / n**0.5
    assert (x.var() - 1).abs() < 4 * (2 / n) ** 0.5
    assert ((x**3).mean()).abs() < 4 * (15 / n) ** 0.5
    assert ((x**4).mean() - 3).abs() < 4 * (96 / n) ** 0.5
    assert 5 < x.abs().max() < 6


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_matter(threads):
    shape, kwargs = (5, 3, 131, 257), dict(seed=8, identities=range(5), step=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = philox_normal(shape, **kwargs)
        torch.set_num_threads(threads)
        assert torch.equal(philox_normal(shape, **kwargs), one)
    finally:
        torch.set_num_threads(before)


def test_out_with_gaps():
    kwargs = dict(seed=8, identities=[1, 2], step=4)
    wide = torch.full((4, 3, 5, 7), float("nan"))
    filled = philox_normal((2, 3, 5, 7), **kwargs, out=wide[::2])
    assert torch.equal(filled, philox_normal((2, 3, 5, 7), **kwargs))
    assert wide[1::2].isnan().all()


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -1])
def test_opcheck(seed):
    ids = torch.tensor([1, 2])
    torch.library.opcheck(torch.ops.sda_fast.philox_normal.default, (ids, (2, 3, 4, 5), seed, 7))
    out = torch.empty(2, 3, 4, 5)
    torch.library.opcheck(torch.ops.sda_fast.philox_normal_out.default, (out, ids, seed, 7))


def test_tracing_and_compiling():
    def noised(x, ids):
        return x + philox_normal(x.shape, seed=2**64 - 2, identities=ids, step=3)

    x, ids = torch.zeros(2, 3, 4, 5), torch.tensor([3, 4])
    traced = make_fx(noised)(x, ids)
    assert any(node.target is torch.ops.sda_fast.philox_normal.default for node in traced.graph.nodes)
    assert torch.equal(traced(x, ids), noised(x, ids))
    compiled = torch.compile(noised, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, ids), noised(x, ids))


MISTAKES = {
    "seed is -1; choose": dict(seed=-1),
    "seed is 18446744073709551616": dict(seed=2**64),
    "step is 4294967296; choose": dict(step=2**32),
    "one int64 per image": dict(identities=[1]),
    "torch.int32": dict(identities=torch.tensor([1, 2], dtype=torch.int32)),
    "identities hold 18446744073709551616; choose numbers in \\[-2\\^63, 2\\^64\\)": dict(identities=[1, 2**64]),
    "shape is \\(\\)": dict(shape=()),
    "sizes from 0": dict(shape=(2, -1)),
    "2\\^34": dict(shape=(2, 2**34 + 1)),
    "out is torch.float64": dict(out=torch.empty(2, 3, 4, 5, dtype=torch.float64)),
    "out has shape \\(2, 3, 4\\), but .* pass an out of that shape": dict(out=torch.empty(2, 3, 4)),
    "contiguous or channels_last": dict(out=torch.empty(2, 3, 5, 4).transpose(2, 3)),
    "out lies on cpu": dict(out=torch.empty(2, 3, 4, 5), device="meta"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    arguments = {"shape": (2, 3, 4, 5), "seed": 0, "identities": [1, 2], "step": 0, **MISTAKES[message]}
    with pytest.raises(SdaError, match=message):
        philox_normal(**arguments)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("contiguous", [True, False])
def test_triton_compiles(compile_triton, capability, contiguous):
    from sda_fast.kernels.philox_normal import BLOCK, philox_normal_kernel

    signature = dict.fromkeys(philox_normal_kernel.arg_names, "i32")
    signature.update(p_out="*fp32", p_identities="*i64", seed="i64", step="i64")
    constexprs = dict(CONTIGUOUS=contiguous, BLOCK=BLOCK)
    cubin, resources = compile_triton(philox_normal_kernel, signature, constexprs, capability, enable_fp_fusion=False)
    assert cubin.startswith(b"\x7fELF")
    assert (resources.spills, resources.stack) == (0, 0)


@pytest.mark.parametrize("capability", [80, 90])
def test_cuda_compiles(compile_cuda, capability):
    resources = compile_cuda("philox_normal.cu", capability)
    assert (resources.spills, resources.stack) == (0, 0)


def words_cuda(out, identities, *, seed, step, first_block, stream=0):
    images, blocks, _ = out.shape
    address = identities.data_ptr()
    _core.philox_words_cuda(out.data_ptr(), images, blocks, first_block, seed, address, step, stream)


def test_cuda_emulated(emulate):
    """The CPU's bits, in both memory formats and with images apart; and the words."""
    calls, expected = [], []
    for shape, seed, identities, step in [*CASES, ((3, 3, 32, 32), 9, [0, 1, 2], 3)]:
        kwargs = dict(seed=seed, identities=identities, step=step)
        cpu = philox_normal(shape, **kwargs)
        apart = torch.full((2 * shape[0], *shape[1:]), float("nan"))
        outs = [torch.full(shape, float("nan")), apart[::2]] + ([channels_last(shape)] if len(shape) == 4 else [])
        calls += [("sda_fast.ops", "philox_normal", (shape,), {**kwargs, "out": out}) for out in outs]
        expected += [cpu] * len(outs)
    where = dict(step=2**31 + 1, first_block=2**32 - 1000)
    identities, seed = [5, 2**40 + 3, -2], 0xFEDCBA9876543210
    words = torch.full((3, 1000, 4), -1, dtype=torch.int32), torch.tensor(identities)
    calls.append(("test_philox_normal", "words_cuda", words, dict(seed=seed, **where)))
    expected.append(words_cpp(3, 1000, where["first_block"], seed=seed, identities=identities, step=where["step"]))
    for result, value in zip(emulate(calls), expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_the_device(backend):
    """The device's noise has the CPU's bits, in both memory formats and with images apart."""
    if backend == "cuda" and not _core.cuda_built:
        pytest.skip("this installation was built without CUDA")
    for shape, seed, identities, step in [*CASES, ((16, 3, 256, 256), 9, list(range(16)), 3)]:
        kwargs = dict(seed=seed, identities=identities, step=step)
        cpu = philox_normal(shape, **kwargs)
        with ops.backend(backend):
            assert torch.equal(philox_normal(shape, **kwargs, device="cuda").cpu(), cpu)
            if len(shape) == 4:
                out = channels_last(shape).cuda()
                assert torch.equal(philox_normal(shape, **kwargs, out=out).cpu(), cpu)
                apart = torch.full((2 * shape[0], *shape[1:]), float("nan"), device="cuda")
                assert torch.equal(philox_normal(shape, **kwargs, out=apart[::2]).cpu(), cpu)
                assert apart[1::2].isnan().all()


@pytest.mark.gpu
def test_words_on_the_device():
    from sda_fast.kernels.philox_normal import philox_words

    arguments = dict(seed=0xFEDCBA9876543210, identities=[5, 2**40 + 3, 2**64 - 2], step=2**31 + 1)
    first_block = 2**32 - 1000
    cpp = words_cpp(3, 1000, first_block, **arguments)
    ids = torch.tensor([signed(i) for i in arguments["identities"]], device="cuda")
    out = torch.full((3, 1000, 4), -1, dtype=torch.int32, device="cuda")
    philox_words(out, ids, seed=signed(arguments["seed"]), step=arguments["step"], first_block=first_block)
    assert torch.equal(out.cpu(), cpp)
    if _core.cuda_built:
        out.fill_(-1)
        arguments["identities"], stream = ids, torch.cuda.current_stream().cuda_stream
        words_cuda(out, **arguments, first_block=first_block, stream=stream)
        assert torch.equal(out.cpu(), cpp)
