"""Compiled kernels on disk: where they are, what tells one form from another, and keeping them.

The code of `gemv.py` is in a folder `gemv-STAMP`, one file for each kernel and each target. A file
begins with the hash of what follows, so that one cut short or damaged is not run.

No shapes here.
"""

import hashlib
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

PRUNE_AFTER_DAYS = 14
_HERE = Path(__file__).parent
_HASH_BYTES = 32


@cache
def _imports(path):
    """The bytes of a kernel file, and the kernel files that it imports: those beside it and, if it
    is elsewhere, those of the package."""
    source, files = path.read_bytes(), set()
    ways = [(rb"\.", rb"", path.parent)]
    if path.parent != _HERE:
        ways.append((rb"onnxstream_nb\.kernels", rb"\.", _HERE))
    for package, dot, folder in ways:
        names = re.findall(rb"^from %b%b(\w+) import" % (package, dot), source, re.MULTILINE)
        for line in re.findall(rb"^from %b import (.+)$" % package, source, re.MULTILINE):
            names += [name.split()[0] for name in line.split(b",")]
        files |= {folder / f"{name.decode()}.py" for name in names}
    return source, tuple(sorted(files))


@cache
def stamp(path):
    """A hash of a kernel file and of all it imports."""
    seen, todo = {}, [path]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen[name], more = _imports(name)
            todo += more
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(seen[name])
    return digest.hexdigest()[:16]


@cache
def cache_root():
    """The folder of compiled kernels, or None when no place can be written."""
    import platformdirs

    candidates = [platformdirs.user_cache_path("onnxstream_nb") / "kernels"]
    if hasattr(os, "getuid"):
        candidates.append(Path(tempfile.gettempdir()) / f"onnxstream_nb-{os.getuid()}")
    if os.environ.get("ONNXSTREAM_CACHE"):
        candidates.insert(0, Path(os.environ["ONNXSTREAM_CACHE"]) / "kernels")
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            tempfile.TemporaryFile(dir=folder).close()
            status = folder.stat()
        except OSError:
            continue
        # Anybody can make a folder among the temporary ones, and fill it with machine code.
        temporary = folder.parent == Path(tempfile.gettempdir())
        if not temporary or (status.st_uid == os.getuid() and not status.st_mode & 0o022):
            return folder
    return None


def prune():
    """Delete the compiled code of kernel files that no longer exist in that form."""
    root = cache_root()
    oldest = time.time() - PRUNE_AFTER_DAYS * 86400
    for folder in root.iterdir() if root else ():
        stem, _, version = folder.name.rpartition("-")
        current = (_HERE / f"{stem}.py").exists() and version == stamp(_HERE / f"{stem}.py")
        with suppress(FileNotFoundError):  # another process prunes as well
            if not current and folder.stat().st_mtime < oldest:
                shutil.rmtree(folder, ignore_errors=True)


def place(function, name):
    """The file called `name` of what is compiled from a function; None when nothing can be kept."""
    root, source = cache_root(), Path(function.__code__.co_filename)
    return None if root is None else root / f"{source.stem}-{stamp(source)}" / name


def keep(path, data):
    """Write a file whole, or not at all: other processes may be reading, or writing the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.replace(partial, path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise


def kept(path):
    """What `keep` was given; None when there is no such file, or not whole."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    data = found[_HASH_BYTES:]
    return data if hashlib.sha256(data).digest() == found[:_HASH_BYTES] else None
