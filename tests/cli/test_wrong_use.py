"""Wrong use ends with one sentence on standard error that names the culprit and the way out, and exit code 2."""

import json
import pickle
import re
import shlex

import pytest
import torch

ALIGN = "align -i {images} -o {out} --adm {adm} --respacing 10 --start 5"
SYNTHESIZE = "synthesize -o {out} --dit {dit} --per-class 1 --respacing 10"
FINETUNE = "finetune -i {images} -o {out} --model {resnet} --recipe photos"
EVALUATE = "evaluate -i {images} -o {out} --model {resnet}"

# command: what its sentence must hold
CASES = {
    # checkpoints: missing, foreign, damaged, dangerous
    f"{ALIGN} --adm {{none}}.pt": "checkpoint {none}.pt does not exist; give a file",
    f"{ALIGN} --adm photos:none": "photos:none does not ship with this package; known are",
    f"{ALIGN} --adm {{folder}}": "folder {folder} holds no diffusion_pytorch_model.safetensors, neither",
    f"{ALIGN} --adm {{resnet}}": "looks like a classifier): name a preset",
    f"{ALIGN} --adm {{dit}}": "looks like a DiT): name a preset",
    f"{ALIGN} --adm {{dit}} --preset imagenet256": "is not this ADM (",
    f"{ALIGN} --adm {{adm}} --preset imagenet": "unknown ADM preset 'imagenet'; known are",
    f"{ALIGN} --adm {{text}}.safetensors": "is damaged or not safetensors (",
    f"{ALIGN} --adm {{text}}.pt": "is damaged or holds more than tensors (",
    f"{ALIGN} --adm {{text}}.zip": "has suffix '.zip'; known are .safetensors",
    f"{ALIGN} --adm {{code}}.pt": "is damaged or holds more than tensors (",
    f"{ALIGN} --adm {{list}}.pt": "holds no state dict; give a file",
    f"{ALIGN} --adm {{conditional}}": "this ADM is class-conditional",
    f"{SYNTHESIZE} --dit {{adm}}": "looks like an ADM): name a preset",
    f"{SYNTHESIZE} --dit {{latents}}": "works on latents (4 channels)",
    f"{FINETUNE} --model {{adm}}": "does not say which timm model it holds (it looks like an ADM)",
    f"{EVALUATE} --model {{dit}}": "does not say which timm model it holds (it looks like a DiT)",
    f"{EVALUATE} --finetuned {{none}}": "checkpoint {none} does not exist",
    # folders: missing, empty, a file, of other things, not writable
    f"{ALIGN} -i {{none}}": "--input {none} does not exist: check the path",
    f"{ALIGN} -i {{empty}}": "--input {empty} holds no image",
    f"{ALIGN} -i {{text}}.pt": "--input {text}.pt is a file: give the folder",
    f"{ALIGN} -i {{twins}} --norm batch": "ant/1.jpg, which differs from ant/1.png in its suffix alone: rename one",
    f"{FINETUNE} -i {{broken}}": "broken/ant/1.png is not an image, whatever its suffix says: replace or remove it",
    f"{FINETUNE} -i {{twins}}": "ant/1.jpg, which differs from ant/1.png in its suffix alone: rename one",
    f"{ALIGN} -o {{text}}.pt": "--output {text}.pt cannot be used (",
    f"{ALIGN} -o {{text}}.pt/deep": "--output {text}.pt/deep cannot be used (",
    f"{ALIGN} -o /proc/nothing": "--output /proc/nothing cannot be used (",
    f"{ALIGN} -o {{folder}}": "--output {folder} holds ant but no manifest.json: use another --output",
    f"{ALIGN} -o {{images}}/out": "images/out lies in --input",
    f"{SYNTHESIZE} -o {{text}}.pt": "--output {text}.pt cannot be used (",
    f"{FINETUNE} -o {{text}}.pt": "--output {text}.pt cannot be used (",
    f"{FINETUNE} -i {{dogs}}": "the folder dog of {dogs}/dog/1.png is none of the 3 classes (",
    f"{FINETUNE} -i {{tinier}}": "images of 20x9 are smaller than the classifier's 16x16",
    f"{EVALUATE} -o {{text}}.pt": "--output {text}.pt cannot be used (",
    f"{EVALUATE} -i {{dogs}}": "the folder dog of {dogs}/dog/1.png is none of the 3 classes (",
    f"{EVALUATE} -i {{empty}}": "--input {empty} holds no image",
    f"{EVALUATE} --projection dda={{none}}": "--projection dda= {none} does not exist",
    f"{EVALUATE} --projection dda={{dogs}} -i {{other}}": " (cow/3.png) have no projection: align them first",
    "photos -o {text}.pt --per-class 1 --corruption fog": "--output {text}.pt cannot be used (",
    "train-photos -o {text}.pt --steps 1": "--output {text}.pt cannot be used (",
    "demo -o {text}.pt --per-class 1": "--output {text}.pt/target cannot be used (",
    # numbers out of range
    f"{ALIGN} --start 0": "start=0 is out of range",
    f"{ALIGN} --start 10": "start=10 is out of range",
    f"{ALIGN} --start -1": "start=-1 is out of range",
    f"{ALIGN} --projection diffpure --start 11": "start=11 is out of range: respacing '10' has 10 steps",
    f"{ALIGN} --factor 0": "D=0 does not divide the image size 16; choose a divisor",
    f"{ALIGN} --factor 5": "D=5 does not divide the image size 16; choose a divisor",
    f"{ALIGN} --factor 32": "D=32 does not divide the image size 16; choose a divisor",
    f"{ALIGN} --batch-size 0": "batch_size=0 is out of range",
    f"{ALIGN} --norm-group 0": "norm_group=0 is out of range",
    f"{ALIGN} --norm batch --norm-group 3": "would cut a norm group of 3",
    f"{ALIGN} --workers 0": "--workers 0 is out of range: give at least 1",
    f"{ALIGN} --respacing 0": "respacing '0': 0 is not between 1 and 1000",
    f"{ALIGN} --respacing many": "respacing 'many' is not of the form",
    f"{SYNTHESIZE} --per-class 0": "--per-class 0 is out of range: give at least 1",
    f"{SYNTHESIZE} --cfg-scale 0.5": "cfg_scale=0.5 is out of range",
    f"{SYNTHESIZE} --workers -2": "--workers -2 is out of range",
    f"{FINETUNE} --drop-path 1": "--drop-path 1.0 is out of range: give at least 0 and less than 1",
    f"{FINETUNE} --micro-batch 1": "--micro-batch 1 is out of range: give at least 2",
    f"{FINETUNE} --stop-after 16": "--stop-after 16 is out of range: the recipe has 15 epochs",
    f"{EVALUATE} --batch-size 0": "--batch-size 0 is out of range",
    "photos -o {out} --per-class 101 --corruption fog": "--per-class 101 is out of range",
    "photos -o {out} --per-class 0 --corruption fog": "--per-class 0 is out of range",
    "photos -o {out} --severity 6": "--severity 6 is out of range: 1 is the weakest, 5 the strongest",
    "train-photos -o {out} --steps 0": "--steps 0 is out of range",
    "bench --batch 0": "--batch and --repeats must be at least 1",
    "bench --repeats 0": "--batch and --repeats must be at least 1",
    "bench --whole --unguided": "--whole times projections by the shipped model: leave out --ledger, --unguided",
    "bench --whole --winograd": "winograd is an option of the inductor engine, not of eager",
    "bench --ledger --winograd": "--ledger counts direct convolutions: leave out --winograd",
    "bench --whole --profile": "--profile is of a step that is timed: leave out --ledger and --whole",
    "bench --winograd": "winograd is an option of the inductor engine, not of eager: give both or leave it out",
    "bench --whole --preset dit-xl-2-256": "--whole measures the preset photos, not 'dit-xl-2-256'",
    "bench --engine onnx --precision bf16": "the onnx engine runs fp32 on the CPU, not bf16 on cpu",
    "bench --ledger --weights {adm}": "--ledger counts, which does not depend on weights: leave out --weights",
    "bench --ledger --output {text}.pt/rows.jsonl": "rows.jsonl cannot be written (",
    # names nobody knows
    f"{ALIGN} --projection diffpure --jacobian-free": "diffpure has no guidance that could be jacobian_free",
    f"{ALIGN} --projection sdedit": "projection = 'sdedit' is not known; choose from dda, diffpure",
    f"{ALIGN} --norm group": "norm = 'group' is not known; choose from image, batch",
    f"{ALIGN} --engine turbo": "engine 'turbo' is not known; choose one of",
    f"{ALIGN} --precision fp8": "precision = 'fp8' is not known; choose from fp32, bf16, fp16",
    f"{ALIGN} --decoder turbo": "decoder = 'turbo' is not known; choose from pillow, dali, dali-gpu",
    f"{EVALUATE} --decoder turbo": "decoder 'turbo' is not known; choose from pillow, dali, dali-gpu",
    f"{ALIGN} --device abacus": "device 'abacus' cannot be used on this machine (",
    f"{SYNTHESIZE} --only dog": "class 'dog' is none of the model's 3 (",
    f"{SYNTHESIZE} --classes {{none}}": "class list {none} cannot be read (No such file or directory)",
    f"{SYNTHESIZE} --classes {{text}}.pt": "class names were given, but DiT",
    f"{SYNTHESIZE} --device cuda:99": "device 'cuda:99' cannot be used on this machine (",
    f"{FINETUNE} --recipe vit": "recipe 'vit' is not known; choose from paper, code, code-resnet, code-transformer,",
    f"{FINETUNE} --device abacus": "device 'abacus' cannot be used",
    f"{EVALUATE} --method magic": "method 'magic' is not known; choose from source",
    f"{EVALUATE} --method diffusion_tta": "diffusion_tta needs a diffusion model of kind dit: give --network dit=FILE",
    f"{EVALUATE} --network unet={{images}}": "--network unet= is not known; choose from adm, dit, vae",
    f"{EVALUATE} --network adm": "--network adm is not of the form KIND=VALUE, KIND being adm, dit or vae",
    f"{EVALUATE} --option memo=16": "--option memo=16 is not of the form METHOD.NAME=VALUE",
    f"{EVALUATE} --method memo --option memo.view=16": "method memo: got an unexpected keyword argument 'view'",
    f"{EVALUATE} --method sda --projection dda={{images}}": "sda needs a fine-tuned model: give --finetuned FILE",
    f"{EVALUATE} --method dda": "method dda needs the dda projections: give --projection dda=FOLDER",
    f"{EVALUATE} --ensemble mean": "--ensemble 'mean' is not known; choose one of sum",
    f"{EVALUATE} --projection {{images}}": "--projection {images} is not of the form dda=FOLDER",
    f"{EVALUATE} --projection dda=a --projection dda=b": "--projection dda is given twice (a and b): give one",
    f"{EVALUATE} --network adm=a --network adm=b": "--network adm is given twice (a and b): give one",
    f"{EVALUATE} --option memo.views=2 --option memo.views=3": "--option memo.views is given twice (2 and 3): give one",
    f"{EVALUATE} --projection sda={{images}}": "is not of the form dda=FOLDER or diffpure=FOLDER",
    "photos -o {out} --corruption rain": "corruption 'rain' is not known; choose from gaussian_noise",
    "train-photos -o {out} --model vit": "--model vit is not known; choose from adm, dit, resnet, convnext",
    "corrupt -i {images} -o {out} --corruption rain": "--corruption rain is not known; choose from gaussian_noise",
    "corrupt -i {images} -o {out} --severity 0": "--severity 0 is out of range",
    "corrupt -i {images} -o {out} --size 300": "--size 300 is out of range: give 32 to --resize, here 256",
    "corrupt -i {images} -o {out} --jpeg-quality 96": "--jpeg-quality 96 is out of range: give 1 to 95",
    "corrupt -i {images} -o {images}/out": "images/out lies in --input",
    "corrupt -i {images} -o {out} --corruption watermark --font {none}": "--font {none} cannot be read (",
    "bench --preset imagenet": "preset 'imagenet' is not known; choose one of photos, adm-256-uncond, dit-xl-2-256",
    "bench --engine cuda": "engine 'cuda' is not known; choose one of eager, inductor, onnx, trt",
    "bench --precision fp8": "precision 'fp8' is not known; choose one of fp32, bf16, fp16",
    "bench --weights {none}.pt": "{none}.pt",
    "demo -o {out} --per-class 0": "--per-class 0 is out of range",
    "demo -o {out} --device abacus": "device 'abacus' cannot be used",
    # the file of `run`
    "run {none}.toml": "{none}.toml cannot be read (No such file or directory)",
    "run {text}.pt": "{text}.pt is not TOML (",
    "run {toml}": "unknown key 'outptu'; did you mean output?",
}


