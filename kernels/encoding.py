"""Encodings as compile-time tokens: one kernel body, compiled once for each encoding it serves.

Dims: group g is elements 32 g .. 32 g + 31 of a row, unpacked into two vectors (16,).

Numba specialises a function on the types of its arguments. A token's type is its encoding, so a
body that receives a token has the encoding's own code in its inner loop. (Functions passed as
arguments would do the same, but code that holds them cannot be cached on disk.)
"""

from numba import types
from numba.extending import models, register_model, typeof_impl
from numba.core.imputils import lower_constant

from .machine_code import overload_inline
from .simd import JIT


class Token:
    """An encoding: `unpack(row, g)` gives two vectors, `element(row, k)` one float."""

    def __init__(self, name, unpack, element):
        self.name, self.unpack, self.element = name, unpack, element


class TokenType(types.Opaque):
    def __init__(self, token):
        self.token = token
        super().__init__(name=f"Encoding({token.name})")


@typeof_impl.register(Token)
def _type_of(token, context):
    return TokenType(token)


register_model(TokenType)(models.OpaqueModel)


@lower_constant(TokenType)
def _constant(context, builder, token_type, token):
    return context.get_dummy_value()


def unpack(token, row, g):
    """Group g of the row at an address, as two (16,) vectors."""
    return token.unpack(row, g)


def element(token, row, k):
    """Element k of the row at an address."""
    return token.element(row, k)


if JIT:

    @overload_inline(unpack)
    def _unpack(token, row, g):
        function = token.token.unpack
        return lambda token, row, g: function(row, g)

    @overload_inline(element)
    def _element(token, row, k):
        function = token.token.element
        return lambda token, row, k: function(row, k)
