"""PyTorch: transformers' LlamaForCausalLM with the GGUF's weights, dequantised; not compiled."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from llama_weights import config, tensors
from protocol import Engine, Logits, arguments, serve


class TorchEager(Engine):
    """DynamicCache and scaled-dot-product attention: what `generate` uses by default."""

    def __init__(self, given: Namespace) -> None:
        super().__init__()
        import torch
        import transformers
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        torch.set_num_threads(given.threads)
        dtype = getattr(torch, given.dtype)
        settings = transformers.LlamaConfig(**config(given.model), attn_implementation="sdpa")
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(settings)
        weights = {name: torch.from_numpy(a).to(dtype) for name, a in tensors(given.model)}
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        model.load_state_dict(weights, assign=True)
        model.model.rotary_emb = LlamaRotaryEmbedding(settings)
        self._torch, self._transformers, self._model = torch, transformers, model.eval()
        self._cache = transformers.DynamicCache()
        self.vocab_size = settings.vocab_size
        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self.settings = f"{given.dtype}, eager, sdpa"

    def feed(self, ids: Sequence[int]) -> Logits:
        with self._torch.inference_mode():
            read = self._torch.tensor([list(ids)])
            result = self._model(
                input_ids=read, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
        self.tokens += ids
        return result.logits[0, -1].float().numpy()

    def rewind(self, length: int) -> None:
        if length == 0:
            self._cache = self._transformers.DynamicCache()
        elif length < len(self.tokens):
            self._cache.crop(length - len(self.tokens))
        del self.tokens[length:]


if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    serve(parser.parse_args(), TorchEager)
