"""PTX and machine code of CUDA kernels, by NVIDIA's assembler: what a GPU would run."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from onnxstream_nb.kernels.cuda_kernel import CudaKernel

CAPABILITIES = ((7, 5), (8, 0), (9, 0))
SHARED = {(7, 5): 64 << 10, (8, 0): 99 << 10, (9, 0): 227 << 10}
"""Bytes of shared memory that a block may have, the least of the GPUs of a generation."""
REGISTERS = 65536  # of a multiprocessor
SHARED_MEMORY = ".extern .shared .align 16 .b8 shared_memory[];\n"
"""Kernels that use it declare it, each of them."""
DOUBLES = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "MUFU.RCP64H", "MUFU.RSQ64H")


@dataclass(frozen=True)
class Assembly:
    """`instructions` counts what there is of each; `spilled` and `stack` are bytes a thread."""

    ptx: str
    registers: int
    spilled: int
    stack: int
    instructions: Counter[str]

    def count(self, *starts: str) -> int:
        """How many instructions begin with one of the words."""
        return sum(n for name, n in self.instructions.items() if name.startswith(starts))


def faults(kernel: CudaKernel, made: Assembly, capability: tuple[int, int]) -> list[str]:
    """What no kernel should have: arithmetic of doubles, which a literal that is not wrapped makes;
    registers kept in memory; more of anything than a multiprocessor has."""
    found = []
    if ".f64" in made.ptx:
        found.append("PTX of doubles")
    if made.count(*DOUBLES) or any(".F64" in name for name in made.instructions):
        found.append("instructions of doubles")
    if made.spilled:
        found.append(f"{made.spilled} bytes spilled")
    if made.registers * kernel.threads * kernel.resident > REGISTERS:
        found.append(f"{made.registers} registers")
    if kernel.shared > SHARED[capability]:
        found.append(f"{kernel.shared} bytes of shared memory")
    return found


def faults_of_streaming(made: Assembly) -> list[str]:
    """What no kernel should have whose time is that of reading a matrix once."""
    found = []
    if made.count("LDG.E.NA.128", "LDG.E.128.CONSTANT", "LDG.E.128") < 3:
        found.append("fewer than three loads of 16 bytes")
    if made.stack or made.count("LDL", "STL"):
        found.append("a stack")
    if made.count("I2F"):
        found.append("conversions of integers")
    return found


def faults_of_products(made: Assembly, asynchronous: bool) -> list[str]:
    """What no kernel should have whose time is that of its multiplications."""
    found = []
    if made.count("HMMA") < 16:
        found.append("fewer than sixteen products of tensor cores")
    if made.count("LDSM") < 8:
        found.append("fewer than eight loads of small matrices")
    if asynchronous and made.count("LDGSTS") < 8:
        found.append("fewer than eight asynchronous copies")
    if made.stack:
        found.append("a stack")
    return found


@cache
def tool(name: str) -> str | None:
    """The path of ptxas or nvdisasm, of the wheels; None where they are not installed."""
    for package in ("nvidia.cu13", "nvidia.cuda_nvcc", "nvidia.cuda_nvdisasm"):
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in spec.submodule_search_locations or () if spec else ():
            path = Path(folder) / "bin" / name
            if path.is_file():
                return str(path)
    return None


def can_assemble() -> bool:
    """Whether Numba's CUDA target and NVIDIA's assembler are here."""
    return bool(find_spec("numba_cuda") and tool("ptxas") and tool("nvdisasm"))


def assemblies(kernels: Iterable[CudaKernel], capability: tuple[int, int]) -> dict[str, Assembly]:
    """The machine code of kernels for a GPU, by their names.

    The disassembler takes longer to begin than to read a kernel, so all kernels are one file to
    it: one for each way in which PTX begins, which says for what GPUs it is.
    """
    bodies: dict[str, dict[str, str]] = {}
    for kernel in kernels:
        ptx = kernel.ptx(capability)
        head, body = re.split(r"(?<=^\.address_size 64\n)", ptx, maxsplit=1, flags=re.MULTILINE)
        head = "".join(line for line in head.splitlines(True) if line.startswith("."))
        bodies.setdefault(head, {})[kernel.name] = body
    return {
        name: made
        for head, those in bodies.items()
        for name, made in _assembled(head, those, capability).items()
    }


def _assembled(
    head: str, bodies: dict[str, str], capability: tuple[int, int]
) -> dict[str, Assembly]:
    """PTX without its beginning -> machine code, both by the names of kernels."""
    declared = SHARED_MEMORY if any(SHARED_MEMORY in body for body in bodies.values()) else ""
    arguments = f"-arch=sm_{capability[0]}{capability[1]}", "-v"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        together = "".join(body.replace(SHARED_MEMORY, "") for body in bodies.values())
        source.write_text(head + declared + together)
        status, said = _run("ptxas", *arguments, str(source), "-o", str(binary))
        if status and len(bodies) > 1:  # whose fault it is
            for name, body in bodies.items():
                _assembled(head, {name: body}, capability)
        assert status == 0, f"{', '.join(bodies)}: {said}"
        status, code = _run("nvdisasm", "-c", str(binary))
        assert status == 0, code
    reports = _by_name(r"^ptxas info\s+: Compiling entry function '(\w+)'", said)
    codes = _by_name(r"^//-+ \.text\.(\w+)\s+-+$", code)
    assert reports.keys() == codes.keys() == bodies.keys(), said
    return {name: _read(head + body, reports[name], codes[name]) for name, body in bodies.items()}


def _by_name(title: str, text: str) -> dict[str, str]:
    """What follows each line with a name in it, up to the next one."""
    _, *parts = re.split(title, text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _read(ptx: str, said: str, code: str) -> Assembly:
    """One kernel's machine code, of what the assembler and the disassembler say about it."""

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        assert found is not None, said
        return int(found[1])

    lines = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Assembly(
        ptx, number(r"Used (\d+) registers"), spilled, number(r"(\d+) bytes stack frame"),
        Counter(lines),
    )  # fmt: skip


def _run(name: str, *arguments: str) -> tuple[int, str]:
    path = tool(name)
    assert path is not None
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr
