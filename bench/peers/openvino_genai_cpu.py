"""OpenVINO GenAI's LLMPipeline, which reads a GGUF by itself.

It has no verb for one token, so times are its own: to the first token for a prompt, and between
the tokens of a greedy continuation for decoding. Its prefix cache is off: a prompt is read anew.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
from protocol import Engine, arguments, serve


class OpenVino(Engine):
    """The pipeline with its own defaults but for threads and the prefix cache."""

    def __init__(self, given: Namespace) -> None:
        super().__init__()
        import openvino
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 1 << 20  # a prompt is read in one piece
        self._tensor = openvino.Tensor
        self._config = openvino_genai.GenerationConfig
        self._pipeline = openvino_genai.LLMPipeline(
            str(given.model), "CPU",
            {"scheduler_config": scheduler, "INFERENCE_NUM_THREADS": given.threads},
        )  # fmt: skip
        self.vocab_size = len(self._pipeline.get_tokenizer().get_vocab())
        self.version = f"openvino-genai {openvino_genai.__version__}"
        self.settings = "GGUF, its own precision"

    def _generate(self, prompt: int, tokens: int) -> Any:
        config = self._config(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        ids = self._tensor(np.array([self.ids(prompt)], np.int64))
        return self._pipeline.generate(ids, config)

    def prefill(self, tokens: int) -> float:
        metrics = self._generate(tokens, 1).perf_metrics
        return float(metrics.raw_metrics.m_times_to_first_token[0]) / 1e6

    def decode(self, tokens: int, depth: int) -> float:
        raw = self._generate(depth, tokens + 1).perf_metrics.raw_metrics
        return float(sum(raw.m_durations[-tokens:])) / 1e6

    def greedy(self, tokens: int, prompt: int) -> list[int]:
        return [int(i) for i in self._generate(prompt, tokens).tokens[0]]


if __name__ == "__main__":
    serve(arguments().parse_args(), OpenVino)
