"""What is to guess the tokens of a model: the text itself, or a draft model opened beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .device import current_rss, format_size, parse_size
from .errors import MemoryBudgetError, UsageError
from .progress import Report, of_download

if TYPE_CHECKING:
    from .hub import Resolved
    from .llm import LanguageModel
    from .tokenizer import Tokenizer

MOST_GUESSES = 7  # a pass of up to 8 tokens gives each one's logits bit by bit as alone


def guesses_a_pass(llm: LanguageModel, asked: int | None, draft: bool) -> int:
    """How many tokens the text may propose a pass: as asked, else all there may be where a pass
    waits for the disk, and none where it computes.

    UsageError for a number that cannot be, and for guesses that the graph does not let be checked.
    """
    if asked is not None and not 0 <= asked <= MOST_GUESSES:
        raise UsageError(f"speculate is {asked}: it may be 0 to {MOST_GUESSES} (--speculate)")
    if (asked or draft) and not llm.every_position:
        raise UsageError(
            f"{'--draft' if draft else '--speculate'}: the graph gives the logits of its last "
            "position only, so no guesses can be checked; export it with those of all positions"
        )
    if asked is None:
        return MOST_GUESSES if llm.streams and llm.every_position else 0
    return asked


def open_draft(
    name: str,
    model: Resolved,
    tokenizer: Tokenizer,
    *,
    ram: int | None,
    threads: int | None,
    context: int | None,
    device: str,
    cuda: int | str,
    progress: Report,
) -> LanguageModel:
    """The draft model `name` for `model`; under a budget all of it is kept in memory.

    Its context is no longer than the model's. Errors: UsageError when the vocabularies differ,
    MemoryBudgetError when it alone is larger than `ram`.
    """
    from .hub import resolve
    from .llm import LanguageModel, declared
    from .tokenizer import load_tokenizer

    found = resolve(name, progress=of_download(progress))
    check_vocabulary(model.name, tokenizer, found.name, load_tokenizer(found.path))
    own_context, size = declared(found.path)
    if ram is not None:
        context = context or declared(model.path)[0]
        if current_rss() + size > ram:
            raise MemoryBudgetError(
                f"--ram {format_size(ram)} is too little for the draft model {found.name} alone, "
                f"whose weights take {format_size(size)}: raise it, or leave out --draft"
            )
    draft = LanguageModel(
        found.path,
        load="auto" if ram is None else "ram",
        threads=threads,
        context=min(own_context, context or own_context),
        device=device,
        cuda=cuda,
        progress=lambda text, part: progress(f"draft model: {text}", part),
    )
    if ram is not None:  # all of it is there before the rest of the budget is worked out
        draft.feed([0])
        draft.rewind(0)
    return draft


def left_beside(draft: LanguageModel, cuda: int | str) -> int | str:
    """What of a GPU's budget (see Session) a draft model leaves."""
    if cuda in ("auto", "all"):
        return cuda  # of what is free then
    budget = parse_size(cuda, "--cuda") if isinstance(cuda, str) else cuda
    return max(0, budget - draft.gpu_bytes)


@contextmanager
def beside(draft: LanguageModel | None, ram: int | None) -> Iterator[int | None]:
    """What of a budget is left to the model beside its draft model, whose cache has yet to grow; a
    refusal within names both."""
    if draft is None or ram is None:
        yield ram
        return
    try:
        yield max(1, ram - draft.full_cache_bytes)
    except MemoryBudgetError as error:
        raise MemoryBudgetError(
            f"--ram {format_size(ram)} is for the model and its draft model together, and does not "
            f"do: raise it, or leave out --draft ({error})"
        ) from error


def check_vocabulary(model: str, own: Tokenizer, draft: str, other: Tokenizer) -> None:
    """UsageError unless every id means the same to both; it names the models and the first that
    does not."""
    from .tokenizer import first_difference

    if own.vocab_size != other.vocab_size:
        reason = f"it has {other.vocab_size} tokens, and {model} has {own.vocab_size}"
    elif (token := first_difference(own, other, range(own.vocab_size))) is not None:
        here, there = own.token_bytes(token), other.token_bytes(token)
        reason = f"token {token} is {there!r} to it, and {here!r} to {model}"
    elif own.special != other.special:
        differing = sorted(k for k, _ in set(own.special.items()) ^ set(other.special.items()))
        reason = f"the special token {differing[0]} is not the same to it and to {model}"
    else:
        return
    raise UsageError(
        f"--draft {draft}: its vocabulary is not that of {model} ({reason}); "
        "a draft model has to have the very same"
    )
