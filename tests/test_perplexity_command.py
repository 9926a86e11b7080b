"""The command `perplexity`: its figures against the oracle, its flags and its errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import write_gguf
from llama_oracle import Array, Tiny
from llama_oracle import logits as oracle
from llm_checks import FLOAT16_CACHE
from perplexity_oracle import (
    TINY,
    VOCAB,
    Held,
    counted,
    expected,
    expected_divergence,
    tokenizer,
    two_models,
)
from tokenizer_fixtures import gguf_bpe, gguf_metadata, small_bpe

from onnxstream_nb import cli, device
from onnxstream_nb.cli import perplexity as verb
from onnxstream_nb.llm import LanguageModel

TEXT = Path(__file__).parent / "fixtures" / "public_domain.txt"
WINDOW, TOKENS = 21, 110  # five windows of an odd size, and five tokens that fill none


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    return two_models(tmp_path_factory.mktemp("perplexity"))


def command(held: Held, *arguments: str) -> list[str]:
    line = ["perplexity", str(held.paths[0]), "--text", str(TEXT), "--tokens", str(TOKENS)]
    return [*line, "--window", str(WINDOW), *arguments]


def run(capsys: pytest.CaptureFixture[str], line: Sequence[str]) -> dict[str, Any]:
    assert cli.main([*line, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    document: dict[str, Any] = json.loads(out)
    return document


def fails(capsys: pytest.CaptureFixture[str], line: Sequence[str]) -> str:
    assert cli.main(line) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1].removeprefix("error: ")


def cut_by_hand() -> list[list[int]]:
    bos = small_bpe().token_to_id("<|begin|>")
    ids = [bos, *gguf_bpe().encode(TEXT.read_text("utf-8"))]
    assert TOKENS // WINDOW == 5 and len(ids) > TOKENS
    return [[bos, *ids[at + 1 : at + WINDOW]] for at in (0, 21, 42, 63, 84)]


def test_against_the_oracle(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    """Within what a float16 cache does to logits: `e` to each, so 2 e to a log probability."""
    line = command(held, "--reference", str(held.paths[1]), "--precision", "exact")
    document = run(capsys, line)
    pairs, references = (
        list(counted(cut_by_hand(), lambda ids, w=w: oracle(TINY, w, ids))) for w in held.weights
    )
    e = FLOAT16_CACHE * max(abs(row).max() for row, _ in [*pairs, *references])
    wanted, other = expected(pairs), document["reference"]
    assert document["perplexity"] == pytest.approx(wanted["perplexity"], rel=2 * e)
    assert document["perplexity_error"] == pytest.approx(wanted["perplexity_error"], rel=0.01)
    assert other["perplexity"] == pytest.approx(expected(references)["perplexity"], rel=2 * e)
    far = expected_divergence(pairs, references)
    assert far["kl_mean"] > 10 * e * e  # the reference is farther off than the cache
    for name in ("kl_mean", "kl_p99", "kl_max"):
        assert math.sqrt(other[name]) == pytest.approx(math.sqrt(far[name]), abs=2 * e), name
    for name in ("logit_max_difference", "logit_rms_difference"):
        assert other[name] == pytest.approx(far[name], abs=2 * e)
    assert other["logit_correlation"] == pytest.approx(far["logit_correlation"], abs=1e-3)
    assert (document["windows"], document["tokens_counted"], document["tokens_read"]) == (
        5,
        50,
        100,
    )


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_from_the_models_own_logits(
    batch: int, held: Held, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures are those of the logits that generating sees, whatever is read at a time."""
    line = command(held, "--reference", str(held.paths[1]), "--batch", str(batch))
    document = run(capsys, line)
    given = []
    for path in held.paths:
        model = LanguageModel(path)
        given.append(list(counted(cut_by_hand(), lambda ids, m=model: by_parts(m, ids, batch))))
        model.close()
    wanted = expected(given[0]) | {"reference": expected(given[1]) | expected_divergence(*given)}
    names = wanted["reference"].keys()
    got = {name: document["reference"][name] for name in names}
    assert got == pytest.approx(wanted["reference"], rel=1e-9)
    assert document["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-12)


def by_parts(model: LanguageModel, ids: Sequence[int], batch: int) -> Array:
    model.rewind(0)
    half = len(ids) // 2
    starts = [*range(0, half, batch), *range(half, len(ids) - 1, batch)]
    ends = [*starts[1:], len(ids) - 1]
    return np.concatenate(
        [model.logits(ids[start:end]) for start, end in zip(starts, ends, strict=True)]
    )


def test_a_model_as_its_own_reference(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    document = run(capsys, command(held, "--reference", str(held.paths[0]), "--load", "stream"))
    other = document["reference"]
    assert other["kl_mean"] == other["kl_max"] == other["logit_max_difference"] == 0
    assert (other["same_best"], other["perplexity"]) == (1, document["perplexity"])
    assert (document["load"], other["model"]) == ("stream", document["model"])


def test_the_real_entry_point(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    line = [sys.executable, "-m", "onnxstream_nb", *command(held)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "window 1 of 5" in done.stderr
    document = run(capsys, command(held))
    lines = done.stdout.splitlines()
    assert lines[0].endswith("5 windows of 21 tokens, 50 tokens counted")
    error = f"{document['perplexity_error']:.4f}"
    assert lines[1] == f"perplexity       {document['perplexity']:.4f} ± {error}"
    assert [each.split()[0] for each in lines[2:]] == ["speed", "peak"]
    assert document["reference"] is None and document["tokens_per_s"] > 0


def test_the_table() -> None:
    other = {
        "model": "big", "precision": "exact", "perplexity": 9.5, "perplexity_error": 0.25,
        "kl_mean": 0.00123456, "kl_error": 0.0000123, "kl_p99": 0.0456789, "kl_max": 1.5,
        "same_best": 0.98765, "logit_max_difference": 2.0, "logit_rms_difference": 0.125,
        "logit_correlation": 0.99999,
    }  # fmt: skip
    document = {
        "model": "m", "precision": "fast", "text": "t.txt",
        "windows": 3, "window": 512, "tokens_counted": 765,
        "perplexity": 10.123456, "perplexity_error": 0.5, "tokens_per_s": 123.456,
        "peak_rss_mb": 432.1, "reference": other,
    }  # fmt: skip
    assert verb.table(document).splitlines() == [
        "m, fast, on t.txt: 3 windows of 512 tokens, 765 tokens counted",
        "perplexity       10.1235 ± 0.5000",
        "reference        big, exact",
        "its perplexity   9.5000 ± 0.2500",
        "KL divergence    0.00123 ± 1.2e-05 nats a token; 99 % below 0.0457, at most 1.5",
        "same best token  98.77%",
        "logits           differ by 0.125 (rms), at most 2; correlation 0.9999900",
        "speed            123.5 tokens/s",
        "peak memory      432 MB",
    ]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ((), ["auto"]),
        (("--precision", "exact"), ["exact"]),
        (("--reference-precision", "exact"), ["auto", "exact"]),
        (("--precision", "exact", "--reference-precision", "fast"), ["exact", "fast"]),
        (("--reference", "b", "--reference-precision", "fast"), ["auto", "fast"]),
        (("--precision", "exact", "--reference", "b"), ["exact", "exact"]),
    ],
)
def test_precision_of_each(
    arguments: tuple[str, ...],
    wanted: list[str],
    held: Held,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []

    class Recorded(LanguageModel):
        def __init__(self, graph: Any, **options: Any) -> None:
            asked.append(options["precision"])
            super().__init__(graph, **options)

    monkeypatch.setattr("onnxstream_nb.llm.LanguageModel", Recorded)
    named = [str(held.paths[1]) if word == "b" else word for word in arguments]
    document = run(capsys, command(held, *named))
    assert asked == wanted
    documents = [document, *([document["reference"]] if document["reference"] else [])]
    said = ["fast" if each == "auto" else each for each in wanted]  # the weights are floats
    assert [each["precision"] for each in documents] == said


def test_flags_that_contradict(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (
        ["--precision", "fast", "--reference-precision", "fast"],
        ["--precision", "exact", "--reference-precision", "exact"],
    ):
        message = fails(capsys, command(held, *flags))
        assert message.startswith(f"--reference-precision {flags[-1]} is the model's own")
    message = fails(capsys, command(held, "--tokens", "20"))
    assert message.startswith("--tokens 20 is less than one window of 21 tokens")
    message = fails(capsys, command(held, "--window", "65", "--tokens", "70"))
    assert message.startswith("--window 65: ") and "at most 64 tokens" in message
    assert "--window: must be at least 8" in fails(capsys, command(held, "--window", "7"))
    assert "exclude" in fails(capsys, command(held, "--ram", "1GB", "--load", "mmap"))


def test_texts_that_cannot_be_read(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latin, short, empty = (tmp_path / name for name in ("latin", "short", "empty"))
    latin.write_bytes("naïve".encode("latin-1"))
    short.write_text("In the beginning", "utf-8")
    empty.write_bytes(b"")
    for path, message in (
        (tmp_path / "none", f"--text {tmp_path / 'none'}: No such file or directory"),
        (tmp_path, f"--text {tmp_path}: Is a directory"),
        (latin, f"--text {latin} is not UTF-8 (at byte 2)"),
        (short, f"--text {short}: {1 + len(gguf_bpe().encode('In the beginning'))} tokens are"),
        (empty, f"--text {empty}: 1 tokens are fewer than one window of 21; give a longer text"),
    ):
        assert fails(capsys, command(held, "--text", str(path))).startswith(message)


def test_references_of_another_vocabulary(
    held: Held, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = gguf_metadata(small_bpe())["tokenizer.ggml.tokens"]
    assert isinstance(texts, list)
    first = gguf_bpe().encode(TEXT.read_text("utf-8"))[0]
    other = first + 1
    swapped = list(texts)
    swapped[first], swapped[other] = swapped[other], swapped[first]
    changed = {"tokenizer.ggml.tokens": swapped}
    path = tmp_path / "swapped.gguf"
    write_gguf(path, TINY, extra=lambda writer: tokenizer(writer, **changed))
    message = fails(capsys, command(held, "--reference", str(path)))
    assert message.startswith(f"--reference {path}: its vocabulary is another one (token {first} ")

    path = tmp_path / "wide.gguf"
    write_gguf(path, Tiny(vocab=VOCAB + 3, context=64), extra=tokenizer)
    message = fails(capsys, command(held, "--reference", str(path)))
    assert f"have {VOCAB} and {VOCAB + 3} tokens" in message


def test_a_tokenizer_of_another_model(
    tmp_path: Path, held: Held, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "narrow.gguf"
    write_gguf(path, Tiny(vocab=300, context=64), extra=tokenizer)
    line = ["perplexity", str(path), *command(held)[2:]]
    assert "the model knows only 300; put the tokenizer beside it" in fails(capsys, line)


def test_budgets_share_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for later, second in ((100, 550), (300, 750), (550, 1000), (600, 1000)):
        sizes = iter((100, later))
        monkeypatch.setattr(device, "current_rss", lambda s=sizes: next(s))
        budgets = verb._budgets(1000, 2)
        assert (next(budgets), next(budgets)) == (550, second)
        assert later + max(0, 550 - later) + (second - later) == 1000  # when both took theirs
    assert list(verb._budgets(1000, 1)) == [1000] and list(verb._budgets(None, 2)) == [None, None]


def test_a_budget_for_two(held: Held, capsys: pytest.CaptureFixture[str]) -> None:
    both = command(held, "--reference", str(held.paths[1]))
    assert run(capsys, [*both, "--ram", "64GB"])["reference"]["kl_mean"] > 0
    message = fails(capsys, [*both, "--ram", "1MB"])
    assert message.startswith("--ram 1.00 MB is for the model and its reference together")
    assert fails(capsys, command(held, "--ram", "1MB")).startswith("--ram 1.00 MB is too little")


def test_the_verb_imports_the_engine_only_when_flags_are_right() -> None:
    code = (
        "import sys\nfrom onnxstream_nb.cli import main\n"
        "assert main(['perplexity', 'm', '--text', '/nowhere/at-all']) == 2\n"
        "sys.exit('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.startswith("error: --text /nowhere/at-all: No such file or directory")


def test_the_text_is_what_its_readme_says() -> None:
    text = TEXT.read_text("utf-8")
    assert text.startswith("In the beginning God created the heaven and the earth.\n")
    assert text.count("\n") == 31 and len(text.split()) == 797
