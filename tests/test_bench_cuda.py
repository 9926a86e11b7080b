"""bench/cuda.py, on the tests' stand-in for a GPU and without any."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_fixtures import random_weights
from llama_oracle import Array, Tiny, logits

from onnxstream_nb.errors import UnsupportedError
from onnxstream_nb.gpu import offload

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(offload, "_first", offload._first)  # a dry run puts another in its place
    # Not by its name, which is that of NVIDIA's bindings.
    found = importlib.util.spec_from_file_location("bench_cuda", BENCH / "cuda.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_a_dry_run_measures_everything(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--dry-run", "--runs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["dry_run"] and len(found["checked"]) == len(bench.TINY_ODD)
    assert all(case["right"] for case in [*found["checked"], *found["ids"], found["tests"]])
    assert found["tests"]["counts"] == {"passed": 4} and "rows_i4" in found["tests"]["kernels"]
    assert [(c["kind"], c["budget"]) for c in found["models"]] == [
        ("decode", 0), ("decode", "all"), ("prefill", "all"),
    ]  # fmt: skip
    assert [c["gpu_bytes"] > 0 for c in found["models"]] == [False, True, True]
    decode = found["models"][1]
    read = decode["weight_bytes"] + decode["cache_bytes"]
    assert decode["cache_bytes"] == 2 * 2 * 16 * 2  # keys and values, halves, of a head, on average
    assert math.isclose(decode["bound_tokens_per_s"], found["copy"] / read)
    assert found["models"][2]["operations_per_token"] == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 1024)
    numbers = [c["us"] for c in found["kernels"] + found["round_trips"]]
    assert len(numbers) == 4 and all(math.isfinite(n) and n > 0 for n in numbers)
    assert any(line.startswith("take_largest") and "right" in line for line in lines)


def test_some_parts(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--dry-run", "--runs", "1", "--parts", "trips"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["round_trips"] and not any(found[part] for part in ("checked", "models", "torch"))
    with pytest.raises(SystemExit):
        bench.main(["--dry-run", "--parts", "trips,some"])
    assert "--parts some: there are checks, kernels" in capsys.readouterr().err


def test_wrong_kernels_are_told(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda_trials

    right = cuda_trials.made(("norm", 2, 33))
    right.launches = lambda where: []
    monkeypatch.setattr(cuda_trials, "made", lambda sizes: right)
    given = type("Given", (), {"dry_run": True, "runs": 1})()
    kernels = cuda_trials.Kernels(bench.fake_devices(), given)
    assert not kernels.error(("norm", 2, 33))["right"]
    monkeypatch.setattr(cuda_trials, "TINY_TESTS", ["tests/test_no_such.py"])
    assert not kernels.tests()["right"]


@pytest.mark.parametrize(
    ("ids", "there", "right", "first"),
    [([1, 2, 3], 9, True, None), ([1, 9, 3], 9, False, 1), ([1, 2, 3], 0, False, None)],
)
def test_ids_are_the_cpus_and_the_gpu_gave_them(
    ids: list[int], there: int, right: bool, first: int | None, bench: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import cuda_models

    answers = iter([([1, 2, 3], 0), (ids, there)])
    monkeypatch.setattr(cuda_models, "greedy", lambda *_, **options: next(answers))
    found = cuda_models.compared(Path("m"), "m", [1], 3)
    assert (found["right"], found["first_difference"]) == (right, first)


def test_without_a_gpu_it_says_so(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Any:
        raise UnsupportedError("no NVIDIA driver was found")

    monkeypatch.setattr(offload, "_first", none)
    assert bench.main([]) == 2
    assert capsys.readouterr().out == "nothing to measure: no NVIDIA driver was found\n"


def test_its_name_stands_before_nothing() -> None:
    """As a program it is in a folder of modules, where `cuda` is not to mean itself."""
    program = f"""
import importlib.util, runpy, sys
sys.argv, sys.path[0] = ["cuda.py", "--help"], {str(BENCH)!r}
try:
    runpy.run_path({str(BENCH / "cuda.py")!r}, run_name="__main__")
except SystemExit:
    found = importlib.util.find_spec("cuda")
    sys.exit(found is not None and str(found.origin).startswith({str(BENCH)!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "--dry-run" in done.stdout, done.stderr


def test_torch_runs_a_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch is timed on computes what it should, in a prompt and behind a cache."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCH / "peers"))
    peer = importlib.import_module("torch_cuda")
    tiny = Tiny()
    weights = {
        name: np.ones_like(w) if w.ndim == 1 else w for name, w in random_weights(tiny).items()
    }
    parts = {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
             "o": ["self_attn.o_proj"], "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
             "down": ["mlp.down_proj"]}  # fmt: skip

    def matrix(name: str, n: int, k: int) -> Any:
        layer, _, part = name.rpartition(".")
        names = [f"model.layers.{layer}.{p}.weight" for p in parts.get(part, [])]
        found: list[Array] = [weights[name] for name in names] or [
            weights["lm_head.weight" if name == "head" else "model.embed_tokens.weight"]
        ]
        assert sum(len(w) for w in found) == n and all(w.shape[1] == k for w in found)
        return torch.from_numpy(np.concatenate(found))

    geometry = {
        "vocab": tiny.vocab, "hidden": tiny.hidden, "layers": tiny.layers, "heads": tiny.heads,
        "kv_heads": tiny.kv_heads, "head_dim": tiny.head_dim, "ffn": tiny.intermediate,
        "rope_theta": tiny.theta, "norm_epsilon": tiny.epsilon, "tied_embeddings": False,
    }  # fmt: skip
    llama = peer.Llama(torch, geometry, 16, "cpu", matrix)
    ids = [5, 9, 33, 2, 7]
    wanted = logits(tiny, weights, ids)
    places = torch.arange(len(ids))
    whole = llama(torch.tensor(ids[:3]), places[:3], whole=True)
    rest = [llama(torch.tensor([ids[i]]), places[i : i + 1]) for i in (3, 4)]
    for found, row in zip([whole, *rest], wanted[2:], strict=True):
        np.testing.assert_allclose(found.numpy(), row, rtol=1e-4, atol=1e-4)
