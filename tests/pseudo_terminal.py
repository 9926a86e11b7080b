"""Programs at a pseudo-terminal: what is typed, what is shown, how they end."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals are a thing of Unix")

ROOT = Path(__file__).parent.parent


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | more


class PseudoTerminal:
    """A program at the slave end of a pseudo-terminal of 80 columns. `prepare` is called in the
    child, before the program."""

    def __init__(
        self,
        command: Sequence[str],
        term: str = "xterm",
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        import fcntl
        import struct
        import termios

        pid, self.fd = pty.fork()
        if pid == 0:
            prepare()
            os.execve(command[0], list(command), environment(TERM=term, NO_COLOR="1"))
        self.pid = pid
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.seen = ""
        self._code: int | None = None

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, text: str, timeout: float = 30.0) -> str:
        """Reads until `text` is shown; returns what came before it."""
        end = time.monotonic() + timeout
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come: {self.seen[-3000:]!r}"
            self.read()
        before, _, self.seen = self.seen.partition(text)
        return before

    def wait(self, timeout: float = 30.0) -> int:
        """Waits for the end; returns the exit code."""
        end = time.monotonic() + timeout
        while self._code is None:
            assert time.monotonic() < end, f"the program did not end: {self.seen[-3000:]!r}"
            self.read()
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def close(self) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)

    def read(self) -> None:
        """Takes what is shown within a tenth of a second."""
        if not select.select([self.fd], [], [], 0.1)[0]:
            return
        try:
            data = os.read(self.fd, 65536).decode("utf-8", "replace")
        except OSError:  # the program has ended
            time.sleep(0.05)
            return
        if "\x1b[6n" in data:  # prompt_toolkit asks where the cursor is
            os.write(self.fd, b"\x1b[1;1R")
        self.seen += data
