"""What test_batches.py lets worker processes do; they import it by this name."""

import os
import signal
import time
from pathlib import Path

import torch

from sda_fast.errors import SdaError


def writer(folder: Path):
    def work(keys):
        for key in keys:
            (folder / key).write_text(str(os.getpid()))

    return work


def counting(folder: Path):
    def work(keys):
        (folder / keys[0]).write_text(str(torch.get_num_threads()))

    return work


def refusing(folder: Path):
    """Writes nothing and refuses the key "c"."""

    def work(keys):
        if "c" in keys:
            raise SdaError(f"{keys[0]} is no picture: remove it.")

    return work


def unmade(folder: Path):
    raise SdaError("these weights are torn: fetch them again.")


def dying(folder: Path):
    def work(keys):
        os.kill(os.getpid(), signal.SIGKILL)

    return work


def endless(folder: Path):
    """Writes a first file and then nothing more for ten minutes."""

    def work(keys):
        (folder / keys[0]).write_text(str(os.getpid()))
        time.sleep(600)

    return work
