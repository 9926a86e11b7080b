"""The flag --cuda: what it means, what it imports, and what is said, with a GPU and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_device import FakeDevice
from llama_fixtures import write_gguf
from llama_oracle import Tiny
from perplexity_oracle import tokenizer
from streamed_chat import CHATML

from onnxstream_nb import Model, cli
from onnxstream_nb.cli.main import parse
from onnxstream_nb.device import format_size
from onnxstream_nb.drafting import left_beside
from onnxstream_nb.errors import UsageError
from onnxstream_nb.generation import Stats
from onnxstream_nb.gpu import asked, found, offload
from onnxstream_nb.gpu.device import DeviceError
from onnxstream_nb.llm import LanguageModel
from onnxstream_nb.ui import footer_parts

TINY = Tiny(vocab=405, hidden=32, intermediate=64, heads=2, kv_heads=1, head_dim=16, layers=1)
MATRICES = 2 * (32 * (32 + 2 * 16 + 32 + 3 * 64) + 405 * 32)  # bytes, float16
NO_DRIVER = (
    "--cuda: no NVIDIA driver was found: install one for your GPU, 580 or newer; the CPU is used"
)
REFUSED = """
import sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("cuda", "numba_cuda"), name
        assert not name.startswith("numba.cuda"), name
sys.meta_path.insert(0, Refused())
"""
RUN = """
from onnxstream_nb.cli import main
code = main(sys.argv[1:])
taken = [n for n in sys.modules if n.split(".")[0] == "cuda" or n.startswith("numba.cuda")]
sys.exit(str(taken) if taken else code)
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("ONNXSTREAM_")]:
        if name != "ONNXSTREAM_CACHE":
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def extra(writer: Any) -> None:
        tokenizer(writer)
        writer.add_chat_template(CHATML)

    path = tmp_path_factory.mktemp("cuda") / "tiny.gguf"
    write_gguf(path, TINY, "F16", extra=extra)
    return path


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevice]:
    """The GPUs that were opened, each a new one of the tests."""
    opened: list[FakeDevice] = []

    def first() -> FakeDevice:
        opened.append(FakeDevice(memory=1 << 30))
        return opened[-1]

    monkeypatch.setattr(offload, "_first", first)
    return opened


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "driver_version", lambda: None)


def generate(path: Path, *arguments: str) -> list[str]:
    line = ["generate", str(path), "--prompt", "hello", "--max-tokens", "2", "--temperature", "0"]
    return [*line, "--precision", "exact", *arguments]


# -- the flag


@pytest.mark.parametrize("verb", ["chat", "generate", "bench", "perplexity"])
def test_every_verb_that_opens_a_model_has_it(verb: str) -> None:
    needed = {"generate": ["--prompt", "p"], "perplexity": ["--text", "t"]}.get(verb, [])
    assert asked(parse(verb, ["m", *needed], {})["cuda"]) == {}
    assert (
        asked(parse(verb, ["m", *needed, "--cuda", "0"], {"ONNXSTREAM_CUDA": "all"})["cuda"]) == {}
    )
    options = parse(verb, ["m", *needed], {"ONNXSTREAM_CUDA": "2.5"})
    assert asked(options["cuda"]) == {"device": "cuda", "cuda": 2_500_000_000}


@pytest.mark.parametrize(
    ("given", "meant"),
    [("4", 4 * 10**9), (".5", 5 * 10**8), ("4GB", 4 * 10**9), ("512MiB", 512 << 20), ("0.0", 0),
     ("auto", "auto"), ("ALL", "all")],
)  # fmt: skip
def test_a_bare_number_means_gigabytes(given: str, meant: int | str) -> None:
    assert parse("chat", ["--cuda", given], {})["cuda"] == meant


@pytest.mark.parametrize("given", ["", "some", "-1", "4X", "nan", "inf", "1e3", "0MB"])
def test_what_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match="^--cuda: .* a number of gigabytes, .* auto or all$"):
        parse("chat", [f"--cuda={given}"], {})
    with pytest.raises(UsageError, match="^ONNXSTREAM_CUDA: "):
        parse("chat", [], {"ONNXSTREAM_CUDA": given})


# -- without it, and without a GPU


@pytest.mark.parametrize("verb", ["help", "generate"])
def test_without_the_flag_nothing_of_cuda_is_imported(verb: str, model: Path) -> None:
    arguments = ["chat", "--help"] if verb == "help" else generate(model)
    done = python(REFUSED + RUN, *arguments)
    assert done.returncode == 0, done.stderr
    assert "AssertionError" not in done.stderr


