"""Compiling kernels in child processes, before they are needed.

No shapes here. The parent stays small (the compiler takes some 100 MB) and can be interrupted
(a KeyboardInterrupt inside the compiler can be swallowed); the children share the disk cache.
"""

import ctypes
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from ..errors import OnnxstreamError
from ..registry import kernels, op
from .disk_cache import cache_root, prune
from .simd import JIT
from .threads import set_precision, set_threads

ALWAYS = ("team_lead", "team_member", "joined")  # what any plan runs on
LONGEST = ("attention", "gemm")  # to compile: first, lest a child be left alone with one
DONTNEED = 4  # madvise: these pages will not be needed soon

_CHILD = """
import sys
sys.path[:0] = {paths!r}
from onnxstream_nb.kernels.compile import serve
serve()
"""


@op("Threads", domain="onnxstream_nb")
def threads(count):
    """How many threads the kernels called from this Python thread use from now on."""
    set_threads(count)


@op("Precision", domain="onnxstream_nb")
def precision(name):
    """How products of many rows are computed from now on, called from this Python thread."""
    set_precision(name)


@op("PrepareKernels", domain="onnxstream_nb")
def prepare(names, workers, progress=None):
    """Load the kernels of these names, compiling those that the disk cache lacks.

    `progress(text, fraction)` is told about every kernel that is compiled.
    """
    known = kernels()  # a plan may name more than there is: not every encoding has every order
    wanted = [known[n] for n in dict.fromkeys((*names, *ALWAYS)) if n in known]
    if not JIT:
        return
    missing = [k.name for k in wanted if not k.load()]
    missing.sort(key=lambda name: not name.startswith(LONGEST))
    if cache_root() is None:
        for done, name in enumerate(missing):
            _tell(progress, name, done, len(missing))
            kernels()[name].compile()
    elif missing:
        _compile_in_children(missing, workers, progress)
        prune()
        for name in missing:
            if not kernels()[name].load():
                raise OnnxstreamError(f"kernel {name} was compiled but is not in {cache_root()}")
    _drop_compiler_pages()


def _drop_compiler_pages():
    """Give back what the compiler's own code takes, some 50 MB: the system reads it again from its
    file should it be needed. Only code, which nobody has written to, and only on Linux."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    system = ctypes.CDLL(None)
    for line in maps.read_text().splitlines():
        where, rights, *_, name = line.split()
        if rights == "r-xp" and name.endswith("libllvmlite.so"):
            start, stop = (int(address, 16) for address in where.split("-"))
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), DONTNEED)


def _tell(progress, name, done, total):
    if progress is not None:
        progress(f"compiling {name} ({done + 1}/{total})", done / total)


class _Children:
    """Child processes that take names from a queue until it is empty."""

    def __init__(self, names, workers):
        self.queue = queue.Queue()
        for name in names:
            self.queue.put(name)
        self.events = queue.Queue()  # (event, text): "begin" a name, "done" a name, "end", "error"
        self.processes = []
        self.stopped = False
        self.threads = [threading.Thread(target=self._feed, daemon=True) for _ in range(workers)]

    def _feed(self):
        root = str(Path(__file__).resolve().parent.parent)
        above = str(Path(root).parent)
        paths = [p for p in (root, above) if (Path(p) / "onnxstream_nb").is_dir()]
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD.format(paths=paths)], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the parent, which ends the children
            )  # fmt: skip
        except OSError as error:
            self.events.put(("error", f"no child process: {error}"))
            return
        self.processes.append(child)
        if self.stopped:
            child.kill()
        with child:
            while not self.queue.empty():
                try:
                    name = self.queue.get_nowait()
                except queue.Empty:
                    break
                self.events.put(("begin", name))
                try:
                    child.stdin.write(name + "\n")
                    child.stdin.flush()
                    answer = child.stdout.readline()
                except BrokenPipeError:
                    answer = ""
                    with suppress(BrokenPipeError):  # what was not written stays unwritten
                        child.stdin.close()
                if answer.strip() != name:
                    child.kill()  # it may be waiting for the next name
                    self.events.put(("error", f"{name}: {answer}{child.stderr.read()[-2000:]}"))
                    return
                self.events.put(("done", name))
            child.stdin.close()
        self.events.put(("end", ""))

    def stop(self):
        """End all children, also one that is just being started."""
        self.stopped = True
        with suppress(queue.Empty):
            while True:
                self.queue.get_nowait()
        for process in list(self.processes):
            process.kill()


def _compile_in_children(names, workers, progress):
    children = _Children(names, max(1, min(workers, len(names))))
    try:
        for thread in children.threads:
            thread.start()
        finished, ended = 0, 0
        while ended < len(children.threads):
            try:
                event, text = children.events.get(timeout=0.05)  # so that Ctrl-C comes through
            except queue.Empty:
                continue
            if event == "error":
                raise OnnxstreamError(f"compiling a kernel failed: {text}")
            ended += event == "end"
            finished += event == "done"
            if event == "begin":
                _tell(progress, text, finished, len(names))
    finally:
        children.stop()


def serve():
    """The child's side: compile the kernels named on standard input, one a line."""
    for line in sys.stdin:
        name = line.strip()
        try:
            kernels()[name].address  # noqa: B018 - compiles and saves
        except OSError as error:
            sys.exit(f"{error}; free some space there, or set ONNXSTREAM_CACHE to another folder")
        print(name, flush=True)
