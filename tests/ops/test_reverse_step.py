"""reverse_step: the plain formula, one set of bits from all backends, layouts and batches."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sda_fast import _core, ops
from sda_fast.diffusion import Schedule
from sda_fast.errors import SdaError
from sda_fast.ops.reverse_step import reverse_step
from sda_fast.reference import reverse_step as plain

SCHEDULE = Schedule.linear("100")
TABLE = SCHEDULE.step_table()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = 2.0**-23  # of the largest value, beside twice the error of the plain version
IDENTITIES = [5, 2**40 + 3, -2, 0, 9, 2**62, 1]

# What the step consists of; each is tried in every layout.
KINDS = {
    "guided": dict(learned=True, guided=True, scale=6.0),
    "guided, drawn": dict(learned=True, guided=True, drawn=True, scale=6.0),
    "joint norm, padded": dict(learned=True, guided=True, scale=6.0, norm="batch", norm_group=2, real=2),
    "fixed variance": dict(learned=False, guided=True, scale=3.0, norm_group=10),
    "guided in float32": dict(learned=True, guided=True, scale=6.0, returned=torch.float32),
    "unguided": dict(learned=True, clip=False, drawn=True),
    "unguided, fixed": dict(learned=False),
}
SHAPES = [(3, 3, 8, 8), (3, 3, 5, 7), (3, 1, 1, 1), (3, 4, 33, 35), (0, 3, 4, 4), (3, 3, 0, 4)]


def problem(shape, dtype, *, learned, guided=False, drawn=False, index=37, seed=0, device="cpu", **settings):
    """Arguments of reverse_step: (args, kwargs). `returned`: through_network's dtype, if not that of the others."""
    g = torch.Generator().manual_seed(seed)
    images, channels, *size = shape

    def normal(channels, dtype):
        return torch.randn(images, channels, *size, generator=g).to(device, dtype)

    args = (normal(channels, torch.float32), normal(channels * (1 + learned), dtype), TABLE.to(device))
    kwargs = dict(settings)
    returned = kwargs.pop("returned", dtype)
    if "real" in kwargs:
        kwargs["real"] = min(kwargs["real"], images)
    if guided:
        squares = torch.rand(images, generator=g).mul(50).to(device)
        kwargs |= dict(cotangent=normal(channels, dtype), through_network=normal(channels, returned))
        kwargs |= dict(squares=squares)
    noise = normal(channels, torch.float32)
    if drawn:
        kwargs |= dict(seed=2**63 + 5, identities=torch.tensor(IDENTITIES[:images], dtype=torch.int64, device=device))
    else:
        kwargs |= dict(noise=noise)
    return (*args, torch.tensor([index, 2**31 + 7], device=device)), kwargs


def apart(x, memory_format):
    """x as channels and images cut out of a larger tensor."""
    shape = (2 * x.shape[0], 2 * x.shape[1], *x.shape[2:])
    wide = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device).to(memory_format=memory_format)
    wide[::2, x.shape[1] :] = x
    return wide[::2, x.shape[1] :]


LAYOUTS = {
    "contiguous": lambda x, i: x,
    "channels_last": lambda x, i: x.to(memory_format=torch.channels_last),
    "apart": lambda x, i: apart(x, torch.contiguous_format),
    "apart, channels_last": lambda x, i: apart(x, torch.channels_last),
    "each in its own": lambda x, i: x.to(memory_format=torch.channels_last) if i % 2 else x,
}


def lay(layout, args, kwargs):
    """The same arguments with every image tensor in a layout."""
    x, out, *rest = args
    args = (LAYOUTS[layout](x, 0), LAYOUTS[layout](out, 1), *rest)
    images = ("noise", "cotangent", "through_network")
    changed = {name: LAYOUTS[layout](kwargs[name], i) for i, name in enumerate(images) if name in kwargs}
    return args, {**kwargs, **changed}


def poisoned(x):
    return torch.full_like(x, float("nan"))


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_plain_version(kind):
    for dtype in DTYPES:
        for shape in SHAPES:
            for index in (0, 1, 99):
                args, kwargs = problem(shape, dtype, index=index, **KINDS[kind])
                exact = plain.reverse_step(*args, **kwargs, dtype=torch.float64)
                allowed = 2 * largest(plain.reverse_step(*args, **kwargs) - exact) + TINY * largest(exact)
                for layout in LAYOUTS:
                    laid, named = lay(layout, args, kwargs)
                    result = reverse_step(*laid, **named, result=poisoned(laid[0]))
                    assert result.dtype == torch.float32
                    assert largest(result - exact) <= allowed, (dtype, shape, index, layout)


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


@pytest.mark.parametrize("norm", ["image", "batch"])
@pytest.mark.parametrize("learned", [True, False])
def test_against_the_schedule(norm, learned):
    """At every index the formula in float64 from the schedule's own tables; the last image is padding."""
    for i in range(len(SCHEDULE)):
        args, kwargs = problem((4, 3, 8, 8), torch.float32, learned=learned, guided=True, index=i, seed=i)
        x, out = (t.double() for t in args[:2])
        a, b = SCHEDULE.sqrt_recip_alphas_cumprod[i], SCHEDULE.sqrt_recipm1_alphas_cumprod[i]
        x0 = (a * x - b * out[:, :3]).clamp(-1, 1)
        mean = SCHEDULE.posterior_mean_coef1[i] * x0 + SCHEDULE.posterior_mean_coef2[i] * x
        fraction = (out[:, 3:] + 1) / 2 if learned else torch.ones(())
        low, high = SCHEDULE.posterior_log_variance_clipped[i], SCHEDULE.betas[i].log()
        sigma = (0.5 * (fraction * high + (1 - fraction) * low)).exp() if i else 0.0
        squares = kwargs["squares"].double()
        squares[3:] = 0
        norms = (2 * squares).sqrt() if norm == "image" else squares.reshape(2, 2).sum(1).sqrt().repeat_interleave(2)
        weights = torch.where(norms > 0, 1 / norms, 0.0)[:, None, None, None]
        g = a * kwargs["cotangent"].double() - b * kwargs["through_network"].double()
        expected = mean + sigma * kwargs["noise"].double() + 6.0 * weights * g
        settings = dict(scale=6.0, norm=norm, norm_group=2, real=3)
        ours, theirs = (f(*args, **kwargs, **settings).double() for f in (reverse_step, plain.reverse_step))
        assert (ours - expected).abs().max() <= 2 * (theirs - expected).abs().max() + 1e-6
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_backends_agree(interpret):
    """Triton gives the bits of C++, in every layout."""
    calls, expected = [], []
    cases = [(kind, (3, 3, 8, 8), torch.bfloat16, layout) for kind in KINDS for layout in LAYOUTS]
    cases += [("guided, drawn", shape, torch.float16, layout) for shape in SHAPES[1:] for layout in LAYOUTS]
    cases += [("guided", (3, 3, 17, 31), torch.float32, layout) for layout in LAYOUTS]
    for kind, shape, dtype, layout in cases:
        args, kwargs = lay(layout, *problem(shape, dtype, **KINDS[kind]))
        expected.append(reverse_step(*args, **kwargs))
        calls.append(("sda_fast.ops", "reverse_step", args, {**kwargs, "result": poisoned(args[0])}))
    for index in (0, 100, -1):
        args, kwargs = problem((2, 3, 4, 4), torch.float32, index=index, **KINDS["guided"])
        expected.append(reverse_step(*args, **kwargs))
        calls.append(("sda_fast.ops", "reverse_step", args, kwargs))
    for case, triton, cpp in zip([*cases, 0, 100, -1], interpret(calls), expected, strict=True):
        torch.testing.assert_close(triton, cpp, rtol=0, atol=0, equal_nan=True, msg=str(case))


def test_what_overflowed_is_not_hidden(interpret):
    """What is infinite from a network in float16 makes the image infinite, or NaN, there and nowhere else."""
    args, kwargs = problem((2, 3, 4, 4), torch.float16, **KINDS["guided"])
    kwargs["cotangent"][0, 0, 0, 0] = math.inf
    kwargs["through_network"][1, 2, 3, 3] = -math.inf
    for result in (
        reverse_step(*args, **kwargs),
        plain.reverse_step(*args, **kwargs),
        *interpret([("sda_fast.ops", "reverse_step", args, kwargs)]),
    ):
        assert not result[0, 0, 0, 0].isfinite()
        assert not result[1, 2, 3, 3].isfinite()
        assert result.isfinite().sum() == result.numel() - 2


def test_drawn_noise_is_philox_normal():
    for shape in SHAPES:
        args, kwargs = problem(shape, torch.float32, **KINDS["guided, drawn"])
        drawn = reverse_step(*args, **kwargs)
        key = dict(seed=kwargs.pop("seed"), identities=kwargs.pop("identities"))
        noise = ops.philox_normal(shape, **key, step=int(args[3][1]))
        assert torch.equal(drawn, reverse_step(*args, **kwargs, noise=noise))


