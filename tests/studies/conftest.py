"""A study of tiny models on eight images of two corruptions, and the command that runs it."""

import json

import pytest

IMAGES = [
    f"{group}/{name}/{i}.png" for group in ("clean", "fog/3", "snow/3") for name in ("ant", "cow") for i in (1, 2)
]


@pytest.fixture
def study(tmp_path, tiny, write_images):
    """The text of a TOML file."""
    write_images(tmp_path / "target", IMAGES, size=(20, 24))
    return f"""
output = "{tmp_path / "out"}"
target = "{tmp_path / "target"}"
adm = "{tiny.adm}"
dit = "{tiny.dit}"
[classifiers]
resnet = "{tiny.resnet}"
convnext = "{tiny.convnext}"
[synthesize]
respacing = "4"
per_class = 3
clip = true
[align]
respacing = "10"
start = 2
[diffpure]
respacing = "10"
start = 2
[finetune]
recipe = "photos"
[compare]
[compare.options]
memo = {{ views = 2 }}
diffusion_tta = {{ updates = 1, pairs = 2 }}
gda = {{ views = 2, start = 2 }}
tent = {{ steps = 2 }}
[ablate]
per_class = [1, 2]
cfg_scales = [1.0, 4.0]
cfg_per_class = 2
"""


@pytest.fixture
def call(tmp_path, cli):
    """call("compare", text, ...): what the command said, its rows among it."""

    def call(command, text, *options, code=0):
        (tmp_path / "study.toml").write_text(text)
        said = cli(command, tmp_path / "study.toml", "--json", *options)
        assert said.code == code, said.err
        return json.loads(said.out)["rows"] if code == 0 else said.err.splitlines()[-1]

    return call
