"""modulate and gate_residual: agreement of the backends, independence of the batch, gradients, layouts."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from sda_fast import ops
from sda_fast.errors import SdaError
from sda_fast.ops import gate_residual, modulate
from sda_fast.reference import modulate as plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TINY = {
    torch.float32: 2e-7,
    torch.bfloat16: 1e-3,
    torch.float16: 1e-4,
}  # beside twice the plain error; of the largest |y|

# [N, T, C]: DiT's widths, odd ones, one channel, no image, no token, the largest.
SHAPES = [
    (2, 16, 72),
    (2, 5, 144),
    (1, 3, 1152),
    (3, 2, 77),
    (2, 3, 1),
    (0, 4, 8),
    (2, 0, 8),
    (1, 2, 1000),
    (1, 1, 8192),
]


def inputs(shape, dtype=torch.float32, seed=0, mean=1.0):
    """(x, y, adaLN output [N, 6 C]); the chunks of the last are what a DiT block passes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    n, _, channels = shape
    return normal(*shape) + mean, normal(*shape), normal(n, 6 * channels)


def calls(shape, dtype=torch.float32, **kwargs):
    """The operators on one set of inputs: (function, plain function, arguments)."""
    x, y, rows = inputs(shape, dtype, **kwargs)
    shift, scale, gate, *_ = rows.chunk(6, dim=1)
    return [(modulate, plain.modulate, (x, shift, scale)), (gate_residual, plain.gate_residual, (x, gate, y))]


def eager(name, arguments):
    """What a model writes in its own dtype: the plain low-precision version of the tolerance rule."""
    if name == "modulate":
        x, shift, scale = arguments
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    x, gate, y = arguments
    return x + gate[:, None] * y


def check(name, result, arguments):
    """The tolerance rule against the float64 oracle, for a result computed from these arguments."""
    oracle = getattr(plain, name)(*(argument.double() for argument in arguments))
    assert result.shape == oracle.shape
    assert result.dtype == arguments[0].dtype
    assert result.is_contiguous()
    if oracle.numel():
        allowed = 2 * (eager(name, arguments).double() - oracle).abs().max() + TINY[result.dtype] * oracle.abs().max()
        assert (result.double() - oracle).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain(dtype):
    for shape in SHAPES:
        for operator, _, arguments in calls(shape, DTYPES[dtype]):
            check(operator.__name__, operator(*arguments), arguments)


def test_triton_agrees(interpret):
    """Every shape in every dtype; gate_residual has the plain version's bits."""
    cases = [case for dtype in DTYPES.values() for shape in SHAPES for case in calls(shape, dtype)]
    results = interpret(("sda_fast.ops", operator.__name__, arguments, {}) for operator, _, arguments in cases)
    for (operator, reference, arguments), result in zip(cases, results, strict=True):
        check(operator.__name__, result, arguments)
        if operator is gate_residual:
            assert torch.equal(result, reference(*arguments))


def test_difficult_inputs(interpret):
    """Dtypes that differ, |mean| = 1e4 sigma, equal channels, values near float16's end; plain and Triton."""
    x, y, rows = inputs((2, 3, 24))
    shift, scale, gate, *_ = rows.chunk(6, dim=1)
    far, _, far_rows = inputs((2, 3, 1152), mean=1e4)
    far_shift, far_scale, *_ = far_rows.chunk(6, dim=1)
    line = torch.linspace(-1, 1, 64, dtype=torch.float16)[None]
    equal = torch.full((1, 2, 64), 3e4, dtype=torch.float16)
    large = torch.where(torch.arange(64) % 2 == 0, 6e4, -6e4).half().expand(1, 2, 64)
    cases = [
        ("modulate", (x.bfloat16(), shift.half(), scale)),
        ("gate_residual", (x, gate.half(), y.bfloat16())),
        ("modulate", (x, shift.bfloat16(), scale.bfloat16())),
        ("modulate", (large, line, line)),
        ("modulate", (far, far_shift, far_scale)),
        ("modulate", (equal, line, line)),
    ]
    for results in (
        interpret(("sda_fast.ops", *case, {}) for case in cases),
        [getattr(ops, name)(*arguments) for name, arguments in cases],
    ):
        for (name, arguments), result in zip(cases[:4], results[:4], strict=True):
            check(name, result, tuple(argument.to(result.dtype) for argument in arguments))
        oracle = plain.modulate(far.double(), far_shift.double(), far_scale.double())
        assert (results[4] - oracle).abs().max() <= 1e-2  # 1e4 has a last place of 1e-3, here times |1 + scale|
        assert torch.equal(results[5], line[:, None].expand_as(equal))


