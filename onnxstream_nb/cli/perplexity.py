"""The verb perplexity: what it opens, and how its figures are shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, device
from ..errors import MemoryBudgetError, ModelError, UsageError
from ..gpu import asked
from ..progress import Report, of_download

if TYPE_CHECKING:
    from ..hub import Resolved
    from ..perplexity import Divergence, Reader
    from ..tokenizer import Tokenizer

Windows = Sequence[Sequence[int]]


def perplexity(options: Mapping[str, Any]) -> int:
    """Measure a model on a text, beside a reference if one is named; print the figures."""
    _check_flags(options)
    text = read_text(options["text"])
    from .. import ui

    with ui.progress() as report:
        document = measure(text, options, report)
    print(json.dumps(document, ensure_ascii=False) if options["json"] else table(document))
    return 0


def _check_flags(options: Mapping[str, Any]) -> None:
    if options["tokens"] is not None and options["tokens"] < options["window"]:
        raise UsageError(
            f"--tokens {options['tokens']} is less than one window of {options['window']} tokens: "
            "raise it, or lower --window"
        )
    other = options["reference_precision"]
    if other == options["precision"] and not options["reference"]:
        raise UsageError(
            f"--reference-precision {other} is the model's own --precision: "
            "change one of them, or name another model as --reference"
        )


def read_text(path: str, flag: str = "--text") -> str:
    """The text of a UTF-8 file that a flag names, its line breaks as they stand."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}; name a file of text") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{flag} {path} is not UTF-8 (at byte {error.start}): convert it, for example by iconv"
        ) from error


