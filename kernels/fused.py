"""Operators that a GPU computes together (passes/fused.py), by the CPU.

Dims: rows of N elements (..., N).
"""

from ..registry import declared, op
from . import arithmetic  # noqa: F401  it declares the two
from .attention import attention_24
from .elementwise import swish
from .matmul import matmul
from .norm import rms_normalization
from .rope import rotary_embedding

ADD, MULTIPLY = (declared(name)[7].function for name in ("Add", "Mul"))


@op("AddRMSNormalization", domain="onnxstream_nb")
def add_rms_normalization(a, b, scale, *, axis=-1, epsilon=1e-5, stash_type=1):
    """a and b (..., N), scale (N,) -> a + b, and its RMSNormalization."""
    total = ADD(a, b)
    return total, rms_normalization(total, scale, axis=axis, epsilon=epsilon, stash_type=stash_type)


@op("SwishMul", domain="onnxstream_nb")
def swish_mul(x, y):
    """x (..., N), y (..., N) -> x sigmoid(x) y."""
    return MULTIPLY(swish(x), y)


@op("MatMuls", domain="onnxstream_nb", native=("b", "c", "d"), packs=("b", "c", "d"))
def matmuls(a, b, c=None, d=None):
    """a (..., M, K), matrices (K, N) -> the product with each, (..., M, N)."""
    return tuple(matmul(a, matrix) for matrix in (b, c, d) if matrix is not None)


@op("RotaryAttention", domain="onnxstream_nb", native=("past_key", "past_value"))
def rotary_attention(
    q, k, v, past_key, past_value, cos_cache, sin_cache, *, q_num_heads, kv_num_heads,
    interleaved=0, rotary_embedding_dim=0, n_outputs=1, is_causal=0, scale=None, softcap=0.0,
    qk_matmul_output_mode=0, softmax_precision=0, left_window_size=-1, right_window_size=-1,
):  # fmt: skip
    """q (1, T, H D), k and v (1, T, KV D), a cache, cos and sin (1, T, R / 2) -> Attention of
    rotated q and k."""
    q, k = (
        rotary_embedding(
            x,
            cos_cache,
            sin_cache,
            interleaved=interleaved,
            num_heads=heads,
            rotary_embedding_dim=rotary_embedding_dim,
        )  # fmt: skip
        for x, heads in ((q, q_num_heads), (k, kv_num_heads))
    )
    return attention_24(
        q, k, v, None, past_key, past_value, is_causal=is_causal, kv_num_heads=kv_num_heads,
        q_num_heads=q_num_heads, qk_matmul_output_mode=qk_matmul_output_mode, scale=scale,
        softcap=softcap, softmax_precision=softmax_precision, left_window_size=left_window_size,
        right_window_size=right_window_size, n_outputs=n_outputs,
    )  # fmt: skip
