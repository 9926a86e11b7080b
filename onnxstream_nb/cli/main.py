"""The command line: verbs, their flags, exit codes. Nothing heavy is imported before a verb runs.

Exit codes: 0 done, 1 the check failed (doctor), 2 a user error, 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import difflib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from .. import __version__
from ..errors import DISK_FULL, OnnxstreamError, UsageError
from .options import Parser, read_options
from .verbs import DEBUG, VERBS

PROGRAM = "onnxstream_nb"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? instead
    try:
        return _finish(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: that is no error of ours
        _drop_output()
        return 141
    except (OnnxstreamError, OSError, MemoryError) as error:
        if "--debug" in arguments or os.environ.get(DEBUG.variable, "0") not in ("", "0"):
            import traceback

            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # which the interpreter would tell once more
            _drop_output()
        return 2


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return "there is not enough memory; --ram SIZE streams what does not fit, --context N less"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{text}; free some space on that disk"
    return text


def _drop_output() -> None:
    """What is still to be written to standard output is not wanted, or cannot be."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _finish(arguments: list[str]) -> int:
    try:
        code = _run(arguments)
    except SystemExit as done:  # argparse has printed a help page
        code = int(done.code or 0)
    sys.stdout.flush()
    return code


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"{PROGRAM} {__version__}")
        return 0
    name, *rest = arguments
    verb = VERBS.get(name) or _unknown(name)
    options = parse(name, rest, os.environ)
    module, _, function = verb.run.partition(":")
    command = getattr(import_module(f"..{module}", __package__), function)
    from ..ui import telling

    with telling():
        return _traced(command, options) if options.get("trace") else int(command(options))


def _traced(command: Callable[[Mapping[str, Any]], int], options: Mapping[str, Any]) -> int:
    """Run a verb, and print the time and bytes of each operator."""
    from .. import trace

    with trace.tracing() as recorded:
        code = int(command(options))
    print(recorded.table(), file=sys.stderr)
    return code


def parse(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The checked values of a verb's flags and of `model`, by name."""
    verb = VERBS[name]
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=verb.help[0].upper() + verb.help[1:] + ".",
        epilog="A variable in brackets gives the flag's value where the flag is absent.",
        allow_abbrev=False,
    )
    if verb.model:
        parser.add_argument(
            "model",
            metavar="MODEL",
            nargs="?" if verb.model == "optional" else None,
            help=verb.about,
        )
    options = read_options(parser, (*verb.options, DEBUG), arguments, environment)
    if options.get("ram") is not None and options.get("load") == "mmap":
        raise UsageError(
            "--ram and --load mmap exclude each other (the system, not the program, decides how"
            " much of a mapped file is resident): drop one, also from ONNXSTREAM_RAM and _LOAD"
        )
    if name == "generate":
        _check_prompts(options)
    if options.get("dtype") and not options.get("random_weights", True):
        raise UsageError("--dtype is the storage of --random-weights: give both")
    return options


def _check_prompts(options: Mapping[str, Any]) -> None:
    """UsageError unless there is either a prompt or a file of them."""
    prompt, batch = options["prompt"] is not None, options["batch"] is not None
    if not prompt and not batch:
        raise UsageError(
            "--prompt is missing; give it, or set ONNXSTREAM_PROMPT (--batch FILE for many)"
        )
    if prompt and batch:
        raise UsageError(
            "--prompt and --batch exclude each other: drop one, also from ONNXSTREAM_PROMPT and"
            " ONNXSTREAM_BATCH"
        )
    if batch and options["draft"] is not None:
        raise UsageError(
            "--draft guesses for one reply, and --batch has many in a pass: drop one, also from"
            " ONNXSTREAM_DRAFT"
        )
    if options["batch_size"] is not None and not batch:
        raise UsageError("--batch-size is for --batch FILE: give both")


def overview() -> str:
    """The help page of the program itself."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{verb.help}" for name, verb in VERBS.items())
    return (
        f"usage: {PROGRAM} COMMAND [MODEL] [flags]\n\n"
        "Runs ONNX models, language models first, that are larger than memory.\n\n"
        f"commands:\n{verbs}\n\n"
        f"flags of a command: {PROGRAM} COMMAND --help; version: {PROGRAM} --version\n"
        f"begin with: {PROGRAM} chat"
    )


def _unknown(name: str) -> NoReturn:
    close = difflib.get_close_matches(name, VERBS, 1)
    hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(VERBS)}"
    raise UsageError(f"unknown command {name!r}; {hint}")
