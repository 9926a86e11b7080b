"""Files that a model names for its weights: found safely, measured, and checked against a hash."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

from ..errors import ModelError


def resolve(model: Path, location: str) -> Path:
    """The real path of the file that `model` names as `location`, relative to its own folder.

    The name must stay inside the model's folder, and so must the file it leads to, or inside
    the folder where the model file really lies: in a hub cache both are links into `blobs/`.
    Raises ModelError for a path that escapes, or is not a regular file.
    """
    escapes = ModelError(
        f"{model}: the weights file {location!r} lies outside the model's folder; "
        "refused, because a model must not read other files of this machine"
    )
    relative = Path(os.path.normpath(location.replace("\\", "/")))
    if "\0" in location or PureWindowsPath(location).anchor or ".." in relative.parts:
        raise escapes
    real = Path(os.path.realpath(model.parent / relative))
    allowed = (os.path.realpath(model.parent), os.path.dirname(os.path.realpath(model)))
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise escapes
    if not real.exists():
        raise ModelError(f"{model}: its weights file {location!r} is missing; fetch it as well")
    if not stat.S_ISREG(real.stat().st_mode):
        raise ModelError(f"{model}: its weights file {location!r} is not a regular file")
    return real


class ExternalFiles:
    """The external data of one ONNX model; each file is hashed at most once."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._digests: dict[Path, str] = {}

    def locate(self, tensor: str, entries: Mapping[str, str], nbytes: int) -> tuple[Path, int]:
        """The file and offset of `tensor`'s `nbytes` bytes, from its external_data entries.

        The keys are those of ONNX's ExternalData.md: location, offset, length, checksum (SHA1 of
        the whole file, hexadecimal). Raises ModelError when the file cannot hold the tensor.
        """
        where = f"{self.model}: external data of {tensor!r}"
        if not entries.get("location"):
            raise ModelError(f"{where} names no location")
        file = resolve(self.model, entries["location"])
        offset = _number(where, entries, "offset", 0)
        length = _number(where, entries, "length", nbytes)
        if length != nbytes:
            raise ModelError(f"{where} has {length} bytes; its shape and type need {nbytes}")
        size = file.stat().st_size
        if offset + length > size:
            raise ModelError(
                f"{where} ends at byte {offset + length}, but {entries['location']!r} has only "
                f"{size} bytes; the file is truncated, fetch it again"
            )
        self._verify(where, file, entries.get("checksum", ""))
        return file, offset

    def _verify(self, where: str, file: Path, checksum: str) -> None:
        if not checksum:
            return
        if file not in self._digests:
            with file.open("rb") as stream:
                self._digests[file] = hashlib.file_digest(stream, "sha1").hexdigest()
        if self._digests[file] != checksum.lower():
            raise ModelError(
                f"{where}: the SHA1 of {file.name!r} is {self._digests[file]}, the model says "
                f"{checksum}; the file is damaged or of another version, fetch it again"
            )


def _number(where: str, entries: Mapping[str, str], key: str, default: int) -> int:
    text = entries.get(key, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(f"{where}: its {key} is {text[:80]!r}, not a number of bytes")
    return int(text)
