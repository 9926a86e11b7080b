"""The disk cache of compiled kernels: its stamps, its places, and compiling in child processes."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
import platformdirs
import pytest

from onnxstream_nb.errors import OnnxstreamError
from onnxstream_nb.kernels import compile as compiling
from onnxstream_nb.kernels import cuda_kernel, disk_cache, machine_code
from onnxstream_nb.kernels.cuda_kernel import CudaKernel
from onnxstream_nb.kernels.jit import Kernel, arg, jit
from onnxstream_nb.kernels.vector import atomic_store

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "kernels").glob("*.py"))


def store_sum(args: int, thread: int, threads: int) -> None:
    """args: a cell, two numbers: a kernel that no registry knows."""
    atomic_store(arg(args, 0), arg(args, 1) + arg(args, 2))


def assert_adds(kernel: Any) -> None:
    cell = np.zeros(1, np.int64)
    args = np.array([cell.ctypes.data, 40, 2], np.int64)
    kernel(args.ctypes.data)
    assert cell[0] == 42


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this process."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setattr(disk_cache, "cache_root", lambda: folder)
    monkeypatch.setattr(compiling, "cache_root", lambda: folder)
    return folder


# -- stamps ------------------------------------------------------------------------------------


@pytest.fixture
def copies(tmp_path: Path) -> Iterator[Path]:
    """A copy of the kernels' sources."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for path in SOURCES:
        shutil.copy(path, folder)
    yield folder
    fresh()


def fresh() -> None:
    disk_cache.stamp.cache_clear()
    disk_cache._imports.cache_clear()


def stamp(path: Path) -> str:
    fresh()
    return str(disk_cache.stamp(path))


def edit(path: Path) -> None:
    path.write_text(path.read_text("utf-8") + "\n# edited\n", "utf-8")


@pytest.mark.parametrize(
    "edited", ["gemv", "quant", "vector", "simd", "encoding", "jit", "machine_code"]
)
def test_stamp_covers_a_kernel_s_file_and_all_it_imports(edited: str, copies: Path) -> None:
    before = stamp(copies / "gemv.py")
    edit(copies / f"{edited}.py")
    assert stamp(copies / "gemv.py") != before


def test_stamp_ignores_files_that_are_not_imported(copies: Path) -> None:
    before = stamp(copies / "gemv.py")
    for name in ("norm", "flash", "rope", "gemm", "compile"):
        edit(copies / f"{name}.py")
    assert stamp(copies / "gemv.py") == before


@pytest.mark.parametrize(
    "line", ["from onnxstream_nb.kernels.gemv import dot", "from onnxstream_nb.kernels import gemv"]
)
def test_stamp_of_a_file_elsewhere_covers_what_it_imports_of_the_package(
    line: str, copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_cache, "_HERE", copies)
    path = tmp_path / "own.py"
    path.write_text(f"import numpy\n{line}\n")
    before = stamp(path)
    edit(copies / "vector.py")
    assert stamp(path) != before


