"""What convolutions and pools look at: padded input as windows of it, without a copy.

Dims: x (N, C, *S) with S sizes of the spatial axes; a window has the kernel's sizes *K and there
are *O of them; `pads` are those before every spatial axis, then those behind.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..errors import ShapeError


@dataclass(frozen=True, slots=True)
class Windows:
    """Where windows lie, one entry for each spatial axis; `before` and `behind` are padding,
    `beyond` is how far the last window of `ceil_mode` goes past that."""

    kernel: tuple
    strides: tuple
    dilations: tuple
    before: tuple
    behind: tuple
    beyond: tuple
    out: tuple

    def view(self, x, fill):
        """x (N, C, *S) -> (N, C, *O, *K), padded with `fill`."""
        more = tuple(b + e for b, e in zip(self.behind, self.beyond, strict=True))
        if any(self.before) or any(more):
            pads = ((0, 0), (0, 0), *zip(self.before, more, strict=True))
            x = np.pad(x, pads, constant_values=fill)
        steps = x.strides[2:]
        between = [s * n for s, n in zip(steps, self.strides, strict=True)]
        inside = [s * n for s, n in zip(steps, self.dilations, strict=True)]
        shape = (*x.shape[:2], *self.out, *self.kernel)
        return as_strided(x, shape, (*x.strides[:2], *between, *inside), writeable=False)


def windows(sizes, kernel, strides=None, pads=None, dilations=None, auto_pad="", ceil_mode=0):
    """The windows of the standard's attributes over spatial axes of these sizes."""
    rank, kernel = len(sizes), tuple(kernel)
    strides, dilations = tuple(strides or (1,) * rank), tuple(dilations or (1,) * rank)
    pads = tuple(pads or (0,) * 2 * rank)
    auto_pad = auto_pad.decode() if isinstance(auto_pad, bytes) else auto_pad
    if len({rank, len(kernel), len(strides), len(dilations), len(pads) / 2}) > 1:
        raise ShapeError(
            f"windows of {list(kernel)}, strides {list(strides)}, dilations {list(dilations)} and "
            f"pads {list(pads)} do not fit {rank} spatial axes"
        )
    axes = [
        _axis(*of, auto_pad, ceil_mode)
        for of in zip(sizes, kernel, strides, dilations, pads[:rank], pads[rank:], strict=True)
    ]
    before, behind, beyond, out = zip(*axes, strict=True) if axes else ((),) * 4
    return Windows(kernel, strides, dilations, before, behind, beyond, out)


def _axis(size, kernel, stride, dilation, before, behind, auto_pad, ceil_mode):
    """Padding before, behind, what the last window needs beyond, and the number of windows."""
    extent = dilation * (kernel - 1) + 1
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        padding = max((-(-size // stride) - 1) * stride + extent - size, 0)
        before = padding // 2 if auto_pad == "SAME_UPPER" else -(-padding // 2)
        behind = padding - before
    elif auto_pad == "VALID":
        before = behind = 0
    room = size + before + behind - extent
    count = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + before:
        count -= 1  # a window that begins in the padding behind is none
    if count < 1:
        raise ShapeError(f"a window of {extent} does not fit {size} + {before} + {behind} elements")
    return before, behind, max(0, (count - 1) * stride - room), count
