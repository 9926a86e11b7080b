"""The primitives of CUDA kernels: loads and stores by address, warps, arithmetic; those of tensor
cores, and the copies that feed them, are in cuda_tensor_prims.py.

Dims: a warp has 32 lanes. An address is an int64 in global memory, or an int32 in the block's own
shared memory, of which a launch says how many bytes there are. Nothing here checks a bound.

Each is written once for the compiler (LLVM, or PTX where LLVM has no word for it) and once for the
simulator, which checks bounds and alignment. Sources: PTX ISA 9.0, NVVM IR.
"""

import numpy as np

from . import cuda_simulator as simulator
from .cuda_kernel import device
from .cuda_primitive import Cast, Names, assembly, primitive

cuda = Names()
float32, int32, int64, uint32 = (Cast(n) for n in ("float32", "int32", "int64", "uint32"))
GLOBAL, SHARED = 1, 3  # LLVM's address spaces

# -- loads and stores ------------------------------------------------------------------------------


def _at(ir, builder, where, llvm_type, space):
    return builder.inttoptr(where, ir.PointerType(llvm_type, space))


def _loader(result, space, stored, widen, dtype):
    """A load of one element, of `stored` (a function of ir), made into `result` by `widen`."""
    where = "i64" if space == GLOBAL else "i32"
    size = np.dtype(dtype).itemsize

    def twin(address):
        return simulator.memory(space).load(address, dtype)

    def generate(ir, builder, address):
        pointer = _at(ir, builder, address, stored(ir), space)
        return widen(ir, builder, builder.load(pointer, align=size))

    return primitive(result, where, twin=twin)(generate)


def _same(ir, builder, value):
    return value


def _extended(ir, builder, value):
    return builder.fpext(value, ir.FloatType())


def _signed(ir, builder, value):
    return builder.sext(value, ir.IntType(32))


def _unsigned(ir, builder, value):
    return builder.zext(value, ir.IntType(32))


load_f32 = _loader("f32", GLOBAL, lambda ir: ir.FloatType(), _same, np.float32)
load_f16 = _loader("f32", GLOBAL, lambda ir: ir.HalfType(), _extended, np.float16)
load_i32 = _loader("i32", GLOBAL, lambda ir: ir.IntType(32), _same, np.int32)
load_u32 = _loader("u32", GLOBAL, lambda ir: ir.IntType(32), _same, np.uint32)
load_i64 = _loader("i64", GLOBAL, lambda ir: ir.IntType(64), _same, np.int64)
load_i8 = _loader("i32", GLOBAL, lambda ir: ir.IntType(8), _signed, np.int8)
load_u8 = _loader("i32", GLOBAL, lambda ir: ir.IntType(8), _unsigned, np.uint8)
shared_f32 = _loader("f32", SHARED, lambda ir: ir.FloatType(), _same, np.float32)
shared_f16 = _loader("f32", SHARED, lambda ir: ir.HalfType(), _extended, np.float16)
shared_i32 = _loader("i32", SHARED, lambda ir: ir.IntType(32), _same, np.int32)


def _storer(value, space, stored, narrow, dtype):
    """A store of one element."""
    where = "i64" if space == GLOBAL else "i32"
    size = np.dtype(dtype).itemsize

    def twin(address, value):
        simulator.memory(space).store(address, value, dtype)

    def generate(ir, builder, address, value):
        pointer = _at(ir, builder, address, stored(ir), space)
        builder.store(narrow(ir, builder, value), pointer, align=size)

    return primitive("void", where, value, twin=twin)(generate)


def _truncated(ir, builder, value):
    return builder.fptrunc(value, ir.HalfType())


store_f32 = _storer("f32", GLOBAL, lambda ir: ir.FloatType(), _same, np.float32)
store_f16 = _storer("f32", GLOBAL, lambda ir: ir.HalfType(), _truncated, np.float16)
store_i32 = _storer("i32", GLOBAL, lambda ir: ir.IntType(32), _same, np.int32)
store_i64 = _storer("i64", GLOBAL, lambda ir: ir.IntType(64), _same, np.int64)
store_shared_f32 = _storer("f32", SHARED, lambda ir: ir.FloatType(), _same, np.float32)
store_shared_f16 = _storer("f32", SHARED, lambda ir: ir.HalfType(), _truncated, np.float16)
store_shared_i32 = _storer("i32", SHARED, lambda ir: ir.IntType(32), _same, np.int32)


