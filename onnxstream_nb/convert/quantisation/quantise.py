"""The step that quantises: what is asked for, and the methods by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ...errors import UsageError
from ...progress import Report
from ..draft import FLOATS, Draft

if TYPE_CHECKING:
    from ...tokenizer import Tokenizer

METHODS: Mapping[str, str] = {
    "rtn": "weight_only:rounded",
    "awq": "weight_only:activation_aware",
    "gptq": "weight_only:with_feedback",
    "dynamic": "integer:dynamic",
    "static": "integer:static",
}
"""Method -> `module:function` of this package, a function (draft, options, report) -> Draft."""

DTYPES = ("int4", "int8")
SCALES = ("float16", "float32")
DEFAULT_BLOCK = 32
CALIBRATED = ("awq", "gptq")
"""Methods that cannot do without a calibration text."""


@dataclass(frozen=True)
class QuantiseOptions:
    """How a model is to be quantised.

    `dtype` is that of weights; `block` how many along K share a scale (0: all of a column).
    `keep` are (pattern, dtype) of layers that differ, the first match counts: the pattern is one of
    file names (`*down_proj*`) for the name of a weight or its node, or one of the roles "head",
    "values" and "table"; the dtype int4, int8, or one of FLOATS to leave it in floats. `search`
    looks for the scales of least error, instead of those that cover a block's range.
    `matmul_nbits` writes com.microsoft's operator, `scales` is their type.

    Calibration reads `tokens` of `text` (`source` names it in messages) in windows of `window`,
    through `tokenizer`, or for a model that reads no text the arrays of the folder `feeds`.
    `range_data` is a file of ranges for the method "static" to read, or to write when it is not
    there; `percentile` cuts outliers off (100: none).
    """

    dtype: str = "int4"
    method: str = "rtn"
    block: int = DEFAULT_BLOCK
    asymmetric: bool = False
    keep: tuple[tuple[str, str], ...] = ()
    search: bool = True
    matmul_nbits: bool = False
    scales: str = "float16"
    text: str | None = None
    source: str = "the calibration text"
    tokens: int = 16384
    window: int = 512
    tokenizer: Tokenizer | None = None
    feeds: Path | None = None
    range_data: Path | None = None
    percentile: float = 100.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--method {self.method!r} is none of {', '.join(METHODS)}")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.block < 0 or self.block % 2:
            raise UsageError(f"--block {self.block}: give an even number, or 0 for whole columns")
        if self.matmul_nbits and (self.block < 16 or self.block & (self.block - 1)):
            raise UsageError(
                f"--block {self.block}: MatMulNBits has blocks of a power of two from 16 on"
            )
        for pattern, dtype in self.keep:
            if dtype not in (*DTYPES, *FLOATS):
                names = ", ".join((*DTYPES, *FLOATS))
                raise UsageError(f"--keep {pattern}={dtype}: {dtype!r} is none of {names}")
        if self.method in CALIBRATED and (self.text is None or self.tokenizer is None):
            raise UsageError(
                f"--method {self.method} is calibrated: give a text as --calibration, and a model "
                "that has its tokenizer beside it"
            )


def quantise(draft: Draft, options: QuantiseOptions, report: Report) -> Draft:
    """The draft with its weights (and with some methods its activations) in integers.

    Raises UsageError for a calibration text that is too short, UnsupportedError when the graph
    cannot hold the operators that are needed, ModelError for weights that are no finite numbers.
    """
    module, _, name = METHODS[options.method].partition(":")
    function = getattr(import_module(f"{__package__}.{module}"), name)
    return cast(Callable[[Draft, QuantiseOptions, Report], Draft], function)(draft, options, report)
