"""The operators that are matrix products: MatMul and Gemm.

Dims: M rows, K common, N columns; leading dims broadcast as NumPy's.
"""

import math

import numpy as np

from ..errors import ShapeError, UnsupportedError
from ..registry import kernels, op
from . import gemm_bf16, gemv, panel_gemm
from .buffers import contiguous, empty
from .gemm import BLOCK, TILE_ROWS, gemm_pack, scratch_bytes
from .joined import Flow
from .lowered import FEW_ROWS, Rows, plain
from .packing import Packer, Panels
from .panel_products import TOGETHER, block_rows, quantize_rows
from .quads import RECORD
from .threads import precision, team
from .weight import decode

USES = (
    "gemv_{order}_{encoding}",
    "gemm_{precision}_{order}_{encoding}",
    "gemm_{precision}_pack",
    "gemm_pack",
    "gemv_columns_sum",
)


class Matrix:
    """A float32 array (K, N) seen as a weight in column order."""

    encoding, order, scale, zero_point = "float32", "columns", 1.0, 0
    first, in_tiles = 0, False

    def __init__(self, array):
        self.array = contiguous(array, np.float32)
        self.shape, self.address = array.shape, self.array.ctypes.data
        self.row_bytes = 4 * array.shape[1]

    def tiles(self):
        """All of it at once."""
        yield self


def _kernel(product, weight):
    """The kernel for a weight's encoding and storage order."""
    found = kernels().get(f"{product}_{weight.order}_{weight.encoding}")
    if found is None:
        raise UnsupportedError(
            f"a product with a {weight.encoding} weight stored by {weight.order} is not supported; "
            "convert it to float16 or float32"
        )
    return found


def is_ready(weight):
    """Whether there are kernels for a weight as it is: all but those in parts that were not packed
    when they were loaded."""
    return weight.order == "panels" or isinstance(weight, Matrix) or not weight.ref.parts


def prepared(weight):
    """A weight as kernels take it: in parts, it is packed now, or decoded if it has no panels."""
    if is_ready(weight):
        return weight
    return Panels(weight) if Packer().panel_bytes(weight.ref) else Matrix(decode(weight))


def _workspace(nbytes, purpose, name="workspace"):
    return *team().workspace(nbytes, name), True


