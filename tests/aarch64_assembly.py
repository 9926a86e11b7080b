"""Compiles kernels for 64-bit ARM on any host. Run as a program by test_aarch64.py:

    python aarch64_assembly.py FOLDER CPU [KERNEL ...]

writes KERNEL.ll and KERNEL.s of each kernel (of all that may run there, when none is named) into
FOLDER and prints, a line each, which kernels stand for the names of fast and exact products.
numba is told that it runs on Linux on an ARM processor and takes its own way from there on,
optimiser and all, up to but not including the call.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRIPLE = "aarch64-unknown-linux-gnu"
X86_ONLY = ("gemm_bf16", "gemm_split", "attention_bf16")
"""What these names begin with is written in an x86 processor's instructions and stands for nothing
elsewhere."""


def pretend(cpu: str) -> None:
    """Before numba is imported: this process compiles for that processor from now on."""
    os.environ.update(NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="")
    platform.machine = lambda: "aarch64"  # the numbers of system calls differ
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: TRIPLE
    llvm.Target.from_default_triple = classmethod(lambda target: target.from_triple(TRIPLE))


def write(folder: Path, kernel: Any) -> None:
    from onnxstream_nb.kernels.machine_code import compile_kernel

    code = compile_kernel(kernel.function, kernel.name)
    for suffix, text in (("ll", code.get_llvm_str()), ("s", code.get_asm_str())):
        (folder / f"{kernel.name}.{suffix}").write_text(text, "utf-8")


def inner_loops(assembly: str) -> Iterator[tuple[str, list[str]]]:
    """(mangled name, lines) of each loop that holds no other, of each function of the package."""
    for name, body in re.findall(
        r"^(_ZN13onnxstream_nb\S+):\n(.*?)^\.Lfunc_end", assembly, re.M | re.S
    ):
        lines = body.splitlines()
        labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith(".LBB")}
        jumps = ((re.match(r"\s+[a-z.]+\s.*?(\.LBB\w+)$", line), i) for i, line in enumerate(lines))
        spans = [(labels[j[1]], i) for j, i in jumps if j and labels[j[1]] <= i]
        for first, last in spans:
            if not any((first, last) != s and first <= s[0] and s[1] <= last for s in spans):
                yield name, lines[first : last + 1]


def main(folder: str, cpu: str, *names: str) -> None:
    pretend(cpu)
    from onnxstream_nb.registry import kernels

    known = {name: kernel for name, kernel in kernels().items() if name == kernel.name}
    for name in names or [n for n in known if not n.startswith(X86_ONLY)]:
        write(Path(folder), known[name])
    for name, kernel in kernels().items():
        if name != kernel.name:
            print(name, kernel.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