def test_exponential():
    """Within 1 ulp over the whole range, through the variance of a step whose mean is zero."""
    log_variance = torch.linspace(-180, 177, 2**20).reshape(1, 1, 1024, 1024)
    table = torch.zeros(1, 8)
    table[0, 5], table[0, 6] = 1, 1  # high = 1, low = 0: sigma = exp(f / 2)
    out = torch.cat([torch.zeros_like(log_variance), 2 * log_variance - 1], dim=1)
    zero, one = torch.zeros_like(log_variance), torch.ones_like(log_variance)
    sigma = reverse_step(zero, out, table, torch.tensor([0, 0]), noise=one)
    exact = (0.5 * ((out[:, 1:] + 1) * 0.5)).double().exp()
    spacing = torch.maximum(exact, torch.tensor(2.0**-126)).float()
    spacing = spacing.nextafter(torch.tensor(math.inf)) - spacing
    finite = exact < 3.4e38
    assert ((sigma - exact).abs() <= spacing)[finite].all()
    assert sigma[~finite].isinf().all()


@pytest.mark.parametrize("backend", ["cpp", "plain"])
def test_noise_and_variance_do_not_matter_at_index_zero(backend):
    args, kwargs = problem((3, 3, 5, 7), torch.float32, index=0, **KINDS["guided"])
    with ops.backend(backend):
        clean = reverse_step(*args, **kwargs)
        kwargs["noise"][0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        args[1][1, 3:] = math.nan
        assert torch.equal(reverse_step(*args, **kwargs), clean)


def test_zero_residual_gives_no_guidance():
    args, kwargs = problem((3, 3, 5, 7), torch.float32, **KINDS["guided"])
    for norm in ("image", "batch"):
        guided = reverse_step(*args, **{**kwargs, "squares": torch.zeros(3), "norm": norm})
        assert torch.equal(guided, reverse_step(*args, noise=kwargs["noise"]))


def test_nan_spreads_and_positions_outside_give_nan():
    args, kwargs = problem((2, 3, 4, 4), torch.float32, **KINDS["guided"])
    args[0][0, 0, 0, 0] = math.nan
    result = reverse_step(*args, **kwargs)
    assert result[0, 0, 0, 0].isnan()
    assert result.isnan().sum() == 1
    for index in (-1, 100, 2**40):
        assert reverse_step(*args[:3], torch.tensor([index, 0]), **kwargs).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place(layout):
    for shape in SHAPES:
        args, kwargs = lay(layout, *problem(shape, torch.bfloat16, **KINDS["guided"]))
        x, expected = args[0], reverse_step(*args, **kwargs)
        assert reverse_step(*args, **kwargs, result=x) is x
        assert torch.equal(x, expected)


def test_result_keeps_gaps_and_layout():
    args, kwargs = problem((2, 3, 4, 6), torch.bfloat16, **KINDS["guided"])
    wide = torch.full((4, 6, 4, 6), math.nan)
    assert torch.equal(reverse_step(*args, **kwargs, result=wide[::2, 3:]), reverse_step(*args, **kwargs))
    assert wide[1::2].isnan().all()
    assert wide[:, :3].isnan().all()
    args, kwargs = lay("channels_last", args, kwargs)
    assert reverse_step(*args, **kwargs).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["guided", "guided, drawn"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_image_is_alone_in_the_world(backend, kind, layout):
    args, kwargs = lay(layout, *problem((7, 3, 9, 11), torch.bfloat16, **KINDS[kind]))
    batch = reverse_step(*args, **kwargs)

    def pick(images):
        picked = {name: t[images] if isinstance(t, torch.Tensor) else t for name, t in kwargs.items()}
        return reverse_step(args[0][images], args[1][images], *args[2:], **picked)

    order = torch.tensor([6, 2, 0, 5, 1, 4, 3])
    assert torch.equal(pick(order), batch[order])
    for i in range(7):
        assert torch.equal(pick(slice(i, i + 1))[0], batch[i])


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kind", ["guided", "guided, drawn"])
def test_threads_and_runs_do_not_matter(one_thread, kind, threads):
    args, kwargs = problem((5, 3, 131, 257), torch.bfloat16, **KINDS[kind])
    one = reverse_step(*args, **kwargs)
    torch.set_num_threads(threads)
    assert torch.equal(reverse_step(*args, **kwargs), one)
    assert torch.equal(reverse_step(*args, **kwargs), one)


def op_arguments(args, kwargs):
    given = dict(noise=None, cotangent=None, through_network=None, identities=None, seed=0, clip=True)
    given |= dict(squares=None, scale=0.0, norm="image", norm_group=1, real=len(args[0]))
    given |= kwargs
    given["seed"] -= 2**64 if given["seed"] >= 2**63 else 0
    return (*args, *given.values())


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    for layout in ("contiguous", "apart, channels_last"):
        args = op_arguments(*lay(layout, *problem((2, 3, 4, 6), torch.bfloat16, **KINDS[kind])))
        torch.library.opcheck(torch.ops.sda_fast.reverse_step.default, args)
        out = (*args, torch.empty(2, 3, 4, 6))
        torch.library.opcheck(torch.ops.sda_fast.reverse_step_out.default, out)


@pytest.mark.parametrize("kind", ["guided", "guided, drawn"])
def test_tracing_and_compiling(kind):
    args, kwargs = problem((2, 3, 4, 6), torch.bfloat16, **KINDS[kind])

    def step(x, out, position):
        return reverse_step(x, 2 * out, TABLE, position, **kwargs) + 1

    inputs = (args[0], args[1], args[3])
    expected = step(*inputs)
    traced = make_fx(step)(*inputs)
    assert any(node.target is torch.ops.sda_fast.reverse_step.default for node in traced.graph.nodes)
    assert torch.equal(traced(*inputs), expected)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), expected)
    # One graph serves every step.
    other = (args[0], args[1], torch.tensor([0, 1]))
    assert torch.equal(traced(*other), step(*other))


