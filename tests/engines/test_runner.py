"""Running out of memory at any step loses nothing; engines that fail say so; programs are kept by shape."""

import json
import weakref

import pytest
import torch

from sda_fast import Projector
from sda_fast.data import write_png
from sda_fast.engines import Engine
from sda_fast.engines.base import preparing
from sda_fast.engines.eager import EagerEngine, EagerProgram
from sda_fast.engines.runner import Runner
from sda_fast.engines.steps import Step
from sda_fast.errors import SdaError
from sda_fast.models import load_adm, load_dit
from sda_fast.projector import Purifier
from sda_fast.sampler import Sampler
from sda_fast.stages import batch_size as chosen
from sda_fast.stages.align import AlignSettings, align
from sda_fast.stages.synthesize import SynthesizeSettings, synthesize

SHORT = {"respacing": "6", "start": 3, "factor": 2}
IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
LABELS = [0, 1, 2, 2, 1]
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
    MemoryError(),
]


class Faulty:
    """The eager engine, but call number `at` (0, 1, ..., of all its programs) raises, and so does every call with more
    than `most` images. sizes: the batches that programs were prepared for."""

    name = "faulty"

    def __init__(self, error, at=-1, most=64):
        self.error, self.at, self.most = error, at, most
        self.calls, self.sizes = 0, []

    def prepare(self, step, example):
        self.sizes.append(len(example[0]))
        return FaultyProgram(self, EagerEngine().prepare(step, example))


class FaultyProgram:
    def __init__(self, engine, program):
        self.engine, self.program = engine, program
        self.memory_needed, self.describe = program.memory_needed, program.describe

    def run(self, *inputs):
        engine, call = self.engine, self.engine.calls
        engine.calls += 1
        if call == engine.at or len(inputs[0]) > engine.most:
            raise type(engine.error)(*engine.error.args)  # a new one: what is raised keeps its traceback
        return self.program.run(*inputs)


@pytest.fixture(scope="module")
def make(tiny):
    """make(kind, engine, batch_size) -> the images it makes, with one engine and batch size, as a function."""
    adm, dit = load_adm(tiny.adm), load_dit(tiny.dit)

    def build(kind, **options):
        if kind == "sampler":
            made = Sampler(dit, respacing="3", cfg_scale=1.5, **options)
            return made, lambda: made(LABELS)
        made = Purifier(adm, 3, "6", **options) if kind == "purifier" else Projector(adm, **SHORT, **options)
        return made, lambda: made(IMAGES)

    return build


@pytest.mark.parametrize("kind", ["projector", "purifier", "sampler"])
@pytest.mark.parametrize("at", range(6))  # two batches of three steps each
def test_no_image_is_lost_whatever_step_memory_runs_out_at(make, kind, at):
    expected = make(kind, batch_size=2)[1]()
    engine = Faulty(OUT_OF_MEMORY[at % 3], at)
    made, run = make(kind, engine=engine, batch_size=4)
    assert torch.equal(run(), expected)
    assert made.batch_size == 2
    assert torch.equal(run(), expected)  # for good
    assert engine.sizes == [4, 2]


@pytest.mark.parametrize("kind", ["projector", "purifier", "sampler"])
@pytest.mark.parametrize("batch_size", [8, None])
def test_halving_goes_on_until_a_batch_fits(make, kind, batch_size):
    engine = Faulty(OUT_OF_MEMORY[0], most=1)
    made, run = make(kind, engine=engine, batch_size=batch_size)
    assert torch.equal(run(), make(kind, batch_size=1)[1]())
    assert engine.sizes == ([8, 4, 2, 1] if batch_size else [5, 2, 1])
    assert made.batch_size == 1


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 4, 2]), (6, [6, 2]), (None, [5, 2])])
def test_norm_groups_are_never_cut(make, batch_size, sizes):
    grouped = {"norm": "batch", "norm_group": 2}
    engine = Faulty(OUT_OF_MEMORY[0], most=2)
    _, run = make("projector", engine=engine, batch_size=batch_size, **grouped)
    assert torch.equal(run(), make("projector", batch_size=2, **grouped)[1]())
    assert engine.sizes == sizes
    engine.most = 1
    with pytest.raises(SdaError, match="there is not enough memory for 2 images at a time"):
        run()


