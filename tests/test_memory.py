"""Budgets of real processes: what they have resident at most, and that they run without more.

Each runs in a process of its own; the kernels are compiled by one that runs before.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Tiny

CHAT = """
import sys
from onnxstream_nb import device
from onnxstream_nb.llm import LanguageModel

ram = int(sys.argv[2])
model = LanguageModel(sys.argv[1], ram=ram)
model.feed([(7 * i) % 8000 for i in range(512)])
for i in range(30):
    model.feed([i])
print(model.session.provider.bytes_a_pass == 0, device.peak_rss(), ram)
"""

LEAST = """
import re, sys
from onnxstream_nb import device
from onnxstream_nb.errors import MemoryBudgetError
from onnxstream_nb.llm import LanguageModel
try:
    LanguageModel(sys.argv[1], ram=1)
except MemoryBudgetError as error:
    print(device.parse_size(re.search("at least (.*?) is needed", str(error))[1]))
"""

REPLY = """
import sys
from onnxstream_nb import device
from onnxstream_nb.llm import LanguageModel
model = LanguageModel(sys.argv[1], ram=int(sys.argv[2]))
model.feed(range(60))
model.feed([1])
print(device.peak_rss())
"""

CHAIN = r"""
import re, sys
from pathlib import Path
import numpy as np
from onnxstream_nb import device
from onnxstream_nb.graph import Graph, Node, Value, WeightRef
from onnxstream_nb.session import Session
from onnxstream_nb.streaming import READERS
from onnxstream_nb.weights import encoded_bytes
from dataclasses import replace

path, encoding, ram, limited = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "limited"
transposed = sys.argv[5] == "rows"
WIDTH, WIDER, PAIRS = 1024, 4096, 9
refs, nodes, name, offset = {}, [], "x", 4096
for i in range(PAIRS):
    for j, shape in enumerate([(WIDTH, WIDER), (WIDER, WIDTH)]):
        ref = WeightRef(f"w{i}.{j}", shape, "float32", path, offset, 0, encoding, transposed)
        ref = replace(ref, nbytes=encoded_bytes(ref))
        offset += ref.nbytes
        refs[ref.name] = ref
        nodes += [Node("MatMul", (name, ref.name), (f"p{i}.{j}",)),
                  Node("Tanh", (f"p{i}.{j}",), (f"y{i}.{j}",))]
        name = f"y{i}.{j}"
with path.open("ab") as file:
    file.truncate(offset)
graph = Graph(tuple(nodes), (Value("x", "float32", None),), (Value(name, "float32", None),), refs,
              {"": 21})
budget = device.parse_size(ram)
with Session(graph, ram=ram, threads=2) as session:
    if limited:
        import resource
        data = re.search(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())
        stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
        stacks = (READERS + 1) * (stack if 0 < stack < 1 << 30 else 8 << 20)  # reserved, not used
        most = 1024 * int(data[1]) + budget - device.current_rss() + stacks
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    for m in (1, session.chunk, 1, 8):
        y = session.run({"x": np.ones((m, WIDTH), np.float32)})[name]
        assert y.shape == (m, WIDTH) and np.isfinite(y).all() and y.any()
    for _ in range(3):
        session.run({"x": np.ones((1, WIDTH), np.float32)})
    part = session.provider.bytes_a_pass / session.plan.weight_bytes
print(part, device.peak_rss(), budget)
"""


def process(program: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_chat_stays_within_its_budget(tmp_path: Path) -> None:
    """Reading a prompt and writing."""
    path = tmp_path / "m.gguf"
    tiny = Tiny(vocab=8000, hidden=512, intermediate=1536, layers=8, heads=8, kv_heads=4,
                head_dim=64, context=1024)  # fmt: skip
    write_gguf(path, tiny, "F16")
    process(CHAT, path, 10**9)  # compiles
    least = int(process(LEAST, path)[0])
    for factor, held in ((1, "False"), (1.15, "False"), (2, "True")):
        all_held, peak, ram = process(CHAT, path, int(factor * least))
        assert all_held == held
        assert int(peak) <= int(ram)


def test_the_least_that_is_named_covers_the_start(tmp_path: Path) -> None:
    """The engine takes more for a moment when it is loaded than a small model needs later."""
    write_gguf(tmp_path / "m.gguf", Tiny(), "F16")
    process(LEAST, tmp_path / "m.gguf")  # compiles
    least = int(process(LEAST, tmp_path / "m.gguf")[0])
    assert int(process(REPLY, tmp_path / "m.gguf", least)[0]) <= least


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """151 MB of float16 between -1 and 1, behind a page."""
    path = tmp_path_factory.mktemp("large") / "w.bin"
    values = np.random.default_rng(0).uniform(-1, 1, 4 << 20).astype(np.float16)
    with path.open("wb") as file:
        file.write(bytes(4096))
        for _ in range(18):
            file.write(values.tobytes())
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read, and limits kept, as on Linux")
@pytest.mark.parametrize(
    ("order", "ways"),
    [("rows", {"160MB": "limited", "230MB": "free"}), ("columns", {"180MB": "limited"})],
)
def test_a_model_larger_than_its_budget(order: str, ways: dict[str, str], weights: Path) -> None:
    """151 MB of weights in a process of at most so much, itself included; also when the system
    gives it no more data than that."""
    process(CHAIN, weights, "float16", "1GB", "free", order)
    for ram, limit in ways.items():
        part, peak, budget = map(float, process(CHAIN, weights, "float16", ram, limit, order))
        assert 0.2 < part <= 1
        assert 0.5 * budget < peak <= budget