def test_an_import_of_cuda_would_be_seen() -> None:
    looked = python(REFUSED + "from onnxstream_nb.gpu import found; found.compiler_version()")
    assert looked.returncode == 1 and "AssertionError: cuda" in looked.stderr
    taken = python("import sys, types; sys.modules['numba.cuda'] = types.ModuleType('c')\n" + RUN)
    assert taken.returncode == 1 and "['numba.cuda']" in taken.stderr


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", program, *arguments]
    return subprocess.run(line, capture_output=True, text=True)


def test_without_a_gpu_one_line_says_so(
    model: Path, no_gpu: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where two models are opened, and on standard error only."""
    assert cli.main(generate(model, "--json")) == 0
    plain = json.loads(capfd.readouterr().out)
    arguments = generate(model, "--json", "--cuda", "auto", "--draft", str(model))
    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    assert err.splitlines().count(NO_DRIVER) == 1 and err.count("--cuda") == 1
    document = json.loads(out)
    assert document["tokens"] == plain["tokens"] and document["gpu_bytes"] == 0


def test_a_driver_that_refuses_leaves_the_cpu(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def first() -> FakeDevice:
        raise DeviceError("the GPU: cuInit: no CUDA-capable device is detected")

    monkeypatch.setattr(offload, "_first", first)
    assert cli.main(generate(model, "--cuda", "4")) == 0
    line = "--cuda: the GPU: cuInit: no CUDA-capable device is detected; the CPU is used"
    assert line in capfd.readouterr().err.splitlines()


# -- with a GPU


def test_generate_says_what_lies_on_the_gpu(
    model: Path, devices: list[FakeDevice], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(generate(model, "--json")) == 0
    plain = json.loads(capsys.readouterr().out)
    assert cli.main(generate(model, "--json", "--cuda", "1")) == 0
    document = json.loads(capsys.readouterr().out)
    assert plain["gpu_bytes"] == 0 and document["gpu_bytes"] == MATRICES
    assert document["tokens"] == plain["tokens"]
    assert len(devices) == 1 and devices[0].launched and devices[0].closed


def test_the_footer_says_it(model: Path, devices: list[FakeDevice]) -> None:
    with Model.load(model, device="cuda") as opened:
        reply = opened.generate("hello", max_tokens=2, temperature=0)
        list(reply)
    assert f"{format_size(MATRICES)} of weights on the GPU" in footer_parts(reply.stats)
    assert not any("GPU" in part for part in footer_parts(Stats()))


def test_a_gpu_that_failed_holds_nothing_that_is_used(
    model: Path, devices: list[FakeDevice]
) -> None:
    with Model.load(model, device="cuda") as opened:
        devices[0].fail_after = devices[0].calls
        reply = opened.generate("hello", max_tokens=2, temperature=0)
        assert list(reply)
    assert reply.stats.gpu_bytes == 0


def test_a_draft_model_has_its_part_of_the_budget(model: Path, devices: list[FakeDevice]) -> None:
    with Model.load(model, device="cuda", cuda=MATRICES + 40_000, draft=model) as opened:
        assert opened.draft is not None and 0 < opened.llm.gpu_bytes < 60_000
        taken = opened.draft.gpu_bytes
        assert taken == MATRICES and len(devices) == 2
        assert left_beside(opened.draft, "all") == "all"
        assert left_beside(opened.draft, "1MB") == 10**6 - taken
        assert left_beside(opened.draft, 10) == 0


def test_what_is_streamed_beside_a_gpu_is_counted(model: Path, devices: list[FakeDevice]) -> None:
    llm = LanguageModel(model, load="stream", device="cuda", cuda=40_000)
    llm.feed([3, 4])
    assert llm.streams and llm.bytes_streamed > 0 and llm.gpu_bytes > 20_000
    llm.close()


def test_bench_and_perplexity(
    model: Path, devices: list[FakeDevice], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["bench", str(model), "-p", "0", "-n", "2", "-r", "1", "--cuda", "1", "--json"]
    assert cli.main(line) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["backend"], document["gpu_bytes"]) == ("CUDA", MATRICES)
    assert document["decode_share"] is None
    (tmp_path / "t.txt").write_text("the quick brown fox " * 20)
    line = ["perplexity", str(model), "--text", str(tmp_path / "t.txt"), "--window", "8"]
    assert cli.main([*line, "--tokens", "8", "--cuda", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu_bytes"] > MATRICES
    assert len(devices) == 2 and all(device.launched for device in devices)
