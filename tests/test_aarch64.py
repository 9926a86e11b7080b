"""What LLVM makes of kernels for 64-bit ARM, on any host: they are compiled, not run."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding as llvm
import pytest
from aarch64_assembly import TRIPLE, inner_loops

HERE = Path(__file__).parent
SERVER = (
    "gemv_rows_float16", "gemv_rows_q4_0", "gemm_rows_float32", "attention_exact",
    "float_to_half",
)  # fmt: skip
LEAST = (
    "gemv_rows_float16", "attention_decode", "rms_norm", "rotary", "decode_q4_k",
    "gemv_panels_q4_0", "team_lead",
)  # fmt: skip
COMPILED = [("neoverse-n1", name) for name in SERVER] + [("generic", name) for name in LEAST]
"""The least is what every 64-bit ARM processor has: no atomic instructions, for instance."""

Outputs = dict[str, tuple[Path, str]]


def has_target() -> bool:
    llvm.initialize_all_targets()
    try:
        llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_target(), reason="this LLVM has no ARM target")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """For each processor the folder of its kernels, and what the compiling process printed."""

    def compiled(cpu: str, names: tuple[str, ...]) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(cpu)
        program = str(HERE / "aarch64_assembly.py")
        done = subprocess.run(
            [sys.executable, "-W", "error", program, str(folder), cpu, *names], cwd=HERE.parent,
            text=True, capture_output=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return folder, done.stdout

    sets = {"neoverse-n1": SERVER, "generic": LEAST}
    with ThreadPoolExecutor() as pool:
        return dict(zip(sets, pool.map(compiled, sets, sets.values()), strict=True))


def text_of(outputs: Outputs, cpu: str, name: str, suffix: str) -> str:
    return (outputs[cpu][0] / f"{name}.{suffix}").read_text("utf-8")


@pytest.mark.parametrize(("cpu", "name"), COMPILED)
def test_kernels_use_nothing_of_x86_and_no_helpers(cpu: str, name: str, outputs: Outputs) -> None:
    ir, assembly = (text_of(outputs, cpu, name, suffix) for suffix in ("ll", "s"))
    assert TRIPLE in ir and "onnxstream_nb7kernels" in ir
    assert "llvm.x86" not in ir
    called = set(re.findall(r"^\s+bl?\t([A-Za-z_][\w.]*)", assembly, re.M))
    # Python's functions are for the errors that a wrapper may report.
    ours = ("_ZN13onnxstream_nb", "_ZN5numba", "cfunc.", "Py", "_Py", "NRT_", "numba_")
    foreign = {f for f in called if not f.startswith(ours)}
    assert foreign <= {"sched_yield", "syscall"}, (
        foreign
    )  # no __extendhfsf2, __aarch64_cas8 and the like


@pytest.mark.parametrize("cpu", ["neoverse-n1", "generic"])
@pytest.mark.parametrize("function", ["4dot4", "4rows"])
def test_halves_are_multiplied_in_registers(cpu: str, function: str, outputs: Outputs) -> None:
    """16 multiply-adds of 4 lanes a row and 64 halves. One row alone is part of `rows`."""
    loops = inner_loops(text_of(outputs, cpu, "gemv_rows_float16", "s"))
    hot = ["\n".join(lines) for name, lines in loops if f"4gemv{function}B" in name]
    hot = [loop for loop in hot if "fcvtl" in loop]
    assert hot
    for loop in hot:
        converted, products = (
            len(re.findall(r"\tfcvtl2?\t", loop)),
            len(re.findall("\tfmla\t", loop)),
        )
        assert converted == products > 0 and products % 8 == 0
        assert not re.search(r"\tblr?\t", loop)


def stack_loads(loop: list[str]) -> int:
    return sum(bool(re.search(r"\tld[rpu]r?\t.*\[(sp|x29)", line)) for line in loop)


@pytest.mark.parametrize("name", ["gemv_rows_float16", "gemv_rows_q4_0", "gemm_rows_float32"])
def test_sums_stay_in_registers(name: str, outputs: Outputs) -> None:
    """Mostly: four rows at a time take all 32 registers for their sums, which costs up to a load
    from the stack for each multiply-add; one row, and the tile, have room."""
    found: dict[str, list[tuple[int, int]]] = {}
    for function, lines in inner_loops(text_of(outputs, "neoverse-n1", name, "s")):
        products = sum("\tfmla\t" in line for line in lines)
        if products >= 16:
            at = re.sub(r"B\d*v\d+B.*", "", function.removeprefix("_ZN13onnxstream_nb7kernels"))
            found.setdefault(at, []).append((products, stack_loads(lines)))
    assert found
    for at, counts in found.items():
        for products, loads in counts:
            assert loads <= (products if at.endswith("4dot4") else products // 2), (at, counts)


def test_float_to_half_is_one_instruction_for_four(outputs: Outputs) -> None:
    assert re.search(r"\tfcvtn2?\t", text_of(outputs, "neoverse-n1", "float_to_half", "s"))


@pytest.mark.skipif(sys.platform != "linux", reason="threads wait for one another otherwise")
def test_threads_wait_by_the_number_that_linux_has_there(outputs: Outputs) -> None:
    numbers = re.findall(r"@syscall\(i64 (\d+)", text_of(outputs, "generic", "team_lead", "ll"))
    assert numbers and set(numbers) == {"98"}  # futex, in asm-generic/unistd.h


def test_nothing_in_bfloat16_stands_for_a_product(outputs: Outputs) -> None:
    for _, printed in outputs.values():
        names = dict(line.split() for line in printed.splitlines())
        assert names["gemm_fast_pack"] == names["gemm_exact_pack"] == "gemm_pack"
        for name, kernel in names.items():
            assert kernel == name.replace("_fast", "").replace("_exact", "") or (
                name.startswith("attention") and kernel == "attention_exact"
            )
