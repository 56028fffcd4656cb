"""Schedules, the low-pass operator, samplers and the counter-based noise: the mathematics, free of any model."""

from sda_fast.diffusion.lowpass import LowPass
from sda_fast.diffusion.schedule import Schedule

__all__ = ["LowPass", "Schedule"]
