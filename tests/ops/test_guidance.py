"""guidance: every version against float64, the adjoint, the original's numbers, and dependence on one image alone."""

import pytest
import torch
from lowpasses import (
    CASES,
    CONTIGUOUS,
    LARGER,
    LAST,
    TINY,
    Sizes,
    arguments,
    assert_as_good_as_plain,
    assert_same,
    draw,
    matrices,
    relative,
)

from sda_fast import _core, ops
from sda_fast.diffusion import LowPass
from sda_fast.diffusion.schedule import STEP_COLUMNS
from sda_fast.ops._checks import COLUMNS
from sda_fast.ops.guidance import guidance


def triton_call(args, **kwargs):
    return "sda_fast.ops", "guidance", args, {"return_x0": True, **kwargs}


# For the CUDA version, whose tiles and shared memory depend on the size.
BIG = [
    Sizes(2, 3, 6, 256, 4),
    Sizes(2, 3, 6, 256, 4, torch.bfloat16, LAST, LAST),
    Sizes(1, 3, 3, 256, 1),
    Sizes(2, 3, 3, 512, 8, torch.float16, out_format=LAST),
    Sizes(1, 3, 3, 512, 1, out_format=LAST),
    Sizes(2, 3, 3, 128, 2, out_format=LAST),  # shared memory just below what needs no asking
]


@pytest.mark.parametrize("sizes", [*CASES, *LARGER])
def test_cpp(sizes):
    args = arguments(sizes)
    results = guidance(*args, return_x0=True)
    assert_as_good_as_plain(results, args)
    without = guidance(*args)
    assert len(without) == 2
    assert all(torch.equal(a, b) for a, b in zip(without, results[:2], strict=True))
    with ops.backend("plain"):
        assert_as_good_as_plain(guidance(*args, return_x0=True), args)


def test_triton(interpret):
    """Parity on all cases; then, in the same interpreter, other batches, and repetition on poisoned outputs."""
    cases = [arguments(sizes) for sizes in CASES]
    batch = arguments(Sizes(7, 1, 1, 4, 2))
    poisoned = (*(torch.full(shape, float("nan")) for shape in ((7, 1, 4, 4), (7,), (7, 1, 4, 4))), *batch)
    calls = [triton_call(args) for args in cases]
    calls += [triton_call(batch), *(triton_call(chosen(batch, rows)) for rows in ROWS)]
    calls += [("sda_fast.kernels.guidance", "guidance", poisoned, {})]
    *results, filled = interpret(calls)
    for args, result in zip(cases, results, strict=False):
        assert_as_good_as_plain(result, args)
    whole, *others = results[len(cases) :]
    for rows, other in zip(ROWS, others, strict=True):
        assert_same(other, [result[rows] for result in whole])
    assert torch.equal(filled, whole[0])


def test_cuda_emulated(emulate):
    """Parity, other batches, slices, zero and NaN."""
    cases = [arguments(sizes) for sizes in [*CASES, *LARGER, *BIG]]
    batch = arguments(Sizes(7, 3, 6, 64, 4, out_format=LAST))
    x, out, *rest = arguments(Sizes(2, 3, 6, 32, 4))
    nan = x.clone()
    nan[0, 1, 5, 9] = float("nan")
    others = [
        batch,
        *(chosen(batch, rows) for rows in ROWS),
        (x, out, *rest),
        (x, out[:, :3], *rest),
        (nan, out, *rest),
        only_x(torch.zeros(2, 3, 16, 16), 4),
    ]
    results = emulate(("sda_fast.ops", "guidance", args, {"return_x0": True}) for args in [*cases, *others])
    for args, result in zip(cases, results, strict=False):
        assert_as_good_as_plain(result, args)
    whole, *parts, full, cut, of_nan, zero = results[len(cases) :]
    for rows, part in zip(ROWS, parts, strict=True):
        assert_same(part, [result[rows] for result in whole])
    assert_same(cut, full)
    assert of_nan[1].isnan().tolist() == [True, False]
    assert not zero[0].any()
    assert not zero[1].any()


ROWS = [[0], [6], [6, 2, 0, 5, 1, 4, 3]]


def chosen(args, rows):
    """The arguments of a batch of only these images."""
    return tuple(a[rows] for a in args[:3]) + tuple(args[3:])


