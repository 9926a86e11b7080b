"""The verb verify: the checks of a model, as lines or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..convert.checks.finding import Finding
    from ..hub import Copy

MARKS = {"ok": "ok       ", "failed": "FAILED   ", "skipped": "skipped  "}
INDENT = f"{'':<9}{'':<11}"


def verify(options: Mapping[str, Any]) -> int:
    """Check a model on this disk and print each finding; 1 when one of the checks failed."""
    path, copy = here(options["model"])
    from .. import ui
    from ..convert.checks.verify import Verification

    def silent(text: str, fraction: float | None) -> None: ...

    checks = Verification(
        path, silent, copy=copy, load=options["load"], ram=options["ram"],
        threads=options["threads"], sizes=dict(options["size"] or ()),
    )  # fmt: skip
    findings, pending = [], iter(checks)
    while True:
        with ui.progress() as checks.report:  # a bar of its own for each, above which lines stay
            finding = next(pending, None)
        checks.report = silent
        if finding is None:
            break
        findings.append(finding)
        if not options["json"]:
            print(text(finding), flush=True)
    failures = sum(finding.state == "failed" for finding in findings)
    if options["json"]:
        print(json.dumps(document(options["model"], path, findings), ensure_ascii=False))
    else:
        checked = f"{path}: " if sys.stdout.isatty() else ""
        print(f"{checked}{f'{failures} failed' if failures else 'no check failed'}")
    return int(failures > 0)


def here(name: str) -> tuple[Path, Copy | None]:
    """The model's path, and what is known of its download: nothing is fetched or repaired.

    Raises UsageError when it is not on this disk.
    """
    from .. import hub

    copy, path = hub.recorded(name), Path(name).expanduser()
    if name and path.exists():
        return path, copy
    if copy is None:
        raise UsageError(
            f"{name!r} is no path and not on this disk; `onnxstream_nb list` shows what there is, "
            "and `onnxstream_nb pull` fetches one"
        )
    return copy.path, copy


def document(name: str, path: Path, findings: list[Finding]) -> dict[str, Any]:
    """What --json prints."""
    return {
        "model": name,
        "path": str(path),
        "ok": all(finding.state != "failed" for finding in findings),
        "checks": [asdict(finding) for finding in findings],
    }


def text(finding: Finding) -> str:
    """A finding as one line, and its remedy on a second one."""
    from ..ui.text import clean, one_line

    where = ": ".join(part for part in (finding.file, finding.tensor) if part)
    detail = f"{where}: {finding.detail}" if where else finding.detail
    line = f"{MARKS[finding.state]}{finding.check:<11}{clean(one_line(detail))}"
    return f"{line}\n{INDENT}{clean(one_line(finding.remedy))}" if finding.remedy else line
