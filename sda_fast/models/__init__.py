"""The networks: ADM and DiT written for this package, timm's classifiers, diffusers' VAE, and how files are read."""

from sda_fast.models.adm import ADM, with_phase_convolutions
from sda_fast.models.checkpoints import load_adm, load_classifier, load_dit, save_checkpoint
from sda_fast.models.classifiers import Classifier, create_classifier
from sda_fast.models.dit import DiT
from sda_fast.models.vae import VAE, load_vae

__all__ = [
    "ADM",
    "VAE",
    "Classifier",
    "DiT",
    "create_classifier",
    "load_adm",
    "load_classifier",
    "load_dit",
    "load_vae",
    "save_checkpoint",
    "with_phase_convolutions",
]
