"""`generate --batch FILE`: many prompts, answered together and printed in the file's order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..progress import Report
from . import commands
from .commands import first_interrupt_stops, load_model, sampling

if TYPE_CHECKING:
    from ..batch import Batch, BatchItem, BatchRequest
    from ..tokenizer import Tokenizer

PROMPT_COLUMNS = 72  # of a prompt above its reply


def generate(options: Mapping[str, Any]) -> int:
    """Answer the prompt, or the file of prompts, that the options name."""
    if options["batch"] is None:
        return commands.generate(options)
    return generate_batch(options)


def generate_batch(options: Mapping[str, Any]) -> int:
    """Answer the prompts of a file; 2 when one of them could not be, 130 after Ctrl-C."""
    from .. import ui

    requests = read_requests(options["batch"])
    sequences = min(options["batch_size"] or 1, len(requests))
    with load_model(options, sequences=sequences) as model:
        batch = model.generate_batch(
            requests,
            batch_size=options["batch_size"],
            system=options["system"],
            raw=options["raw"],
            max_tokens=options["max_tokens"],
            **sampling(options),
        )
        if not batch.side_by_side and len(requests) > 1:
            print(
                f"{model.name} reads one sequence at a time: its prompts run one after the other",
                file=sys.stderr,
            )
        with ui.progress() as report, first_interrupt_stops(batch):
            done = list(show(batch, len(requests), options, model.tokenizer, report))
    reasons = {item.stop_reason for item in done}
    return 130 if "interrupted" in reasons else 2 if "error" in reasons else 0


def show(
    batch: Batch, total: int, options: Mapping[str, Any], tokenizer: Tokenizer, report: Report
) -> Iterator[BatchItem]:
    """Print what has ended, in order, and in the end what is complete behind what is not; yield
    each item when it has ended."""
    ended: dict[int, BatchItem] = {}
    started, printed = perf_counter(), 0
    counts: dict[int, int] = {}
    try:
        for item in batch:
            if item.done:
                yield item
                if item.stop_reason != "interrupted":
                    ended[item.index] = item
            while printed in ended:
                show_item(ended.pop(printed), options, tokenizer)
                printed += 1
            counts[item.index] = len(item.tokens)
            rate = sum(counts.values()) / (perf_counter() - started)
            finished = printed + len(ended)
            report(f"answered {finished} of {total} prompts, {rate:.1f} tok/s", finished / total)
    finally:
        for index in sorted(ended):
            show_item(ended[index], options, tokenizer)


def show_item(item: BatchItem, options: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """A reply on stdout: a JSON line, or text under its prompt."""
    from ..ui.text import clean, one_line

    if options["show_prompt"] and item.generation is not None:
        text = tokenizer.decode(item.generation.prompt_ids, skip_special=False)
        print(text, file=sys.stderr)
    if options["json"]:
        print(json.dumps(item_report(item), ensure_ascii=False), flush=True)
        return
    prompt = one_line(str(item.request.prompt))
    if len(prompt) > PROMPT_COLUMNS:
        prompt = prompt[: PROMPT_COLUMNS - 1] + "…"
    text = item.text if item.error is None else f"error: {one_line(str(item.error))}"
    print(
        f"[{item.request.id}] {prompt}\n{clean(text) if sys.stdout.isatty() else text}\n",
        flush=True,
    )


def item_report(item: BatchItem) -> dict[str, Any]:
    """The object that `generate --batch --json` prints for one prompt."""
    stats = item.generation.stats if item.generation is not None else None
    error = {} if item.error is None else {"error": str(item.error)}
    return {
        "id": item.request.id,
        "prompt": item.request.prompt,
        "text": item.text,
        "tokens": [token.id for token in item.tokens],
        "prompt_tokens": stats.prompt_tokens if stats is not None else 0,
        "completion_tokens": len(item.tokens),
        "stop_reason": item.stop_reason,
    } | error


# -- the file


def read_requests(source: str) -> list[BatchRequest]:
    """The prompts of a file (`-`: stdin): one a line, or JSON objects if the first is one.

    Raises UsageError naming the file and the line of the first that makes no sense.
    """
    name, text = _read(source)
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"--batch {name}: there is no prompt in it; write one a line")
    is_json = lines[0][1].lstrip().startswith("{")
    return [_request(f"--batch {name}, line {i}", i, line, is_json) for i, line in lines]


def _read(source: str) -> tuple[str, str]:
    try:
        if source == "-":
            return "stdin", sys.stdin.read()
        return source, Path(source).read_text("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--batch {source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--batch {source}: it is not UTF-8 text ({error.reason})") from error


def _request(where: str, number: int, line: str, is_json: bool) -> BatchRequest:
    from ..batch import BatchRequest

    if not is_json:
        return BatchRequest(line.removesuffix("\r"), id=number)
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UsageError(
            f"{where}: it is no JSON ({error}), as in a file whose first line begins with a brace"
        ) from error
    return BatchRequest(**{"id": number, **_checked(where, given)})


FIELDS: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,), "system": (str,), "max_tokens": (int,), "id": (str, int),
}  # fmt: skip


def _checked(where: str, given: Any) -> dict[str, Any]:
    """A JSON line's fields, those that are null left out."""
    if not isinstance(given, dict):
        raise UsageError(f'{where}: it is no JSON object, as in {{"prompt": "..."}}')
    fields = {name: value for name, value in given.items() if value is not None}
    _refuse(where, fields, [name for name in fields if name not in FIELDS], "is unknown")
    odd = [n for n, v in fields.items() if isinstance(v, bool) or not isinstance(v, FIELDS[n])]
    _refuse(where, fields, odd, "is of the wrong kind")
    if not fields.get("prompt"):
        raise UsageError(f'{where}: it has no "prompt", or an empty one')
    if fields.get("max_tokens", 1) < 1:
        raise UsageError(f'{where}: "max_tokens" must be at least 1')
    return fields


def _refuse(where: str, fields: Mapping[str, Any], names: Sequence[str], why: str) -> None:
    kinds = 'use "prompt", "system", "id" (texts) and "max_tokens" (a whole number)'
    for name in names:
        raise UsageError(f"{where}: {json.dumps({name: fields[name]})} {why}; {kinds}")
