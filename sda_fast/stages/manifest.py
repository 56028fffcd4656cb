"""What an output folder says about itself: how a stage opens one, resumes in it, refuses to mix settings.

The folder holds one file per image under the image's key, a PNG unless the stage says otherwise, and `manifest.json`:

    {"format": 1, "stage": "align", "settings": {...}, "version": "0.1.0", "created": "2026-01-01T00:00:00",
     "finished": {"at": "2026-01-01T01:00:00", ...}}

Whatever changes a result belongs into the settings: hashes of the weights, the seed, the size of the batch.
What does not, such as the number of workers, must stay out, or it could not be changed on resuming.
"""

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from sda_fast.data.images import JPEG_SUFFIXES, SUFFIXES, shown
from sda_fast.errors import SdaError
from sda_fast.files import machine_id, temporary_name, write_json

MANIFEST = "manifest.json"
FORMAT = 1
KEYS = {"format", "stage", "settings", "version", "created"}
# What runs of every stage did before there was this setting: where a manifest does not name it, it has this value, so
# that a folder of an earlier version goes on; a name means the same in every stage. Whoever adds a setting adds its
# line; but where what runs do changed with it, as with the later settings of a recipe, there is none, and such a folder
# is refused.
BEFORE = {
    "decoder": "pillow",
    "engine": "eager",
    "precision": "fp32",
    "phase_convolutions": False,
    "winograd": False,
    "jacobian_free": False,
    "format": "png",
    "revisions": {},
}
_TEMPORARY = re.compile(r"\.sda-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-\d+\.tmp")
# No single file takes that long to write: what is older was left by a process nobody can ask about any more.
_ABANDONED_SECONDS = 24 * 3600
_PNG_ENDS = (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")  # how a file starts and ends
_JPEG_ENDS = (b"\xff\xd8\xff", b"\xff\xd9")


@dataclass(frozen=True)
class Output:
    """An opened output folder; `resumed` tells whether its manifest was there before."""

    folder: Path
    stage: str
    settings: dict[str, Any]
    resumed: bool

    def path(self, key: str, suffix: str = ".png") -> Path:
        """Where the image of this key belongs. Raises SdaError for a key that leads out of the folder."""
        if not key or PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
            raise SdaError(f"{key!r} is no place inside {self.folder}: keys are relative paths without '..'.")
        return self.folder / f"{key}{suffix}"

    def done(self, key: str, suffix: str = ".png") -> bool:
        """Whether the image of this key is there and whole: starts and ends as a file of this suffix, JPEG or PNG."""
        start, end = _JPEG_ENDS if suffix.lower() in JPEG_SUFFIXES else _PNG_ENDS
        try:
            with open(self.path(key, suffix), "rb") as file:
                if file.read(len(start)) != start:
                    return False
                file.seek(-len(end), os.SEEK_END)
                return file.read() == end
        except OSError:
            return False

    def require_no_others(self, keys: Iterable[str], way_out: str) -> None:
        """Raises SdaError if there are images in the folder that are not the PNGs of `keys`; it ends in `way_out`."""
        found = {path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES}
        if others := sorted(found - set(map(self.path, keys))):
            count, first = f"{len(others)} image{'s' * (len(others) > 1)}", others[0].relative_to(self.folder)
            held = f"{count} that these settings do not ask for, such as {shown(str(first))}"
            raise SdaError(f"{self.folder} holds {held}: {way_out}")

    def record(self, **facts: Any) -> None:
        """Note how the run went on this machine, under "execution": what no setting asked for, such as a smaller batch.

        Of several processes that record at once, the last stands.
        """
        manifest = _read(self.folder / MANIFEST)
        execution = {**manifest.get("execution", {}), **_plain(facts)}
        write_json({**manifest, "execution": execution}, self.folder / MANIFEST)

    def recorded(self) -> dict[str, Any]:
        """What was recorded so far."""
        return _read(self.folder / MANIFEST).get("execution", {})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Record what was done, such as counts, under "finished"; of several processes the last stands."""
        manifest = _read(self.folder / MANIFEST)
        write_json({**manifest, "finished": {"at": _now(), **_plain(summary)}}, self.folder / MANIFEST)


def open_output(
    folder: str | Path,
    stage: str,
    settings: Mapping[str, Any],
    *,
    resume: bool = True,
    option: str = "--output",
) -> Output:
    """Make or resume the output folder of a stage; any number of processes may open it at the same time.

    A folder that is new or empty (hidden files aside) gets a manifest. One that has a manifest is resumed if
    stage and settings are the same, compared as JSON, so tuples equal lists, and with `BEFORE` for what one does not
    name. Temporary files of processes that died are removed.

    `option` is what the error messages call the folder. Raises SdaError if the manifest differs (naming the
    first setting that does, with both values), is damaged, or exists while `resume` is false, if the folder
    holds other things, and if it cannot be written.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    wanted = _plain(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SdaError(f"{option} {folder} cannot be used ({error.strerror}): choose another one.") from error
    resumed = _holds_manifest(folder, option)
    if not resumed:
        begun = {"version": _version(), "created": _now()}
        _create(path, {"format": FORMAT, "stage": stage, "settings": wanted, **begun})
    elif not resume:
        raise SdaError(f"{option} {folder} holds results already: use another {option} or delete the folder.")
    # The process that lost the race reads what the winner wrote; so does the winner, to have one way only.
    _require_same(_read(path), stage, wanted, f"{option} {folder}", option)
    _remove_stale(folder)
    return Output(folder, stage, wanted, resumed)


def require_apart(
    output: str | Path, input: str | Path, what: str, *, named: tuple[str, str] = ("--output", "--input")
) -> None:
    """Raises SdaError if an output folder lies in the input, where a second call would take it for input too.

    what: ends "a second call would ..."; named: what the message calls the two.
    """
    if Path(output).resolve().is_relative_to(Path(input).resolve()):
        raise SdaError(f"{named[0]} {output} lies in {named[1]} {input}: a second call would {what}; move it")


def check_output(
    folder: str | Path, stage: str, settings: Callable[[], Mapping[str, Any] | None], *, option: str = "--output"
) -> Output:
    """What `open_output` would open, without making or writing anything.

    settings: called only if there is a manifest to compare with; None where they are not known yet. Raises SdaError as
    `open_output` does.
    """
    folder = Path(folder)
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if above == folder:
        resumed = _holds_manifest(folder, option)
    else:
        resumed = False
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            reason = os.strerror(errno.EACCES if above.is_dir() else errno.ENOTDIR)
            raise SdaError(f"{option} {folder} cannot be used ({reason}): choose another one.")
    wanted = settings() if resumed else None
    if wanted is not None:
        _require_same(_read(folder / MANIFEST), stage, _plain(wanted), f"{option} {folder}", option)
    return Output(folder, stage, _plain(wanted or {}), resumed)


def _holds_manifest(folder: Path, option: str) -> bool:
    """Whether a stage began in this folder. Raises SdaError if it cannot be written or holds other things."""
    try:
        foreign = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != MANIFEST)
    except OSError as error:
        raise SdaError(f"{option} {folder} cannot be used ({error.strerror}): choose another one.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SdaError(f"{option} {folder} is not writable: change its permissions or choose another one.")
    # Looked for after listing: another process may have begun since, and the manifest comes first.
    resumed = (folder / MANIFEST).exists()
    if foreign and not resumed:
        held = f"holds {foreign[0]} but no {MANIFEST}"
        raise SdaError(f"{option} {folder} {held}: use another {option} or empty the folder.")
    return resumed


def _require_same(manifest: dict[str, Any], stage: str, settings: dict[str, Any], where: str, option: str) -> None:
    way_out = f"use another {option} or delete the folder."
    if manifest["stage"] != stage:
        raise SdaError(f"{where} holds the results of {manifest['stage']!r}, not of {stage!r}: {way_out}")
    difference = _first_difference(_completed(manifest["settings"]), _completed(settings))
    if difference:
        name, old, new = difference
        raise SdaError(f"{where} was made with {name} = {old}, this run has {name} = {new}: {way_out}")


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """With what goes without saying: `BEFORE`, also in the settings that its inputs were made with."""
    result = {**settings, **{name: value for name, value in BEFORE.items() if name not in settings}}
    for name in ("input_made_with", "projection_made_with"):
        if settings.get(name):
            result[name] = _completed(settings[name])
    if kinds := settings.get("projections_made_with"):
        result["projections_made_with"] = {kind: made and _completed(made) for kind, made in kinds.items()}
    return result


def _first_difference(old: Any, new: Any, name: str = "") -> tuple[str, str, str] | None:
    """The dotted name and both values, as JSON, of the first setting that differs, in the order of `new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            full = f"{name}.{key}" if name else key
            if key not in old or key not in new:
                return full, _show(old, key), _show(new, key)
            if found := _first_difference(old[key], new[key], full):
                return found
        return None
    before, after = json.dumps(old), json.dumps(new)
    # The text tells true from 1 and finds a NaN equal to itself; beyond that, 6 is the same number as 6.0.
    same = before == after or (old == new and isinstance(old, bool) == isinstance(new, bool))
    return None if same else (name, before, after)


def _show(settings: dict[str, Any], key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "(absent)"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON; paths become text. Other objects raise TypeError: the program's mistake."""

    def text(value: object) -> str:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise TypeError(f"{value!r} has no place in a manifest")

    return json.loads(json.dumps(dict(settings), default=text))


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SdaError(f"{path} cannot be read ({error}): delete the folder or use another one.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or KEYS - manifest.keys():
        raise SdaError(f"{path} was not written by this version of sda-fast: use another folder.")
    return manifest


def _create(path: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest unless it exists by now: of processes that try at once, exactly one succeeds."""
    temporary = path.with_name(temporary_name())
    write_json(manifest, temporary)
    try:
        os.link(temporary, path)  # fails if the name is taken, unlike a rename
    except FileExistsError:
        pass
    except OSError:  # a file system without links: the last one wins, whoever differs reads so right after
        write_json(manifest, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    here = machine_id()
    for parent, _, names in os.walk(folder):
        for name in names:
            if not (match := _TEMPORARY.fullmatch(name)):
                continue
            file = Path(parent, name)
            try:
                local = match["machine"] == here
                old = time.time() - file.stat().st_mtime > _ABANDONED_SECONDS
                if old or (local and not _alive(int(match["pid"]))):
                    file.unlink()
            except OSError:  # its writer or another cleaner was faster
                continue


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's
        return True
    try:  # one that was killed but that nobody waits for, as in containers without an init, is dead too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # not Linux
        return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version() -> str:
    try:
        return version("sda-fast")
    except PackageNotFoundError:
        return "uninstalled"


def made_with(folder: str | Path) -> dict[str, Any] | None:
    """The settings that a stage made this folder with; None if no stage did. Raises SdaError for a damaged manifest."""
    path = Path(folder) / MANIFEST
    return _read(path)["settings"] if path.is_file() else None


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal. Raises SdaError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SdaError(f"{path} cannot be read ({error.strerror}): check the path.") from error


def state_sha256(state: torch.nn.Module | Mapping[str, torch.Tensor]) -> str:
    """The SHA-256, in hexadecimal, of a model's tensors: names, dtypes, shapes and bytes, sorted by name.

    Equal for equal weights wherever they lie and however they were stored, unlike the hash of a file.
    """
    tensors = state.state_dict() if isinstance(state, torch.nn.Module) else state
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
