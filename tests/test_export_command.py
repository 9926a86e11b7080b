"""The command export: what it prints, what it refuses, and that nothing is left of a failure."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from export_models import save
from hub_fixtures import caches, server  # noqa: F401
from hub_server import Hub, Repository

from onnxstream_nb import cli
from onnxstream_nb.cli.export import located
from onnxstream_nb.convert.pytorch import compared

TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
needs_torch = pytest.mark.skipif(not TORCH, reason="torch or transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers, on import and use


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of the error."""
    assert cli.main(["export", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def silent(*_: object) -> None:
    """A report that nobody reads."""


# -- without PyTorch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "out"), "name what to export: either a Hugging Face folder or hub repository"),
        (("m", "--module", "a:b", "-o", "out"), "name what to export: either"),
        (("m",), "--out is missing; give it, or set ONNXSTREAM_OUT"),
        (("m", "-o", "out", "--exporter", "dynamo"), "--exporter: 'dynamo' is none of opset14, "),
        (("m", "-o", "out", "--dtype", "int8"), "--dtype: 'int8' is none of fp32, fp16, bf16"),
        pytest.param(
            ("./nowhere", "-o", "out"), "there is no file or folder './nowhere'", marks=needs_torch
        ),
    ],
)
def test_bad_flags(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fails(capsys, *arguments).startswith(message)


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else 1)
    assert fails(capsys, tmp_path, "-o", tmp_path / "out") == (
        f"exporting needs {missing}, which is not installed: pip install 'onnxstream_nb[export]'"
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_downloaded_for_a_package_that_is_missing(
    server: Hub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.repositories["owner/model"] = Repository({"config.json": b"{}"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = fails(capsys, "owner/model", "-o", tmp_path / "out")
    assert message.startswith("exporting needs torch and transformers")
    assert server.log == []


def test_the_hugging_face_folder_of_a_repository_is_taken(server: Hub) -> None:  # noqa: F811
    names = ("config.json", "model.safetensors", "tokenizer.json", "model-Q8_0.gguf")
    server.repositories["owner/model"] = Repository({name: name.encode() for name in names})
    folder = located("owner/model", silent)
    assert sorted(p.name for p in folder.iterdir()) == sorted(names[:3])


def test_a_config_file_stands_for_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    assert located(str(tmp_path / "config.json"), silent) == tmp_path


# -- with it


@needs_torch
def test_lines_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("llama3", tmp_path / "model")
    arguments = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'model'} -> {tmp_path / 'out'}"
    assert lines[1].startswith("graph        opset 14, ")
    assert " elements, fp32; " in lines[2]
    assert " from PyTorch at most, in " in lines[3]
    assert cli.main([*arguments, "--json", "--overwrite", "--dtype", "bf16"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["relative_difference"] < 1e-5
    assert (document["dtype"], document["opset"], document["runs"]) == ("bf16", 14, 3)
    assert (
        document["size_bytes"]
        == sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != "manifest.json")
        + (tmp_path / "out" / "manifest.json").stat().st_size
    )


@needs_torch
def test_an_output_that_exists_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    message = fails(capsys, tmp_path, "-o", tmp_path / "out")
    assert message == (f"-o {tmp_path / 'out'} exists; name another output, or give --overwrite")


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def unknown(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "riddle"}', "utf-8")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_state(folder: Path) -> None:
    """A model that carries something else than keys and values from token to token."""
    import transformers

    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)
    transformers.MambaForCausalLM(config).save_pretrained(folder)


def hybrid(folder: Path) -> None:
    """A model whose layers need a cache of two kinds."""
    import transformers

    config = transformers.Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_experts=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_experts_per_tok=1, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@needs_torch
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "transformers cannot load it as a causal language model: "),
        (unknown, "riddle"),
        (without_config, "no config.json; give a Hugging Face folder"),
        (without_state, "its state between tokens is not keys and values of each layer"),
        (hybrid, "its state between tokens is not keys and values of each layer"),
    ],
)
def test_bad_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    save("tinyllama", tmp_path / "model")
    damage(tmp_path / "model")
    assert message in fails(capsys, tmp_path / "model", "-o", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@needs_torch
def test_nothing_is_left_of_an_export_that_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save("tinyllama", tmp_path / "model")
    monkeypatch.setattr(compared, "LIMIT", 1e-12)
    message = fails(capsys, tmp_path / "model", "-o", tmp_path / "out")
    assert " away from PyTorch's, whose largest element is " in message
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
