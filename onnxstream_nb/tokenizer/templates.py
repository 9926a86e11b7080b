"""Chat templates: a model's own Jinja text, rendered in a limited child process.

Jinja's sandbox keeps a template from running code, but not from using all CPU or memory; so it
runs in a child with limits (`template_child.py`), which this process starts without forking.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ModelError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""`<|im_start|>role\\ntext<|im_end|>\\n` for each message (TinyLlama-Chat v0.3 and many more)."""

LLAMA_INST = (
    "<s>{% set system = namespace(text='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set system.text = system.text + m.content + '\\n\\n' %}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}"
    "{% else %}{{ '[INST] ' + system.text + m.content + ' [/INST]' }}"
    "{% set system.text = '' %}{% endif %}{% endfor %}"
)
"""`<s>[INST] text [/INST] reply</s>[INST] ...` (Mistral-Instruct v0.1 and v0.2). A system message
is put before the user's next text, as these models know no such role."""

CPU_SECONDS = 3
WALL_SECONDS = 15.0
MEMORY_BYTES = 512 << 20
TEXT_LIMIT = 32 << 20

_CHILD = Path(__file__).with_name("template_child.py")


def render(template: str, **variables: Any) -> str:
    """Render a chat template with JSON-like variables, as Hugging Face's `apply_chat_template`
    does (trimmed blocks, loop controls, `raise_exception`, `strftime_now`, plain `tojson`).

    ModelError when the template is malformed or unsafe, refuses the conversation, or takes more
    than CPU_SECONDS, MEMORY_BYTES (Linux) or WALL_SECONDS."""
    built_in = _BUILT_IN.get(template)
    if built_in is not None:
        return built_in(variables["messages"], variables.get("add_generation_prompt", False))
    request = {
        "paths": _library_paths(),
        "limits": {"cpu": CPU_SECONDS, "memory": MEMORY_BYTES, "text": TEXT_LIMIT},
        "template": template,
        "variables": variables,
    }
    return _text_of(_run_child(json.dumps(request).encode()))


def _chatml(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """CHATML without a child."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join([*turns, "<|im_start|>assistant\n" if add_generation_prompt else ""])


def _llama_inst(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
    """LLAMA_INST without a child. The user's turn ends in the cue for the reply anyway."""
    text, system = "<s>", ""
    for message in messages:
        if message["role"] == "system":
            system += message["content"] + "\n\n"
        elif message["role"] == "assistant":
            text += f" {message['content']}</s>"
        else:
            text += f"[INST] {system}{message['content']} [/INST]"
            system = ""
    return text


_BUILT_IN: Mapping[str, Callable[[Sequence[Mapping[str, str]], bool], str]] = {
    CHATML: _chatml,
    LLAMA_INST: _llama_inst,
}


def _library_paths() -> list[str]:
    """Where jinja2 and what it needs are installed: the isolated child has no other packages."""
    specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
    found = [Path(spec.origin).parent.parent for spec in specs if spec and spec.origin]
    return list(dict.fromkeys(map(str, found)))


def _run_child(request: bytes) -> subprocess.CompletedProcess[bytes]:
    # -S skips site-packages' start-up hooks; a session of its own keeps Ctrl-C from the child
    command = [sys.executable, "-I", "-S", str(_CHILD)]
    try:
        return subprocess.run(
            command, input=request, capture_output=True, timeout=WALL_SECONDS,
            start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"the model's chat template was stopped after {WALL_SECONDS:g} s: {_ADVICE}"
        ) from error


_ADVICE = "use a model with a sound template, or --raw for no template"


def _text_of(child: subprocess.CompletedProcess[bytes]) -> str:
    if child.returncode == 0:
        reply = json.loads(child.stdout)
        if "text" in reply:
            return str(reply["text"])
        raise ModelError(f"the model's chat template failed ({reply['error']}): {_ADVICE}")
    if child.returncode < 0:
        raise ModelError(
            f"the model's chat template was stopped: it used more than {CPU_SECONDS} s of CPU time "
            f"or {MEMORY_BYTES >> 20} MiB of memory (signal {-child.returncode}): {_ADVICE}"
        )
    last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
    raise ModelError(f"the chat template's process failed ({''.join(last)}): {_ADVICE}")