def test_stamp_does_not_depend_on_the_folder(copies: Path) -> None:
    assert stamp(copies / "flash.py") == stamp(ROOT / "kernels" / "flash.py")


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [(numba, "__version__", "99.9"), (llvmlite, "__version__", "99.9"),
     (machine_code.config, "CPU_NAME", "another"), (machine_code.config, "CPU_FEATURES", "+none")],
    ids=["numba", "llvmlite", "processor", "features"],
)  # fmt: skip
def test_target_covers_compilers_and_processor(
    owner: Any, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = machine_code.target.__wrapped__
    before = target()
    assert before == target()
    monkeypatch.setattr(owner, name, value)
    assert target() != before


@pytest.mark.parametrize("package", ["numba", "llvmlite", "numba-cuda", "nvidia-nvvm"])
def test_ptx_is_made_again_for_another_version_of_what_compiles_it(
    package: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CudaKernel("sum", store_sum, "")
    monkeypatch.setattr(cuda_kernel, "_versions", cuda_kernel._versions.__wrapped__)
    before = entry._cached()
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "99.9" if name == package else installed(name)
    )
    assert entry._cached() != before


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_every_import_of_a_kernel_file_is_seen(path: Path) -> None:
    fresh()
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            imported |= {node.module} if node.module else {a.name for a in node.names}
    assert {p.stem for p in disk_cache._imports(path)[1]} == imported


# -- the cache's files -------------------------------------------------------------------------


def test_load_finds_only_what_was_compiled_in_this_form(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not Kernel(store_sum).load() and not list(root.rglob("*.o"))
    assert_adds(Kernel(store_sum))
    assert list(root.glob(f"test_jit_cache-{disk_cache.stamp(Path(__file__))}/store_sum-*.o"))
    again = Kernel(store_sum)
    assert not again.loaded and again.load() and again.loaded
    assert_adds(again)
    monkeypatch.setattr(disk_cache, "stamp", lambda path: "0" * 16)
    assert not Kernel(store_sum).load()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the hash": lambda data: data[:20],
    "cut after the hash": lambda data: data[:32],
    "cut in half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one bit wrong": lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
    "longer": lambda data: data + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_compiled_again(root: Path, damage: str) -> None:
    assert_adds(Kernel(store_sum))
    (path,) = root.rglob("*.o")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert not Kernel(store_sum).load()
    assert_adds(Kernel(store_sum))
    assert Kernel(store_sum).load()


def test_a_file_is_kept_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "file"
    disk_cache.keep(path, b"first")
    assert disk_cache.kept(path) == b"first"

    def full(old: str, new: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        disk_cache.keep(path, b"second")
    assert disk_cache.kept(path) == b"first" and [path] == list(path.parent.iterdir())
    assert disk_cache.kept(tmp_path / "absent") is None


def refuse(args: int, thread: int, threads: int) -> None:
    """A kernel that raises, as none may."""
    if threads > 1:
        raise ValueError("too many")


def test_a_kernel_that_raises_is_not_compiled(root: Path) -> None:
    with pytest.raises(TypeError, match=r"test_jit_cache.py \(\d+\): kernels.* cannot raise"):
        Kernel(refuse).compile()
    assert not list(root.rglob("*.o"))


def test_the_parts_of_kernels_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="store_sum is part of kernels"):
        jit(store_sum)(0, 0, 1)


def test_without_a_cache_kernels_are_compiled_every_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(disk_cache, "cache_root", lambda: None)
    monkeypatch.chdir(tmp_path)
    kernel = Kernel(store_sum)
    assert not kernel.load()
    assert_adds(kernel)
    assert not Kernel(store_sum).load() and not list(tmp_path.rglob("*"))
    disk_cache.prune()


def test_prepare_without_a_cache_compiles_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "cache_root", lambda: None)
    monkeypatch.setattr(compiling, "cache_root", lambda: None)
    entry = Kernel(store_sum)
    monkeypatch.setattr(compiling, "kernels", lambda: {"store_sum": entry})
    told: list[tuple[str, float]] = []
    compiling.prepare(["store_sum"], 2, lambda text, done: told.append((text, done)))
    assert told == [("compiling store_sum (1/1)", 0.0)] and entry.loaded
    assert_adds(entry)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Where the cache may go: the variable's folder, the user's cache, the temporary folder."""
    found = {name: tmp_path / name for name in ("variable", "user", "temporary")}
    monkeypatch.setenv("ONNXSTREAM_CACHE", str(found["variable"]))
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: found["user"] / name)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(found["temporary"]))
    return found


def block(path: Path) -> None:
    """Put a file where a folder is wanted: nobody, root included, can write below it."""
    path.write_text("not a folder")


def test_cache_root_is_the_first_place_that_can_be_written(places: dict[str, Path]) -> None:
    choose = disk_cache.cache_root.__wrapped__
    assert choose() == places["variable"] / "kernels" and choose().is_dir()
    shutil.rmtree(places["variable"])
    block(places["variable"])
    assert choose() == places["user"] / "onnxstream_nb" / "kernels"
    shutil.rmtree(places["user"])
    block(places["user"])
    if hasattr(os, "getuid"):
        assert choose().is_relative_to(places["temporary"])
        shutil.rmtree(places["temporary"])
    block(places["temporary"])
    assert choose() is None


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners of folders are POSIX")
def test_a_temporary_folder_that_others_can_write_is_not_used(places: dict[str, Path]) -> None:
    # Its machine code and pickles could be anybody's.
    block(places["variable"])
    block(places["user"])
    planted = places["temporary"] / f"onnxstream_nb-{os.getuid()}"
    planted.mkdir(parents=True)
    for mode in (0o777, 0o770, 0o702):
        planted.chmod(mode)
        assert disk_cache.cache_root.__wrapped__() is None
    planted.chmod(0o700)
    assert disk_cache.cache_root.__wrapped__() == planted


def test_prune_deletes_only_old_code_of_other_forms(root: Path) -> None:
    current = root / f"gemv-{disk_cache.stamp(ROOT / 'kernels' / 'gemv.py')}"
    old, recent, gone = root / "gemv-0123456789abcdef", root / "gemv-fedcba", root / "absent-0123"
    long_ago = time.time() - (disk_cache.PRUNE_AFTER_DAYS + 1) * 86400
    for folder in (current, old, recent, gone):
        folder.mkdir()
        (folder / "code.o").write_bytes(b"x")
        if folder != recent:
            os.utime(folder, (long_ago, long_ago))
    disk_cache.prune()
    assert {p.name for p in root.iterdir()} == {current.name, recent.name}
    assert (current / "code.o").exists()


def test_python_threads_may_load_kernels_at_once() -> None:
    compiling.prepare(LOADED, 2)
    assert run_script(LOAD_AT_ONCE.format(names=LOADED), None).strip() == "[]"


# -- compiling in children ---------------------------------------------------------------------

PREPARE = """
import json, sys
from onnxstream_nb.kernels.compile import prepare
from onnxstream_nb.registry import kernels
names = ["rms_norm", "rotary", "gemm_pack", "rms_norm"]
before = [kernels()[n].load() for n in names]
told = []
prepare(names, 2, lambda text, done: told.append((text, done)))
after = [kernels()[n].loaded for n in names]
print(json.dumps([before, told, after]))
"""

LOADED = [
    "rms_norm", "layer_norm", "rotary", "gemm_pack", "cache_append", "team_lead", "team_member",
    "joined", "attention_exact", "decode_q8_0", "decode_float16", "gemv_rows_q8_0",
    "gemm_rows_q8_0", "gemv_panels_q8_0", "gemm_panels_q8_0", "pack_q8_0", "quantize_rows",
]  # fmt: skip
LOAD_AT_ONCE = """
import sys, threading
from onnxstream_nb.registry import kernels
entries = [kernels()[name] for name in {names}]
gate, errors = threading.Barrier(8), []
sys.setswitchinterval(1e-5)
def load(first):
    gate.wait()
    try:
        for entry in entries[first:] + entries[:first]:
            assert entry.address
    except Exception as error:
        errors.append(error)
threads = [threading.Thread(target=load, args=(i % 3,)) for i in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(errors)
"""

INTERRUPT = """
import os, signal, sys, threading, time
import psutil
from onnxstream_nb.kernels.compile import prepare
begun = []
def progress(text, done):
    if not begun:
        begun.append(0.0)
        def press():
            begun[0] = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
        threading.Timer({delay}, press).start()
try:
    prepare(["gemv_rows_q4_k", "gemm_rows_q4_k", "attention_exact", "gemv_rows_q6_k"], 2, progress)
except KeyboardInterrupt:
    latency = time.monotonic() - begun[0]
else:
    sys.exit("not interrupted")
children = psutil.Process().children(recursive=True)
_, alive = psutil.wait_procs(children, timeout=5)
print(latency, len(alive), threading.active_count() - 1)
"""


def run_script(code: str, cache: Path | None) -> str:
    """What it prints; with an empty cache of its own, or with the one that is."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, text=True, capture_output=True,
        timeout=120, env={**os.environ, **({"ONNXSTREAM_CACHE": str(cache)} if cache else {})},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_missing_kernels_are_compiled_by_children(tmp_path: Path) -> None:
    import json

    before, told, after = json.loads(run_script(PREPARE, tmp_path))
    assert before == [False] * 4 and after == [True] * 4
    names = ["gemm_pack", "joined", "rms_norm", "rotary"]
    names += ["team_lead", "team_member"]  # these and "joined" are what every plan needs
    assert sorted(text.split()[1] for text, _ in told) == names
    assert all(text.startswith("compiling ") and 0 <= done < 1 for text, done in told)
    assert [done for _, done in told] == sorted(done for _, done in told)
    before, told, after = json.loads(run_script(PREPARE, tmp_path))
    assert before == after == [True] * 4 and told == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("delay", [0.0, 1.0])
def test_ctrl_c_ends_the_children(delay: float, tmp_path: Path) -> None:
    latency, alive, _ = run_script(INTERRUPT.format(delay=delay), tmp_path).split()
    assert float(latency) < 1.0 and int(alive) == 0


@pytest.mark.parametrize("program", ["absent", "silent"])
def test_a_child_that_cannot_work_is_an_error(
    program: str, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / program
    if program == "silent":
        path.write_text("#!/bin/sh\necho broken installation >&2\nexit 3\n")
        path.chmod(0o755)
    monkeypatch.setattr(compiling.sys, "executable", str(path))
    entry = Kernel(store_sum)
    monkeypatch.setattr(compiling, "kernels", lambda: {"store_sum": entry})
    raised: list[BaseException] = []

    def prepare() -> None:
        try:
            compiling.prepare(["store_sum"], 2)
        except OnnxstreamError as error:
            raised.append(error)

    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "prepare waits for a child that never was"
    (error,) = raised
    message = "absent" if program == "absent" else "broken installation"
    assert "compiling a kernel failed" in str(error) and message in str(error)
