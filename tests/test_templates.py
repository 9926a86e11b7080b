"""Chat templates: rendered as Hugging Face does, in a child that cannot harm this process."""

from __future__ import annotations

import threading
import time

import pytest

from onnxstream_nb.errors import ModelError
from onnxstream_nb.tokenizer import templates
from onnxstream_nb.tokenizer.templates import CHATML, LLAMA_INST, render

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße\n 'quoted' {{ 7*7 }}"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Again?"},
]


def test_built_in_formats_by_hand():
    assert render(CHATML, messages=CONVERSATION[1:2], add_generation_prompt=True) == (
        "<|im_start|>user\nGrüße\n 'quoted' {{ 7*7 }}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(LLAMA_INST, messages=CONVERSATION, add_generation_prompt=True) == (
        "<s>[INST] Be brief.\n\nGrüße\n 'quoted' {{ 7*7 }} [/INST] Hi.</s>[INST] Again? [/INST]"
    )


@pytest.mark.parametrize("template", [CHATML, LLAMA_INST], ids=["chatml", "inst"])
@pytest.mark.parametrize("add", [True, False])
def test_built_in_formats_are_their_templates(template, add):
    # a comment makes it another template, which the child renders
    by_jinja = render("{# #}" + template, messages=CONVERSATION, add_generation_prompt=add)
    assert by_jinja == render(template, messages=CONVERSATION, add_generation_prompt=add)


def test_what_transformers_offers_to_templates():
    template = """
    {%- for m in messages %}
        {%- if loop.index == 3 %}{% break %}{% endif %}
        {{- m | tojson }}
    {% endfor %}
{%- generation %}[{{ strftime_now('%Y') | length }}]{% endgeneration %}
{{- bos_token is defined }}{{ tools is none }}{{ missing }}"""
    messages = [{"role": "user", "content": "<é>"}] * 4
    assert render(template, messages=messages, tools=None, bos_token="<s>") == (
        '{"role": "user", "content": "<é>"}\n{"role": "user", "content": "<é>"}\n[4]TrueTrue'
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError|unsafe|undefined"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{{ 'ab' * 10**9 }}", "more than 512 MiB of memory"),
        ("{{ 'ab' * 20000000 }}", "40000000 characters"),
    ],
)
def test_a_template_that_fails_says_why(template, message):
    with pytest.raises(ModelError, match=message):
        render(template, messages=[])


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
    ],
    ids=["loop", "power"],
)
def test_cpu_bombs_are_stopped(bomb, monkeypatch):
    monkeypatch.setattr(templates, "CPU_SECONDS", 1)
    monkeypatch.setattr(templates, "WALL_SECONDS", 8.0)
    started = time.monotonic()
    with pytest.raises(ModelError, match="was stopped"):
        render(bomb, messages=[])
    assert time.monotonic() - started < 10


def test_the_wall_clock_limit_alone_stops_a_template(monkeypatch):
    monkeypatch.setattr(templates, "WALL_SECONDS", 0.5)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ModelError, match="stopped after 0.5 s"):
        render(loop, messages=[])


def test_works_while_other_threads_run():
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert render("{{ messages | length }}", messages=CONVERSATION) == "4"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
