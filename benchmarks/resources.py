"""What every kernel takes on a GPU, compiled without one: registers, shared memory, spills, stack.

    python benchmarks/resources.py [--output benchmarks/results/kernels.json]

Compiles the specialisations that `compilations()` of every module in kernels/ names, those that launches at the shapes
of ADM-256 ask for (launches.py), and every file of csrc/cuda, for sm_80 and sm_90. Prints a table, writes the rows,
exits with 1 on any spill or stack frame. Without nvcc the CUDA files are named as not compiled, and the exit status is
1 too.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compilation import CAPABILITIES, ROOT, compile_cuda, compile_triton, triton_kernels
from launches import launches

COLUMNS = ("source", "sm", "function", "specialisation", "registers", "shared", "spills", "stack")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "kernels.json")
    options = parser.parse_args()
    rows = list(triton_rows())
    missing = []
    try:
        rows += cuda_rows()
    except FileNotFoundError as error:
        missing.append(f"csrc/cuda was not compiled: {error}")
    print(table(rows))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    bad = [row for row in rows if row["spills"] or row["stack"]]
    for line in [*missing, *(f"{row['source']}: {row['function']} spills on sm_{row['sm']}" for row in bad)]:
        print(line)
    sys.exit(1 if bad or missing else 0)


def triton_rows() -> Iterator[dict[str, Any]]:
    for operator, (kernel, signature, constexprs, options) in [*triton_kernels(), *launches()]:
        for capability in CAPABILITIES:
            _, resources = compile_triton(kernel, signature, constexprs, capability, **options)
            source, function, specialisation = name_of(operator, kernel, signature, constexprs, options)
            named = {"function": function, "specialisation": specialisation}
            yield {"source": source, "sm": capability, **named, **_numbers(resources)}


def name_of(
    operator: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], options: dict[str, Any]
) -> tuple[str, str, str]:
    """(source, function, specialisation) of a row."""
    dtypes = dict.fromkeys(kind.lstrip("*").split(":")[0] for kind in signature.values() if kind.startswith("*"))
    constants = [f"{name}={value}" for name, value in constexprs.items() if name.isupper()]
    absent = [f"no {name.removeprefix('p_')}" for name, value in constexprs.items() if value is None]
    # Strides and sizes as they are, a one or a multiple of 16, rather than any.
    known = any(value == 1 and not name.isupper() for name, value in constexprs.items()) or any(
        kind.endswith(":16") and not kind.startswith("*") for kind in signature.values()
    )
    words = [*dtypes, *constants, *absent, *["ADM-256"] * known, f"warps={options.get('num_warps', 4)}"]
    words += [f"registers<={options['maxnreg']}"] if "maxnreg" in options else []
    return f"kernels/{operator}.py", kernel.__name__, " ".join(words)


def cuda_rows() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            for capability in CAPABILITIES:
                for resources in compile_cuda(file, capability, Path(folder) / "kernel.o"):
                    named = {"function": resources.name, "specialisation": ""}
                    yield {"source": f"csrc/cuda/{file.name}", "sm": capability, **named, **_numbers(resources)}


def _numbers(resources: Any) -> dict[str, int]:
    return {name: value for name, value in asdict(resources).items() if name != "name"}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [COLUMNS, *([str(row[column]) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    main()