@pytest.mark.parametrize("out_format", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("rows", ROWS)
def test_an_image_is_alone_in_the_world(one_thread, backend, rows, out_format):
    args = arguments(Sizes(7, 3, 6, 64, 4, out_format=out_format))
    whole = guidance(*args, return_x0=True)
    assert_same(guidance(*args, return_x0=True), whole)
    part = chosen(args, rows)
    part = (part[0], part[1].contiguous(memory_format=out_format), *part[2:])
    assert_same(guidance(*part, return_x0=True), [result[rows] for result in whole])


@pytest.mark.parametrize("out_format", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(one_thread, threads, out_format):
    args = arguments(Sizes(3, 3, 3, 160, 4, out_format=out_format))
    one = guidance(*args, return_x0=True)
    torch.set_num_threads(threads)
    assert_same(guidance(*args, return_x0=True), one)


@pytest.mark.parametrize("x_format", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("out_format", [CONTIGUOUS, LAST])
def test_layouts_and_slices_are_read_in_place(x_format, out_format):
    sizes = Sizes(2, 3, 6, 32, 4, x_format=x_format, out_format=out_format)
    x, out, *rest = arguments(sizes)
    expected = guidance(x, out[:, :3].contiguous(memory_format=out_format), *rest, return_x0=True)
    apart = torch.full((4, 6, 32, 32), float("nan")).to(memory_format=out_format)
    apart[::2] = out
    wide = torch.full((2, 5, 32, 32), float("nan")).to(memory_format=x_format)
    wide[:, 1:4] = x
    for x_, out_ in ((x, out), (x, out[:, :3]), (x, apart[::2]), (wide[:, 1:4], out)):
        assert_same(guidance(x_, out_, *rest, return_x0=True), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e5])
def test_half_precision_is_the_rounded_float32(dtype, scale):
    """Denormals and what overflows included."""
    x, out, reference_down, *rest = arguments(Sizes(2, 3, 6, 32, 4, dtype))
    half = guidance(0 * x, 0 * out, scale * reference_down, *rest)
    full = guidance(0 * x, 0 * out.float(), scale * reference_down, *rest)
    assert torch.equal(half[0], full[0].to(dtype))
    assert torch.equal(half[1], full[1])


def test_every_output_is_written():
    args = arguments(Sizes(2, 3, 6, 20, 5, x_format=LAST))
    x, out, reference_down, down, gram, table, position = args
    cotangent, squares, x0 = torch.full_like(x, float("nan")).contiguous(), torch.full((2,), float("nan")), 0 * x / 0
    tensors = _core.GuidanceTensors(
        images=2,
        channels=3,
        size=20,
        low=4,
        dtype=_core.float32,
        interleaved=False,
        x=x.data_ptr(),
        x_strides=_core.ImageStrides(*x.stride()),
        out=out.data_ptr(),
        out_strides=_core.ImageStrides(*out.stride()),
        reference_down=reference_down.data_ptr(),
        down=down.data_ptr(),
        gram=gram.data_ptr(),
        table=table.data_ptr(),
        steps=len(table),
        position=position.data_ptr(),
        cotangent=cotangent.data_ptr(),
        squares=squares.data_ptr(),
        x0=x0.data_ptr(),
        x0_strides=_core.ImageStrides(*x0.stride()),
    )
    workspace = torch.full((_core.guidance_cpu_workspace(tensors, 1),), 255, dtype=torch.uint8)
    _core.guidance_cpu(tensors, workspace.data_ptr(), 1)
    assert_same((cotangent, squares, x0), guidance(*args, return_x0=True))


def only_x(x, factor, a=1.0):
    """Arguments for raw = a x and a reference of zero."""
    table = torch.tensor([[a, *[0.0] * (COLUMNS - 1)]])
    m = x.shape[2] // factor
    return (
        x,
        torch.zeros_like(x),
        x.new_zeros(*x.shape[:2], m, m),
        *matrices(x.shape[2], factor),
        table,
        torch.zeros(2).long(),
    )


@pytest.mark.parametrize(("size", "factor"), [(32, 4), (45, 5), (24, 1), (64, 16)])
def test_the_cotangent_is_the_adjoint_of_the_residual(size, factor):
    """With phi(d) = -phi(v): cotangent(v) = -phi^T phi v, so <phi v, phi w> = -<cotangent(v), w>."""
    v, w = (draw(2, 3, size, size, seed=seed).clamp(-1, 1) for seed in (0, 1))
    cotangent, squares = guidance(*only_x(v, factor))
    phi = LowPass(size, factor)
    phi_v, phi_w = phi(v.double()), phi(w.double())
    scale = float(phi_v.norm() * phi_w.norm())
    at_the_edge = guidance(*only_x(v, factor, a=2.0))[0] == 0  # |v| > 1/2
    assert at_the_edge.any()
    assert abs(float((phi_v * phi_w).sum() + (cotangent.double() * w.double()).sum())) <= TINY * scale
    assert relative(squares, phi_v.square().sum((1, 2, 3))) <= TINY


@pytest.mark.parametrize(("size", "factor"), [(32, 2), (32, 4), (64, 8), (256, 4), (256, 32)])
def test_the_original_gradient(load_reference, size, factor):
    """The gradient of the norm does not feel a common scale of x and reference, which brings x into [-1, 1]."""
    tensors, _ = load_reference("lowpass")
    prefix = f"size{size}_factor{factor}/"
    case = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    scale = 0.99 / float(case["x"].abs().max())
    x, out, _, down, gram, table, position = only_x(case["x"], factor, a=scale)
    reference_down = scale * (down @ case["reference"] @ down.T)
    cotangent, squares = guidance(x, out, reference_down, down, gram, table, position)
    norm = squares.sum().sqrt()
    assert relative(norm / scale, case["norm"].double()) <= 1e-5
    assert relative(-cotangent / norm, case["grad_x"].double()) <= 1e-5


def test_without_a_residual_everything_is_zero():
    args = only_x(torch.zeros(2, 3, 16, 16), 4)
    for backend in ("cpp", "plain"):
        with ops.backend(backend):
            cotangent, squares = guidance(*args)
        assert not cotangent.any()
        assert not squares.any()


@pytest.mark.parametrize("backend", ["cpp", "plain"])
def test_the_edges_of_the_clamp_belong_to_it(backend):
    values = torch.tensor([-1.0, 1.0, -1.0000001, 1.0000001, -(1 - 2**-24), 5.0, -float("inf"), 0.0])
    args = only_x(values.repeat(1, 1, 8, 1), 2)
    with ops.backend(backend):
        cotangent, squares, x0 = guidance(*args, return_x0=True)
    assert torch.equal((cotangent != 0)[0, 0, 3], torch.tensor([1, 1, 0, 0, 1, 0, 0, 1]).bool())
    assert torch.equal(x0, values.repeat(1, 1, 8, 1).clamp(-1, 1))
    assert squares.isfinite().all()


@pytest.mark.parametrize("backend", ["cpp", "plain"])
@pytest.mark.parametrize("where", [(0, 0), (5, 9), (15, 15)])
def test_nan_is_not_hidden(backend, where):
    x, *rest = arguments(Sizes(2, 3, 6, 16, 4))
    x[(0, 1, *where)] = float("nan")
    with ops.backend(backend):
        _, squares = guidance(x, *rest)
    assert squares.isnan().tolist() == [True, False]


def test_the_bands():
    """All that is not zero in LowPass's matrices lies where the operators look."""
    assert len(STEP_COLUMNS) == COLUMNS
    for factor in range(1, 17):
        for low in (1, 2, 3, 4, 7, 16, 32):
            down, gram = matrices(low * factor, factor)
            row, column = down.nonzero(as_tuple=True)
            tap = column - (factor * row - 3 * factor // 2)
            assert tap.min() >= 0
            assert tap.max() < 4 * factor
            row, column = gram.nonzero(as_tuple=True)
            assert (row - column).abs().max() <= 3


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles(compile_triton, capability):
    from sda_fast.kernels.guidance import compilations

    for kernel, signature, constexprs, options in compilations():
        cubin, resources = compile_triton(kernel, signature, constexprs, capability, **options)
        assert cubin.startswith(b"\x7fELF")
        assert (resources.spills, resources.stack) == (0, 0), (kernel.__name__, constexprs)


@pytest.mark.parametrize("capability", [80, 90])
def test_cuda_compiles(compile_cuda, capability):
    resources = compile_cuda("guidance.cu", capability)
    assert (resources.spills, resources.stack) == (0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_the_device(backend):
    """Parity, repetition, other batches, slices, zero and NaN, as above."""
    if backend == "cuda" and not _core.cuda_built:
        pytest.skip("this installation was built without CUDA")

    def run(args, **kwargs):
        with ops.backend(backend):
            return [r.cpu() for r in guidance(*(a.cuda() for a in args), return_x0=True, **kwargs)]

    for sizes in [*CASES, *LARGER, *BIG]:
        args = arguments(sizes)
        assert_as_good_as_plain(run(args), args)
    for out_format in (CONTIGUOUS, LAST):
        args = arguments(Sizes(7, 3, 6, 64, 4, out_format=out_format))
        whole = run(args)
        assert_same(run(args), whole)
        for rows in ROWS:
            part = chosen(args, rows)
            part = (part[0], part[1].contiguous(memory_format=out_format), *part[2:])
            assert_same(run(part), [result[rows] for result in whole])
    x, out, *rest = (a.cuda() for a in arguments(Sizes(2, 3, 6, 32, 4)))
    with ops.backend(backend):
        assert_same(guidance(x, out[:, :3], *rest), guidance(x, out, *rest))
        x[0, 1, 5, 9] = float("nan")
        assert guidance(x, out, *rest)[1].isnan().tolist() == [True, False]
    cotangent, squares, _ = run(only_x(torch.zeros(2, 3, 16, 16), 4))
    assert not cotangent.any()
    assert not squares.any()


@pytest.mark.gpu
def test_rows_beyond_shared_memory_on_the_device():
    args = arguments(Sizes(1, 1, 1, 2500, 4))
    assert_as_good_as_plain([r.cpu() for r in guidance(*(a.cuda() for a in args), return_x0=True)], args)