def _words(space):
    def twin(address):
        return tuple(int(word) for word in simulator.memory(space).vector(address, 4, np.uint32))

    return twin


def _loader_128(where, space):
    """A load of 16 bytes at an address that is a multiple of 16, as four words."""

    def generate(ir, builder, address):
        kind = ir.VectorType(ir.IntType(32), 4)
        value = builder.load(_at(ir, builder, address, kind, space), align=16)
        return [builder.extract_element(value, ir.IntType(32)(i)) for i in range(4)]

    return primitive("u32x4", where, twin=_words(space))(generate)


load_128, shared_128 = _loader_128("i64", GLOBAL), _loader_128("i32", SHARED)


@primitive("u32x4", "i64", twin=_words(GLOBAL))
def stream_128(ir, builder, address):
    """As load_128, of bytes that nobody reads twice: they push no others out of the L1 cache."""
    text = "ld.global.nc.L1::no_allocate.v4.u32 {$0,$1,$2,$3}, [$4];"
    return assembly(ir, builder, text, [ir.IntType(32)] * 4, [address], effect=True)


def _stored_words(space):
    def twin(address, *words):
        simulator.memory(space).vector(address, 4, np.uint32, writing=True)[:] = words

    return twin


@primitive("void", "i64", *["u32"] * 4, twin=_stored_words(GLOBAL))
def store_128(ir, builder, address, *words):
    """Write 16 bytes at an address that is a multiple of 16."""
    text = "st.global.v4.u32 [$0], {$1,$2,$3,$4};"
    return assembly(ir, builder, text, [], [address, *words], effect=True, memory=True)


@primitive("void", "i32", *["u32"] * 4, twin=_stored_words(SHARED))
def store_shared_128(ir, builder, address, *words):
    """Write 16 bytes of shared memory, at a multiple of 16."""
    kind = ir.VectorType(ir.IntType(32), 4)
    value = ir.Constant(kind, ir.Undefined)
    for i, word in enumerate(words):
        value = builder.insert_element(value, word, ir.IntType(32)(i))
    builder.store(value, _at(ir, builder, address, kind, SHARED), align=16)


@primitive("i32", twin=lambda: 0)
def shared_memory(ir, builder):
    """The address of the block's shared memory."""
    name, module = "shared_memory", builder.module
    found = module.globals.get(name)
    if found is None:
        found = ir.GlobalVariable(module, ir.ArrayType(ir.IntType(8), 0), name, addrspace=SHARED)
        found.linkage, found.align = "external", 16
    return builder.ptrtoint(found, ir.IntType(32))


# -- pairs of halves -------------------------------------------------------------------------------


def _halves_twin(word):
    low, high = np.array([word], np.uint32).view(np.float16)
    return np.float32(low), np.float32(high)


@primitive("f32x2", "u32", twin=_halves_twin)
def halves(ir, builder, word):
    """The two float16 of a word, as float32: low, high."""
    pair = builder.bitcast(word, ir.VectorType(ir.HalfType(), 2))
    picked = [builder.extract_element(pair, ir.IntType(32)(i)) for i in range(2)]
    return [builder.fpext(each, ir.FloatType()) for each in picked]


def _pack_twin(low, high):
    with np.errstate(over="ignore"):
        return int(np.array([low, high], np.float16).view(np.uint32)[0])


@primitive("u32", "f32", "f32", twin=_pack_twin)
def pack_halves(ir, builder, low, high):
    """Two float32, rounded to float16, as one word."""
    pair = ir.Constant(ir.VectorType(ir.HalfType(), 2), ir.Undefined)
    for i, value in enumerate((low, high)):
        half = builder.fptrunc(value, ir.HalfType())
        pair = builder.insert_element(pair, half, ir.IntType(32)(i))
    return builder.bitcast(pair, ir.IntType(32))


def _bytes_twin(word):
    return tuple(np.float32(byte) for byte in np.array([word], np.uint32).view(np.int8))