@pytest.mark.parametrize("kind", ["projector", "purifier", "sampler"])
def test_where_one_image_is_too_much_one_sentence_says_so(make, kind):
    for error in OUT_OF_MEMORY:
        _, run = make(kind, engine=Faulty(error, most=0), batch_size=2)
        with pytest.raises(SdaError, match="there is not enough memory for 1 image at a time") as raised:
            run()
        assert (type(raised.value.__cause__), raised.value.__cause__.args) == (type(error), error.args)


@pytest.mark.parametrize("kind", ["projector", "purifier", "sampler"])
def test_another_error_is_not_taken_for_it(make, kind):
    engine = Faulty(RuntimeError("an illegal memory access was encountered"), at=3)
    made, run = make(kind, engine=engine, batch_size=4)
    with pytest.raises(RuntimeError, match="illegal"):
        run()
    assert made.batch_size == 4


@pytest.mark.parametrize("kind", ["projector", "sampler"])
def test_the_tensors_of_a_failed_run_are_gone_when_its_memory_is_given_back(make, kind):
    given, checked = [], []

    class Watched(Faulty):
        def prepare(self, step, example):
            given.append(weakref.ref(example[0]))
            return super().prepare(step, example)

    made, run = make(kind, engine=Watched(OUT_OF_MEMORY[0], most=1), batch_size=4)
    forget = made.network.forget

    def check():
        made.network._programs.clear()  # the eager program keeps its example
        checked.append(given[-1]() is None)
        forget()

    made.network.forget = check
    run()
    assert checked == [True, True]


class Broken:
    """An engine whose compiler gives up."""

    name = "broken"

    def __init__(self, error):
        self.error = error

    def prepare(self, step, example):
        with preparing(self.name):
            raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("\n  no kernel for this\nstack"), "no kernel for this"), (ValueError(), "ValueError")],
)
@pytest.mark.parametrize("kind", ["projector", "purifier", "sampler"])
def test_an_engine_that_cannot_prepare_says_why_and_nothing_else_is_tried(make, kind, error, reason):
    engine: Engine = Broken(error)
    made, run = make(kind, engine=engine, batch_size=2)
    sentence = rf"the broken engine could not compile this step \({reason}\): use --engine eager, or run"
    with pytest.raises(SdaError, match=sentence) as raised:
        run()
    assert raised.value.__cause__ is error
    assert (made.batch_size, made.network.describe()) == (2, {"engine": "broken"})


def test_memory_may_run_out_while_preparing(make):
    for error in OUT_OF_MEMORY:
        with pytest.raises(SdaError, match="not enough memory for 1 image"):
            make("projector", engine=Broken(error), batch_size=2)[1]()


class Double(Step):
    inputs, outputs, precision = ("x",), ("y",), "fp32"

    def forward(self, x):
        return (2 * x,)


def test_programs_are_kept_by_shape():
    engine = Faulty(None)
    run = Runner(Double(), engine)
    assert run.describe() == {"engine": "faulty"}
    for size in (3, 1, 3, 1):
        (y,) = run(torch.ones(size, 2))
        assert torch.equal(y, torch.full((size, 2), 2.0))
    assert engine.sizes == [3, 1]
    assert run.describe()["engine"] == "eager"
    run.forget()
    run(torch.ones(1, 2))
    assert engine.sizes == [3, 1, 1]
    with pytest.raises(TypeError):
        run(torch.ones(1, 2), torch.ones(1, 2))


@pytest.fixture
def images(tmp_path, write_images):
    return write_images(tmp_path / "images", [f"{i}.png" for i in range(7)], size=(16, 16))


@pytest.fixture
def cramped(monkeypatch):
    """cramped(most): from now on the eager engine runs out of memory with more than `most` images; returns the sizes it
    is asked for."""
    run = EagerProgram.run

    def cramp(most):
        asked = []

        def fail(self, *inputs):
            asked.append(len(inputs[0]))
            if len(inputs[0]) > most:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return run(self, *inputs)

        monkeypatch.setattr(EagerProgram, "run", fail)
        return asked

    return cramp


ALIGN = {"respacing": "6", "start": 3}


