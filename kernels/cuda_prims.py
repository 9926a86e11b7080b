"""The primitives of CUDA kernels: loads and stores by address, warps, tensor cores, async copies.

Dims: a warp has 32 lanes. An address is an int64 in global memory, or an int32 in the block's own
shared memory, of which a launch says how many bytes there are. Nothing here checks a bound.

Each is written once for the compiler (LLVM, or PTX where LLVM has no word for it) and once for the
simulator, which checks bounds and alignment and may let a copy land as late, or as soon, as the
hardware may. Sources: PTX ISA 9.0 (mma.sync, ldmatrix, cp.async), NVVM IR.
"""

import numpy as np

from . import cuda_simulator as simulator
from .cuda_kernel import device
from .cuda_primitive import Cast, Names, assembly, primitive

FULL = 0xFFFFFFFF  # all lanes of a warp


cuda = Names()
float32, int32, int64, uint32 = (Cast(n) for n in ("float32", "int32", "int64", "uint32"))


# -- loads and stores ------------------------------------------------------------------------------

GLOBAL, SHARED = 1, 3  # LLVM's address spaces


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


def _words(count, space, twin_dtype=np.uint32):
    def twin(address):
        found = simulator.memory(space).vector(address, count, twin_dtype)
        return tuple(int(word) for word in found)

    return twin


@primitive("u32x4", "i64", twin=_words(4, GLOBAL))
def load_128(ir, builder, address):
    """16 bytes at an address that is a multiple of 16, as four words."""
    kind = ir.VectorType(ir.IntType(32), 4)
    value = builder.load(_at(ir, builder, address, kind, GLOBAL), align=16)
    return [builder.extract_element(value, ir.IntType(32)(i)) for i in range(4)]


@primitive("u32x4", "i64", twin=_words(4, GLOBAL))
def stream_128(ir, builder, address):
    """The same of bytes that nobody reads twice: they do not push others out of the L1 cache."""
    text = "ld.global.nc.L1::no_allocate.v4.u32 {$0,$1,$2,$3}, [$4];"
    return assembly(ir, builder, text, [ir.IntType(32)] * 4, [address], effect=True)


@primitive("u32x4", "i32", twin=_words(4, SHARED))
def shared_128(ir, builder, address):
    """16 bytes of shared memory at a multiple of 16, as four words."""
    kind = ir.VectorType(ir.IntType(32), 4)
    value = builder.load(_at(ir, builder, address, kind, SHARED), align=16)
    return [builder.extract_element(value, ir.IntType(32)(i)) for i in range(4)]


def _store_global_words(address, *words):
    simulator.memory(GLOBAL).vector(address, 4, np.uint32)[:] = words


@primitive("void", "i64", *["u32"] * 4, twin=_store_global_words)
def store_128(ir, builder, address, *words):
    """Write 16 bytes at an address that is a multiple of 16."""
    text = "st.global.v4.u32 [$0], {$1,$2,$3,$4};"
    return assembly(ir, builder, text, [], [address, *words], effect=True, memory=True)


def _store_words_twin(address, *words):
    memory = simulator.memory(SHARED)
    memory.vector(address, 4, np.uint32, writing=True)[:] = words


@primitive("void", "i32", *["u32"] * 4, twin=_store_words_twin)
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


@primitive("f32", "f32", twin=lambda x: np.tanh(np.float32(x)))
def tanh_fast(ir, builder, x):
    """The hyperbolic tangent, within 2 ** -11 of its value (sm_75)."""
    return assembly(ir, builder, "tanh.approx.f32 $0, $1;", [ir.FloatType()], [x])


# -- asynchronous copies ---------------------------------------------------------------------------


@primitive("void", "i32", "i64", "i32", twin=simulator.copy_later)
def copy_async(ir, builder, to, source, nbytes):
    """Begin to write 16 bytes of shared memory, at a multiple of 16: the first `nbytes` from global
    memory, at a multiple of 16 too, and zeros (sm_80)."""
    text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
    return assembly(ir, builder, text, [], [to, source, nbytes], effect=True, memory=True)


