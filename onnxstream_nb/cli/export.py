"""The verb export: from PyTorch to ONNX, and what is told about it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, device
from ..errors import UsageError
from ..progress import of_download

if TYPE_CHECKING:
    from ..convert.pytorch.export import Exported
    from ..progress import Report


def export(options: Mapping[str, Any]) -> int:
    """Export a model or a module; print what was written and how far it is from PyTorch."""
    if (options["model"] is None) == (options["module"] is None):
        raise UsageError(
            "name what to export: either a Hugging Face folder or hub repository, or --module "
            "pkg:factory"
        )
    from .. import ui

    with ui.progress() as report:
        document = described(options, exported(options, report))
    print(json.dumps(document, ensure_ascii=False) if options["json"] else table(document))
    return 0


def exported(options: Mapping[str, Any], report: Report) -> Exported:
    """Do it."""
    from ..convert.folder import check_out
    from ..convert.pytorch import export as convert
    from ..convert.pytorch.exporters import require

    how = convert.Options(options["exporter"], options["dtype"], options["overwrite"])
    out = Path(options["out"]).expanduser()
    check_out(out, overwrite=how.overwrite)
    if options["module"] is not None:
        return convert.export_module(options["module"], out, how, report)
    require(*convert.NEEDED)  # before anything is downloaded
    return convert.export_language_model(located(options["model"], report), out, how, report)


def located(source: str, report: Report) -> Path:
    """The folder that a path, or a hub repository's Hugging Face folder, stands for."""
    path = Path(source).expanduser()
    if path.exists():
        return path.parent if path.name == "config.json" else path
    from .. import hub
    from ..hub.catalogue import CATALOGUE

    entry = CATALOGUE.get(source)
    name = entry.repository if entry else source
    if "/" in name and ":" not in name and not source.startswith((".", "/", "~")):
        name += ":config.json"  # the folder it is in, also where a GGUF lies beside it
    return hub.resolve(name, progress=of_download(report)).path


def described(options: Mapping[str, Any], done: Exported) -> dict[str, Any]:
    """What --json prints."""
    apart = done.difference
    return {
        "source": options["model"] or options["module"], "out": str(done.out),
        "exporter": done.exporter, "opset": done.opset, "nodes": done.nodes,
        "weights": done.weights, "dtype": done.dtype, "size_bytes": done.size_bytes,
        "difference": apart.absolute, "relative_difference": apart.relative,
        "largest": apart.largest, "output": apart.output, "runs": apart.runs,
        "unsupported": apart.unsupported or None,
        "peak_rss_mb": round(device.peak_rss() / 1e6, 1), "version": __version__,
    }  # fmt: skip


def table(document: Mapping[str, Any]) -> str:
    """The document as lines of text."""
    d = document
    size = device.format_size(d["size_bytes"])
    lines = [
        f"{d['source']} -> {d['out']}",
        f"graph        opset {d['opset']}, {d['nodes']} nodes",
        f"weights      {d['weights']} elements, {d['dtype']}; {size} on disk",
        f"difference   {d['difference']:.2g} from PyTorch at most, in {d['output']}, whose largest"
        f" element is {d['largest']:.3g} ({d['runs']} runs)",
        f"peak memory  {d['peak_rss_mb']:.0f} MB",
    ]
    if d["unsupported"]:
        lines.append(f"compared by  the ONNX reference evaluator: {d['unsupported']}")
    return "\n".join(lines)
