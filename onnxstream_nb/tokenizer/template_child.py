"""Run as a script: read a template and its variables on stdin, write the rendered text on stdout.

`templates.render` starts it, by path and isolated. It limits itself before it reads a template.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def limit_resources(cpu: int, memory: int) -> None:
    """Cap CPU seconds and (on Linux, where it holds) address space; Windows has neither."""
    try:
        import resource
    except ImportError:
        return
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: cpu}
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = memory
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, hard))


def environment() -> Environment:
    """Hugging Face transformers' environment for chat templates."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's text for training; here it only renders."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    result = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    result.filters["tojson"] = to_json
    result.globals["raise_exception"] = raise_exception
    result.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return result


def rendered(request: dict[str, Any]) -> dict[str, str]:
    """{"text": ...} or {"error": why not}."""
    sys.path.extend(request["paths"])
    try:
        text = environment().from_string(request["template"]).render(request["variables"])
    except MemoryError:
        return {"error": f"it needs more than {request['limits']['memory'] >> 20} MiB of memory"}
    except Exception as error:  # whatever a template raises is the template's failure
        return {"error": f"{type(error).__name__}: {error}"}
    limit = request["limits"]["text"]
    if len(text) > limit:
        return {"error": f"it makes {len(text)} characters, and {limit} is the most allowed"}
    return {"text": text}


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    limit_resources(request["limits"]["cpu"], request["limits"]["memory"])
    sys.stdout.write(json.dumps(rendered(request)))


if __name__ == "__main__":
    main()