def layouts(shape):
    """(x, shift, scale, gate, y) in strides that are supported: chunks, gaps, other orders, odd addresses, repeats."""
    x, y, rows = inputs(shape)
    chunks = rows.chunk(6, dim=1)[:3]
    shift, scale, gate = (row.contiguous() for row in chunks)
    apart = torch.full((2 * shape[0], shape[1] + 1, shape[2] + 8), float("nan"))
    apart[::2, 1:, : shape[2]] = x
    offset = torch.full((y.numel() + 1,), float("nan"))
    offset[1:] = y.flatten()
    yield x, *chunks, y
    yield apart[::2, 1:, : shape[2]], shift, scale, gate, y
    yield x.transpose(0, 1).contiguous().transpose(0, 1), shift, scale, gate, offset[1:].view(shape)
    yield x, shift[:1].expand_as(shift), scale[:1].expand_as(scale), gate[:1].expand_as(gate), y


def test_layouts(interpret):
    """Whatever the strides and addresses, the bits are those of dense copies."""
    cases = []
    for shape in ((2, 3, 72), (3, 2, 13)):
        for x, shift, scale, gate, y in layouts(shape):
            cases += [("modulate", (x, shift, scale)), ("gate_residual", (x, gate, y))]
    copies = [(name, tuple(argument.contiguous() for argument in arguments)) for name, arguments in cases]
    results = interpret(("sda_fast.ops", *case, {}) for case in cases + copies)
    for result, copy in zip(results[: len(cases)], results[len(cases) :], strict=True):
        assert torch.equal(result, copy)
    for (name, arguments), (_, dense) in zip(cases, copies, strict=True):
        assert torch.equal(getattr(ops, name)(*arguments), getattr(ops, name)(*dense))


def batches(shape, order):
    """Arguments of both operators for seven images, each alone, and in another order."""
    for operator, _, (x, row, other) in calls((7, *shape)):
        yield operator, (x, row, other), None
        yield operator, (x[order], row[order], other[order]), order
        for i in range(7):
            yield operator, (x[i : i + 1], row[i : i + 1], other[i : i + 1]), torch.tensor([i])


def check_batches(run, shapes):
    cases = [case for shape in shapes for case in batches(shape, torch.tensor([6, 2, 0, 5, 1, 4, 3]))]
    whole = {}
    for (operator, _, images), result in zip(cases, run(cases), strict=True):
        if images is None:
            whole[operator] = result
        else:
            assert torch.equal(result, whole[operator][images])


def test_an_image_is_alone_in_the_world(interpret):
    shapes = [(4, 72), (3, 77)]
    check_batches(lambda cases: [operator(*arguments) for operator, arguments, _ in cases], shapes)
    check_batches(lambda cases: interpret(("sda_fast.ops", c[0].__name__, c[1], {}) for c in cases), shapes)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(threads):
    before = torch.get_num_threads()
    for operator, _, arguments in calls((5, 33, 1152)):
        try:
            torch.set_num_threads(1)
            one, again = operator(*arguments), operator(*arguments)
            torch.set_num_threads(threads)
            assert torch.equal(one, again)
            assert torch.equal(operator(*arguments), one)
        finally:
            torch.set_num_threads(before)


def test_nan_stays_where_it_is():
    for operator, _, arguments in calls((2, 3, 16)):
        arguments[0][1, 2, 5] = float("nan")
        bad = operator(*arguments).isnan()
        assert bad[1, 2, 5]
        assert bad.any(-1).sum() == 1


@pytest.mark.parametrize("operator", [modulate, gate_residual])
def test_gradients(operator):
    """Against autograd through the plain version in float64."""
    (case,) = [case for case in calls((2, 5, 24)) if case[0] is operator]
    _, reference, arguments = case
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    doubles = [argument.detach().double().requires_grad_() for argument in arguments]
    result = operator(*leaves)
    cotangent = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(result, leaves, cotangent)
    expected = torch.autograd.grad(reference(*doubles), doubles, cotangent.double())
    for ours, theirs in zip(gradients, expected, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    half = [argument.detach().bfloat16().requires_grad_() for argument in arguments]
    for ours, theirs in zip(torch.autograd.grad(operator(*half), half, cotangent.bfloat16()), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    for operator, _, arguments in calls((2, 3, 8)):
        arguments = tuple(argument.detach().clone().requires_grad_(requires_grad) for argument in arguments)
        extra = (1e-6,) if operator is modulate else ()
        torch.library.opcheck(getattr(torch.ops.sda_fast, operator.__name__).default, (*arguments, *extra))


def test_tracing_and_compiling():
    def block(x, rows, y):
        shift, scale, gate, *_ = rows.chunk(6, dim=1)
        return gate_residual(x, gate, modulate(y, shift, scale))

    x, y, rows = inputs((2, 3, 8))
    traced = make_fx(block)(x, rows, y)
    targets = {node.target for node in traced.graph.nodes}
    assert {torch.ops.sda_fast.modulate.default, torch.ops.sda_fast.gate_residual.default} <= targets
    assert torch.equal(traced(x, rows, y), block(x, rows, y))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, rows, y), block(x, rows, y))


