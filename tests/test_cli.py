"""The command line: help, flags, variables, errors, exit codes, and what the verbs print."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import onnxstream_nb
from onnxstream_nb import cli, model
from onnxstream_nb.cli.main import parse
from onnxstream_nb.cli.verbs import SAMPLING, VERBS
from onnxstream_nb.errors import ModelError, UsageError
from onnxstream_nb.progress import ReplyProgress

COMMAND = [sys.executable, "-m", "onnxstream_nb"]
HEAVY = ("numba", "llvmlite", "numpy", "onnx", "rich", "jinja2", "huggingface_hub", "tokenizers")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("ONNXSTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ONNXSTREAM_CACHE", str(tmp_path / "cache"))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that is a user error."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    return err.removeprefix("error: ").rstrip()


# -- a model that needs no weights ---------------------------------------------------------------


@dataclass
class FakeTokenizer:
    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        assert not skip_special
        return "".join(f"<{i}>" for i in ids)


class FakeRun:
    """Three tokens, unless stopped; `at_token` is called before each."""

    def __init__(self, at_token: Callable[[int], None] = lambda i: None) -> None:
        self.prompt_ids = [1, 7, 7]
        self.stats = model.Stats(prompt_tokens=3, prefill_s=0.5, load_s=0.25, peak_rss_mb=100.5)
        self.at_token, self.stopped = at_token, False

    def stop(self) -> None:
        self.stopped = True

    def progress(self) -> ReplyProgress:
        return ReplyProgress(None, self.stats.completion_tokens, 10, None)

    def __iter__(self) -> Iterator[model.Token]:
        for i, text in enumerate(("Par", "is", " ✓")):
            self.at_token(i)
            if self.stopped:
                self.stats.stop_reason = "interrupted"
                return
            self.stats.completion_tokens += 1
            self.stats.ttft_s, self.stats.decode_s = 0.6, 0.1 * i
            yield model.Token(text, 100 + i, -0.5)
        self.stats.stop_reason = "eos"


@dataclass
class FakeModel:
    """Stands for onnxstream_nb.model.Model; remembers what it was asked."""

    run: FakeRun = field(default_factory=FakeRun)
    asked: dict[str, Any] = field(default_factory=dict)
    closed: bool = False
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)

    def load(self, name: str, *, progress: Callable[..., None], **options: Any) -> FakeModel:
        progress("reading the weights", 0.5)
        self.asked |= {"name": name} | options
        return self

    def generate(self, prompt: str, **options: Any) -> FakeRun:
        self.asked |= {"prompt": prompt} | options
        return self.run

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(model, "Model", fake)
    return fake


# -- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--version",), ("generate", "--help")])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom onnxstream_nb.cli import main\n"
        f"code = main({list(arguments)!r})\n"
        f"loaded = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "sys.exit(str(loaded) if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "onnxstream_nb" in done.stdout


def test_help_is_quick() -> None:
    def best(command: list[str]) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - started)
        return min(times)

    assert best([*COMMAND, "--help"]) - best([sys.executable, "-c", ""]) < 0.15


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb_lists_each_flag_with_its_variable(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([name, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in VERBS[name].options:
        assert all(flag in text for flag in option.flags)
        assert f"[{option.variable}]" in text
    assert ("MODEL" in text.split("options:")[0]) == bool(VERBS[name].model)


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and verb.help in out for name, verb in VERBS.items())
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"onnxstream_nb {onnxstream_nb.__version__}\n"


README = Path(__file__).parent.parent / "README.md"


@pytest.mark.skipif(not README.exists(), reason="a checkout without README.md")
@pytest.mark.parametrize("name", VERBS)
def test_readme_lists_every_verb(name: str) -> None:
    assert f"| `{name}` | {VERBS[name].help} |" in README.read_text("utf-8")


def test_documented_sampling_defaults_are_the_samplers() -> None:
    from onnxstream_nb.sampling import SamplingParams

    defaults = SamplingParams()
    for option in SAMPLING:
        value = getattr(defaults, option.name)
        if value not in (None, ()):
            assert option.help.endswith(f"default {value}"), option.name


# -- flags and variables -------------------------------------------------------------------------


BAD_FLAGS = [
    (("generate",), "the following arguments are required: MODEL"),
    (("generate", "m"), "--prompt is missing; give it, or set ONNXSTREAM_PROMPT"),
    (("generate", "m", "--prompt", ""), "--prompt: the text is empty"),
    (("generate", "m", "--prompt"), "argument --prompt: expected one argument"),
    (("generate", "m", "--top", "3"), "unrecognized arguments: --top 3"),
    (("generate", "m", "n", "--prompt", "p"), "unrecognized arguments: n"),
    (("chat", "--max-tokens", "0"), "--max-tokens: must be at least 1, not 0"),
    (("chat", "--max-tokens", "ten"), "--max-tokens: 'ten' is not a whole number"),
    (("chat", "--temperature", "hot"), "--temperature: 'hot' is not a number"),
    (("chat", "--temperature", "-1"), "--temperature: must be at least 0, not -1"),
    (("chat", "--temperature", "nan"), "--temperature: must be at least 0, not nan"),
    (("chat", "--top-k", "-1"), "--top-k: must be at least 0, not -1"),
    (("chat", "--top-p", "0"), "--top-p: must be above 0 to 1, not 0"),
    (("chat", "--top-p", "1.5"), "--top-p: must be above 0 to 1, not 1.5"),
    (("chat", "--min-p", "2"), "--min-p: must be from 0 to 1, not 2"),
    (("chat", "--repeat-penalty", "0"), "--repeat-penalty: must be more than 0, not 0"),
    (("chat", "--stop", ""), "--stop: the text is empty"),
    (("chat", "--seed", "1.5"), "--seed: '1.5' is not a whole number"),
    (("chat", "--threads", "0"), "--threads: must be at least 1, not 0"),
    (("chat", "--context", "0"), "--context: must be at least 1, not 0"),
    (("chat", "--load", "disk"), "--load: 'disk' is none of auto, stream, mmap, ram"),
    (("chat", "--ram", "lots"), "--ram: 'lots' is not a size; write for example 2GB"),
    (("chat", "--ram", "0"), "--ram: the size must be more than 0, not '0'"),
    (("chat", "--ram", "1GB", "--load", "mmap"), "--ram and --load mmap exclude each other"),
    (("bench", "m", "-p", "1,x"), "--n-prompt: 'x' is not a whole number"),
    (("bench", "m", "-p", "-1"), "--n-prompt: must be at least 0, not -1"),
    (("bench", "m", "-r", "0"), "--repetitions: must be at least 1, not 0"),
    (("bench", "m", "--dtype", "f16"), "--dtype is the storage of --random-weights: give both"),
    (("bench", "m", "--random-weights", "--dtype", "q2"), "--dtype: 'q2' is none of f16, q8_0"),
    (("bench", "m", "-p", "0", "-n", "0"), "--n-prompt and --n-gen are both 0"),
    (("bench", "m", "--random-weights"), "--random-weights: 'm' is no catalogue model; known: "),
    (("generat",), "unknown command 'generat'; did you mean generate?"),
    (("--loud",), "unknown command '--loud'; commands: chat, generate"),
    (("rm", "nobody"), "'nobody' is not installed; `onnxstream_nb list` shows what is"),
    (("show", "nobody"), "'nobody' is no path, no catalogue name and not installed"),
    (("inspect", "/nowhere/x.onnx"), "there is no file or folder '/nowhere/x.onnx'"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_FLAGS, ids=lambda v: " ".join(v)[:40])
def test_bad_flags(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(capsys, *arguments).startswith(message)


def test_parse_errors_say_where_to_look(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "pull").endswith("(see onnxstream_nb pull --help)")


def test_variables_stand_for_flags() -> None:
    environment = {
        "ONNXSTREAM_TOP_K": "7", "ONNXSTREAM_RAM": "1.5GiB", "ONNXSTREAM_LOAD": "stream",
        "ONNXSTREAM_STOP": "\n", "ONNXSTREAM_RAW": "yes", "ONNXSTREAM_JSON": "0",
        "ONNXSTREAM_PROMPT": "hi", "ONNXSTREAM_DRAFT": "small", "ONNXSTREAM_SPECULATE": "0",
    }  # fmt: skip
    options = parse("generate", ["m", "--top-k", "8"], environment)
    assert options["top_k"] == 8  # the command line wins
    assert (options["ram"], options["load"]) == (3 << 29, "stream")
    assert (options["stop"], options["raw"], options["json"]) == (("\n",), True, False)
    assert (options["prompt"], options["model"]) == ("hi", "m")
    assert (options["draft"], options["speculate"]) == ("small", 0)
    bench = parse("bench", ["m"], {"ONNXSTREAM_N_PROMPT": "16,32", "ONNXSTREAM_N_DEPTH": "4"})
    assert (bench["n_prompt"], bench["n_depth"], bench["n_gen"]) == ((16, 32), (4,), (64,))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TEMPERATURE", "warm", "ONNXSTREAM_TEMPERATURE: 'warm' is not a number"),
        ("RAM", "big", "ONNXSTREAM_RAM: 'big' is not a size"),
        ("SHOW_PROMPT", "maybe", "ONNXSTREAM_SHOW_PROMPT: 'maybe' is neither 1 nor 0"),
        ("SPECULATE", "8", "ONNXSTREAM_SPECULATE: must be at most 7, not 8"),
        ("SPECULATE", "-1", "ONNXSTREAM_SPECULATE: must be at least 0, not -1"),
        ("DRAFT", "", "ONNXSTREAM_DRAFT: the text is empty"),
        ("LOAD", "MMAP", "ONNXSTREAM_LOAD: 'MMAP' is none of auto, stream, mmap, ram"),
        ("DEBUG", "x", "ONNXSTREAM_DEBUG: 'x' is neither 1 nor 0"),
    ],
)
def test_bad_variables_are_named(variable: str, value: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse("generate", ["m", "--prompt", "p"], {f"ONNXSTREAM_{variable}": value})
    assert str(caught.value).startswith(message)


def test_ram_and_mapping_exclude_each_other_from_variables_too() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        parse("chat", ["--load", "mmap"], {"ONNXSTREAM_RAM": "1GB"})
    assert parse("chat", ["--load", "ram"], {"ONNXSTREAM_RAM": "1GB"})["ram"] == 10**9


def test_defaults_and_repeated_flags() -> None:
    options = parse("chat", ["--stop", "a", "--stop=-b", "--presence-penalty", "-1.5"], {})
    assert (options["model"], options["load"], options["ram"]) == (None, "auto", None)
    assert (options["stop"], options["presence_penalty"]) == (("a", "-b"), -1.5)
    assert all(options[name] is None for name in ("temperature", "seed", "context", "threads"))


# -- generate ------------------------------------------------------------------------------------


def test_generate_json(fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "m", "--prompt", "capital?", "--json", "--temperature", "0"]
    assert cli.main([*arguments, "--max-tokens", "9", "--stop", "x", "--load", "ram"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {
        "text": "Paris ✓", "tokens": [100, 101, 102], "prompt_tokens": 3, "completion_tokens": 3,
        "passes": 0, "drafted": 0, "accepted": 0,
        "prefill_tps": 6.0, "decode_tps": 10.0, "ttft_s": 0.6, "load_s": 0.25,
        "bytes_read": 0, "gpu_bytes": 0, "peak_rss_mb": 100.5, "stop_reason": "eos",
    }  # fmt: skip
    assert out.count("\n") == 1
    assert fake.asked == {
        "name": "m", "load": "ram", "ram": None, "threads": None, "context": None,
        "precision": "auto", "kv_cache": "f16", "kv_spill": None, "packed": None, "draft": None,
        "speculate": None, "prompt": "capital?", "system": None, "raw": False, "max_tokens": 9,
        "temperature": 0.0, "stop": ("x",),
    }  # fmt: skip
    assert fake.closed


def test_generate_streams_text(fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "m", "--prompt", "p", "--show-prompt"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris ✓\n"
    assert "<1><7><7>\n" in err


def test_generate_reads_stdin(fake: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n\n"))
    assert cli.main(["generate", "m", "--prompt", "-", "--raw"]) == 0
    assert (fake.asked["prompt"], fake.asked["raw"]) == ("two\nlines\n", True)


def test_generate_refuses_empty_stdin(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert fails(capsys, "generate", "m", "--prompt", "-").startswith("--prompt: stdin is empty")


def test_a_terminal_gets_no_escape_sequences(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnxstream_nb.cli import commands

    evil = [model.Token("a\x1b[2Jb\n", 1, 0.0)]
    commands.stream(evil, FakeRun().progress)
    assert capsys.readouterr().out == "a\x1b[2Jb\n\n"  # a pipe gets the bytes as they are
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    commands.stream(evil, FakeRun().progress)
    assert capsys.readouterr().out == "a[2Jb\n\n"


def interrupt_at(token: int) -> Callable[[int], None]:
    return lambda i: signal.raise_signal(signal.SIGINT) if i == token else None


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_keeps_what_was_said(
    as_json: bool, fake: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    fake.run = FakeRun(interrupt_at(2))
    assert cli.main(["generate", "m", "--prompt", "p", *(["--json"] if as_json else [])]) == 130
    out = capsys.readouterr().out
    if as_json:
        report = json.loads(out)
        assert (report["text"], report["stop_reason"]) == ("Paris", "interrupted")
    else:
        assert out == "Paris\n"
    assert fake.closed
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_ends_the_program(
    fake: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(i: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    fake.run = FakeRun(twice)
    assert cli.main(["generate", "m", "--prompt", "p", "--json"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("interrupted\n")


def test_ctrl_c_while_loading(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fake, "load", load)
    assert cli.main(["generate", "m", "--prompt", "p"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# -- errors and exits ----------------------------------------------------------------------------


def test_errors_are_one_line_and_debug_shows_the_traceback(
    fake: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: object, **options: object) -> None:
        raise ModelError("x.gguf: the header ends early;\n  fetch it again")

    monkeypatch.setattr(fake, "load", load)
    arguments = ("generate", "m", "--prompt", "p")
    assert fails(capsys, *arguments) == "x.gguf: the header ends early; fetch it again"
    for debug, variable in ((["--debug"], "0"), ([], "1")):
        monkeypatch.setenv("ONNXSTREAM_DEBUG", variable)
        assert cli.main([*arguments, *debug]) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err and err.endswith("error: x.gguf: the header ends early;"
                                                   " fetch it again\n")  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["list"]])
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_has_gone_is_no_error(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, *arguments], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == (0 if "generate" in arguments else 141)  # argparse ignores it


def test_trace_prints_a_table(fake: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    from onnxstream_nb import trace

    def record(i: int) -> None:
        recorded = trace.current()
        assert recorded is not None
        recorded.record("MatMul", 0.5, 10**9)

    fake.run = FakeRun(record)
    assert cli.main(["generate", "m", "--prompt", "p", "--trace"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris ✓\n"
    assert err.splitlines()[-1].split() == ["MatMul", "3", "1.5000", "100.0%", "3.000", "2.00"]
    assert trace.current() is None


# -- chat, list, rm, show, doctor ----------------------------------------------------------------


def test_chat_without_a_name_takes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxstream_nb import chat

    asked: list[Any] = []

    def run(name: str, *, options: chat.ChatOptions) -> int:
        asked.extend((name, options))
        return 0

    monkeypatch.setattr(chat, "run", run)
    arguments = ["chat", "--continue", "--system", "s", "--top-k", "3", "--threads", "2"]
    arguments += ["--draft", "tiny", "--speculate", "3"]
    assert cli.main(arguments) == 0
    name, options = asked
    assert (name, options.resume, options.system) == ("smollm2-135m", True, "s")
    assert options.sampling == {"top_k": 3}
    assert options.load_options == {
        "load": "auto", "ram": None, "threads": 2, "context": None, "precision": "auto",
        "kv_cache": "f16", "kv_spill": None, "packed": None, "draft": "tiny", "speculate": 3,
    }  # fmt: skip


def test_list_knows_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {"smollm2-135m", "tinyllama", "mistral-7b"} <= set(rows)
    assert not rows["tinyllama"]["installed"] and rows["tinyllama"]["size_bytes"] > 2e9
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "installed", "size", "description"]
    assert any(line.startswith("tinyllama") and " no " in line for line in lines)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One model on this disk; the list collects the names that are removed."""
    from onnxstream_nb import hub

    removed: list[str] = []
    here = hub.Installed("some/model", Path("/x"), 2 * 10**9, True)
    monkeypatch.setattr(hub, "installed", lambda: [here])
    monkeypatch.setattr(hub, "remove", lambda name: removed.append(name) or here.size_bytes)
    return removed


