"""`generate --batch`: the file of prompts, what is printed in which order, and what goes wrong."""

from __future__ import annotations

import io
import json
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from batch_models import open_tiny, write_tiny

from onnxstream_nb import cli, ui
from onnxstream_nb.cli.batch import read_requests
from onnxstream_nb.errors import UsageError
from onnxstream_nb.model import Model

FOLDER = Path(__file__).parent / "fixtures" / "models"

pytestmark = pytest.mark.usefixtures("panels_pay")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("batch") / "tiny.gguf")


@pytest.fixture(autouse=True)
def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every model is the tiny one, or the file that MODEL names; returns how it was loaded."""
    asked: dict[str, Any] = {}

    def load_tiny(name: str, *, progress: Any, **options: Any) -> Model:
        asked.update(options)
        file = Path(name) if "/" in name else path
        return open_tiny(file, load="ram" if file == path else "mmap", context=options["context"])

    monkeypatch.setattr(Model, "load", load_tiny)
    return asked


def single(prompt: str, **options: Any) -> str:
    """What `generate --prompt` says."""
    out, sys.stdout = sys.stdout, io.StringIO()
    try:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        assert cli.main(["generate", "m", "--prompt", prompt, "--temperature", "0", *flags]) == 0
        return sys.stdout.getvalue().removesuffix("\n")
    finally:
        sys.stdout = out


def batch(file: Path, *arguments: str, model: str = "m") -> int:
    return cli.main(["generate", model, "--batch", str(file), "--temperature", "0", *arguments])


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Three prompts, of which the first takes longest."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "first", "id": "one", "max_tokens": 30}\n\n'
        '{"prompt": "second\\nof\\nmany lines", "system": "be brief", "id": 7}\n'
        '{"prompt": "third", "id": null}\n',
        encoding="utf-8",
    )
    return file


# -- what is printed ---------------------------------------------------------------------------


def test_text(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch(lines, "--max-tokens", "6") == 0
    wanted = [
        ("[one] first", single("first", max_tokens=30)),
        ("[7] second of many lines", single("second\nof\nmany lines", max_tokens=6,
                                            system="be brief")),
        ("[4] third", single("third", max_tokens=6)),
    ]  # fmt: skip
    capsys_out = capsys.readouterr()
    assert capsys_out.out == "".join(f"{above}\n{text}\n\n" for above, text in wanted)
    assert "answered 0 of 3 prompts" in capsys_out.err


def test_json_lines_in_the_order_of_the_file(
    lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(lines, "--max-tokens", "6", "--json", "--batch-size", "3") == 0
    got = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [g["id"] for g in got] == ["one", 7, 4]
    assert [g["prompt"] for g in got] == ["first", "second\nof\nmany lines", "third"]
    assert [len(g["tokens"]) for g in got] == [30, 6, 6]
    assert [g["completion_tokens"] for g in got] == [30, 6, 6]
    assert {g["stop_reason"] for g in got} == {"length"}
    assert got[2]["text"] == single("third", max_tokens=6)
    assert got[0].keys() == {
        "id", "prompt", "text", "tokens", "prompt_tokens", "completion_tokens", "stop_reason",
    }  # fmt: skip


def test_one_prompt_a_line_from_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\r\n\n{not json}\n"))
    assert batch(Path("-"), "--max-tokens", "3", "--show-prompt") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "[1] hello" and out.splitlines()[3] == "[3] {not json}"
    assert "userxhello" in err


def test_a_long_prompt_is_cut_above_its_reply(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("word " * 40, encoding="utf-8")
    assert batch(tmp_path / "a.txt", "--max-tokens", "1", "--raw") == 0
    assert capsys.readouterr().out.splitlines()[0] == "[1] " + ("word " * 15)[:71] + "…"


def test_a_prompt_that_fails_is_reported_in_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(f"one\n{'x' * 200}\nthree\n", encoding="utf-8")
    for flags in ([], ["--json"]):
        assert batch(tmp_path / "a.txt", "--max-tokens", "2", "--context", "90", *flags) == 2
    out = capsys.readouterr().out.splitlines()
    assert out[4].startswith("error: the prompt has") and "--context" in out[4]
    reports = [json.loads(line) for line in out[9:]]
    assert [r["stop_reason"] for r in reports] == ["length", "error", "length"]
    assert reports[1]["error"] == out[4].removeprefix("error: ") and reports[1]["tokens"] == []


def test_a_graph_that_reads_one_sequence_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    masked = str(FOLDER / "onnxstream_llama_small")
    assert batch(tmp_path / "a.txt", "--max-tokens", "2", model=masked) == 0
    out, err = capsys.readouterr()
    assert out.count("[") == 2
    assert err.count("one sequence at a time: its prompts run one after the other") == 1


def interrupting(monkeypatch: pytest.MonkeyPatch, times: dict[int, int]) -> None:
    """Ctrl-C, so often, at some of the reports on the answers: how many others come before them
    depends on what has been compiled."""
    calls = []

    @contextmanager
    def progress() -> Any:
        def report(text: str, fraction: float | None) -> None:
            if not text.startswith("answered"):
                return
            calls.append(text)
            for _ in range(times.get(len(calls), 0)):
                signal.raise_signal(signal.SIGINT)

        yield report

    monkeypatch.setattr(ui, "progress", progress)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_prints_what_is_complete(
    times: int, lines: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second and the third prompt, though the first is not: it alone would take 30 tokens."""
    before = signal.getsignal(signal.SIGINT)
    interrupting(monkeypatch, {20: times})
    assert batch(lines, "--max-tokens", "6", "--json") == 130
    out, err = capsys.readouterr()
    got = [json.loads(line) for line in out.splitlines()]
    assert [(g["id"], g["stop_reason"]) for g in got] == [(7, "length"), (4, "length")]
    assert "interrupted" in err or times == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_a_budget_is_to_hold_as_many_contexts_as_are_asked_for(
    lines: Path, load: dict[str, Any]
) -> None:
    assert batch(lines, "--max-tokens", "1") == 0
    assert "sequences" not in load  # as many as find room in what one context takes
    assert batch(lines, "--max-tokens", "1", "--batch-size", "2") == 0
    assert load["sequences"] == 2
    assert batch(lines, "--max-tokens", "1", "--batch-size", "20") == 0
    assert load["sequences"] == 3


