"""Names, downloads and their faults, against a small hub on loopback."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import hub_fixtures
import pytest
from hub_fixtures import (
    FIRST,
    REPO,
    ROOT,
    SECOND,
    USAGE,
    check_folder,
    data,
    environment,
    shards,
    start,
    use_endpoint,
)  # fmt: skip
from hub_server import Hub, Repository

from onnxstream_nb import hub
from onnxstream_nb.errors import DownloadError, ModelError, UsageError
from onnxstream_nb.hub import Progress, store
from onnxstream_nb.hub.catalogue import CATALOGUE

caches, server = hub_fixtures.caches, hub_fixtures.server


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def leftovers(caches: Path) -> list[Path]:
    return [*caches.rglob("*.incomplete"), *caches.rglob("*.partial.json"), *caches.rglob("*.tmp")]


def test_an_existing_path_wins_over_the_catalogue(caches: Path) -> None:
    (caches / "tinyllama").mkdir()
    assert hub.resolve("tinyllama") == hub.Resolved(Path("tinyllama"), "tinyllama")
    assert hub.resolve(str(caches / "tinyllama")).name == "tinyllama"


@pytest.mark.parametrize(
    "name", ["./x", "../x:y", "/no/such/file", "~/no-such", "a/b/c", "m.gguf", ""]
)
def test_a_path_that_does_not_exist(caches: Path, name: str) -> None:
    with pytest.raises(ModelError, match="no file or folder"):
        hub.resolve(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smollm2", "did you mean smollm2-135m"),
        ("Tinylama", "did you mean tinyllama"),
        ("zzz", "known: smollm2-135m, tinyllama, mistral-7b"),
        ("tinyllama:q4", "did you mean tinyllama"),
        ("own..er/x", "known"),
        ("a--b/x", "known"),
        ("-a/x", "known"),
    ],
)
def test_an_unknown_name_gets_near_matches(caches: Path, name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        hub.resolve(name)


def test_the_catalogue_is_what_its_geometry_says() -> None:
    assert [name for name, entry in CATALOGUE.items() if entry.default] == ["smollm2-135m"]
    for name in ("tinyllama", "mistral-7b"):
        g = CATALOGUE[name].geometry
        assert g is not None
        width, kv = g["hidden"], g["kv_heads"] * g["head_dim"]
        layer = 2 * width * width + 2 * width * kv + 3 * width * g["ffn"]
        parameters = g["layers"] * layer + 2 * g["vocab"] * width
        assert CATALOGUE[name].size_bytes == pytest.approx(2 * parameters, rel=1e-3)


def test_the_sampling_that_a_catalogue_model_asks_for_makes_sense() -> None:
    from onnxstream_nb.sampling import SamplingParams

    for entry in CATALOGUE.values():
        SamplingParams(**entry.sampling)
    assert CATALOGUE["smollm2-135m"].sampling == {"temperature": 0.2, "top_p": 0.9}


def test_importing_the_hub_is_light() -> None:
    heavy = "{'huggingface_hub', 'httpx2', 'numpy', 'filelock', 'platformdirs', 'psutil', 'tqdm'}"
    code = f"import sys, onnxstream_nb.hub; print(sorted({heavy} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_download_in_another_process_with_the_users_variables(server: Hub, caches: Path) -> None:
    repository = server.repositories[REPO] = shards()
    env = environment(server, caches, HF_TOKEN="hf_secret")
    process = start(REPO, env)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    path = Path(out.strip())
    assert path.is_relative_to(caches / "hf" / "hub")
    check_folder(path, repository)
    assert not err and not leftovers(caches)
    assert (path.parents[1] / "refs" / "main").read_text() == path.name == repository.commit
    tokens = {r.headers.get("authorization") for r in server.log if REPO in r.path}
    assert tokens == {"Bearer hf_secret"}
    requests = len(server.log)
    offline = start(REPO, environment(server, caches, HF_HUB_OFFLINE="1"))
    assert offline.communicate(timeout=60) == (out, "")
    assert len(server.log) == requests


def test_killed_half_way_then_run_again(server: Hub, caches: Path) -> None:
    repository = server.repositories[REPO] = shards()
    server.delay = 0.05
    env = environment(server, caches)
    process = start(REPO, env)
    wait_for(lambda: any(r.sent > 100_000 for r in server.fetched(SECOND)))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert list(caches.rglob("*.incomplete"))
    (found,) = hub.installed()
    assert (found.name, found.complete) == (REPO, False)
    server.delay = 0
    again = start(REPO, env)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    check_folder(Path(out.strip()), repository)
    assert not leftovers(caches)
    assert [len(server.fetched(name)) for name in ("config.json", FIRST, SECOND)] == [1, 1, 2]
    assert "Range" not in server.fetched(SECOND)[1].headers
    assert hub.installed()[0].complete


def test_two_processes_fetch_a_model_once(server: Hub, caches: Path) -> None:
    repository = server.repositories[REPO] = shards()
    server.delay = 0.01
    processes = [start(REPO, environment(server, caches)) for _ in range(2)]
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0] == results[1]
    check_folder(Path(results[0][0].strip()), repository)
    assert [len(server.fetched(name)) for name in repository.files] == [1, 1, 0, 0, 1, 1]


def test_a_second_process_waits_for_the_first(server: Hub) -> None:
    repository = server.repositories[REPO] = shards()
    notes: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with store.hold_lock(REPO, store.Reporter(None)):
            waiting = pool.submit(hub.resolve, REPO, progress=lambda p: notes.append(p.note))
            wait_for(lambda: notes)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.5)
            assert notes == [f"waiting for another process that is fetching {REPO}"]
            assert not server.log
        check_folder(waiting.result(timeout=60).path, repository)


def test_progress_counts_all_files(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_INTERVAL", 0)
    monkeypatch.setattr(store, "_CHUNK", 1 << 16)
    repository = server.repositories[REPO] = shards()
    total = sum(map(len, repository.files.values())) - 4200
    seen: list[Progress] = []
    hub.resolve(REPO, progress=seen.append)
    assert {p.total_bytes for p in seen} == {total} and {p.file_count for p in seen} == {4}
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert seen[-1].done_bytes == total and seen[-1].file_index == 4
    assert [p.file_index for p in seen] == sorted(p.file_index for p in seen)


def test_an_interrupt_leaves_finished_files(
    server: Hub, caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories[REPO] = shards()

    def interrupt(progress: Progress) -> None:
        if progress.file == SECOND:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_INTERVAL", 0)
        with pytest.raises(KeyboardInterrupt):
            hub.resolve(REPO, progress=interrupt)
    assert not hub.installed()[0].complete and not list(caches.rglob("*.incomplete"))
    hashed: list[str] = []

    def count(path: Path, like: str, reporter: store.Reporter) -> str:
        hashed.append(path.name)
        return digest(path, like, reporter)

    digest = store.file_digest
    monkeypatch.setattr(store, "file_digest", count)
    check_folder(hub.resolve(REPO).path, server.repositories[REPO])
    assert len(server.fetched(FIRST)) == 1 and hashed == [SECOND]


@pytest.mark.parametrize("name", [SECOND, "config.json"])
def test_a_wrong_hash_is_refused(server: Hub, caches: Path, name: str) -> None:
    repository = server.repositories[REPO] = shards()
    wrong = bytes(len(repository.files[name]))
    repository.served[name] = wrong
    for _ in range(2):  # the second run may not take the first one's file for right
        with pytest.raises(DownloadError) as caught:
            hub.resolve(REPO)
        assert name in str(caught.value) and "it was removed" in str(caught.value)
    if name == SECOND:
        assert hashlib.sha256(repository.files[name]).hexdigest() in str(caught.value)
        assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
    assert not list(caches.rglob(name))
    assert len(server.fetched(name)) == 2
    repository.served.clear()
    check_folder(hub.resolve(REPO).path, repository)


def test_a_truncated_file_is_refused(server: Hub, caches: Path) -> None:
    repository = server.repositories[REPO] = shards()
    repository.served[FIRST] = repository.files[FIRST][:300_000]
    with pytest.raises(DownloadError, match=f"{FIRST} could not be fetched .*run the same command"):
        hub.resolve(REPO)
    assert not list(caches.rglob(FIRST)) and not list(caches.rglob("*.incomplete"))


def test_a_dropped_connection_is_tried_again(server: Hub, caches: Path) -> None:
    repository = server.repositories[REPO] = shards()
    repository.drop_after[FIRST] = 100_000
    check_folder(hub.resolve(REPO).path, repository)
    assert [r.sent for r in server.fetched(FIRST)] == [100_000, 600_001]
    assert not leftovers(caches)


def test_a_file_damaged_in_the_cache_is_fetched_again(server: Hub) -> None:
    repository = server.repositories[REPO] = shards()
    path = hub.resolve(REPO).path
    (path / FIRST).resolve().write_bytes(b"damaged")
    assert not hub.installed()[0].complete
    check_folder(hub.resolve(REPO).path, repository)
    assert [len(server.fetched(name)) for name in (FIRST, SECOND)] == [2, 1]


def test_a_quantisation_is_one_file(server: Hub, caches: Path) -> None:
    files = {f"m-{q}.gguf": data(q, 5000) for q in ("Q4_0", "Q4_K_M", "Q8_0")}
    server.repositories[REPO] = Repository(files)
    found = hub.resolve(f"{REPO}:q4_0")
    assert found.name == f"{REPO}:q4_0" and found.path.read_bytes() == files["m-Q4_0.gguf"]
    assert [p.name for p in caches.rglob("*.gguf")] == ["m-Q4_0.gguf"]
    with pytest.raises(UsageError, match="it has m-Q4_0.gguf"):
        hub.resolve(f"{REPO}:Q6_K")


def test_pull_takes_a_newer_revision_and_resolve_does_not_ask(server: Hub) -> None:
    server.repositories[REPO] = Repository({"m-Q4_0.gguf": data("old", 5000)})
    old = hub.resolve(REPO).path
    server.repositories[REPO] = Repository({"m-Q4_0.gguf": data("new", 5000)})
    assert hub.resolve(REPO).path == old
    new = hub.pull(REPO).path
    assert new != old and new.read_bytes() == data("new", 5000)
    assert hub.resolve(REPO).path == new


def test_an_interrupted_pull_keeps_the_older_copy(server: Hub) -> None:
    server.repositories[REPO] = Repository({"m-Q4_0.gguf": data("old", 5000)})
    old = hub.resolve(REPO).path
    newer = server.repositories[REPO] = Repository({"m-Q4_0.gguf": data("new", 5000)})
    newer.served["m-Q4_0.gguf"] = data("other", 5000)
    with pytest.raises(DownloadError, match="is not what the hub says"):
        hub.pull(REPO)
    assert hub.resolve(REPO).path == old and hub.installed()[0].complete


def test_a_full_disk_is_seen_before_the_download(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repositories[REPO] = shards()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: USAGE(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(DownloadError, match=r"needs 1.21 MB .* 1.00 MB are free: .*HF_HOME"):
        hub.resolve(REPO)
    assert not [r for r in server.log if "/resolve/" in r.path]


def test_a_model_beyond_memory_is_remarked(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories[REPO] = shards()
    monkeypatch.setattr("onnxstream_nb.device.memory_total", lambda: 1_000_000)
    notes: list[str] = []
    hub.resolve(REPO, progress=lambda p: notes.append(p.note))
    assert [n for n in notes if n] == [
        f"{REPO} (1.21 MB) is larger than this machine's memory (1.00 MB): "
        "its weights will be streamed from disk"
    ]


@pytest.mark.parametrize(
    ("gated", "name", "message"),
    [(True, REPO, "is gated: .*HF_TOKEN"), (False, "owner/none", "no such model on the hub")],
)
def test_what_the_hub_refuses(server: Hub, gated: bool, name: str, message: str) -> None:
    server.repositories[REPO] = replace(shards(), gated=gated)
    with pytest.raises(DownloadError, match=message):
        hub.resolve(name)


# without the hub


def test_no_connection_and_no_copy(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="cannot be asked .* holds no complete copy"):
        hub.resolve(REPO)


def test_an_offline_process_without_a_copy(server: Hub, caches: Path) -> None:
    process = start(REPO, environment(server, caches, HF_HUB_OFFLINE="1"))
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and err.startswith("DownloadError: the hub cannot be asked for")
    assert "HF_HUB_OFFLINE" in err and not server.log


def test_a_hub_out_of_order_is_no_reason_to_fail(server: Hub) -> None:
    server.repositories[REPO] = shards()
    path = hub.resolve(REPO).path
    server.status = 503
    assert hub.pull(REPO).path == path


def test_an_interrupted_pull_is_not_complete_offline(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = server.repositories[REPO] = shards()
    repository.served[SECOND] = b"short"
    with pytest.raises(DownloadError):
        hub.resolve(REPO)
    server.status = 503
    with pytest.raises(DownloadError, match="no complete copy"):
        hub.resolve(REPO)


def test_another_programs_download_is_used_offline(server: Hub, caches: Path) -> None:
    from huggingface_hub import hf_hub_download

    repository = server.repositories[REPO] = shards()
    for name in ("config.json", "tokenizer.json", FIRST):
        hf_hub_download(REPO, name)
    server.status = 503
    with pytest.raises(DownloadError, match="no complete copy"):
        hub.resolve(REPO)
    server.status = None
    hf_hub_download(REPO, SECOND)
    server.status = 503
    path = hub.resolve(REPO).path
    check_folder(path, repository)
    assert hub.installed() == [
        hub.Installed(REPO, path, sum(p.stat().st_size for p in path.iterdir()), True)
    ]
    (path / SECOND).resolve().write_bytes(bytes(len(repository.files[SECOND])))
    with pytest.raises(DownloadError, match="is damaged"):
        hub.resolve(REPO)


def test_a_folder_of_unknown_extent_is_not_used_offline(server: Hub) -> None:
    from huggingface_hub import hf_hub_download

    files = {"model.txt": data("text", 500), "w.bin": data("weight", 500)}
    server.repositories[REPO] = Repository(files)
    hf_hub_download(REPO, "model.txt")
    server.status = 503
    with pytest.raises(DownloadError, match="no complete copy"):
        hub.resolve(REPO)


def test_an_endpoint_that_is_no_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = server.repositories[REPO] = shards()
    monkeypatch.setattr(repository, "tree", lambda: [{"unexpected": 1}], raising=False)
    with pytest.raises(DownloadError, match="check HF_ENDPOINT"):
        hub.resolve(REPO)


# removing


def test_remove_keeps_what_others_need(server: Hub, caches: Path) -> None:
    files = {f"m-{q}.gguf": data(q, 5000) for q in ("Q4_0", "Q8_0")}
    server.repositories[REPO] = Repository(files)
    names = [f"{REPO}:Q4_0", f"{REPO}:q4_0", f"{REPO}:Q8_0"]
    paths = [hub.resolve(name).path for name in names]
    assert [m.name for m in hub.installed()] == names[:1] + names[2:] + names[1:2]
    assert hub.remove(names[0]) == 0 and paths[1].exists()
    assert hub.remove(names[1]) == 5000 and not paths[1].exists() and paths[2].exists()
    assert hub.remove(names[2]) == 5000 and not list(caches.rglob("*.gguf"))
    assert hub.installed() == [] and not list((caches / "hf" / "hub").glob("models--*"))
    with pytest.raises(UsageError, match="there are: none"):
        hub.remove(names[2])


def test_remove_takes_an_interrupted_pull(server: Hub, caches: Path) -> None:
    repository = server.repositories[REPO] = shards()
    repository.served[SECOND] = b"short"
    with pytest.raises(DownloadError):
        hub.resolve(REPO)
    assert hub.remove(REPO) == sum(map(len, repository.files.values())) - 4200 - 600_002
    assert hub.installed() == [] and not list(caches.rglob("*.safetensors"))


def test_a_damaged_record_is_no_record(server: Hub) -> None:
    server.repositories[REPO] = shards()
    path = hub.resolve(REPO).path
    for text in ("", "{}", "[1]", '{"files": 3}'):
        next((hub.cache_dir() / "models").glob("*.json")).write_text(text)
        assert hub.installed() == []
        assert hub.resolve(REPO).path == path
    assert len(server.fetched(FIRST)) == 1


@pytest.mark.parametrize(
    "path", ["../evil.gguf", "/etc/x.gguf", "a/../../x.gguf", "a\\b.gguf", "a//b"]
)
def test_paths_that_lead_outside_are_refused(server: Hub, caches: Path, path: str) -> None:
    server.repositories[REPO] = replace(shards(), listed=[path])
    with pytest.raises(DownloadError, match="outside the model's folder"):
        hub.resolve(REPO)
    assert not (caches / "hf").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prlimit is Linux's")
def test_a_disk_that_fills_up_in_the_middle_of_a_download(server: Hub, caches: Path) -> None:
    """What fits is kept, nothing half is left, and the same command goes on when there is room."""
    server.repositories[REPO] = shards()
    env = environment(server, caches)
    code = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))\n"
        "sys.argv = ['onnxstream_nb', 'pull', 'owner/model']\n"
        "runpy.run_module('onnxstream_nb', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert "could not be stored" in errors[0] and "File too large" in errors[0]
    assert "free some space, or set ONNXSTREAM_CACHE and HF_HOME" in errors[0]
    assert not list(caches.rglob("*.incomplete"))
    process = start(REPO, env)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    check_folder(Path(out.strip()), server.repositories[REPO])