@pytest.fixture
def places(tmp_path, tiny, write_images):
    write_images(tmp_path / "images", ["ant/1.png", "cow/2.png"])
    write_images(tmp_path / "folder", ["ant/1.png"])
    write_images(tmp_path / "other", ["cow/3.png"])
    write_images(tmp_path / "dogs", ["dog/1.png", "ant/1.png"])
    write_images(tmp_path / "tinier", ["ant/1.png", "ant/2.png"], size=(20, 9))
    write_images(tmp_path / "twins", ["ant/1.png", "ant/1.jpg"])
    for name in ("broken", "torn"):
        write_images(tmp_path / name, ["ant/2.png"])
    (tmp_path / "broken" / "ant" / "1.png").write_text("this is no picture")
    write_images(tmp_path / "torn", ["ant/1.png"], size=(64, 64))
    torn = tmp_path / "torn" / "ant" / "1.png"
    torn.write_bytes(torn.read_bytes()[:1000])
    (tmp_path / "empty").mkdir()
    for suffix in ("pt", "safetensors", "zip"):
        (tmp_path / f"text.{suffix}").write_text("neither weights nor settings\n")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(print, protocol=2))
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    (tmp_path / "run.toml").write_text('outptu = "x"\n')
    named = (
        "images",
        "folder",
        "other",
        "dogs",
        "tinier",
        "twins",
        "broken",
        "torn",
        "empty",
        "text",
        "code",
        "list",
        "none",
    )
    return {
        **{name: tmp_path / name for name in (*named, "out")},
        **{"toml": tmp_path / "run.toml", "adm": tiny.adm, "dit": tiny.dit, "resnet": tiny.resnet},
        "conditional": tiny.save("adm", "conditional", num_classes=3),
        "latents": tiny.save("dit", "latents", names=tiny.classes, in_channels=4),
    }


