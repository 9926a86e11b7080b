"""How a primitive of CUDA kernels is declared: its types, its code, its twin.

Dims: none; a primitive's types are "f32", "i32", "u32", "i64", a tuple of four "f32x4", or "void".
"""

from functools import cache

import numpy as np

from . import cuda_simulator as simulator
from .cuda_kernel import Stand


class Primitive(Stand):
    """One primitive; `generate` writes the code, given the module `ir`, a builder and values."""

    def __init__(self, result, arguments, generate, twin):
        self.result, self.arguments, self.generate, self.twin = result, arguments, generate, twin
        self.__doc__ = generate.__doc__
        self._intrinsic = None

    def simulated(self):
        return self.twin

    def compiled(self):
        if self._intrinsic is None:
            self._intrinsic = self._declare()
        return self._intrinsic

    def _declare(self):
        from llvmlite import ir
        from numba.cuda import types
        from numba.cuda.extending import intrinsic

        signature = _type(self.result)(*[_type(name) for name in self.arguments])

        def codegen(context, builder, signature, values):
            value = self.generate(ir, builder, *values)
            if isinstance(value, list):
                return context.make_tuple(builder, signature.return_type, value)
            return context.get_dummy_value() if signature.return_type == types.void else value

        typer = _typer(len(self.arguments), (signature, codegen))
        typer.__name__ = self.generate.__name__
        return intrinsic(typer)


def _typer(count, answer):
    """The typing function of an intrinsic of so many arguments: Numba wants them by name."""
    names = ", ".join(f"x{i}" for i in range(count))
    scope = {"answer": answer}
    exec(f"def typer(context, {names}): return answer", scope)
    return scope["typer"]


@cache
def _type(name):
    """Numba's type of "f32", "i32", "u32", "i64", "f32x4" (a tuple of four), "void"."""
    from numba.cuda import types

    kind, _, count = name.partition("x")
    full = {"i": "int", "u": "uint", "f": "float"}.get(kind[0], "") + kind[1:]
    single = types.void if name == "void" else getattr(types, full)
    return types.UniTuple(single, int(count)) if count else single


def primitive(result, *arguments, twin):
    """Declare a primitive: its types, its twin in Python, and the code generator decorated."""
    return lambda generate: Primitive(result, arguments, generate, twin)


class Names(Stand):
    """What is an attribute of numba.cuda when compiled, and of the simulator when simulated."""

    def compiled(self):
        from numba import cuda

        return cuda

    def simulated(self):
        return simulator.Cuda()


class Cast(Stand):
    def __init__(self, name):
        self.name = name

    def compiled(self):
        from numba.cuda import types

        return getattr(types, self.name)

    def simulated(self):
        return getattr(np, self.name) if self.name.startswith("float") else int


def assembly(ir, builder, text, results, values, *, effect=False, memory=False):
    """Inline PTX; one result, a list of several, or None."""
    letters = {"i32": "r", "i64": "l", "float": "f"}
    constraints = [f"={letters[str(r)]}" for r in results]
    constraints += [letters[str(v.type)] for v in values] + ["~{memory}"] * memory
    several = ir.LiteralStructType(results) if len(results) > 1 else None
    result = several or (results[0] if results else ir.VoidType())
    kind = ir.FunctionType(result, [v.type for v in values])
    asm = ir.InlineAsm(kind, text, ",".join(constraints), side_effect=effect)
    value = builder.call(asm, values)
    if effect:  # what lanes do together is not to be moved to where only some of them come
        value.attributes.add("convergent")
    if several is None:
        return value if results else None
    return [builder.extract_value(value, i) for i in range(len(results))]