def execution(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest.get("execution"), manifest["settings"]["batch_size"]


@pytest.mark.parametrize("options", [{}, {"norm": "batch", "norm_group": 2}], ids=["image", "batch"])
def test_align_records_the_smaller_batch_and_goes_on_with_it(
    tmp_path, images, tiny, pictures, monkeypatch, cramped, options
):
    settings = AlignSettings(batch_size=4, **ALIGN, **options)
    align(images, tmp_path / "small", tiny.adm, AlignSettings(batch_size=2, **ALIGN, **options))
    asked = cramped(2)
    left = iter(range(5))

    def interrupted(array, path, source):
        if next(left, None) is None:
            raise KeyboardInterrupt
        write_png(array, path, source)

    with monkeypatch.context() as patch:
        patch.setattr("sda_fast.data.writer.write_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            align(images, tmp_path / "out", tiny.adm, settings)
    assert asked[:2] == [4, 2]
    assert set(asked[1:]) == {2}
    assert execution(tmp_path / "out") == ({"batch_size": 2}, 4)
    asked.clear()
    assert align(images, tmp_path / "out", tiny.adm, settings)["projected"] >= 2
    assert set(asked) == {2}  # it need not find out again
    assert pictures(tmp_path / "out") == pictures(tmp_path / "small")
    assert execution(tmp_path / "out") == ({"batch_size": 2}, 4)


@pytest.mark.parametrize(
    ("options", "batch_size"), [({}, 4), ({"norm": "batch", "norm_group": 3}, 3), ({"projection": "diffpure"}, 4)]
)
def test_a_batch_chosen_by_memory_is_recorded(
    tmp_path, images, tiny, pictures, monkeypatch, cramped, options, batch_size
):
    monkeypatch.setattr(chosen, "affordable_batch", lambda step, engine, workers: 4)
    asked = cramped(64)
    options = {**ALIGN, **options}
    align(images, tmp_path / "auto", tiny.adm, AlignSettings(batch_size="auto", **options))
    assert set(asked) == {batch_size}
    assert execution(tmp_path / "auto") == ({"batch_size": batch_size}, "auto")
    align(images, tmp_path / "given", tiny.adm, AlignSettings(batch_size=batch_size, **options))
    assert pictures(tmp_path / "auto") == pictures(tmp_path / "given")
    # Another machine, or another moment: the run goes on as it began.
    monkeypatch.setattr(chosen, "affordable_batch", lambda step, engine, workers: 1)
    (tmp_path / "auto" / "3.png").unlink()
    asked.clear()
    align(images, tmp_path / "auto", tiny.adm, AlignSettings(batch_size="auto", **options))
    assert set(asked) == {batch_size}
    assert pictures(tmp_path / "auto") == pictures(tmp_path / "given")


def test_synthesis_in_a_batch_that_memory_chose_and_then_halved(tmp_path, tiny, pictures, monkeypatch, cramped):
    def run(folder, batch_size):
        settings = SynthesizeSettings(respacing="3", batch_size=batch_size)
        return synthesize(tmp_path / folder, tiny.dit, per_class=2, settings=settings)

    run("given", 2)
    monkeypatch.setattr(chosen, "affordable_batch", lambda step, engine, workers: 4)
    asked = cramped(2)
    run("auto", "auto")
    assert asked[0] == 4
    assert set(asked[1:]) == {2}
    assert execution(tmp_path / "auto") == ({"batch_size": 2}, "auto")
    assert pictures(tmp_path / "auto") == pictures(tmp_path / "given")
    asked.clear()
    next((tmp_path / "auto").rglob("*.png")).unlink()
    assert run("auto", "auto")["synthesized"] == 1
    assert set(asked) == {2}
    assert pictures(tmp_path / "auto") == pictures(tmp_path / "given")


def test_an_engine_that_fails_leaves_the_folder_as_it_was(tmp_path, images, tiny, pictures, monkeypatch):
    settings = AlignSettings(batch_size=4, **ALIGN)
    align(images, tmp_path / "out", tiny.adm, settings)
    before = pictures(tmp_path / "out")
    (tmp_path / "out" / "3.png").unlink()

    def prepare(self, step, example):
        return Broken(RuntimeError("no kernel")).prepare(step, example)

    with monkeypatch.context() as patch:
        patch.setattr(EagerEngine, "prepare", prepare)
        with pytest.raises(SdaError, match="could not compile this step"):
            align(images, tmp_path / "out", tiny.adm, settings)
    assert pictures(tmp_path / "out") == {name: data for name, data in before.items() if name != "3.png"}
    align(images, tmp_path / "out", tiny.adm, settings)
    assert pictures(tmp_path / "out") == before
