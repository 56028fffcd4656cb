"""What is set so that a GPU gives the same bits in every run, and float32; and what is left behind."""

import os
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import config as inductor_config

from sda_fast import cli
from sda_fast.engines import ClassifierStep, UnguidedStep, create_engine
from sda_fast.engines.base import arithmetic_of
from sda_fast.models import load_adm, load_classifier
from sda_fast.numerics import CUBLAS, deterministic, tf32_convolutions

CPU, GPU = torch.device("cpu"), torch.device("cuda")  # neither is touched
OFF = (False, False, True, False, False, False)
TIMED = (False, True, True, False, False, False)
HARDEST = (True, False, False, True, True, False)
LENIENT = (True, False, False, True, True, True)
WITHOUT_PRODUCTS = (True, False, False, True, False, False)


def settings():
    return (
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
        inductor_config.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@pytest.mark.parametrize(
    ("device", "workspace", "warn_only", "expected"),
    [
        (CPU, ":4096:8", False, OFF),
        (GPU, ":4096:8", False, HARDEST),
        (GPU, ":16:8", True, LENIENT),
        (GPU, "", False, WITHOUT_PRODUCTS),
        (GPU, ":4096:2:16:8", True, WITHOUT_PRODUCTS),
    ],
)
def test_inside_and_after(monkeypatch, device, workspace, warn_only, expected):
    monkeypatch.setenv(CUBLAS, workspace)
    with suppress(ValueError), deterministic(device, warn_only=warn_only):
        assert settings() == expected
        raise ValueError
    assert settings() == OFF


def test_the_strictest_wins_and_the_user_keeps_what_was_chosen(monkeypatch):
    monkeypatch.setenv(CUBLAS, ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with deterministic(GPU, warn_only=True):
        with deterministic(GPU):
            assert settings() == HARDEST
            with deterministic(GPU, warn_only=True):
                assert settings() == HARDEST
        assert settings() == LENIENT
    assert settings() == (False, True, *OFF[2:])


@pytest.mark.parametrize(("given", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_commands_let_products_be_deterministic(monkeypatch, given, expected):
    monkeypatch.setenv(CUBLAS, given or "")  # so that it is as it was, afterwards
    if given is None:
        monkeypatch.delenv(CUBLAS)
    monkeypatch.setattr("sys.argv", ["sda-fast", "--version"])
    monkeypatch.setattr("sda_fast.host_memory.keep_freed_memory", lambda: True)
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ[CUBLAS] == expected


def tf32():
    cudnn = torch.backends.cudnn
    return cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


@pytest.fixture
def restored():
    before = tf32()
    yield
    cudnn = torch.backends.cudnn
    torch.backends.fp32_precision = "none"
    cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before


@pytest.mark.parametrize("before", [True, False])
def test_float32_is_float32(restored, before):
    torch.backends.cudnn.allow_tf32 = before
    settings = tf32()
    with tf32_convolutions(CPU, allowed=not before):
        assert tf32() == settings
    with suppress(ValueError), tf32_convolutions(GPU, allowed=False):
        assert tf32() == (False, "ieee", "ieee")
        with tf32_convolutions(GPU, allowed=True):
            assert tf32() == (True, "tf32", "tf32")
        assert tf32() == (False, "ieee", "ieee")
        raise ValueError
    assert tf32() == settings


def test_float32_where_the_newer_settings_are_used(restored):
    cudnn = torch.backends.cudnn
    cudnn.allow_tf32, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = True, "tf32", "ieee"
    with tf32_convolutions(GPU, allowed=False):
        assert tf32() == (False, "ieee", "ieee")
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("tf32", "ieee")


def test_convolutions_follow_wider_settings_afterwards_too(restored):
    torch.backends.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "none"
    with tf32_convolutions(GPU, allowed=True):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    torch.backends.fp32_precision = "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_what_engines_keep_to(monkeypatch, tiny):
    monkeypatch.setenv(CUBLAS, ":4096:8")
    network = UnguidedStep(load_adm(tiny.adm))
    with arithmetic_of(network, GPU)():
        assert (settings(), tf32()[1]) == (HARDEST, "ieee")
    with arithmetic_of(network, GPU, repeatable=False)():
        assert (settings(), tf32()[1]) == (OFF, "ieee")
    with arithmetic_of(network, GPU, repeatable=False, timed=True)():
        assert (settings(), tf32()[1]) == (TIMED, "ieee")
    assert settings() == OFF
    network.precision = "bf16"
    with arithmetic_of(network, GPU)():
        assert (settings(), tf32()[1]) == (HARDEST, "tf32")
    with arithmetic_of(ClassifierStep(load_classifier(tiny.resnet), 16), GPU)():
        assert (settings(), tf32()[1]) == (LENIENT, "ieee")


class EnteredError(Exception):
    pass


@contextmanager
def entered(*arguments, **settings):
    raise EnteredError
    yield


def enters(monkeypatch, name, call):
    monkeypatch.setattr(name, entered)
    with pytest.raises(EnteredError):
        call()


def test_engines_run_inside(monkeypatch, tiny):
    step = UnguidedStep(load_adm(tiny.adm))
    example = step.example(1)
    for name in ("eager", "inductor"):
        monkeypatch.setattr(f"sda_fast.engines.{name}.arithmetic_of", lambda *arguments: entered)
        monkeypatch.setattr("sda_fast.engines.inductor.preparing", nullcontext)  # reports what it does not know
        with pytest.raises(EnteredError):
            create_engine(name).prepare(step, example).run(*example)


def test_stages_compute_inside(monkeypatch, tiny, tmp_path, write_images):
    from sda_fast.models.vae import VAE
    from sda_fast.stages.evaluate import evaluate
    from sda_fast.stages.finetune import finetune
    from sda_fast.studies import scoring

    images = write_images(tmp_path / "in", [f"{name}/0.png" for name in tiny.classes])
    enters(
        monkeypatch,
        "sda_fast.stages.evaluate.plain_float32",
        lambda: evaluate(images, tmp_path / "scores", tiny.resnet, methods=["source"]),
    )
    enters(
        monkeypatch,
        "sda_fast.stages.training.deterministic",
        lambda: finetune(images, tmp_path / "finetuned", tiny.resnet),
    )
    method = SimpleNamespace(reset=lambda: None)
    shown = torch.zeros(1, 3, 16, 16), None, [None]
    enters(
        monkeypatch,
        "sda_fast.studies.scoring.plain_float32",
        lambda: scoring._see(method, [[["a"]]], lambda batch: shown, {"a": 0}, {}, None, "cpu"),
    )
    vae = VAE(SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0)))
    enters(monkeypatch, "sda_fast.models.vae.plain_float32", lambda: vae.decode(torch.zeros(1, 4, 2, 2)))
    enters(monkeypatch, "sda_fast.models.vae.plain_float32", lambda: vae.encode(torch.zeros(1, 3, 16, 16)))
