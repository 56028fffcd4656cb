import re

import pytest

from sda_fast.errors import SdaError
from sda_fast.stages.align import AlignSettings
from sda_fast.stages.config import FinetuneConfig, build, read_config

SHORTEST = """
output = "out"
target = "images"
adm = "photos:adm"
dit = "photos:dit"
classifiers = { resnet = "photos:resnet" }
"""
LONGEST = """
output = "out"
target = "images"
adm = "adm.pt"
dit = "dit.pt"
adm_preset = "imagenet256"
dit_preset = "dit-xl-2"
device = "cuda"
workers = 3

[classifiers]
a = "a.safetensors"
"b c" = "b.safetensors"

[synthesize]
respacing = "100"
cfg_scale = 4
clip = true
batch_size = 7
seed = 1
per_class = 9
classes = "imagenet"
only = ["n01440764"]

[align]
respacing = "50"
start = 25
factor = 8
scale = 3
norm = "batch"
norm_group = 4
batch_size = 8

[diffpure]
start = 75

[finetune]
recipe = "photos"
drop_path = 0.2
micro_batch = 16
stop_after = 10
seed = 5

[evaluate]
methods = ["source", "sda"]
mode = "confidence"
batch_size = 16
ablation = true
seed = 2

[evaluate.options.memo]
views = 16
"""


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return read_config(path)

    return read


def test_what_is_left_out_is_published(read):
    config = read(SHORTEST)
    assert (config.output, config.target, config.adm, config.dit) == ("out", "images", "photos:adm", "photos:dit")
    assert config.classifiers == {"resnet": "photos:resnet"}
    assert (config.device, config.workers, config.adm_preset, config.dit_preset) == ("cpu", 1, None, None)
    assert (config.synthesize.respacing, config.synthesize.cfg_scale, config.synthesize.per_class) == ("250", 1.0, 50)
    assert config.align == AlignSettings()
    assert config.diffpure == AlignSettings(projection="diffpure")
    assert config.finetune == FinetuneConfig("paper", None, None, None, 0)
    assert config.evaluate.methods == ("source", "diffpure", "dda", "sda")
    assert (config.evaluate.mode, config.evaluate.ablation) == ("sum", False)


def test_the_tables_of_studies_are_passed_over(read):
    assert read(SHORTEST + "[compare]\nmethods = []\n[ablate]\nper_class = [1]") == read(SHORTEST)


def test_everything_can_be_set(read):
    config = read(LONGEST)
    assert (config.device, config.workers, config.adm_preset, config.dit_preset) == (
        "cuda",
        3,
        "imagenet256",
        "dit-xl-2",
    )
    assert config.classifiers == {"a": "a.safetensors", "b c": "b.safetensors"}
    assert (config.synthesize.cfg_scale, config.synthesize.clip, config.synthesize.per_class) == (4.0, True, 9)
    assert (config.synthesize.classes, config.synthesize.only) == ("imagenet", ("n01440764",))
    assert isinstance(config.synthesize.cfg_scale, float)
    assert config.align == AlignSettings(
        respacing="50", start=25, factor=8, scale=3.0, norm="batch", norm_group=4, batch_size=8
    )
    assert config.diffpure == AlignSettings(projection="diffpure", start=75)
    assert config.finetune == FinetuneConfig("photos", 0.2, 16, 10, 5)
    assert config.evaluate.methods == ("source", "sda")
    assert (config.evaluate.mode, config.evaluate.batch_size, config.evaluate.ablation) == ("confidence", 16, True)
    assert (config.evaluate.seed, config.evaluate.options) == (2, {"memo": {"views": 16}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("outpt = 1\n" + SHORTEST, "run.toml: unknown key 'outpt'; did you mean output?"),
        (SHORTEST + "xyzzy = 1", "run.toml: unknown key 'xyzzy'; known are output, target, adm, "),
        (SHORTEST + "[align]\nstrat = 5", "run.toml, [align]: unknown key 'strat'; did you mean start?"),
        (SHORTEST + "[evaluate]\nmethod = []", "run.toml, [evaluate]: unknown key 'method'; did you mean methods?"),
        (SHORTEST + "align = 5", "run.toml: align must be a table of settings, not 5"),
        (SHORTEST + "diffpure = 5", "run.toml: diffpure must be a table of settings, not 5"),
        (SHORTEST.replace('target = "images"', ""), "run.toml: key 'target' is missing; add it"),
        ("", "run.toml: key 'output' is missing; add it"),
        (SHORTEST + 'workers = "two"', "run.toml: workers = 'two' is of another type; give a whole number"),
        (SHORTEST + "workers = true", "run.toml: workers = True is of another type; give a whole number"),
        (SHORTEST + "workers = 2.0", "run.toml: workers = 2.0 is of another type; give a whole number"),
        (SHORTEST + "device = 1", "run.toml: device = 1 is of another type; give a text"),
        (SHORTEST + "adm_preset = 1", "run.toml: adm_preset = 1 is of another type; give a text"),
        (SHORTEST + '[align]\nscale = "6"', "run.toml, [align]: scale = '6' is of another type; give a number"),
        (SHORTEST + "[align]\nstart = 5.5", "start = 5.5 is of another type; give a whole number"),
        (SHORTEST + '[align]\nnorm = "group"', "norm = 'group' is not known; choose from image, batch"),
        (SHORTEST + "[synthesize]\nclip = 1", "clip = 1 is of another type; give true or false"),
        (SHORTEST + '[evaluate]\nmethods = "sda"', "methods = 'sda' is of another type; give a list of texts"),
        (SHORTEST + "[evaluate]\nmethods = [1]", "methods = [1] is of another type; give a list of texts"),
        (
            SHORTEST.replace('{ resnet = "photos:resnet" }', '"photos:resnet"'),
            "classifiers = 'photos:resnet' is of another type; give a table of texts",
        ),
        (
            SHORTEST.replace('"photos:resnet"', "1"),
            "classifiers = {'resnet': 1} is of another type; give a table of texts",
        ),
        (SHORTEST + "[evaluate.options]\nviews = 2", "{'views': 2} is of another type; give a table of tables"),
        ("output = out", "run.toml is not TOML (Invalid value"),
        ("<xml/>", "run.toml is not TOML ("),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(read, text, message):
    with pytest.raises(SdaError, match=re.escape(message)) as error:
        read(text)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(SdaError, match=r"none\.toml cannot be read \(No such file or directory\): give the path"):
        read_config(tmp_path / "none.toml")
    with pytest.raises(SdaError, match=r"cannot be read \(Is a directory\)"):
        read_config(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SdaError, match=r"bytes\.toml is not TOML"):
        read_config(tmp_path / "bytes.toml")


def test_build_names_what_it_is_told():
    assert build(AlignSettings, {"start": 7}, "options") == AlignSettings(start=7)
    with pytest.raises(SdaError, match=r"^options: projection = 'x' is not known; choose from dda, diffpure"):
        build(AlignSettings, {"projection": "x"}, "options")
