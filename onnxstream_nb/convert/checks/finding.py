"""What a check of a model finds, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ...errors import Interrupted, MemoryBudgetError, OnnxstreamError, UsageError
from ...progress import Report

Findings = Iterator["Finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report. `state` is ok, failed or skipped; `file` and `tensor` are empty where
    it is about none, `remedy` says what to do about a failure."""

    check: str
    state: str
    detail: str
    file: str = ""
    tensor: str = ""
    remedy: str = ""


def ok(check: str, detail: str) -> Finding:
    """What was looked at is as it should be."""
    return Finding(check, "ok", detail)


def skipped(check: str, reason: str) -> Finding:
    """There is nothing to look at, or it cannot be looked at."""
    return Finding(check, "skipped", reason)


def failed(
    check: str, detail: str, *, file: object = "", tensor: str = "", remedy: str = ""
) -> Finding:
    """Something is wrong with a file, a tensor or the whole model."""
    return Finding(check, "failed", detail, str(file), tensor, remedy)


def guarded(check: str, findings: Callable[[], Iterable[Finding]]) -> Findings:
    """What a check finds; an error that it raises is a finding as well, whatever it is: a damaged
    model may fail anywhere, and the report must reach its end. A flag that makes no sense is the
    caller's: a UsageError."""
    try:
        yield from findings()
    except (Interrupted, MemoryError, UsageError):
        raise
    except MemoryBudgetError as error:  # says something of this machine, not of the model
        yield skipped(check, str(error))
    except OnnxstreamError as error:
        yield failed(check, str(error))
    except OSError as error:
        remedy = "look after the disk or the file's permissions, then try again"
        reason = error.strerror or str(error)
        yield failed(check, reason, file=error.filename or "", remedy=remedy)
    except Exception as error:
        remedy = "look at the graph with inspect --plan; --debug of generate shows where it fails"
        yield failed(check, f"{type(error).__name__}: {error}", remedy=remedy)


class Counter:
    """Tells `report` how many of `total` bytes a check has read."""

    def __init__(self, report: Report, what: str, total: int) -> None:
        self.report, self.what, self.total, self.done = report, what, total, 0
        self.at(0)

    def at(self, nbytes: int) -> None:
        """So many bytes behind those that were finished are read."""
        done = min(self.done + nbytes, self.total)
        text = f"{self.what}: {done / 1e6:.1f} of {self.total / 1e6:.1f} MB"
        self.report(text, done / self.total if self.total else None)

    def finish(self, nbytes: int) -> None:
        """So many more are done with."""
        self.done += nbytes
        self.at(0)
