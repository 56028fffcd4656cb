"""Kills align and synthesize at random moments, goes on each time, and compares the result with an undisturbed run.

    python benchmarks/kills.py [--kills 50] [--stage align synthesize] [--images 2] [--seed 0] [--output FILE]

Two processes under torchrun, on the photographs testbed (align: `--images` patches per class, clean and noisy, and one
file that is no image; synthesize: `--images` per class). Each kill is SIGKILL to one worker, both, torchrun alone or
all three: while they start, some time after so many images, while a file is being written, or after the last image; the
seed draws which. Then align's command is given again, until it ends by itself; synthesize's workers are started again
by torchrun (`--max-restarts`), unless that was killed too. At the end the folder must hold the very bytes that one
undisturbed process writes: all files, hidden ones too, and the manifest but for its times ("created", "finished.at").
This is repeated in new folders until the kills are spent.

Prints one JSON object, also into --output. Exits with 1 at the first difference. Linux only: reads /proc.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 300  # seconds for anything to happen
START = 4  # seconds from the beginning of a worker to about its first image
SMALL = ["--respacing", "20", "--batch-size", "3"]
TARGETS = {"one worker": 4, "both workers": 3, "torchrun and both workers": 2, "torchrun": 1}  # and how often
MOMENTS = {"start": 2, "image": 4, "file": 4, "last image": 1}


@dataclass(frozen=True)
class Stage:
    """options: all but the output folder. restarts: whether torchrun starts killed workers again."""

    name: str
    options: list[str]
    restarts: bool

    def command(self, output: Path) -> list[str]:
        return ["sda_fast", self.name, "--output", str(output), *self.options]


@dataclass(frozen=True)
class Kill:
    """made: images since the processes had started; left: those still to be made; torn: a file half written."""

    target: str
    made: int
    left: int
    torn: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of every stage")
    parser.add_argument("--stage", nargs="+", default=["align", "synthesize"], choices=("align", "synthesize"))
    parser.add_argument("--images", type=int, default=2, help="per class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    stages = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.stage:
            stage = make_stage(name, Path(folder), options.images)
            stages[name] = try_stage(stage, Path(folder), options.kills, random.Random(f"{name} {options.seed}"))
    identical = all(row["identical"] for row in stages.values())
    summary = {"kills": sum(row["kills"] for row in stages.values()), "identical": identical, "seed": options.seed}
    if options.output is not None:
        from sda_fast.bench.measure import environment

        summary |= environment("cpu")
    text = json.dumps({**summary, "stages": stages}, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")
    sys.exit(not identical)


def make_stage(name: str, folder: Path, images: int) -> Stage:
    if name == "synthesize":
        return Stage(name, ["--dit", "photos:dit", "--per-class", str(images), "--clip", *SMALL], restarts=True)
    from sda_fast.photos.testbed import write_testbed

    write_testbed(folder / "patches", images, ["gaussian_noise"], quiet=True)
    (folder / "patches" / "broken.png").write_bytes(b"no picture")
    options = ["--input", str(folder / "patches"), "--adm", "photos:adm", "--start", "6", *SMALL]
    return Stage(name, options, restarts=False)


def try_stage(stage: Stage, folder: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Spends the kills in one output folder after another; returns what happened, and the first difference."""
    started = time.monotonic()
    alone = folder / f"{stage.name}-alone"
    subprocess.run([sys.executable, "-P", "-m", *stage.command(alone)], stdout=subprocess.DEVNULL, stderr=sys.stderr)
    expected, images = contents(alone), len(images_in(alone))
    spent: list[Kill] = []
    commands = folders = 0
    difference = None if images else "the undisturbed run made no image"
    while len(spent) < kills and difference is None:
        out = folder / f"{stage.name}-{folders}"
        folders += 1
        commands += disturb(stage, out, images, spent, kills, draw)
        difference = first_difference(expected, contents(out))
        print(f"{stage.name}: {len(spent)} kills, {folders} folders", file=sys.stderr, flush=True)
    return {
        "command": " ".join(stage.command(folder / "output")).replace(f"{folder}/", ""),
        "kills": len(spent),
        "targets": Counter(kill.target for kill in spent),
        "before_the_first_image": sum(not kill.made for kill in spent),
        "between_images": sum(kill.made > 0 and kill.left > 0 for kill in spent),
        "after_the_last_image": sum(kill.made > 0 and not kill.left for kill in spent),
        "files_half_written": sum(kill.torn for kill in spent),
        "folders": folders,
        "images_per_folder": images,
        "resumed_by_command": commands - folders,
        "resumed_by_torchrun": len(spent) - (commands - folders),
        "seconds": round(time.monotonic() - started),
        "identical": difference is None,
        "difference": difference,
    }


