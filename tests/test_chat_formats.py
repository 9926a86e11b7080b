"""The chat formats of Gemma and Phi-3, by the templates in their tokenizers' configurations."""

from __future__ import annotations

from typing import Any

import pytest

from onnxstream_nb.errors import ModelError
from onnxstream_nb.tokenizer import Tokenizer, encode_chat, render_chat
from onnxstream_nb.tokenizer.gguf import from_metadata

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "a <end_of_turn> b"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def tokenizer(special: dict[str, int], template: str, **metadata: Any) -> Tokenizer:
    """A vocabulary of bytes and special tokens: text -> its kind, the first two BOS and EOS."""
    pieces = {"<unk>": UNKNOWN, **special, **{f"<0x{i:02X}>": BYTE for i in range(256)}}
    pieces |= {"▁": NORMAL, "h": NORMAL, "i": NORMAL}
    return from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": list(pieces),
            "tokenizer.ggml.token_type": list(pieces.values()),
            "tokenizer.ggml.scores": [0.0] * len(pieces),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.chat_template": template,
            **metadata,
        },
        "x.gguf",
    )


def gemma(kind: int) -> Tokenizer:
    special = {"<bos>": CONTROL, "<eos>": CONTROL, "<start_of_turn>": kind, "<end_of_turn>": kind}
    return tokenizer(special, GEMMA)


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_gemma_ends_turns_and_a_message_cannot(kind: int) -> None:
    made = gemma(kind)
    assert made.eos_ids == {2, 4}
    assert render_chat(made, TALK) == (
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nho<end_of_turn>\n"
        "<start_of_turn>user\na <end_of_turn> b<end_of_turn>\n<start_of_turn>model\n"
    )
    ids = encode_chat(made, TALK)
    assert (ids.count(1), ids.count(3), ids.count(4)) == (1, 4, 3)
    assert made.decode([4]) == ""


def test_gemma_reads_a_system_message_before_the_users_text() -> None:
    text = render_chat(gemma(CONTROL), [SYSTEM, *TALK[:1]])
    assert text == (
        "<bos><start_of_turn>user\nBe brief.\n\nhi<end_of_turn>\n<start_of_turn>model\n"
    )
    with pytest.raises(ModelError, match="System role not supported"):
        render_chat(gemma(CONTROL), [SYSTEM])
    with pytest.raises(ModelError, match="must alternate"):
        render_chat(gemma(CONTROL), [SYSTEM, TALK[0], TALK[2]])


def test_phi3_ends_turns_by_a_token_that_is_not_its_eos() -> None:
    names = ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    made = tokenizer(dict.fromkeys(names, CONTROL), PHI3, **{"tokenizer.ggml.add_bos_token": True})
    assert made.eos_ids == {2, 6}
    ids = encode_chat(made, [SYSTEM, *TALK[:1]])
    assert [i for i in ids if i < 7] == [1, 3, 6, 4, 6, 5]
    assert render_chat(made, [SYSTEM, *TALK[:1]]) == (
        "<s><|system|>\nBe brief.<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n"
    )
