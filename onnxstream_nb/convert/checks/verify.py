"""All checks of a model on this disk, one after the other: each is run when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ... import hub
from ...errors import ModelError
from ...formats import identify
from ...graph import Graph
from ...progress import Report
from ...session import load_graph
from . import verify_files, verify_graph, verify_run, verify_tokenizer, verify_weights
from .finding import Finding, Findings, failed, guarded, skipped

__all__ = ["Finding", "Verification"]

NEEDS_GRAPH = ("shapes", "weights", "tokenizer", "forward", "cache", "packed")


class Verification:
    """The checks of the model at `path`: iterating it runs them, one finding after the other.

    `copy` is what is known of its download. `load`, `ram` and `threads` are as for Session, `sizes`
    the open sizes of the inputs of a graph that is no language model, by name ("": all others).
    `report` may be exchanged between two findings. Raises ModelError when there is no model.
    """

    def __init__(
        self,
        path: Path,
        report: Report,
        *,
        copy: hub.Copy | None = None,
        load: str = "auto",
        ram: int | None = None,
        threads: int | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        identify(path)
        self.path, self.report, self.copy = path, report, copy
        self.holding: Mapping[str, Any] = {"load": load, "ram": ram, "threads": threads}
        self.sizes = sizes or {}
        self._graph: Graph | None = None

    def __iter__(self) -> Iterator[Finding]:
        def tell(text: str, fraction: float | None) -> None:
            self.report(text, fraction)

        yield from guarded("manifest", lambda: verify_files.manifest(self.path, tell))
        yield from guarded("download", lambda: verify_files.download(self.copy, tell))
        yield from guarded("graph", self._load)
        if self._graph is None:
            for name in NEEDS_GRAPH:
                yield skipped(name, "the graph could not be read")
            return
        disagree = False
        for name, check in self._checks(self._graph, tell):
            if name == "forward" and disagree:
                yield skipped(name, "the shapes do not agree")
                continue
            for finding in guarded(name, check):
                disagree |= (finding.check, finding.state) == ("shapes", "failed")
                yield finding

    def _load(self) -> Findings:
        self.report("reading the graph", None)
        try:
            graph = load_graph(self.path)
        except ModelError as error:
            yield failed("graph", str(error))
            return
        yield from verify_graph.placed(graph)
        self._graph = graph

    def _checks(self, graph: Graph, tell: Report) -> list[tuple[str, Callable[[], Findings]]]:
        path = self.path
        return [
            ("shapes", lambda: verify_graph.shapes(graph)),
            ("weights", lambda: verify_weights.finite(graph, tell)),
            ("tokenizer", lambda: verify_tokenizer.tokenizer(graph, path)),
            ("forward", lambda: verify_run.forward(graph, path, self.holding, self.sizes, tell)),
            ("packed", lambda: verify_files.packed(graph, tell)),
        ]
