"""Reads Hugging Face folders: config.json and safetensors, in one file or sharded, as a `Graph`.

The architectures are those of architectures.py. The configuration is read strictly: a field that
is not known might change the results, so it is an error and not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import ModelError, UnsupportedError
from ..graph import Graph, WeightRef
from . import external_data
from .decoder import build
from .hf_config import read_config
from .notation import renamed
from .safetensors_header import TensorInfo, read_header, read_object

INDEX = "model.safetensors.index.json"
_ENCODINGS: Mapping[str, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read(folder: str | Path) -> Graph:
    """The model in `folder` as the compact graph of `formats.decoder`.

    Raises ModelError when a file is missing or damaged or a tensor is missing or of the wrong
    shape, UnsupportedError for an architecture, configuration field or dtype that is not known.
    """
    folder = Path(folder)
    tensors = _tensors(folder)
    config = read_config(folder)
    used: set[str] = set()

    def lookup(name: str) -> WeightRef:
        name = renamed(name, config.kind.names)
        if name not in tensors:
            raise ModelError(
                f"{folder}: tensor '{name}' is missing; the weights do not fit config.json or "
                "are incomplete, download them again"
            )
        used.add(name)
        return _reference(tensors[name])

    graph = build(config, lookup)
    for name in tensors:
        if name not in used | graph.initializers.keys() and not name.endswith(
            ".rotary_emb.inv_freq"
        ):
            raise UnsupportedError(
                f"{folder}: tensor '{name}' is not part of a model as config.json describes it; "
                "it may change the results"
            )
    return graph


def _reference(info: TensorInfo) -> WeightRef:
    if info.dtype not in _ENCODINGS:
        raise UnsupportedError(
            f"{info.path}: tensor '{info.name}' has dtype {info.dtype}, which is not supported; "
            f"choose weights in {', '.join(_ENCODINGS)}, or a GGUF file of the model"
        )
    encoding = _ENCODINGS[info.dtype]
    return WeightRef(
        info.name, info.shape, "float32", info.path, info.offset, info.nbytes, encoding
    )


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of the model, from its single file or from the shards that its index lists."""
    if not (folder / INDEX).is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise ModelError(
                f"{folder}: holds neither model.safetensors nor {INDEX}; weights in another "
                "format (such as pytorch_model.bin) must be converted to safetensors"
            )
        return read_header(_inside(folder, single.name))
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ModelError(f"{folder / INDEX}: weight_map does not map tensor names to file names")
    shards = {n: read_header(_inside(folder, n)) for n in dict.fromkeys(weight_map.values())}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise ModelError(
                f"{folder / shard}: tensor '{name}' is missing, although {INDEX} says it is here; "
                "download the file again"
            )
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of the folder, refused when it really lies elsewhere."""
    external_data.resolve(folder / "config.json", name)
    return folder / name