def test_as_the_model_writes_it():
    """In place of DiT's own lines, on a block of a tiny model."""
    from sda_fast.models.dit import DiTBlock

    torch.manual_seed(0)
    block = DiTBlock(24, 2, 4.0).eval().requires_grad_(False)
    torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.2)
    x, conditioning = torch.randn(2, 5, 24), block.adaLN_modulation(torch.randn(2, 24))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = conditioning.chunk(6, dim=1)
    ours = gate_residual(x, gate_a, block.attn(modulate(x, shift_a, scale_a)))
    ours = gate_residual(ours, gate_m, block.mlp(modulate(ours, shift_m, scale_m)))
    assert torch.allclose(ours, block(x, conditioning), rtol=1e-5, atol=1e-6)


X, ROWS = torch.zeros(2, 3, 8), torch.zeros(2, 8)
MISTAKES = {
    r"x has shape \(2, 8\); pass modulate tokens \[N, T, C\]": (modulate, (ROWS, ROWS, ROWS)),
    r"C from 1 to 8192": (modulate, (torch.zeros(1, 1, 8193), torch.zeros(1, 8193), torch.zeros(1, 8193))),
    r"x has shape \(2, 3, 0\)": (gate_residual, (X[..., :0], ROWS[:, :0], X[..., :0])),
    r"shift has shape \(2, 7\); for this x pass modulate one of shape \(2, 8\)": (modulate, (X, ROWS[:, :7], ROWS)),
    r"scale has shape \(1, 8\)": (modulate, (X, ROWS, ROWS[:1])),
    r"gate has shape \(2, 3, 8\); for this x pass gate_residual one of shape \(2, 8\)": (gate_residual, (X, X, X)),
    r"y has shape \(2, 2, 8\)": (gate_residual, (X, ROWS, X[:, 1:])),
    r"x is torch.float64; pass modulate one in float32, bfloat16 or float16": (modulate, (X.double(), ROWS, ROWS)),
    r"gate is torch.int64": (gate_residual, (X, ROWS.long(), X)),
    r"shift lies on meta and x on cpu; pass both": (modulate, (X, ROWS.to("meta"), ROWS)),
    r"x has shape .* and strides .* pass x.contiguous\(\)": (modulate, (X.mT.contiguous().mT, ROWS, ROWS)),
    r"scale has shape .* and strides .* pass": (modulate, (X, ROWS, ROWS.T.contiguous().T)),
    r"y has shape .* and strides .* pass": (gate_residual, (X, ROWS, X.mT.contiguous().mT)),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    operator, arguments = MISTAKES[message]
    with pytest.raises(SdaError, match=message):
        operator(*arguments)


@pytest.mark.parametrize("name", ["cpp", "cuda"])
def test_absent_versions(name):
    with ops.backend(name), pytest.raises(SdaError, match="has only triton, plain"):
        modulate(X, ROWS, ROWS)


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles(compile_triton, capability):
    from sda_fast.kernels.modulate import compilations

    for kernel, signature, constexprs, options in compilations():
        cubin, resources = compile_triton(kernel, signature, constexprs, capability, **options)
        assert cubin.startswith(b"\x7fELF")
        assert (resources.spills, resources.stack) == (0, 0), (kernel, signature, constexprs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_device(dtype):
    for shape in [*SHAPES, (4, 256, 1152), (2, 9, 4097)]:
        for operator, reference, arguments in calls(shape, DTYPES[dtype]):
            with ops.backend("triton"):
                result, again = (operator(*(argument.cuda() for argument in arguments)).cpu() for _ in range(2))
            assert torch.equal(result, again)
            check(operator.__name__, result, arguments)
            if operator is gate_residual:
                assert torch.equal(result, reference(*arguments))


@pytest.mark.gpu
def test_alone_on_the_device():
    def run(cases):
        with ops.backend("triton"):
            return [operator(*(argument.cuda() for argument in arguments)).cpu() for operator, arguments, _ in cases]

    check_batches(run, [(4, 72), (3, 77), (256, 1152)])


def with_strides_of(t):
    """t on the device with its own strides, overlapping ones too, from where it starts in its storage."""
    elements = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    return t.as_strided((elements,), (1,)).cuda().as_strided(t.size(), t.stride(), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 3, 72), (3, 2, 13)])
def test_layouts_on_the_device(shape):
    """Strides and odd addresses kept on the way to the device: the bits are those of dense copies."""
    for tensors in layouts(shape):
        device = [with_strides_of(t) for t in tensors]
        storage = torch.empty(device[0].numel() + 1, device="cuda")
        device[0] = storage[1:].view(device[0].shape).copy_(device[0])  # four bytes off a vector
        x, shift, scale, gate, y = device
        with ops.backend("triton"):
            dense = [tensor.clone(memory_format=torch.contiguous_format) for tensor in device]
            assert torch.equal(modulate(x, shift, scale), modulate(dense[0], dense[1], dense[2]))
            assert torch.equal(gate_residual(x, gate, y), gate_residual(dense[0], dense[3], dense[4]))
