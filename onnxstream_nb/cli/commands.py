"""The verbs that run or move a model: chat, generate, pull, list, rm."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..gpu import asked

if TYPE_CHECKING:
    from ..model import Generation, Model, Token
    from ..progress import ReplyProgress
    from ..work import Work

SAMPLING_NAMES = (
    "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty",
    "frequency_penalty", "stop", "seed",
)  # fmt: skip


def generate(options: Mapping[str, Any]) -> int:
    """Stream the answer to one prompt on stdout, or print one JSON object with its figures."""
    prompt = read_prompt(options["prompt"])
    with load_model(options) as model:
        run = model.generate(
            prompt,
            system=options["system"],
            raw=options["raw"],
            max_tokens=options["max_tokens"],
            **sampling(options),
        )
        if options["show_prompt"]:
            print(model.tokenizer.decode(run.prompt_ids, skip_special=False), file=sys.stderr)
        with first_interrupt_stops(run):
            if options["json"]:
                print(json.dumps(generation_report(list(run), run), ensure_ascii=False))
            else:
                stream(run, run.progress)
        return 130 if run.stats.stop_reason == "interrupted" else 0


def stream(run: Iterable[Token], progress: Callable[[], ReplyProgress]) -> None:
    """Print each token's text as it comes; a terminal gets no control characters of the model.

    When a token takes long, `progress` tells what it waits for, which is shown on stderr.
    """
    from ..ui import Terminal, held
    from ..ui.text import clean

    on_terminal = sys.stdout.isatty()
    with held():
        with Terminal().streamed(progress) as write:
            for token in run:
                write(clean(token.text) if on_terminal else token.text)
        print(flush=True)


def generation_report(tokens: Sequence[Token], run: Generation) -> dict[str, Any]:
    """The object that `generate --json` prints."""
    stats = run.stats
    return {
        "text": "".join(token.text for token in tokens),
        "tokens": [token.id for token in tokens],
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "passes": stats.passes,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "prefill_tps": round(stats.prefill_tps, 3),
        "decode_tps": round(stats.decode_tps, 3),
        "ttft_s": round(stats.ttft_s, 4),
        "load_s": round(stats.load_s, 4),
        "bytes_read": stats.bytes_read,
        "gpu_bytes": stats.gpu_bytes,
        "peak_rss_mb": round(stats.peak_rss_mb, 1),
        "stop_reason": stats.stop_reason,
    }


def read_prompt(given: str) -> str:
    """The prompt itself, or for `-` all of stdin without its last line break."""
    prompt = sys.stdin.read().removesuffix("\n") if given == "-" else given
    if not prompt:
        raise UsageError("--prompt: stdin is empty; pipe the prompt into it")
    return prompt


def sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options that were given; the sampler knows the others' defaults."""
    return {name: options[name] for name in SAMPLING_NAMES if options[name] is not None}


def load_model(options: Mapping[str, Any], sequences: int = 1) -> Model:
    """Load the model that the options name, with progress on stderr; a budget is to hold the
    contexts of so many sequences."""
    from .. import ui
    from ..model import Model

    with ui.progress() as progress:
        given = loading(options) | ({"sequences": sequences} if sequences > 1 else {})
        return Model.load(options["model"], progress=progress, **given)


def loading(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say how a model is held and helped, as Model.load takes them."""
    from .. import hub

    names = (
        "load", "ram", "threads", "context", "precision", "kv_cache", "kv_spill", "draft",
        "speculate",
    )  # fmt: skip
    packed = hub.packed_dir() if options["keep_packed"] else None
    return {name: options[name] for name in names} | {"packed": packed} | asked(options["cuda"])


@contextmanager
def first_interrupt_stops(run: Work) -> Iterator[None]:
    """Within the block the first Ctrl-C ends the generation; the second ends the program.

    Signals reach the main thread only: elsewhere the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        signal.signal(signal.SIGINT, previous)
        run.stop()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def chat(options: Mapping[str, Any]) -> int:
    """Talk with a model, the catalogue's default one when none is named."""
    from ..chat import ChatOptions, run

    asked = ChatOptions(
        system=options["system"],
        sampling=sampling(options),
        max_tokens=options["max_tokens"],
        resume=options["continue"],
        load_options=loading(options),
        show_prompt=options["show_prompt"],
    )
    return run(options["model"] or default_model(), options=asked)


def default_model() -> str:
    """The name of the catalogue's default model."""
    from .. import hub

    return next(entry.name for entry in hub.CATALOGUE.values() if entry.default)


def pull(options: Mapping[str, Any]) -> int:
    """Download a model, or what is missing of it."""
    from .. import hub, ui

    with ui.download_progress() as progress:
        resolved = hub.pull(options["model"], progress)
    print(f"{resolved.name}: {resolved.path}")
    return 0


def list_models(options: Mapping[str, Any]) -> int:
    """Print what is installed and what the catalogue offers."""
    from .. import hub

    here = {m.name: m for m in hub.installed()}
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "installed": name in here and here[name].complete,
            "size_bytes": here[name].size_bytes if name in here else hub.CATALOGUE[name].size_bytes,
            "path": str(here[name].path) if name in here else None,
            "description": hub.CATALOGUE[name].description if name in hub.CATALOGUE else "",
        }
        for name in dict.fromkeys((*hub.CATALOGUE, *here))
    ]
    if options["json"]:
        print(json.dumps(rows, ensure_ascii=False))
        return 0
    from ..device import format_size
    from .report import columns

    titles = ("name", "installed", "size", "description")
    cells = [(r["name"], _state(r), format_size(r["size_bytes"]), r["description"]) for r in rows]
    print(columns(cells, titles))
    return 0


def _state(row: Mapping[str, Any]) -> str:
    if row["installed"]:
        return "yes"
    return "in part" if row["path"] else "no"


def remove(options: Mapping[str, Any]) -> int:
    """Delete a downloaded model, and what is kept of it packed, after a question, or without one
    after --yes."""
    from .. import hub
    from ..device import format_size
    from ..packed_file import remove_orphans

    name = options["model"]
    found = next((m for m in hub.installed() if m.name == name), None)
    if found is None:
        raise UsageError(f"{name!r} is not installed; `onnxstream_nb list` shows what is")
    if not options["yes"]:
        if not sys.stdin.isatty():
            raise UsageError("rm asks first, and stdin is no terminal: give --yes")
        answer = input(f"delete {name} ({format_size(found.size_bytes)}) in {found.path}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            print("kept")
            return 1
    freed = hub.remove(name) + remove_orphans(hub.packed_dir())
    print(f"freed {format_size(freed)}")
    return 0
