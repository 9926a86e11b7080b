"""A small model to stream, and the program over a disk that is slow, hangs or fails.

`python streamed_chat.py [--delay S] [--hang-after N] [--fail-after N] VERB MODEL ...` is the
program's own command line; every direct read takes S seconds, and after N of them the disk answers
no more, or fails, until the file MODEL.mended is there.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(path: Path, name: str = "tiny", wide: bool = False) -> Path:
    """A GGUF with a chat template and more pieces than the ring has buffers; its text is noise.

    One that is `wide` has 50 MB of weights, which is more than a budget leaves room for.
    """
    from llama_fixtures import write_gguf
    from llama_oracle import Tiny
    from perplexity_oracle import tokenizer

    def extra(writer: Any) -> None:
        writer.add_name(name)
        tokenizer(writer)
        writer.add_chat_template(CHATML)

    hidden = 512 if wide else 64
    tiny = Tiny(
        vocab=405, hidden=hidden, intermediate=3 * hidden, layers=8, heads=4, kv_heads=2,
        head_dim=hidden // 4, context=2048,
    )  # fmt: skip
    write_gguf(path, tiny, "F16", extra=extra)
    return path


class Disk:
    """os.preadv of a disk that takes its time, and after some reads hangs or fails."""

    def __init__(self, given: argparse.Namespace, mended: Path) -> None:
        self._given, self._mended = given, mended
        self._real, self._count = os.preadv, 0
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: Any, offset: int, *flags: int) -> int:
        given = self._given
        with self._lock:
            self._count += 1
        time.sleep(given.delay)
        if given.hang_after and self._count > given.hang_after and not self._mended.exists():
            threading.Event().wait()
        if given.fail_after and self._count > given.fail_after and not self._mended.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real(descriptor, buffers, offset, *flags)


def main() -> int:
    from onnxstream_nb import cli

    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--hang-after", type=int, default=0)
    parser.add_argument("--fail-after", type=int, default=0)
    given, rest = parser.parse_known_args()
    os.preadv = Disk(given, Path(rest[1] + ".mended"))  # type: ignore[assignment]
    return cli.main(rest)


if __name__ == "__main__":
    sys.exit(main())
