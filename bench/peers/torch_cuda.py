"""PyTorch on a GPU: a plain Llama in float16 with random weights, whose next token is a CUDA graph.

The model is a file with a geometry of the catalogue as JSON. `--compile` lets Inductor fuse what
it can before the graph is captured. On `--device cpu` nothing is captured: for tests.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from protocol import Engine, Logits, arguments, seconds, serve

TIMES = 20  # how often a copy or a product is done in a row


class Llama:
    """Weights, a cache for `positions`, and the step of T tokens at given positions. `matrix` makes
    the weight of a name and a shape (N, K)."""

    def __init__(
        self, torch: Any, g: Mapping[str, Any], positions: int, device: str,
        matrix: Callable[[str, int, int], Any],
    ) -> None:  # fmt: skip
        self.torch, self.g = torch, g
        width, d = g["hidden"], g["head_dim"]
        q, kv = g["heads"] * d, g["kv_heads"] * d
        shapes = {"qkv": (q + 2 * kv, width), "o": (width, q), "gate_up": (2 * g["ffn"], width),
                  "down": (width, g["ffn"])}  # fmt: skip
        self.embedding = matrix("embedding", g["vocab"], width)
        self.head = self.embedding if g["tied_embeddings"] else matrix("head", g["vocab"], width)
        self.layers = [
            {name: matrix(f"{i}.{name}", *shape) for name, shape in shapes.items()}
            for i in range(g["layers"])
        ]
        kind = self.embedding.dtype
        self.ones = torch.ones(width, dtype=kind, device=device)
        self.caches = torch.zeros(
            g["layers"], 2, g["kv_heads"], positions, d, dtype=kind, device=device
        )
        self.places = torch.arange(positions, device=device)
        turns = g["rope_theta"] ** (-torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
        angles = self.places[:, None] * torch.cat([turns, turns])[None]
        self.cos, self.sin = angles.cos().to(kind), angles.sin().to(kind)

    def norm(self, x: Any) -> Any:
        functional = self.torch.nn.functional
        return functional.rms_norm(x, self.ones.shape, self.ones, self.g["norm_epsilon"])

    def rotate(self, x: Any, at: Any) -> Any:
        """x (T, H, D) at positions (T,)."""
        first, second = x.chunk(2, dim=-1)
        turned = self.torch.cat([-second, first], dim=-1)
        return x * self.cos[at][:, None] + turned * self.sin[at][:, None]

    def __call__(self, ids: Any, at: Any, whole: bool = False) -> Any:
        """ids and at (T,) -> logits (V,) after the last; `whole` when they are all there is."""
        g, functional = self.g, self.torch.nn.functional
        t, d, heads, kv = len(ids), g["head_dim"], g["heads"], g["kv_heads"]
        x = self.embedding[ids]
        mask = None if whole else self.places[None] <= at[:, None]
        for layer, (past_keys, past_values) in zip(self.layers, self.caches, strict=True):
            q, k, v = (self.norm(x) @ layer["qkv"].T).split([heads * d, kv * d, kv * d], dim=-1)
            q = self.rotate(q.view(t, heads, d), at).transpose(0, 1)
            k = self.rotate(k.view(t, kv, d), at).transpose(0, 1)
            v = v.view(t, kv, d).transpose(0, 1)
            past_keys.index_copy_(1, at, k)
            past_values.index_copy_(1, at, v)
            k, v = (k, v) if whole else (past_keys, past_values)
            y = functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=mask, is_causal=whole, enable_gqa=True
            )
            x = x + y[0].transpose(0, 1).reshape(t, heads * d) @ layer["o"].T
            gate, up = (self.norm(x) @ layer["gate_up"].T).chunk(2, dim=-1)
            x = x + (functional.silu(gate) * up) @ layer["down"].T
        return (self.norm(x[-1:]) @ self.head.T)[0]


class TorchCuda(Engine):
    """One token is a captured graph; more are computed as they come."""

    def __init__(self, given: Namespace) -> None:
        super().__init__()
        import torch

        if given.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        torch.set_num_threads(given.threads)
        self.torch, self.device = torch, given.device
        self.kind = torch.float32 if given.device == "cpu" else torch.float16
        geometry = json.loads(given.model.read_text())
        with torch.inference_mode():
            self.model = Llama(torch, geometry, given.context, given.device, self._random)
            self.id = torch.zeros(1, dtype=torch.int64, device=given.device)
            self.at = torch.zeros_like(self.id)
            step = torch.compile(self.model) if given.compile else self.model
            self.step = self._captured(step) if given.device == "cuda" else self._plainly(step)
        self.vocab_size = geometry["vocab"]
        self.version = f"torch {torch.__version__}"
        how = "a CUDA graph a token" if given.device == "cuda" else given.device
        self.settings = f"{str(self.kind)[6:]}{', compiled' if given.compile else ''}, {how}"

    def _random(self, _: str, n: int, k: int) -> Any:
        return self.torch.randn(n, k, dtype=self.kind, device=self.device) * 0.02

    def _plainly(self, step: Any) -> Callable[[], Any]:
        return lambda: step(self.id, self.at)

    def _captured(self, step: Any) -> Callable[[], Any]:
        torch = self.torch
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            for _ in range(3):
                step(self.id, self.at)
        aside.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(self.id, self.at)

        def replay() -> Any:
            graph.replay()
            return logits

        return replay

    def feed(self, ids: Sequence[int]) -> Logits:
        begin = len(self.tokens)
        with self.torch.inference_mode():
            if len(ids) == 1:
                self.id.fill_(ids[0])
                self.at.fill_(begin)
                logits = self.step()
            else:
                read = self.torch.tensor(list(ids), device=self.device)
                at = self.torch.arange(begin, begin + len(ids), device=self.device)
                logits = self.model(read, at, whole=begin == 0)
            found: Logits = logits.float().cpu().numpy()
        self.tokens += ids
        return found

    def rewind(self, length: int) -> None:
        del self.tokens[length:]

    def respond(self, do: str, **request: Any) -> dict[str, Any]:
        if do == "copy":
            block = self.torch.empty(request["nbytes"], dtype=self.torch.uint8, device=self.device)
            to = self.torch.empty_like(block)
            return {"seconds": self._each(lambda: to.copy_(block))}
        if do == "product":
            x, w = (self._random("", request[side], request["k"]) for side in "mn")
            return {"seconds": self._each(lambda: x @ w.T)}
        return super().respond(do, **request)

    def _each(self, work: Callable[[], Any]) -> float:
        """Seconds of what is done on the GPU, one of many in a row."""
        wait = self.torch.cuda.synchronize if self.device == "cuda" else lambda: None

        def often() -> None:
            for _ in range(TIMES):
                work()
            wait()

        often()
        return seconds(often) / TIMES


if __name__ == "__main__":
    parser = arguments()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    serve(parser.parse_args(), TorchCuda)
