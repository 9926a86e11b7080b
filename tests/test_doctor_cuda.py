"""What doctor finds of a GPU: every state that a machine may be in, by stand-ins."""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_device import FakeDevice

from onnxstream_nb.cli import doctor
from onnxstream_nb.cli.doctor import Check
from onnxstream_nb.errors import UnsupportedError
from onnxstream_nb.gpu import driver, found
from onnxstream_nb.gpu.device import DeviceError

INSTALL = "pip install 'onnxstream_nb[cuda]'"


class Machine:
    """What is installed; everything, unless it is changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver: tuple[int, int] | None = (13, 0)
        self.packages = {"numba-cuda": "0.30.4"}
        self.compiler: str | None = "13.0.88"
        self.gpu = True
        self.opened: Any = FakeDevice(memory=80 * 10**9)
        monkeypatch.setattr(found, "driver_version", lambda: self.driver)
        monkeypatch.setattr(found, "package_version", self.packages.get)
        monkeypatch.setattr(found, "compiler_version", lambda: self.compiler)
        monkeypatch.setattr(found, "has_gpu", lambda: self.gpu)
        monkeypatch.setattr(driver, "CudaDevice", self._open)

    def _open(self) -> Any:
        if isinstance(self.opened, Exception):
            raise self.opened
        return self.opened

    def checks(self) -> dict[str, Check]:
        checks = list(doctor.cuda())
        assert not any(check.state == "broken" for check in checks)
        return {check.subject: check for check in checks}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_everything_is_there(machine: Machine) -> None:
    checks = machine.checks()
    assert {name: check.detail for name, check in checks.items()} == {
        "cuda driver": "CUDA 13.0", "numba-cuda": "0.30.4", "nvvm": "13.0.88",
        "cuda": "a GPU of the tests, capability 8.0, 80.0 GB free of 80.0 GB",
    }  # fmt: skip
    assert all(check.state == "ok" and not check.remedy for check in checks.values())
    assert machine.opened.closed


def test_no_gpu_at_all_is_no_problem(machine: Machine) -> None:
    machine.driver, machine.gpu, machine.packages["numba-cuda"] = None, False, ""
    assert machine.checks() == {"cuda": Check("cuda", "ok", "none; the CPU is used")}


def test_a_gpu_without_a_driver(machine: Machine) -> None:
    machine.driver = None
    checks = machine.checks()
    assert checks["cuda driver"].state == "note"
    assert "580 or newer" in checks["cuda driver"].remedy
    assert checks["cuda"] == Check("cuda", "ok", "cannot be used yet; the CPU is used")


def test_no_packages(machine: Machine) -> None:
    machine.packages.clear()
    check = machine.checks()["numba-cuda"]
    assert (check.state, check.remedy) == ("note", f"for --cuda: {INSTALL}")


def test_no_compiler(machine: Machine) -> None:
    machine.compiler = None
    check = machine.checks()["nvvm"]
    assert check.state == "note" and INSTALL in check.remedy and "CUDA_HOME" in check.remedy


def test_a_driver_older_than_the_compiler(machine: Machine) -> None:
    machine.driver = (12, 4)
    check = machine.checks()["nvvm"]
    assert check.state == "note" and check.detail.endswith("which knows CUDA up to 12.4")
    assert "580" in check.remedy and "numba-cuda[cu12]" in check.remedy
    machine.compiler = "12.4.131"
    assert machine.checks()["cuda"].detail.startswith("a GPU of the tests")
    machine.compiler = "at /usr/local/cuda/nvvm/lib64/libnvvm.so"  # of no package, so who knows
    assert machine.checks()["nvvm"].state == "ok"


@pytest.mark.parametrize("error", [DeviceError("cuInit: no device"), UnsupportedError("too old")])
def test_a_gpu_that_cannot_be_opened(machine: Machine, error: Exception) -> None:
    machine.opened = error
    check = machine.checks()["cuda"]
    assert check.state == "note" and check.detail == f"{error}; the CPU is used"
    assert "nvidia-smi" in check.remedy


def test_a_gpu_that_fails_when_it_is_looked_at(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free() -> int:
        raise DeviceError("cuMemGetInfo: lost")

    monkeypatch.setattr(machine.opened, "free", free)
    assert machine.checks()["cuda"].detail == "cuMemGetInfo: lost; the CPU is used"
    assert machine.opened.closed


def test_opening_says_the_first_thing_that_is_missing(machine: Machine) -> None:
    machine.packages.clear()
    with pytest.raises(UnsupportedError, match=r"numba-cuda is not installed: pip install"):
        driver._driver()


# -- how it looks


def test_looking_takes_no_time_and_breaks_nothing() -> None:
    """On this machine, whatever it has."""
    found.parts()
    started = time.perf_counter()
    parts = found.parts()
    assert time.perf_counter() - started < 1
    assert parts[0].name == "cuda driver" and isinstance(found.has_gpu(), bool)


def test_the_version_of_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        status, number = 0, 12040

        def cuDriverGetVersion(self, place: Any) -> int:
            place._obj.value = self.number
            return self.status

    monkeypatch.setattr(found, "_LIBRARIES", ("libcuda.so.no-such",))
    assert found.driver_version() is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    assert found.driver_version() == (12, 4)
    monkeypatch.setattr(Library, "status", 34)  # the toolkit's stub of a driver
    assert found.driver_version() is None


@pytest.mark.parametrize("missing", ["nvvm", "nvrtc", None])
def test_the_version_of_the_compiler(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pathfinder: Any = ModuleType("cuda.pathfinder")

    def load(name: str) -> Any:
        if name == missing:
            raise RuntimeError(f"lib{name} is nowhere")
        return SimpleNamespace(abs_path=f"/toolkit/lib{name}.so")

    pathfinder.load_nvidia_dynamic_lib = load
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    versions = {"nvidia-nvvm": "13.0.88"}
    monkeypatch.setattr(found, "package_version", versions.get)
    assert found.compiler_version() == (None if missing else "13.0.88")
    versions.clear()
    assert found.compiler_version() == (None if missing else "at /toolkit/libnvvm.so")


def test_gpus_on_the_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "_PCI", tmp_path / "devices")
    assert not found.has_gpu()
    about = {"0": ("0x8086", "0x030000"), "1": ("0x10de", "0x040300"), "2": ("0x10de", "")}
    for name, (vendor, kind) in about.items():
        folder = tmp_path / "devices" / name
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        if kind:
            (folder / "class").write_text(f"{kind}\n")
    assert not found.has_gpu()
    (tmp_path / "devices" / "2" / "class").write_text("0x030200\n")
    assert found.has_gpu()
