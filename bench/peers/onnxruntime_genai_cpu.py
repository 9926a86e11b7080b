"""onnxruntime-genai: a model that its own builder makes from the GGUF's weights, dequantised.

int4 is what the builder is made for: MatMulNBits in blocks of 32 with int8 activations, and
GroupQueryAttention over one growing buffer. The files are made once and kept in the cache folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_weights import config, reader, tensors
from protocol import Engine, Logits, arguments, serve

OPTIONS = ("int4_accuracy_level=4", "int4_block_size=32")


def written(model: Path, kind: str) -> Path:
    """The builder's folder for a model, made when it is missing."""
    from onnxstream_nb.hub import cache_dir

    path = cache_dir() / "bench" / f"{model.stem}-genai-{kind}"
    done = path / "genai_config.json"
    if done.exists() and done.stat().st_mtime >= model.stat().st_mtime:
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        write_transformers(model, Path(place))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", place]
        command += ["-o", str(path), "-p", kind, "-e", "cpu", "-c", str(Path(place) / "cache")]
        command += ["--extra_options", *OPTIONS] if kind == "int4" else []
        made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        words = (made.stderr.strip().splitlines() or [""])[-1]
        raise ValueError(f"the builder: exit code {made.returncode}: {words}")
    return path


def write_transformers(model: Path, folder: Path) -> None:
    """The model as transformers stores it, with float16 weights."""
    import safetensors.numpy
    import tokenizers
    import transformers

    settings = transformers.LlamaConfig(**config(model), architectures=["LlamaForCausalLM"])
    settings.save_pretrained(folder)
    weights = {name: array.astype(np.float16) for name, array in tensors(model)}
    file = folder / "model.safetensors"
    safetensors.numpy.save_file(weights, file, {"format": "pt"})
    fields = {k: f.contents() for k, f in reader(model).fields.items() if k.startswith("tok")}
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    pairs = tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges)
    eos = tokens[fields["tokenizer.ggml.eos_token_id"]]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(pairs), eos_token=eos, bos_token=eos
    ).save_pretrained(folder)


class GenAi(Engine):
    """A Generator, which reads ids in one piece and can be set back."""

    def __init__(self, given: Namespace) -> None:
        super().__init__()
        import onnxruntime_genai

        settings = onnxruntime_genai.Config(str(written(given.model, given.kind)))
        session = {"session_options": {"intra_op_num_threads": given.threads}}
        settings.overlay(json.dumps({"model": {"decoder": session}}))
        model = onnxruntime_genai.Model(settings)
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=given.context, do_sample=False)
        self._model, self._parameters = model, parameters
        self._make = onnxruntime_genai.Generator
        self._generator = self._make(model, parameters)
        self.vocab_size = int(config(given.model)["vocab_size"])
        self.version = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        self.settings = given.kind

    def feed(self, ids: Sequence[int]) -> Logits:
        self._generator.append_tokens(np.array([ids], np.int32))
        self.tokens += ids
        logits: Logits = self._generator.get_logits().reshape(-1, self.vocab_size)[-1]
        return logits

    def rewind(self, length: int) -> None:
        if length < len(self.tokens):
            self._generator.rewind_to(length)
        del self.tokens[length:]


if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--kind", default="int4", choices=("int4", "int8", "fp32"))
    serve(parser.parse_args(), GenAi, lambda given: written(given.model, given.kind))