# -- the file ----------------------------------------------------------------------------------


def written(folder: Path, text: str | bytes) -> str:
    file = folder / "given"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(file)


def test_lines_are_prompts(tmp_path: Path) -> None:
    text = "\ufeff first \r\n \nsecond\u2028still second\x0c\n{third"
    requests = read_requests(written(tmp_path, text))
    assert [(r.prompt, r.id) for r in requests] == [
        (" first ", 1), ("second\u2028still second\x0c", 3), ("{third", 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no prompt in it"),
        (" \n\n", "there is no prompt in it"),
        (b"\xff\xfe", "it is not UTF-8 text"),
        ('{"prompt": "a"}\nplain', "line 2: it is no JSON"),
        ("{plain", "line 1: it is no JSON"),
        ('{"prompt": "a"}\n[1]', "line 2: it is no JSON object"),
        ('{"prompt": "a", "heat": 1}', 'line 1: {"heat": 1} is unknown; use "prompt"'),
        ('\n{"text": "a"}', 'line 2: {"text": "a"} is unknown'),
        ('{"system": "a"}', 'line 1: it has no "prompt"'),
        ('{"prompt": ""}', 'line 1: it has no "prompt", or an empty one'),
        ('{"prompt": 3}', 'line 1: {"prompt": 3} is of the wrong kind'),
        ('{"prompt": "a", "max_tokens": true}', '{"max_tokens": true} is of the wrong kind'),
        ('{"prompt": "a", "max_tokens": 0}', '"max_tokens" must be at least 1'),
        ('{"prompt": "a", "id": [1]}', '{"id": [1]} is of the wrong kind'),
    ],
)
def test_what_makes_no_sense_is_named_and_nothing_is_run(
    text: str | bytes, problem: str, tmp_path: Path, load: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_requests(file)
    assert problem in str(caught.value) and str(caught.value).startswith(f"--batch {file}")
    assert batch(Path(file)) == 2
    assert problem in capsys.readouterr().err and not load


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_requests(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--prompt is missing"),
        (["--batch", "f", "--prompt", "p"], "--prompt and --batch exclude each other"),
        (["--batch", "f", "--draft", "d"], "--draft guesses for one reply"),
        (["--prompt", "p", "--batch-size", "2"], "--batch-size is for --batch FILE"),
        (["--batch", "f", "--batch-size", "0"], "--batch-size: must be at least 1"),
    ],
)
def test_flags_that_exclude_each_other(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "m", *arguments]) == 2
    assert problem in capsys.readouterr().err
