"""The examples of the documents run as they stand there."""

import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from sda_fast import cli, ops
from sda_fast.stages.config import read_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


EXTRAS = {  # of the examples that need one: what they import of ours, the package, the extra that brings it
    "sda_fast.photos.testbed": ("imagecorruptions", "photos"),
    "sda_fast.methods.vp_sde": ("torchsde", "diffpure"),
}
PYTHON = [(path.name, code) for path in DOCUMENTS for code in blocks(path, "python")]


@pytest.mark.parametrize(("name", "code"), PYTHON, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PYTHON)])
def test_python_example(name, code, tmp_path):
    for module, (package, extra) in EXTRAS.items():
        if module in code:
            pytest.importorskip(package, reason=f'needs pip install "sda-fast[{extra}]"')
    environment = dict(os.environ)
    if "sda_fast.kernels" in code:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("torch brings no Triton on this system")
        environment["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=300, env=environment)


def test_every_operator_has_an_example_and_one_of_its_kernel_if_it_has_one():
    page = ROOT / "docs" / "operators.md"
    code = "\n".join(blocks(page, "python"))
    kernels = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    for name in set(ops.__all__) - {"BACKENDS", "backend"}:
        assert f"\n## {name}\n" in page.read_text()
        assert re.search(rf"from sda_fast.kernels.\w+ import {name}\n", code) or f"def {name}(" not in kernels
        assert re.search(rf"from sda_fast.ops import .*{name}", code)


def test_documents_have_python_examples():
    assert len(PYTHON) >= 3


def test_command_line_tour(tmp_path):
    """The commands of docs/cli.md, one after the other in one folder; blocks that name a file first write it."""
    pytest.importorskip("imagecorruptions", reason='needs pip install "sda-fast[photos]"')
    tour = ROOT / "docs" / "cli.md"
    text = tour.read_text(encoding="utf-8")
    for name, content in re.findall(r"`(\S+\.toml)`:\n\n```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(content)
    commands = [line for block in blocks(tour, "sh") for line in block.replace("\\\n", " ").splitlines() if line]
    assert len(commands) >= 8
    script = Path(sys.executable).with_name("sda-fast")
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "sda-fast", line
        done = subprocess.run([script, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


COMMAND = re.compile(r"(?:^|`)(?:torchrun .* -- sda_fast|sda-fast) ([a-z][a-z-]*)([^`\n]*)", re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_of_the_commands_shown_exist(path):
    for module in pkgutil.iter_modules(cli.__path__):  # each registers its commands
        importlib.import_module(f"sda_fast.cli.{module.name}")
    app = typer.main.get_command(cli.app.app)
    for name, arguments in COMMAND.findall(path.read_text(encoding="utf-8").replace("\\\n", " ")):
        assert name in app.commands, f"sda-fast {name}"
        options = {option for p in app.commands[name].params for option in (*p.opts, *p.secondary_opts, "--help")}
        unknown = set(re.findall(r" (--?[a-z][a-z-]*)", arguments)) - options
        assert not unknown, f"sda-fast {name} has no {', '.join(unknown)}"


def test_the_file_of_a_whole_run_of_imagenet_is_one(tmp_path):
    (block,) = blocks(ROOT / "docs" / "reproduce.md", "toml")
    (tmp_path / "run.toml").write_text(block)
    config = read_config(tmp_path / "run.toml")
    assert len(config.classifiers) == 5
    assert (config.align.start, config.synthesize.per_class, config.diffpure.projection) == (None, 50, "diffpure")


def test_every_environment_variable_is_documented():
    page = (ROOT / "docs" / "environment.md").read_text()
    ways = (r'environ(?:\.get\(|\[)"(\w+)"', r'"(\w+)" in os\.environ', r'^VARIABLE = "(\w+)"')
    sources = [*ROOT.glob("sda_fast/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    text = "\n".join(source.read_text() for source in sources)
    names = {name for way in ways for name in re.findall(way, text, re.MULTILINE)}
    assert {"SDA_FAST_BACKEND", "SDA_FAST_CACHE", "LOCAL_RANK"} <= names
    assert not {name for name in names if f"`{name}`" not in page}


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target