@primitive("void", twin=simulator.commit)
def commit_copies(ir, builder):
    """What was begun since the last time is one group."""
    return assembly(ir, builder, "cp.async.commit_group;", [], [], effect=True, memory=True)


def _waiter(left):
    def generate(ir, builder):
        text = f"cp.async.wait_group {left};"
        return assembly(ir, builder, text, [], [], effect=True, memory=True)

    return primitive("void", twin=lambda: simulator.wait(left))(generate)


wait_all_copies, wait_but_one, wait_but_two = _waiter(0), _waiter(1), _waiter(2)


# -- tensor cores ----------------------------------------------------------------------------------


def _matrices_twin(address):
    addresses, lane = simulator.exchange(address)
    memory, words = simulator.memory(SHARED), []
    for matrix in range(4):
        row = memory.vector(addresses[8 * matrix + lane // 4], 4, np.uint32)
        words.append(int(row[lane % 4]))
    return tuple(words)


@primitive("u32x4", "i32", twin=_matrices_twin)
def load_matrices(ir, builder, address):
    """Four 8 x 8 matrices of halves in shared memory: lane l names row l % 8 of matrix l // 8, and
    gets of each the pair 2 (l % 4) of row l // 4 (ldmatrix.x4)."""
    text = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];"
    return assembly(ir, builder, text, [ir.IntType(32)] * 4, [address], effect=True, memory=True)


def _turned_twin(address):
    addresses, lane = simulator.exchange(address)
    memory, words = simulator.memory(SHARED), []
    for matrix in range(4):
        rows = [
            memory.vector(addresses[8 * matrix + 2 * (lane % 4) + i], 8, np.uint16)
            for i in range(2)
        ]
        words.append(int(rows[0][lane // 4]) | int(rows[1][lane // 4]) << 16)
    return tuple(words)


@primitive("u32x4", "i32", twin=_turned_twin)
def load_turned_matrices(ir, builder, address):
    """The same of the matrices' transposes."""
    text = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0,$1,$2,$3}, [$4];"
    return assembly(ir, builder, text, [ir.IntType(32)] * 4, [address], effect=True, memory=True)


def _fragments(words, lane, depth):
    """A (16, depth) and B (depth, 8) of a warp from its lanes' words, and this lane's place."""
    a_words = depth // 4
    pairs = np.array(words, np.uint32).view(np.float16).reshape(32, -1, 2).astype(np.float32)
    a, b = np.zeros((16, depth), np.float32), np.zeros((depth, 8), np.float32)
    for each in range(32):
        row, pair = each // 4, 2 * (each % 4)
        for i in range(a_words):
            column = pair + 8 * (i // 2)
            a[row + 8 * (i % 2), column : column + 2] = pairs[each, i]
        for i in range(depth // 8):
            b[pair + 8 * i : pair + 8 * i + 2, row] = pairs[each, a_words + i]
    return a, b, lane // 4, 2 * (lane % 4)


def _multiply(words, sums, depth):
    everything, lane = simulator.exchange(words)
    a, b, row, column = _fragments(everything, lane, depth)
    product = a[[row, row + 8]] @ b[:, column : column + 2]
    return tuple(np.float32(c + d) for c, d in zip(sums, product.reshape(4), strict=True))


@primitive(
    "f32x4", *["u32"] * 6, *["f32"] * 4,
    twin=lambda *values: _multiply(values[:6], values[6:], 16),
)  # fmt: skip
def multiply_16(ir, builder, *values):
    """(16, 16) float16 times (16, 8) float16 plus (16, 8) float32, of a warp (sm_80)."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    return assembly(ir, builder, text, [ir.FloatType()] * 4, values, effect=True)


@primitive(
    "f32x4", *["u32"] * 3, *["f32"] * 4,
    twin=lambda *values: _multiply(values[:3], values[3:], 8),
)  # fmt: skip
def multiply_8(ir, builder, *values):
    """(16, 8) float16 times (8, 8) float16 plus (16, 8) float32, of a warp (sm_75)."""
    text = (
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{$0,$1,$2,$3}, {$4,$5}, {$6}, {$7,$8,$9,$10};"
    )
    return assembly(ir, builder, text, [ir.FloatType()] * 4, values, effect=True)