def measure(text: str, options: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Let the model, and its reference if there is one, read the text; the JSON document."""
    from .. import hub
    from ..perplexity import read_windows
    from ..tokenizer import load_tokenizer

    asked = [(options["model"], options["precision"])]
    if options["reference"] or options["reference_precision"]:
        precision = options["reference_precision"] or options["precision"]
        asked.append((options["reference"] or options["model"], precision))
    found = [hub.resolve(name, progress=of_download(report)) for name, _ in asked]
    report("tokenising the text", None)
    tokenizer, *others = [load_tokenizer(each.path) for each in found]
    cuts = cut(text, tokenizer, options)
    for other in others:
        _check_vocabulary(other, tokenizer, cuts, options)
    with ExitStack() as stack:
        readers: list[Reader] = []
        budgets = _budgets(options["ram"], len(found))
        for each, (_, precision), ram in zip(found, asked, budgets, strict=True):
            reader = open_reader(each, precision, ram, options, report)
            stack.enter_context(closing(reader.llm))
            _check_ids(reader, cuts)
            readers.append(reader)
        chunks = [min(reader.llm.chunk, reader.llm.logit_chunk) for reader in readers]
        batch = min([*chunks, options["batch"] or chunks[0]])
        divergence = read_windows(cuts, readers, batch, report)
    return document(options, cuts, readers, divergence)


def cut(text: str, tokenizer: Tokenizer, options: Mapping[str, Any]) -> Windows:
    """The text's windows of ids, with BOS where the model's texts begin with it."""
    from ..perplexity import windows

    bos = tokenizer.bos_id if tokenizer.add_bos else None
    ids = [*([] if bos is None else [bos]), *tokenizer.encode(text)]
    cuts = windows(ids[: options["tokens"]], options["window"], bos)
    if not cuts:
        raise UsageError(
            f"--text {options['text']}: {len(ids)} tokens are fewer than one window of "
            f"{options['window']}; give a longer text, or a smaller --window"
        )
    return cuts


def open_reader(
    found: Resolved,
    precision: str,
    ram: int | None,
    options: Mapping[str, Any],
    report: Report,
) -> Reader:
    """The model, open for windows of the size that the options say."""
    from .. import hub
    from ..formats import load
    from ..llm import LanguageModel
    from ..perplexity import Reader

    graph, size = load(found.path), options["window"]
    own = graph.metadata.get("context_length")
    if own and size > int(own):
        raise UsageError(
            f"--window {size}: {found.name} was made for at most {own} tokens; lower it"
        )
    try:
        llm = LanguageModel(
            graph, load=options["load"], ram=ram, threads=options["threads"], context=size,
            precision=precision, kv_cache=options["kv_cache"],
            kv_spill=hub.spill_dir(options["kv_spill"]), progress=report,
            packed=hub.packed_dir() if options["keep_packed"] else None, **asked(options["cuda"]),
        )  # fmt: skip
    except MemoryBudgetError as error:
        if ram == options["ram"]:
            raise
        whole = device.format_size(options["ram"])
        raise MemoryBudgetError(
            f"--ram {whole} is for the model and its reference together, and {found.name}'s part "
            f"of it does not do; raise it, or leave it out ({error})"
        ) from error
    return Reader(found.name, llm, llm.precision)


def _budgets(ram: int | None, count: int) -> Iterator[int | None]:
    """The budget of each of one or two models, told when it is to be opened. Each is one for the
    whole process as it is then: from the second's goes what the first has yet to take."""
    if ram is None or count == 1:
        yield from [ram] * count
        return
    now = device.current_rss()
    first = now + max(0, ram - now) // 2
    yield first
    yield ram - max(0, first - device.current_rss())


def _check_vocabulary(
    other: Tokenizer, own: Tokenizer, cuts: Windows, options: Mapping[str, Any]
) -> None:
    """UsageError unless the ids of the text mean the same bytes to the reference."""
    from ..tokenizer import first_difference

    token = first_difference(own, other, sorted({token for each in cuts for token in each}))
    if token is not None:
        here, there = own.token_bytes(token), other.token_bytes(token)
        raise UsageError(
            f"--reference {options['reference']}: its vocabulary is another one (token {token} "
            f"is {there!r}, and {here!r} in the model); give a model with the same vocabulary"
        )


def _check_ids(reader: Reader, cuts: Windows) -> None:
    largest = max(map(max, cuts))
    if 0 < reader.llm.vocab_size <= largest:
        raise ModelError(
            f"{reader.name}: the text has the token {largest}, and the model knows only "
            f"{reader.llm.vocab_size}; put the tokenizer beside it that belongs to it"
        )


def document(
    options: Mapping[str, Any],
    cuts: Windows,
    readers: Sequence[Reader],
    divergence: Divergence,
) -> dict[str, Any]:
    """What --json prints."""
    model, *others = readers
    compared: list[dict[str, Any]] = [
        {"model": r.name, "precision": r.precision, **r.figures(), **divergence.figures()}
        for r in others
    ]
    return {
        "model": model.name, "precision": model.precision, "text": options["text"],
        "window": options["window"], "windows": len(cuts),
        "tokens_counted": sum(map(len, model.nll)), **model.figures(),
        "reference": compared[0] if compared else None,
        "tokens_read": model.tokens, "seconds": round(model.seconds, 3),
        "tokens_per_s": round(model.tokens / model.seconds, 2),
        "gpu_bytes": sum(reader.llm.gpu_bytes for reader in readers),
        "threads": options["threads"] or device.physical_cores(), "load": options["load"],
        "peak_rss_mb": round(device.peak_rss() / 1e6, 1),
        "cpu": device.cpu_name(), "version": __version__,
    }  # fmt: skip


def table(document: Mapping[str, Any]) -> str:
    """The document as lines of text."""
    d, other = document, document["reference"]
    lines = [
        f"{d['model']}, {d['precision']}, on {d['text']}: {d['windows']} windows of {d['window']}"
        f" tokens, {d['tokens_counted']} tokens counted",
        f"perplexity       {d['perplexity']:.4f} ± {d['perplexity_error']:.4f}",
    ]
    if other is not None:
        lines += [
            f"reference        {other['model']}, {other['precision']}",
            f"its perplexity   {other['perplexity']:.4f} ± {other['perplexity_error']:.4f}",
            f"KL divergence    {other['kl_mean']:.3g} ± {other['kl_error']:.2g} nats a token;"
            f" 99 % below {other['kl_p99']:.3g}, at most {other['kl_max']:.3g}",
            f"same best token  {other['same_best']:.2%}",
            f"logits           differ by {other['logit_rms_difference']:.3g} (rms),"
            f" at most {other['logit_max_difference']:.3g};"
            f" correlation {other['logit_correlation']:.7f}",
        ]
    lines += [
        f"speed            {d['tokens_per_s']:.1f} tokens/s",
        f"peak memory      {d['peak_rss_mb']:.0f} MB",
    ]
    return "\n".join(lines)
