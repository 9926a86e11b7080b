"""Which of a hub repository's files make one model. Pure: names and sizes in, names out.

Without a suffix, the first of these that the repository has, and only the files it needs:

1. a GGUF file, in the order of `QUANTISATIONS`;
2. a Hugging Face folder: config.json, *.safetensors and the tokenizer's files;
3. an OnnxStream folder: model.txt and everything beside it;
4. an ONNX file: `model.onnx`, or the only one, with its external data and tokenizer;
5. a GGUF file of another type, if it is the only one.

2 to 4 are looked for in the repository's root, then in its folders, where only one may have them.
A suffix is the path of a file, the path of a folder (to which the same order applies), or a
quantisation as file names spell it (`q4_k_m`, `fp16`), in either case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..device import format_size
from ..errors import DownloadError, UnsupportedError, UsageError

QUANTISATIONS = (
    "Q4_K_M", "Q8_0", "Q5_K_M", "Q6_K", "Q4_K_S", "Q5_K_S", "Q4_1", "Q4_0", "F16", "BF16",
)  # fmt: skip
"""GGUF types by preference: the usual balance of size and quality first."""

_TOKENIZER_FILES = frozenset({
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
    "generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
})  # fmt: skip
_MODEL_SUFFIXES = (".gguf", ".onnx", ".safetensors")
_OTHER_SUFFIXES = (
    ".bin.index.json", ".gitattributes", ".gitignore", ".h5", ".jpg", ".md", ".mlmodel", ".msgpack",
    ".ot", ".pdf", ".png", ".pt", ".pth", ".py", ".svg", ".tflite", "LICENSE",
)  # fmt: skip
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)")
_LISTED = 30


@dataclass(frozen=True, slots=True)
class Selection:
    """What to fetch: `target` is the file, or the folder (empty: the root), that is then loaded.
    `kind` is gguf, safetensors, onnxstream or onnx."""

    kind: str
    target: str
    files: tuple[str, ...]


def select(repository: str, sizes: Mapping[str, int], suffix: str = "") -> Selection:
    """The files of `repository` (path -> size in bytes) that `suffix` asks for.

    Raises UsageError when nothing or several models match, saying what there is; UnsupportedError
    for a GGUF in parts; DownloadError for a path that leads outside, or a missing shard.
    """
    for path in sizes:
        _refuse_unsafe(repository, path)
    return _Files(repository, sizes).select(suffix.strip("/"))


def _refuse_unsafe(repository: str, path: str) -> None:
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or not {"", ".", ".."}.isdisjoint(parts):
        raise DownloadError(
            f"{repository} lists a file named {path!r}, which would lie outside the model's "
            "folder: nothing of it is fetched"
        )


def _named_like(path: str, quantisation: str) -> bool:
    """Whether a file's name holds a quantisation as a word: Q4_0 is not in Q4_0_8_8."""
    word = rf"(?<![A-Za-z0-9]){re.escape(quantisation)}(?![A-Za-z0-9_])"
    return re.search(word, PurePosixPath(path).name, re.IGNORECASE) is not None


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class _Files:
    repository: str
    sizes: Mapping[str, int]

    def select(self, suffix: str) -> Selection:
        if not suffix:
            return self.preferred("")
        if suffix in self.sizes:
            return self.named(suffix)
        if any(path.startswith(suffix + "/") for path in self.sizes):
            return self.preferred(suffix)
        models = [p for p in self.sizes if p.endswith(".onnx")] + self.ggufs("")
        matches = [path for path in models if _named_like(path, suffix)]
        return self.named(self.only(matches, f"no file, folder or quantisation {suffix!r}"))

    def preferred(self, folder: str) -> Selection:
        """The model that the order of preference finds in a folder."""
        ggufs = self.ggufs(folder)
        for quantisation in QUANTISATIONS:
            if matches := [path for path in ggufs if _named_like(path, quantisation)]:
                return self.named(self.only(matches, ""))
        if kind := self.kind_of(folder):
            return kind(folder)
        below = {_folder_of(p) for p in self.sizes if not folder or p.startswith(folder + "/")}
        models = {inner: kind for inner in below if (kind := self.kind_of(inner))}
        if models:
            inner = self.only(sorted(models), "")
            return models[inner](inner)
        where = f"in {folder!r} " if folder else ""
        return self.named(self.only(ggufs, f"{where}no model in a format that is read here"))

    def ggufs(self, folder: str) -> list[str]:
        """Language models in GGUF at any depth; projectors and importance matrices are none."""
        names = [p for p in self.sizes if not folder or p.startswith(folder + "/")]
        ggufs = [p for p in names if p.endswith(".gguf")]
        return [p for p in ggufs if not re.search(r"mmproj|imatrix", p, re.IGNORECASE)]

    def kind_of(self, folder: str) -> Callable[[str], Selection] | None:
        """How the model that lies directly in `folder` is selected, if there is one."""
        names = {PurePosixPath(path).name for path in self.children(folder)}
        if "config.json" in names and any(name.endswith(".safetensors") for name in names):
            return self.safetensors
        if "model.txt" in names:
            return self.onnxstream
        return self.onnx_folder if any(name.endswith(".onnx") for name in names) else None

    def children(self, folder: str) -> list[str]:
        return [path for path in self.sizes if _folder_of(path) == folder]

    def named(self, path: str) -> Selection:
        """The model that one file stands for."""
        folder, name = _folder_of(path), PurePosixPath(path).name
        if name.endswith(".gguf"):
            if _PART.fullmatch(path):
                raise UnsupportedError(
                    f"{self.repository}: {path} is one part of a split GGUF, which is not read "
                    "here: choose another file, or merge the parts with llama-gguf-split --merge"
                )
            return Selection("gguf", path, (path,))
        if name.endswith(".onnx"):
            return self.onnx(path)
        of_folder = self.kind_of(folder)
        if name.endswith((".safetensors", ".json")) and of_folder == self.safetensors:
            return self.safetensors(folder)
        if name == "model.txt":
            return self.onnxstream(folder)
        raise self.error(f"{path} is no model that is read here")

    def safetensors(self, folder: str) -> Selection:
        """config, tokenizer and weights: `model.safetensors`, or all its shards, or what there is
        (a repository may hold the same weights again under another name)."""
        weights = [path for path in self.children(folder) if path.endswith(".safetensors")]
        named = {PurePosixPath(path).name: path for path in weights}
        shards = [
            path for name, path in named.items() if re.fullmatch(r"model-\d+-of-\d+\..*", name)
        ]
        if "model.safetensors" in named:
            weights = [named["model.safetensors"]]
        elif shards:
            weights = shards
            self.check_shards(shards)
        index = [p for p in self.children(folder) if p.endswith("model.safetensors.index.json")]
        return Selection("safetensors", folder, (*self.tokenizer(folder), *index, *weights))

    def check_shards(self, shards: list[str]) -> None:
        match = _PART.fullmatch(shards[0])
        if match and len(shards) != int(match[3]):
            raise DownloadError(
                f"{self.repository} has {len(shards)} of {int(match[3])} shards like {shards[0]}"
            )

    def onnxstream(self, folder: str) -> Selection:
        """Everything in the folder itself: its weights are its .bin files."""
        files = [p for p in self.children(folder) if not p.endswith(_OTHER_SUFFIXES)]
        return Selection("onnxstream", folder, tuple(files))

    def onnx_folder(self, folder: str) -> Selection:
        models = [path for path in self.children(folder) if path.endswith(".onnx")]
        usual = [path for path in models if PurePosixPath(path).name == "model.onnx"]
        return self.onnx(self.only(usual or models, ""))

    def onnx(self, path: str) -> Selection:
        """The file, its external data, and the tokenizer beside it or above it. Data is named
        after the file (model.onnx_data, model.onnx.data, model.data), or, if nothing is and the
        folder has no other model, it is all that lies in the folder."""
        folder = _folder_of(path)
        names = (path + "_data", path + ".data", path.removesuffix(".onnx") + ".data")
        siblings = [p for p in self.children(folder) if not p.endswith(_MODEL_SUFFIXES)]
        data = [p for p in siblings if p.startswith(names)]
        if not data and sum(p.endswith(".onnx") for p in self.children(folder)) == 1:
            data = [p for p in siblings if not p.endswith(_OTHER_SUFFIXES) and "pytorch" not in p]
        tokenizer: tuple[str, ...] = ()
        for place in (folder, *(str(p) for p in PurePosixPath(folder).parents)):
            tokenizer = tokenizer or self.tokenizer("" if place == "." else place)
        return Selection("onnx", path, tuple(dict.fromkeys((path, *data, *tokenizer))))

    def tokenizer(self, folder: str) -> tuple[str, ...]:
        """The tokenizer's and the configuration's files in a folder."""
        return tuple(p for p in self.children(folder) if PurePosixPath(p).name in _TOKENIZER_FILES)

    def only(self, matches: list[str], problem: str) -> str:
        """The single match; an error that lists the choice when there are none or several."""
        if len(matches) == 1:
            return matches[0]
        if not matches:
            raise self.error(problem)
        raise UsageError(
            f"{self.repository} has several models that match: {self.listing(matches)}; "
            f"choose one as {self.repository}:NAME"
        )

    def error(self, problem: str) -> UsageError:
        models = [p for p in self.sizes if p.endswith((*_MODEL_SUFFIXES, "model.txt"))]
        return UsageError(
            f"{self.repository}: {problem}; it has {self.listing(models or list(self.sizes))}"
        )

    def listing(self, paths: list[str]) -> str:
        """Paths with sizes (a folder's has none), the first of them when there are many."""
        shown = [
            f"{path} ({format_size(self.sizes[path])})" if path in self.sizes else path or "."
            for path in sorted(paths)[:_LISTED]
        ]
        rest = [f"and {len(paths) - _LISTED} more"] if len(paths) > _LISTED else []
        return ", ".join([*shown, *rest]) or "no files"
