"""Machine code: from Python functions to the bytes of an object file, and from there to an address.

Numba makes of every function something that Python can call, with instructions and wrappers of its
own. Functions of kernels only call one another: here they stay LLVM code, which is linked into
their callers, and the processor's instructions are made once, of the whole kernel. To load an
object file takes LLVM's linker alone: no part of the compiler is set up.

No shapes here; a kernel is a function of three integers, as jit.py says.
"""

import hashlib
import sys
from functools import cache, cached_property, update_wrapper

import llvmlite
import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import njit, types
from numba.core import codegen, config
from numba.core import ir as numba_ir
from numba.core.compiler import CompilerBase, DefaultPassBuilder, _LowerResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import register_pass
from numba.core.registry import cpu_target
from numba.core.typed_passes import NativeLowering
from numba.extending import overload

_RAISES = (numba_ir.Raise, numba_ir.StaticRaise, numba_ir.DynamicRaise)
SIGNATURE = types.void(types.int64, types.int64, types.int64)


class Code(codegen.JITCodeLibrary):
    """A function's LLVM code, which nobody runs as it is."""

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True

    def object_file(self):
        """The bytes of an object file for the processor that Numba compiles for."""
        if self._dynamic_globals:  # they hold addresses of this process
            raise ValueError(f"{self.name} cannot be kept: it holds {self._dynamic_globals}")
        return self.codegen._tm.emit_object(self._final_module)


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):
    """From a typed function to LLVM code that its callers link."""

    _name = "onnxstream_nb_lowering"

    def run_pass(self, state):
        for block in state.func_ir.blocks.values():
            for raised in block.find_insts(_RAISES):  # nobody would hear of it: see compile_kernel
                raise TypeError(f"{raised.loc}: kernels, and what they call, cannot raise")
        state.library = Code(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        key = object().__reduce__  # by which callers find it: a builtin, no two of which are equal
        state.targetctx.insert_user_function(key, lowered.fndesc, [state.library])
        state["cr"] = _LowerResult(lowered.fndesc, lowered.call_helper, cfunc=key, env=lowered.env)
        return True


class _Pipeline(CompilerBase):
    """Numba's steps for a function without Python objects, the last one replaced."""

    def define_pipelines(self):
        manager = DefaultPassBuilder.define_nopython_pipeline(self.state)
        manager.passes = [
            (_Lowering if step is NativeLowering else step, why) for step, why in manager.passes
        ]
        manager.finalize()
        return [manager]


_OPTIONS = {
    "nogil": True, "error_model": "numpy", "pipeline_class": _Pipeline,
    "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip
"""How Numba is to compile a function of kernels."""


class Function:
    """A Python function that becomes part of kernels. It is set up when a kernel is compiled."""

    def __init__(self, function, **options):
        self.py_func, self._options = function, _OPTIONS | options
        update_wrapper(self, function)

    @cached_property
    def dispatcher(self):
        return njit(**self._options)(self.py_func)

    @property
    def _numba_type_(self):
        return self.dispatcher._numba_type_

    def __call__(self, *arguments, **named):
        raise TypeError(f"{self.__name__} is part of kernels: only they can be called")


def overload_inline(function):
    """Numba's `overload` for code that melts into kernels."""
    return overload(function, jit_options=_OPTIONS | {"forceinline": True})


@global_compiler_lock
def compile_kernel(function, symbol):
    """The code of a kernel and of all that it calls, with an entry for C called `symbol`."""
    form = Function(function).dispatcher.get_compile_result(SIGNATURE)
    module = form.library.create_ir_module(symbol)
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
    entry = ir.Function(module, kind, symbol)
    builder = ir.IRBuilder(entry.append_basic_block())
    context = form.target_context
    inner = context.declare_function(module, form.fndesc)
    # What it returns is not looked at: kernels raise nothing.
    context.call_conv.call_function(builder, inner, types.void, SIGNATURE.args, entry.args)
    builder.ret_void()
    form.library.add_ir_module(module)
    form.library.finalize()
    return form.library


@cache
def target():
    """A hash of what is compiled for, and by what."""
    cpu, features = config.CPU_NAME, config.CPU_FEATURES
    told = [
        numba.__version__, llvmlite.__version__, llvm.get_process_triple(),
        llvm.get_host_cpu_name() if cpu in (None, "host") else cpu,
        llvm.get_host_cpu_features().flatten() if features is None else features,
    ]  # fmt: skip
    return hashlib.sha256(" ".join(told).encode()).hexdigest()[:16]


@cache
def _host():
    """LLVM's target for this process."""
    codegen.initialize_llvm()
    if sys.platform == "win32":
        _ = cpu_target.target_context  # brings functions of C that no library of Windows' has
    return llvm.Target.from_triple(llvm.get_process_triple())


_ENGINES = []  # each keeps what it loaded in memory


def load_object(data, symbol):
    """The address of `symbol` in an object file's bytes, which are taken for whole.

    Each file has an engine of its own, so that names within it meet none of another's.
    """
    machine = _host().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(""), machine, use_lmm=config.USE_LLVMLITE_MEMORY_MANAGER
    )
    engine.add_object_file(llvm.ObjectFileRef.from_data(data))
    engine.finalize_object()  # which puts its parts where they stay
    _ENGINES.append(engine)
    return engine.get_function_address(symbol)
