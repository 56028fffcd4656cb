"""What a stage could not do: gathered while it goes on with the rest, written beside its results, named at the end."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sda_fast.data import shown
from sda_fast.errors import SdaError, WriteError
from sda_fast.files import write_json

FAILURES = "failures.json"
Failures = dict[str, str]  # a file's name relative to the stage's input -> one sentence: what is wrong, and the way out


def write_failures(folder: Path, failures: Mapping[str, str]) -> None:
    """Write `<folder>/failures.json`, a list of {"file", "reason"} sorted by name; without failures, remove it."""
    path = folder / FAILURES
    if failures:
        write_json([{"file": name, "reason": failures[name]} for name in sorted(failures)], path)
    else:
        path.unlink(missing_ok=True)


def read_failures(folder: str | Path) -> Failures:
    """What the latest run of a stage into this folder could not do; empty if it did everything.

    Raises SdaError for a damaged file.
    """
    path = Path(folder) / FAILURES
    try:
        return {entry["file"]: entry["reason"] for entry in json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SdaError(f"{path} cannot be read ({error}): delete it and run the stage again.") from error


def sentence(folder: str | Path, failures: Mapping[str, str]) -> str:
    """What a command says at its end: how many files failed, the first three, and where all stand."""
    first = ", ".join([shown(name) for name in sorted(failures)[:3]] + ["..."] * (len(failures) > 3))
    count = f"{len(failures)} file{'s' * (len(failures) > 1)} of the input"
    path = shown(str(Path(folder) / FAILURES))
    return f"all is done but {count} ({first}): {path} says why; mend or remove them and give the same command again"


@contextmanager
def counting_what_is_done(keys: Iterable[str], done: Callable[[str], bool]) -> Iterator[None]:
    """If the block stops because a file cannot be written, the error also says what is done and what is missing."""
    try:
        yield
    except WriteError as error:
        keys = list(keys)
        missing = [shown(key) for key in keys if not done(key)]
        names = ", ".join(missing[:3] + ["..."] * (len(missing) > 3))
        raise WriteError(
            f"{error} {len(keys) - len(missing)} of {len(keys)} images are done, {len(missing)} ({names}) are not: "
            "the same command goes on with them once they can be written."
        ) from error


def report_listing(listed: Mapping[str, str]) -> Failures:
    """What `find_images` reports, in whole sentences."""
    return {name: f"{shown(name)} {rest}." for name, rest in listed.items()}