class Kept:
    """Memory for what the tiles of one product share: X as one kernel packs it, sums of parts.

    It is the product's own: between two tiles another session may use the team's workspace.
    """

    def __init__(self):
        self._purpose, self._memory = None, None

    def room(self, nbytes, purpose, name=""):
        """Address, what holds it, and whether it has yet to be filled for this purpose."""
        fresh = self._purpose is not purpose or nbytes + 64 > self._memory.nbytes
        if fresh:
            self._purpose, self._memory = purpose, empty(nbytes + 64, np.uint8)
        return -(-self._memory.ctypes.data // 64) * 64, self._memory, fresh


def calls(x, weight, out, kept=None):
    """The kernel calls for out (M, N) = x (M, K) times a weight (K, N), as Rows.

    The weight may be a tile, some of the stored rows: then they fill its columns of out or, in
    column order, add its products to it; what the next tile needs stays in `kept`, a Kept.
    """
    room = _workspace if kept is None else kept.room
    if weight.order == "panels":
        return (_one_packed if len(x) == 1 else _many)(x, weight, out, room)
    return (_few if len(x) <= FEW_ROWS else _many)(x, weight, out, room)


def _begin(weight):
    """The first of its K inputs, of a tile of a matrix in column order, packed or not."""
    if isinstance(weight, Panels):
        return weight.begin
    return weight.first if weight.order == "columns" else 0


def _few(x, weight, out, room):
    """Each row of x alone gives the same, to the last bit."""
    (m, k), (own, n) = x.shape, weight.shape
    where = weight.address, weight.row_bytes, x.ctypes.data
    kernel, y, y_step = _kernel("gemv", weight), out.ctypes.data, out.strides[0]
    written, source = ((y, out.nbytes),), (where[2], x.nbytes)
    if weight.order == "rows":
        flow = Flow(
            written, whole=(source,), items=n if m == 1 else 0, align=gemv.TOGETHER,
            weights=weight.row_bytes * n,
        )  # fmt: skip
        call = (kernel, *where, y + 4 * weight.first, n, k, m, 4 * k, y_step)
        return Rows((out,), [call], flows=(flow,), source=source)
    each = gemv.sum_bytes(n)
    nbytes = gemv.PARTS * m * each
    sums, held, _ = room(nbytes, kernel)
    todo = [(kernel, *where, sums, each, n, k, m, 4 * k, weight.first, own)]
    if weight.first + own == k:
        todo.append((gemv.gemv_columns_sum, sums, each, y, n, m, y_step))
    flow = Flow(written, whole=((sums, nbytes),), items=n if m == 1 else 0, align=16)
    return Rows((out,), todo, keep=(held,), flows=(None, flow)[: len(todo)])


def _one_packed(x, weight, out, room):
    """A single x: its records are made by one thread, for all tiles that read it alike."""
    (k, n), begin = weight.shape, _begin(weight)
    nbytes, source, y = RECORD * (k // 32), x.ctypes.data + 4 * begin, out.ctypes.data
    # Apart from those of another length: while a share makes records of what a product gives, the
    # others may still read those of its x.
    records, kept, fresh = room(nbytes, quantize_rows, f"records of {k}")
    scratch, each, held = team().scratch(64 * TOGETHER, team().most)
    where, onto = (weight.address, weight.row_bytes, records), int(begin > 0)
    todo = [(_kernel("gemv", weight), *where, y + 4 * weight.first, n, k, scratch, each, onto)]
    made = ((records, nbytes),)
    read = weight.row_bytes * -(-n // 16)
    flows = [Flow(((y, out.nbytes),), whole=made, items=n, align=16, weights=read)]
    if fresh or begin:
        todo.insert(0, (quantize_rows, source, 0, records, 1, k, 1))
        flows.insert(0, Flow(made, own=((source, 4 * k),), items=k // 32, each=32))
    serial = (True, False)[-len(todo) :]
    return Rows((out,), todo, serial=serial, keep=(kept, held), flows=flows, source=(source, k))


def _many(x, weight, out, room):
    """X is packed first: for a matrix in row order once for all of its tiles."""
    (m, x_step), (k, n), begin = (len(x), x.strides[0]), weight.shape, _begin(weight)
    packed, by_columns = weight.order == "panels", weight.order == "columns"
    kind = "exact" if packed and m <= FEW_ROWS else precision()  # each of a few is as if alone
    kernel = _kernel(f"gemm_{kind}", weight)
    pack, nbytes, working, most = _layout(kernel, weight, m, k)
    left, kept, fresh = room(nbytes, pack)
    scratch, each, held = team().scratch(working)
    source, y, onto = x.ctypes.data + 4 * begin, out.ctypes.data, int(begin > 0)
    if not by_columns:
        y += 4 * weight.first
    where = weight.address, weight.row_bytes, left, y, out.strides[0], m, n, k
    rest = (*most, scratch, each, onto) if packed else (onto, scratch, each)
    todo, made, read = [(kernel, *where, *rest)], (left, nbytes), (x.ctypes.data, x.nbytes)
    flows = [Flow(((y, out.nbytes),), whole=(made, read))]
    if fresh or by_columns or begin:
        todo.insert(0, (pack, source, x_step, left, m, k, *most))
        flows.insert(0, Flow((made,), whole=(read,)))
    return Rows((out,), todo, keep=(kept, held), flows=flows, source=(source, k))


def _layout(kernel, weight, m, k):
    """What packs X, bytes of it packed, bytes a thread works in, rows of X a block of panels."""
    if kernel.name.startswith("gemm_bytes_"):
        most, records = panel_gemm.block_rows(k), panel_gemm.record_bytes(m, k)
        return panel_gemm.quantize_bytes, records, panel_gemm.scratch_bytes(most), (most,)
    if weight.order == "panels":
        most = block_rows(m, k)
        return quantize_rows, RECORD * m * (k // 32), 64 * most, (most,)
    for parts, kind in ((1, "bf16"), (2, "split")):
        if kernel.name.startswith(f"gemm_{kind}_"):
            pack = kernels()[f"gemm_{kind}_pack"]
            return pack, parts * gemm_bf16.packed_bytes(m, k), gemm_bf16.scratch_bytes(m), ()
    rows = -(-m // TILE_ROWS) * TILE_ROWS
    return gemm_pack, 4 * rows * -(-k // BLOCK) * BLOCK, scratch_bytes(m), ()


def product(x, weight):
    """x (M, K) float32 contiguous, weight logically (K, N) -> (M, N) float32."""
    if x.shape[1] != weight.shape[0]:  # kernels would read behind the shorter one
        raise ShapeError(f"a product of {x.shape[1]} columns and {weight.shape[0]} rows")
    out = empty((len(x), weight.shape[1]))
    if 0 in (*x.shape, *out.shape):
        out[:] = 0
        return out
    kept = Kept() if weight.in_tiles else None
    for tile in weight.tiles():
        ready = prepared(tile)
        rows = calls(x, ready, out, kept)
        rows.run()
        del rows, ready
    if weight.encoding == "uint8":
        out *= np.float32(weight.scale)
        out -= np.float32(weight.scale * weight.zero_point) * x.sum(axis=1, keepdims=True)
    return out


def lower_matmul(a, b):
    """Rows a (..., M, K), contiguous float32, times an encoded weight (K, N)."""
    if isinstance(b, np.ndarray) or len(b.shape) != 2 or not plain(a) or b.encoding == "uint8":
        return None
    if len(b.shape) != 2 or not is_ready(b):
        return None
    out = empty((*a.shape[:-1], b.shape[1]))
    if not out.size or not a.size or a.shape[-1] != b.shape[0]:
        return None
    rows = calls(_rows(a), b, _rows(out))
    rows.outputs, rows.keep = (out,), (a, b, *rows.keep)
    return rows


def _rows(a):
    """(..., M, K) -> (M, K), contiguous float32."""
    rows = math.prod(a.shape[:-1])  # not -1, which means nothing when K is 0
    return contiguous(a, np.float32).reshape(rows, a.shape[-1])


def _is_float(dtype):
    return dtype == np.float32 or dtype == np.float16 or dtype.name == "bfloat16"


def packing_bytes(a, b, c=None):
    """What products of a (..., M, K) and b (..., K, N) take beside the result: rows of a packed,
    and of matrices in several, one pair of them and its product."""
    if len(a) < 2 or len(b) < 2:
        return 4 * (math.prod(a) + math.prod(b))
    rows, k = (math.prod(a[:-1]) if len(b) == 2 else a[-2]), a[-1]
    packed = 4 * -(-rows // TILE_ROWS) * TILE_ROWS * -(-k // BLOCK) * BLOCK if rows > 1 else 0
    return packed if len(b) == 2 else packed + 4 * (rows * k + k * b[-1] + rows * b[-1])


@op("MatMul", since=1, native=("b",), packs=("b",), uses=USES, lower=lower_matmul,
    working=packing_bytes)  # fmt: skip
def matmul(a, b):
    """a (..., M, K), b (..., K, N) -> (..., M, N); fp16 is accumulated in fp32."""
    if not isinstance(b, np.ndarray) and len(b.shape) != 2:
        b = decode(b.whole())
    if not isinstance(b, np.ndarray):
        return product(_rows(a), b).reshape(*a.shape[:-1], b.shape[1]).astype(a.dtype, copy=False)
    if not _is_float(a.dtype):
        return np.matmul(a, b)
    if b.ndim == 2 and a.ndim >= 2:
        x = _rows(a)
        return product(x, Matrix(b)).reshape(*a.shape[:-1], b.shape[1]).astype(a.dtype, copy=False)
    left = a.reshape(1, -1) if a.ndim == 1 else a
    right = b.reshape(-1, 1) if b.ndim == 1 else b
    lead = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left = np.broadcast_to(left, (*lead, *left.shape[-2:])).astype(np.float32, copy=False)
    right = np.broadcast_to(right, (*lead, *right.shape[-2:]))
    out = empty((*lead, left.shape[-2], right.shape[-1]))
    for i in np.ndindex(lead):
        out[i] = product(contiguous(left[i]), Matrix(right[i]))
    out = out[..., 0, :] if a.ndim == 1 else out
    return (out[..., 0] if b.ndim == 1 else out).astype(a.dtype, copy=False)


@op("Gemm", since=1, native=("b",), uses=USES, working=packing_bytes)
def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0, broadcast=0):  # noqa: N803
    """a (M, K), b (K, N), transposed on demand, c broadcast to (M, N) -> alpha a b + beta c."""
    a = a.T if transA else a
    b = b.T if transB else b
    y = matmul(a, b)
    if alpha != 1.0:
        y = (y * np.asarray(alpha, y.dtype)).astype(a.dtype, copy=False)
    if c is not None and beta != 0.0:
        y = y + (c if beta == 1.0 else np.asarray(beta, c.dtype) * c)
    return y