@pytest.mark.parametrize("command", CASES)
def test_one_sentence_and_exit_code_two(cli, places, command):
    if command.startswith(("photos -o {text}", "demo -o {text}")):
        pytest.importorskip("imagecorruptions", reason='needs pip install "sda-fast[photos]"')
    said = cli(*shlex.split(command.format(**places)), *([] if "train" in command else ["--json"]))
    assert CASES[command].format(**places) in said.err
    lines = [line for line in said.err.splitlines() if not line.startswith("== ")]  # demo and run name their stages
    assert len(lines) == 1, said.err
    assert re.fullmatch(r"sda-fast: .*[^.?][.?]", lines[0])
    assert said.code == 2
    assert said.out == ""


def test_a_question_is_not_followed_by_a_full_stop(cli, tmp_path):
    (tmp_path / "run.toml").write_text("outpt = 1\n")
    said = cli("run", tmp_path / "run.toml")
    assert said.err.endswith("unknown key 'outpt'; did you mean output?\n")
    assert (said.code, said.out) == (2, "")


def test_other_settings_on_resume(cli, places):
    first = {
        "align": f"{ALIGN} --seed 1",
        "synthesize": f"{SYNTHESIZE} --seed 1",
        "finetune": f"{FINETUNE} --seed 1",
    }
    for name, command in first.items():
        here = {**places, "out": places["out"] / name}
        assert cli(*shlex.split(command.format(**here))).code == 0
        said = cli(*shlex.split(command.replace("--seed 1", "--seed 2").format(**here)))
        assert said.code == 2
        expected = f"--output {here['out']} was made with seed = 1, this run has seed = 2: use another --output"
        assert expected in said.err
        assert said.err.count("\n") == 1
    said = cli(*shlex.split(EVALUATE.format(**{**places, "out": places["out"] / "align"})))
    assert "holds the results of 'align', not of 'evaluate'" in said.err


@pytest.mark.parametrize(
    "command", ["", "paint", "align", f"{ALIGN} --nonsense", f"{ALIGN} --start five", f"{ALIGN} --seed -1"]
)
def test_wrong_words_show_the_usage(cli, places, command):
    said = cli(*shlex.split(command.format(**places)))
    assert said.code == 2
    assert "Usage: sda-fast" in said.err + said.out
    assert "Traceback" not in said.err


def test_json_stays_json_after_a_mistake_is_mended(cli, places):
    (places["broken"] / "ant" / "1.png").unlink()
    command = ALIGN.format(**{**places, "images": places["broken"]})
    assert json.loads(cli(*shlex.split(command), "--json").out)["projected"] == 1
