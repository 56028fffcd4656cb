"""The networks: ADM and DiT written for this package, classifiers from timm, and how their files are read."""

from sda_fast.models.adm import ADM
from sda_fast.models.checkpoints import load_adm, load_classifier, load_dit, save_checkpoint
from sda_fast.models.classifiers import Classifier, create_classifier
from sda_fast.models.dit import DiT

__all__ = [
    "ADM",
    "Classifier",
    "DiT",
    "create_classifier",
    "load_adm",
    "load_classifier",
    "load_dit",
    "save_checkpoint",
]