def images(channels=3, dtype=torch.float32, **kwargs):
    return torch.zeros(2, channels, 4, 5, dtype=dtype, **kwargs)


GUIDANCE = dict(cotangent=images(), through_network=images(), squares=torch.ones(2))
MISTAKES = {
    "x is torch.float64": dict(x=images(dtype=torch.float64)),
    "x has shape \\(3, 4, 5\\); pass reverse_step images": dict(x=torch.zeros(3, 4, 5)),
    "2\\^30": dict(x=torch.zeros(1).expand(2, 3, 2**15, 2**15)),
    "out has shape \\(2, 4, 4, 5\\)": dict(out=images(4)),
    "out is torch.float64": dict(out=images(dtype=torch.float64)),
    "noise is torch.bfloat16": dict(noise=images(dtype=torch.bfloat16)),
    "noise has shape \\(2, 6, 4, 5\\)": dict(noise=images(6)),
    "result is torch.float16": dict(result=images(dtype=torch.float16)),
    "cotangent is torch.bfloat16; .* one in float32": {
        **GUIDANCE,
        "cotangent": images(dtype=torch.bfloat16),
    },
    "through_network is torch.float16": {**GUIDANCE, "through_network": images(dtype=torch.float16)},
    "through_network has shape \\(2, 6, 4, 5\\)": {**GUIDANCE, "through_network": images(6)},
    "guidance lacks cotangent and squares": dict(through_network=images()),
    "squares has shape \\(3,\\); .* one of shape \\(2,\\)": {**GUIDANCE, "squares": torch.ones(3)},
    "noise has shape .* pass noise.contiguous\\(\\)": dict(noise=torch.zeros(2, 3, 5, 4).transpose(2, 3)),
    "out lies on meta": dict(out=images(device="meta")),
    "squares lies on meta": {**GUIDANCE, "squares": torch.ones(2, device="meta")},
    "table lies on meta": dict(table=TABLE.to("meta")),
    "table is torch.float64": dict(table=TABLE.double()),
    "table has shape \\(100, 7\\); pass reverse_step Schedule.step_table": dict(table=TABLE[:, :7]),
    "position has shape \\(1,\\)": dict(position=torch.tensor([1])),
    "position is torch.int32": dict(position=torch.tensor([1, 2], dtype=torch.int32)),
    "position lies on meta": dict(position=torch.empty(2, dtype=torch.int64, device="meta")),
    "norm is 'joint'; .* choose one of them": dict(norm="joint"),
    "norm_group is 0; choose": dict(norm_group=0),
    "real is 3; pass": dict(real=3),
    "reverse_step needs noise": dict(noise=None),
    "needs noise: give": dict(noise=None, seed=1),
    "give either noise": dict(seed=1, identities=[1, 2]),
    "seed is -1; choose": dict(noise=None, seed=-1, identities=[1, 2]),
    "one int64 per image": dict(noise=None, seed=1, identities=[1]),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    good = dict(x=images(), out=images(6), table=TABLE, position=torch.tensor([1, 2]), noise=images())
    with pytest.raises(SdaError, match=message):
        reverse_step(**{**good, **MISTAKES[message]})


@pytest.mark.parametrize("capability", [80, 90])
def test_triton_compiles(compile_triton, capability):
    from sda_fast.kernels.reverse_step import compilations

    for kernel, signature, constexprs, options in compilations():
        cubin, resources = compile_triton(kernel, signature, constexprs, capability, **options)
        assert cubin.startswith(b"\x7fELF")
        assert (resources.spills, resources.stack) == (0, 0)


@pytest.mark.parametrize("capability", [80, 90])
def test_cuda_compiles(compile_cuda, capability):
    resources = compile_cuda("reverse_step.cu", capability)
    assert (resources.spills, resources.stack) == (0, 0)


def test_cuda_emulated(emulate):
    """The CPU's bits: every kind in every layout, in place, alone, and outside of the table."""
    cases = [
        (*problem(shape, dtype, **kind), layout)
        for kind in KINDS.values()
        for shape in SHAPES
        for dtype, layout in zip(DTYPES * 2, LAYOUTS, strict=False)
    ]
    calls, expected = [], []
    for args, kwargs, layout in cases:
        laid, named = lay(layout, args, kwargs)
        calls += [(laid, {**named, "result": poisoned(laid[0])}), (laid, {**named, "result": laid[0]})]
        expected += [reverse_step(*args, **kwargs)] * 2
    (x, out, table, _), kwargs = problem((3, 3, 5, 7), torch.bfloat16, **KINDS["guided, drawn"])
    for index in (0, 99, -1, 100):
        calls.append(((x, out, table, torch.tensor([index, 3])), kwargs))
        expected.append(reverse_step(*calls[-1][0], **kwargs))
    alone = {name: value[1:2] if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    calls.append(((x[1:2], out[1:2], table, torch.tensor([99, 3])), alone))
    expected.append(expected[-3][1:2])
    results = emulate(("sda_fast.ops", "reverse_step", *call) for call in calls)
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_device(backend, kind):
    """The device gives the CPU's bits, in every layout and in place."""
    if backend == "cuda" and not _core.cuda_built:
        pytest.skip("this installation was built without CUDA")
    large = (16, 3, 256, 256)
    cases = [(shape, torch.bfloat16, layout) for shape in SHAPES for layout in ("contiguous", "apart, channels_last")]
    cases += [(large, dtype, "contiguous") for dtype in DTYPES] + [(large, torch.bfloat16, name) for name in LAYOUTS]
    for shape, dtype, layout in cases:
        cpu_args, cpu_kwargs = problem(shape, dtype, **KINDS[kind])
        cpu = reverse_step(*cpu_args, **cpu_kwargs)
        args, kwargs = lay(layout, *problem(shape, dtype, device="cuda", **KINDS[kind]))
        with ops.backend(backend):
            assert torch.equal(reverse_step(*args, **kwargs, result=poisoned(args[0])).cpu(), cpu), (shape, layout)
            assert torch.equal(reverse_step(*args, **kwargs, result=args[0]).cpu(), cpu), (shape, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_batches_and_graphs_on_the_device(backend):
    """An image alone, a captured graph, index zero and a position outside."""
    if backend == "cuda" and not _core.cuda_built:
        pytest.skip("this installation was built without CUDA")
    args, kwargs = problem((7, 3, 9, 12), torch.bfloat16, device="cuda", **KINDS["guided, drawn"])
    x, out, table, position = args
    with ops.backend(backend):
        batch = reverse_step(*args, **kwargs)
        for i in range(7):
            one = slice(i, i + 1)
            named = {name: t[one] if isinstance(t, torch.Tensor) else t for name, t in kwargs.items()}
            assert torch.equal(reverse_step(x[one], out[one], table, position, **named)[0], batch[i])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = reverse_step(*args, **kwargs)
        for index in (37, 0, 99, 100):
            position[0] = index
            graph.replay()
            expected = reverse_step(*args, **kwargs)
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
            assert result.isnan().all() == (index == 100)