@primitive("f32x4", "u32", twin=_bytes_twin)
def signed_bytes(ir, builder, word):
    """The four bytes of a word, signed, as float32. Each is put, plus 128, into the mantissa of
    2 ** 23, from which that is taken again: conversions of integers take eight times as long."""
    i32 = ir.IntType(32)
    flipped, large = builder.xor(word, i32(0x80808080)), i32(0x4B000000)
    found = []
    for i in range(4):
        picked = assembly(
            ir, builder, "prmt.b32 $0, $1, $2, $3;", [i32], [flipped, large, i32(0x7650 + i)]
        )
        value = builder.bitcast(picked, ir.FloatType())
        found.append(builder.fsub(value, ir.Constant(ir.FloatType(), 2.0**23 + 128)))
    return found


def _nibbles_twin(word):
    shifts = [shift for j in range(4) for shift in (4 * j, 4 * j + 16)]
    return tuple(np.float32((word >> shift & 15) - 8) for shift in shifts)


@primitive("f32x8", "u32", twin=_nibbles_twin)
def nibbles(ir, builder, word):
    """The nibbles 0, 4, 1, 5, 2, 6, 3, 7 of a word, less 8, as float32. Two at a time they are put
    into the mantissas of 1024 as halves, from which 1032 is taken, exactly."""
    i32, pair, found = ir.IntType(32), ir.VectorType(ir.HalfType(), 2), []
    for j in range(4):
        masked = builder.and_(builder.lshr(word, i32(4 * j)), i32(0x000F000F))
        biased = builder.or_(masked, i32(0x64006400))
        less = assembly(ir, builder, "sub.f16x2 $0, $1, $2;", [i32], [biased, i32(0x64086408)])
        values = builder.bitcast(less, pair)
        picked = [builder.extract_element(values, i32(i)) for i in range(2)]
        found += [builder.fpext(each, ir.FloatType()) for each in picked]
    return found


@primitive("f32", "u32", twin=lambda word: np.array([word], np.uint32).view(np.float32)[0])
def bits_of_f32(ir, builder, word):
    """The float32 whose bits a word holds."""
    return builder.bitcast(word, ir.FloatType())


# -- warps -----------------------------------------------------------------------------------------


def _shuffle_twin(value, mask):
    values, lane = simulator.exchange(value)
    return values[lane ^ mask]


@primitive("f32", "f32", "i32", twin=_shuffle_twin)
def shuffle_xor(ir, builder, value, mask):
    """The value that the lane whose number differs by `mask` gives; every lane has to come."""
    text = "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;"
    return assembly(ir, builder, text, [ir.FloatType()], [value, mask], effect=True)


@device
def warp_sum(value):
    """The sum of all lanes' values, in every lane."""
    value += shuffle_xor(value, 16)
    value += shuffle_xor(value, 8)
    value += shuffle_xor(value, 4)
    value += shuffle_xor(value, 2)
    value += shuffle_xor(value, 1)
    return value


@device
def warp_max(value):
    """The largest of all lanes' values, in every lane."""
    value = max(value, shuffle_xor(value, 16))
    value = max(value, shuffle_xor(value, 8))
    value = max(value, shuffle_xor(value, 4))
    value = max(value, shuffle_xor(value, 2))
    value = max(value, shuffle_xor(value, 1))
    return value


# -- arithmetic ------------------------------------------------------------------------------------


@primitive("f32", "f32", twin=lambda x: np.float32(2) ** np.float32(x))
def exp2(ir, builder, x):
    """2 ** x by the special function unit: within 2 ulp; of -infinity 0."""
    return assembly(ir, builder, "ex2.approx.ftz.f32 $0, $1;", [ir.FloatType()], [x])


@primitive("f32", "f32", twin=lambda x: np.float32(1) / np.sqrt(np.float32(x)))
def rsqrt(ir, builder, x):
    """1 / sqrt(x), within 2 ulp."""
    return assembly(ir, builder, "rsqrt.approx.ftz.f32 $0, $1;", [ir.FloatType()], [x])


@primitive("f32", "f32", twin=lambda x: np.sqrt(np.float32(x)))
def square_root(ir, builder, x):
    """The square root of x, correctly rounded."""
    return assembly(ir, builder, "sqrt.rn.f32 $0, $1;", [ir.FloatType()], [x])