def disturb(stage: Stage, out: Path, images: int, spent: list[Kill], kills: int, draw: random.Random) -> int:
    """Give the stage's command until it ends undisturbed, and add to `spent`; returns how often it was given."""
    seen: set[int] = set()
    given, again = 0, True
    while again:
        given, again = given + 1, False
        with launched(stage, out) as torchrun:
            while len(spent) < kills and not again and (kill := strike(torchrun, out, images, seen, draw)):
                spent.append(kill)
                again = not stage.restarts or kill.target.startswith("torchrun")
            torchrun.wait(PATIENCE)
    wait_until(lambda: not any(map(running, seen)))  # those that torchrun left behind end by themselves
    return given


@contextlib.contextmanager
def launched(stage: Stage, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun with the stage's command; what it says goes to <out>.log, and its own folder is <out>.torchrun."""
    options = ["--standalone", "--nproc-per-node", "2", "--log-dir", f"{out}.torchrun"]
    options += ["--max-restarts", "1000" if stage.restarts else "0"]
    command = [sys.executable, "-P", "-m", "torch.distributed.run", *options, "-m", "--", *stage.command(out)]
    with open(f"{out}.log", "ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        torchrun = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield torchrun
        finally:
            torchrun.kill()
            torchrun.wait()


def strike(
    torchrun: subprocess.Popen[bytes], out: Path, images: int, seen: set[int], draw: random.Random
) -> Kill | None:
    """Wait for workers not seen before, then kill at some moment of theirs; None if they ended before it."""
    target, moment = (draw.choices(list(names), list(names.values()))[0] for names in (TARGETS, MOMENTS))
    more, delay, which = draw.randint(1, 6), draw.random(), draw.randrange(2)

    def ended() -> bool:
        return torchrun.poll() is not None

    wait_until(lambda: len(children(torchrun.pid) - seen) == 2 or ended())
    workers = sorted(children(torchrun.pid) - seen)
    if ended():
        return None
    seen.update(workers)
    before = len(images_in(out))
    if moment == "start":
        wait_until(ended, START * delay)
    elif before == images:  # the folder is whole: these come to their end
        wait_until(ended)
    else:
        enough = images if moment == "last image" else min(before + more, images)
        wait_until(lambda: len(images_in(out)) >= enough or ended())
        if moment == "image":
            wait_until(ended, delay / 10)
        elif moment == "file":
            wait_until(lambda: temporary_files(out, workers) or ended())
    victims = {
        "one worker": [workers[which]],
        "both workers": workers,
        "torchrun and both workers": [torchrun.pid, *workers],
        "torchrun": [torchrun.pid],
    }[target]
    if not any(map(running, victims)):
        return None
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(running, victims)))
    there = len(images_in(out))
    return Kill(target, there - before, images - there, bool(temporary_files(out, victims)))


def wait_until(condition: Callable[[], object], seconds: float | None = None) -> None:
    """Return when it holds, or after `seconds`; without those, raises TimeoutError if it never does."""
    end = time.monotonic() + (PATIENCE if seconds is None else seconds)
    while not condition():
        if time.monotonic() > end:
            if seconds is None:
                raise TimeoutError(f"nothing happened in {PATIENCE} seconds")
            return
        time.sleep(0.0005)


def children(pid: int) -> set[int]:
    """Processes that this one started and that are still running."""
    found = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return {int(child) for task in found for child in task if running(int(child))}


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def names_in(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder):
        yield from (os.path.join(parent, name) for name in names)


def images_in(folder: Path) -> list[str]:
    return [name for name in names_in(folder) if name.endswith(".png")]


def temporary_files(folder: Path, writers: list[int]) -> list[str]:
    return [name for name in names_in(folder) if name.endswith(".tmp") and int(name.split("-")[-2]) in writers]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its name; the manifest without its times."""
    files = {os.path.relpath(name, folder): Path(name).read_bytes() for name in names_in(folder)}
    if "manifest.json" in files:
        manifest = json.loads(files["manifest.json"])
        del manifest["created"]
        manifest.get("finished", {}).pop("at", None)
        files["manifest.json"] = json.dumps(manifest, indent=2).encode()
    return files


def first_difference(expected: dict[str, bytes], found: dict[str, bytes]) -> str | None:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} should not be there"
        if found[name] != expected[name]:
            return f"{name} differs"
    return None


if __name__ == "__main__":
    main()