def test_rm_asks_first(
    installed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "give --yes" in fails(capsys, "rm", "some/model")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    questions: list[str] = []
    for answer, code in (("n", 1), ("", 1), ("YES", 0)):
        assert installed == []
        monkeypatch.setattr("builtins.input", lambda q, a=answer: questions.append(q) or a)
        assert cli.main(["rm", "some/model"]) == code
    assert installed == ["some/model"]
    assert questions[0] == "delete some/model (2.00 GB) in /x? [y/N] "
    assert capsys.readouterr().out == "kept\nkept\nfreed 2.00 GB\n"


def test_rm_yes(installed: list[str]) -> None:
    assert cli.main(["rm", "some/model", "--yes"]) == 0
    assert installed == ["some/model"]


def test_show_does_not_download(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "mistral-7b", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["installed"] == "no; get it with: onnxstream_nb pull mistral-7b"
    assert facts["download"] == "14.5 GB"


def test_doctor_is_content_here_and_finds_slips(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONNXSTREAM_TEMPRATURE", "0")
    assert cli.main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    subjects = {check["subject"] for check in checks}
    assert {"python", "numba", "llvmlite", "numpy", "compiler", "kernels", "processor", "features",
            "memory", "cache", "kernel cache", "cuda", "terminal"} <= subjects  # fmt: skip
    slip = next(
        check for check in checks if check["state"] == "note" and "TEMPRA" in check["detail"]
    )
    assert slip["remedy"] == "did you mean ONNXSTREAM_TEMPERATURE?"


def test_doctor_fails_on_a_cache_it_cannot_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONNXSTREAM_CACHE", str(tmp_path / "file" / "cache"))
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    broken = next(i for i, line in enumerate(lines) if line.startswith("FAIL  cache"))
    assert "set ONNXSTREAM_CACHE" in lines[broken + 1]


def test_doctor_reports_what_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnxstream_nb import registry

    def broken() -> None:
        raise ImportError("a kernel is missing")

    monkeypatch.setattr(registry, "operators", broken)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "ImportError: a kernel is missing" in out and "terminal" in out
