"""llama.cpp by ctypes: the copy inside the xllamacpp wheel, or a build of one's own (--library).

The structs of parameters change from build to build, so they are passed as opaque bytes, larger
than any: a callee reads its own part. Of their fields only the first three of the context's are
set, which have stood still for years; the number of threads has a function.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from argparse import Namespace
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_uint32, c_void_p
from pathlib import Path

import numpy as np
from protocol import Engine, Logits, arguments, serve

BATCH, MICRO_BATCH = 2048, 512  # llama.cpp's defaults


class Opaque(ctypes.Structure):
    """Parameters whose fields are the library's business."""

    _fields_ = (("words", c_uint32 * 256),)


SIGNATURES = {
    "llama_backend_init": (None,),
    "llama_model_default_params": (Opaque,),
    "llama_context_default_params": (Opaque,),
    "llama_model_load_from_file": (c_void_p, c_char_p, Opaque),
    "llama_init_from_model": (c_void_p, c_void_p, Opaque),
    "llama_set_n_threads": (None, c_void_p, c_int32, c_int32),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_batch_get_one": (Opaque, c_void_p, c_int32),
    "llama_decode": (c_int32, c_void_p, Opaque),
    "llama_get_logits_ith": (POINTER(c_float), c_void_p, c_int32),
    "llama_print_system_info": (c_char_p,),
    "llama_log_set": (None, c_void_p, c_void_p),
}


def library(path: Path | None) -> tuple[ctypes.CDLL, str]:
    """The library and its version; with `path`, a libllama beside the backends it loads."""
    if path is None:
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'xllamacpp'", name="xllamacpp")
        name = next(Path(spec.origin).parent.glob("xllamacpp*.so"))
        return ctypes.CDLL(str(name)), f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    for backends in path.parent.glob("libggml*.so*"):
        loader = getattr(ctypes.CDLL(str(backends)), "ggml_backend_load_all_from_path", None)
        if loader is not None:
            loader.argtypes = (c_char_p,)
            loader(str(path.parent).encode())
            break
    return ctypes.CDLL(str(path)), path.name


class LlamaCpp(Engine):
    """One model and one context, with llama.cpp's own defaults but for its size and threads."""

    def __init__(self, given: Namespace) -> None:
        super().__init__()
        self.library, self.version = library(given.library)
        for name, (result, *parameters) in SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, parameters
        call = self.library
        self._silence = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda *_: None)
        call.llama_log_set(ctypes.cast(self._silence, c_void_p), None)
        call.llama_backend_init()
        path = str(given.model).encode()
        self._model = call.llama_model_load_from_file(path, call.llama_model_default_params())
        if not self._model:
            raise ValueError("llama.cpp cannot load the model")
        parameters = call.llama_context_default_params()
        parameters.words[0] = -(-given.context // 256) * 256
        parameters.words[1:3] = BATCH, MICRO_BATCH
        self._context = call.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise ValueError("llama.cpp cannot make a context")
        call.llama_set_n_threads(self._context, given.threads, given.threads)
        self._memory = call.llama_get_memory(self._context)
        self.vocab_size = call.llama_vocab_n_tokens(call.llama_model_get_vocab(self._model))
        self.settings = self._features()

    def _features(self) -> str:
        parts = self.library.llama_print_system_info().decode().replace("CPU :", "").split("|")
        return " ".join(p.split("=")[0].strip() for p in parts if p.strip().endswith("= 1"))

    def feed(self, ids: Sequence[int]) -> Logits:
        for first in range(0, len(ids), BATCH):
            part = np.array(ids[first : first + BATCH], np.int32)
            batch = self.library.llama_batch_get_one(part.ctypes.data, len(part))
            code = self.library.llama_decode(self._context, batch)
            if code:
                raise ValueError(f"llama_decode returned {code}")
        self.tokens += ids
        logits = self.library.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,))

    def rewind(self, length: int) -> None:
        if not self.library.llama_memory_seq_rm(self._memory, 0, length, -1):
            raise ValueError("llama.cpp cannot forget these tokens")
        del self.tokens[length:]


if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--library", type=Path, help="libllama.so of another build")
    serve(parser.parse_args(), LlamaCpp)
