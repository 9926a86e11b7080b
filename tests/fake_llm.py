"""A language model without weights: it answers by rule, one byte a token, as slowly as asked.

`python fake_llm.py [--model-context N] [--delay S] ...` chats with it at the terminal.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxstream_nb.errors import Interrupted
from onnxstream_nb.model import Model
from onnxstream_nb.progress import Reading
from onnxstream_nb.tokenizer.vocabulary import Conventions, Tokenizer

BOS, IM_START, IM_END = 256, 257, 258
SPECIAL = {"<s>": BOS, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
TEXTS = {number: text for text, number in SPECIAL.items()}
VOCAB = 259
CHUNK = 16
REPLY_BEGINS = "<|im_start|>assistant\n"


class FakeTokenizer(Tokenizer):
    """One id for each byte, then the special tokens; ChatML, which the package has built in."""

    def __init__(self, add_bos: bool = False) -> None:
        super().__init__(VOCAB, Conventions(special=SPECIAL, bos_id=BOS, add_bos=add_bos))

    def token_bytes(self, token: int) -> bytes:
        return TEXTS[token].encode() if token in TEXTS else bytes([token])

    def encode_parts(self, text: str, special: bool, stand_ins: Mapping[int, str]) -> list[int]:
        ids: list[int] = []
        while text:
            found = next((s for s in SPECIAL if special and text.startswith(s)), None)
            if found:
                ids.append(SPECIAL[found])
            else:
                ids += text[0].translate(stand_ins).encode()
            text = text[len(found) if found else 1 :]
        return ids


def shout(message: str) -> str:
    """The default rule: repeats the message in capitals."""
    return message.upper()


class FakeLLM:
    """Continues a ChatML prompt with `answer(last user message)`, any other text with "!".

    `delay` is seconds for each chunk fed. `calls` are the ids of each feed, `longest` is the most
    tokens that it held. It says that each chunk streams `pass_bytes`, evenly over the delay.
    """

    streams, every_position, gpu_bytes = False, True, 0

    def __init__(
        self,
        answer: Callable[[str], str] = shout,
        *,
        context: int = 4096,
        delay: float = 0.0,
        pass_bytes: int = 0,
    ) -> None:
        self.context, self.vocab_size, self.delay = context, VOCAB, delay
        self.tokens: list[int] = []
        self.calls: list[list[int]] = []
        self.passes = self.longest = 0
        self.pass_bytes, self._streamed = pass_bytes, 0
        self._pass: tuple[float, int, int] | None = None  # when it began, its tokens, all wanted
        self.closed = False
        self.fail: Exception | None = None
        self._answer = answer
        self._tokenizer = FakeTokenizer()

    def feed(self, ids: Sequence[int], stop: threading.Event | None = None) -> np.ndarray:
        assert ids, "a model must be fed something"
        assert not self.closed
        assert len(self.tokens) + len(ids) <= self.context, "fed beyond the context"
        self.calls.append(list(ids))
        wanted = len(self.tokens) + len(ids)
        for start in range(0, len(ids), CHUNK):
            if self.fail is not None:
                raise self.fail
            chunk, wait = ids[start : start + CHUNK], stop or threading.Event()
            self._pass = time.monotonic(), len(chunk), wanted
            try:
                if wait.wait(self.delay) if self.delay else wait.is_set():
                    raise Interrupted("stopped while reading")
            finally:
                self._streamed, self._pass = self.bytes_streamed, None
            self.tokens += chunk
            self.passes += 1
        self.longest = max(self.longest, len(self.tokens))
        logits = np.full(VOCAB, -30.0, np.float32)
        logits[self.wanted()] = 30.0
        return logits

    def logits(self, ids: Sequence[int], stop: threading.Event | None = None) -> np.ndarray:
        passes, rows = self.passes, [self.feed([i], stop) for i in ids]
        self.passes = passes + 1
        self.calls[-len(rows) :] = [list(ids)]
        return np.stack(rows)

    @property
    def bytes_streamed(self) -> int:
        return self._streamed + self._pass_read()

    def _pass_read(self) -> int:
        if self._pass is None or not self.delay:
            return 0
        return int(self.pass_bytes * min(1.0, (time.monotonic() - self._pass[0]) / self.delay))

    def reading(self) -> Reading | None:
        if self._pass is None:
            return None
        done, (_, now, wanted) = self._pass_read(), self._pass
        name = "blk.12.ffn_up.weight" if self.pass_bytes else ""
        return Reading(
            name, self._streamed + done, done, self.pass_bytes, len(self.tokens), wanted, now
        )

    def rewind(self, length: int) -> None:
        assert 0 <= length <= len(self.tokens)
        del self.tokens[length:]

    def close(self) -> None:
        self.closed = True

    def wanted(self) -> int:
        """The id that comes next, from nothing but the tokens in the cache."""
        text = b"".join(self._tokenizer.token_bytes(token) for token in self.tokens)
        prompt, begins, reply = text.rpartition(REPLY_BEGINS.encode())
        if not begins:
            return ord("!")
        user = prompt.rpartition(b"<|im_start|>user\n")[2].removesuffix(b"<|im_end|>\n")
        answer = self._answer(user.decode("utf-8", "replace")).encode()
        return answer[len(reply)] if len(reply) < len(answer) else IM_END


def fake_model(answer: Callable[[str], str] = shout, **options: Any) -> Model:
    """A Model with the fake tokenizer and language model."""
    llm: Any = FakeLLM(answer, **options)
    return Model("fake", Path("fake.gguf"), FakeTokenizer(), llm, load_s=0.5)


POEM = """# The sea

It is **wide**, and it is *deep*,
and its waves are never asleep.

1. salt
2. water

| wave | metres |
|---|---:|
| small | 0.5 |
| large | 12 |

```python
def wave(height: float) -> str:
    return "~" * int(height)
```

> The end.
"""


def talk(message: str) -> str:
    """The rule of the program below: some messages have answers of their own."""
    if message == "poem":
        return POEM
    if message == "long":
        return "\n\n".join(f"Paragraph {i} goes on for a while." for i in range(1000))
    if message == "escape":
        return "red \x1b[31mtext\x1b]0;title\x07 \x9b2J end"
    return shout(message)


def main() -> int:
    from onnxstream_nb import chat

    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--pass-bytes", type=int, default=0)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--model-context", type=int, default=4096)
    parser.add_argument("--continue", dest="resume", action="store_true")
    parser.add_argument("--system")
    parser.add_argument("--generate", metavar="PROMPT", help="instead of a chat")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--fail", action="store_true")
    given = parser.parse_args()

    def load(name: str, *, progress: Callable[[str, float | None], None], **rest: Any) -> Model:
        steps = 100
        for i in range(steps):
            progress(f"compiling gemv_q4_1 ({i + 1}/{steps})", i / steps)
            threading.Event().wait(given.load_s / steps)
        model = fake_model(
            talk, delay=given.delay, context=given.model_context, pass_bytes=given.pass_bytes
        )
        if given.fail:
            model.llm.fail = OSError(2, "No such file or directory", "weights.bin")
        return model

    Model.load = load  # type: ignore[method-assign, assignment]
    if given.generate:
        from onnxstream_nb import cli

        return cli.main(
            ["generate", "fake", "--prompt", given.generate, *(["--json"] if given.json else [])]
        )
    return chat.run("fake", options=chat.ChatOptions(system=given.system, resume=given.resume))


if __name__ == "__main__":
    sys.exit(main())
