"""What `sda-fast demo` runs: the whole of SDA on the testbed with the shipped weights."""

from pathlib import Path

from sda_fast.stages.align import AlignSettings
from sda_fast.stages.config import EvaluateConfig, FinetuneConfig, RunConfig, SynthesizeConfig

# A taste that takes minutes: one patch of each class under each corruption, ten synthetic images per class.
SMALL = {"per_class": 1, "synthetic": 10, "ablation": False}
FULL = {"per_class": 100, "synthetic": 100, "ablation": True}
BATCH = 28


def demo_config(
    output: str | Path, *, synthetic: int, ablation: bool, workers: int = 1, device: str = "cpu"
) -> RunConfig:
    """The settings of the demo: `synthetic` images per class, with or without the ablation of the paper's table 4."""
    return RunConfig(
        output=str(output),
        target=str(Path(output) / "target"),
        adm="photos:adm",
        dit="photos:dit",
        classifiers={"resnet": "photos:resnet", "convnext": "photos:convnext"},
        device=device,
        workers=workers,
        synthesize=SynthesizeConfig(respacing="100", clip=True, batch_size=BATCH, per_class=synthetic),
        align=AlignSettings(batch_size=BATCH),
        diffpure=AlignSettings(projection="diffpure", batch_size=BATCH),
        finetune=FinetuneConfig(recipe="photos"),
        evaluate=EvaluateConfig(ablation=ablation),
    )
