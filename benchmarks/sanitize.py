"""Every operator once at tiny shapes on the GPU under compute-sanitizer: memcheck, racecheck, initcheck, synccheck.

    python benchmarks/sanitize.py [--device cuda|cpu] [--tools memcheck,...]

The calls are the tiny cases of all `bench_<op>.py`, so no operator can be forgotten; each runs once and is not timed.
Where compute-sanitizer is not on PATH, the calls run without it, and a line says that nothing was sanitised.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--calls-only", action="store_true", help="only the calls, as they run below a sanitizer")
    options = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer")
    call_everything(options.device)  # compiles what Triton compiles, so the sanitizers need not watch it
    if options.calls_only:
        return
    if sanitizer is None or options.device == "cpu":
        reason = "it checks GPU programs only" if sanitizer else "it is not on PATH"
        print(f"SKIPPED: compute-sanitizer did not run, {reason}; nothing above was sanitised.")
        sys.exit(0 if options.device == "cpu" else 1)
    # Every tensor an allocation of its own, so that an access beside it is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = {}
    for tool in options.tools.split(","):
        # Libraries ask the driver for functions that it may not have, which memcheck would count as errors.
        quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [sanitizer, "--tool", tool, *quiet, "--error-exitcode", "9", sys.executable, __file__, "--calls-only"]
        found[tool] = subprocess.run(command, env=environment).returncode
        print(f"{tool}: {'clean' if found[tool] == 0 else f'FAILED with exit status {found[tool]}'}", flush=True)
    sys.exit(1 if any(found.values()) else 0)


def call_everything(device: str) -> None:
    for path in sorted(HERE.glob("bench_*.py")):
        for case in importlib.import_module(path.stem).cases(device, True):
            case.run()
            if device == "cuda":
                torch.cuda.synchronize()
            print(f"called {case.op} {case.backend} {case.dtype} {case.layout}", flush=True)


if __name__ == "__main__":
    main()
