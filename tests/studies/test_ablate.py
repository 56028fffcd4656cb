import json
import os

import pytest
from safetensors.torch import load_file

from sda_fast.stages.finetune import finetune
from sda_fast.studies import prepare, scoring

LABELS = [
    "Source",
    "DDA",
    "DDA, projection alone",
    "SDA",
    "SDA, projection alone",
    "SDA, not aligned",
    "SDA, 1 per class",
    "SDA, 2 per class",
    "SDA, guidance 4.0, 2 per class",
]


def test_the_papers_ablations(tmp_path, study, call, pictures, monkeypatch):
    rows = call("ablate", study)
    cells = {(row["method"], row["model"], row["corruption"]): row for row in rows}
    models = ("resnet", "convnext")
    assert cells.keys() == {(label, model, name) for label in LABELS for model in models for name in ("fog", "snow")}
    assert len(rows) == len(cells)
    assert {row["stream"] for row in rows} == {"any"}

    out = tmp_path / "out"
    synthetic = out / "synthetic"
    assert len(pictures(synthetic / "raw")) == len(pictures(synthetic / "aligned")) == 9
    assert len(pictures(synthetic / "cfg-4.0" / "aligned")) == 6
    aligned = pictures(synthetic / "aligned")
    for n in (1, 2):
        subset = synthetic / f"aligned-first-{n}"
        expected = {name: data for name, data in aligned.items() if int(name[-9:-4]) < n}
        assert pictures(subset) == expected
        assert len(expected) == 3 * n
        assert all(not os.path.isabs(os.readlink(path)) for path in subset.rglob("*.png"))
    check_fine_tuned_on_what_the_name_says(out, study)

    text = (out / "ablate" / "results.md").read_text()
    lines = {tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines() if "|" in line}
    numbers = {("DDA", "0"), ("SDA", "1"), ("SDA", "2"), ("SDA", "3")}
    guidance = {("1.0", mean(cells, "SDA, 2 per class")), ("4.0", mean(cells, "SDA, guidance 4.0, 2 per class"))}
    components = {
        ("DDA", mean(cells, "DDA")),
        ("+ conditional data synthesis", mean(cells, "SDA, not aligned")),
        ("+ unconditional alignment (SDA)", mean(cells, "SDA")),
    }
    plain = {(first, second.replace("*", "").split(" ")[0]) for first, second in lines}
    assert numbers | guidance | components <= plain
    written = json.loads((out / "ablate" / "results.json").read_text())
    assert written["rows"] == rows
    assert (out / "ablate" / "report.html").is_file()

    monkeypatch.setattr(scoring, "_see", lambda *_: pytest.fail("computed again"))
    times = {path: path.stat().st_mtime_ns for path in (*out.rglob("0*.png"), *out.rglob("*.safetensors"))}
    assert len(times) > 30
    assert call("ablate", study) == rows
    assert {path: path.stat().st_mtime_ns for path in times} == times


def mean(cells, label):
    accuracy = [row["accuracy"] for (method, model, _), row in cells.items() if (method, model) == (label, "resnet")]
    return f"{100 * sum(accuracy) / len(accuracy):.1f}"


def check_fine_tuned_on_what_the_name_says(out, study):
    """The model of "aligned-first-1" is what `finetune` makes of these images, and differs from the others."""
    source = next(line.split('"')[1] for line in study.splitlines() if line.startswith("resnet"))
    finetune(out / "synthetic" / "aligned-first-1", out / "again", source, "photos", quiet=True)
    again = load_file(out / "again" / "model.safetensors")
    found = {
        name: load_file(out / "finetuned" / name / "resnet" / "model.safetensors")
        for name in ("aligned", "raw", "aligned-first-1", "aligned-first-2", "cfg-4.0-first-2")
    }
    weights = {name: state["model.fc.weight"].numpy().tobytes() for name, state in found.items()}
    assert weights["aligned-first-1"] == again["model.fc.weight"].numpy().tobytes()
    assert len(set(weights.values())) == len(weights)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("per_class = [1, 2]", "per_class = [9]", "[ablate] asks for 9 images per class: give 1 to"),
        ("cfg_per_class = 2", "cfg_per_class = 4", "[ablate] asks for 4 images per class"),
        ("per_class = [1, 2]", "per_class = [0]", "[ablate] asks for 0 images per class"),
        ("per_class = [1, 2]", "per_class = [1.5]", "per_class = [1.5] is of another type; give a list of whole num"),
        ("[1.0, 4.0]", '["high"]', "cfg_scales = ['high'] is of another type; give a list of numbers"),
    ],
)
def test_numbers_out_of_range(tmp_path, study, call, old, new, message):
    assert message in call("ablate", study.replace(old, new), code=2)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_more_images_than_asked_for_is_refused(study, call):
    text = study.replace("cfg_scales = [1.0, 4.0]", "cfg_scales = []").replace("[1, 2]", "[]")
    call("ablate", text)
    fewer = text.replace("per_class = 3", "per_class = 2")
    assert "holds 3 images that these settings do not ask for, such as " in call("ablate", fewer, code=2)


def test_a_class_with_too_few_images_is_named(tmp_path, write_images):
    folder = write_images(tmp_path / "aligned", ["ant/0.png", "ant/1.png", "cow/0.png"])
    with pytest.raises(prepare.SdaError, match="aligned/cow holds 1 images, not 2: synthesize more"):
        prepare.first_of_each_class(folder, 2)


def test_seconds_add_up_over_calls(tmp_path, study, call):
    text = study.replace("[compare]", '[compare]\nmethods = ["dda"]')
    call("compare", text)
    stage = "project (dda)"
    seconds = tmp_path / "out" / "seconds.json"
    first = json.loads(seconds.read_text())[stage]
    assert first["images"] == 12
    call("compare", text)
    assert json.loads(seconds.read_text())[stage] == first  # nothing was made
    (tmp_path / "out" / "projected" / "dda" / "fog" / "3" / "ant" / "1.png").unlink()
    call("compare", text)
    again = json.loads(seconds.read_text())[stage]
    assert again["images"] == 13
    assert again["seconds"] > first["seconds"]
