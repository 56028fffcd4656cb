"""The published algorithm, plainly written and at its published cost: parity oracle and benchmark baseline.

Nothing in here imports the rest of the package. `unet` is the ADM network, `resize` the low-pass filter,
`diffusion` the schedules and samplers, `ensembles` the combination of scores.
"""

from .diffusion import (
    Schedule,
    Step,
    ancestral,
    diffpure,
    guided_projection,
    guided_step,
    linear_schedule,
    p_sample,
    q_sample,
)
from .ensembles import MODES, combine
from .resize import low_pass, resize
from .unet import UNet

__all__ = [
    "MODES",
    "Schedule",
    "Step",
    "UNet",
    "ancestral",
    "combine",
    "diffpure",
    "guided_projection",
    "guided_step",
    "linear_schedule",
    "low_pass",
    "p_sample",
    "q_sample",
    "resize",
]
