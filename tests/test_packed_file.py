"""Files of packed weights: that they hold what is packed at a load, and what they say of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from kernel_oracles import BLOCKED
from onnx_models import refusal
from packed_models import (
    SHIPPED,
    Shipped,
    Tied,
    contents,
    exact,
    file_of,
    matrices,
    only_file,
    packer,
)  # fmt: skip
from packing_models import graph_of, matrix, one_product, stored
from weight_files import closing

from onnxstream_nb import packed_file, packed_weights, packing
from onnxstream_nb.errors import ModelError
from onnxstream_nb.files import PAGE
from onnxstream_nb.graph import Node, WeightRef
from onnxstream_nb.kernels import packing as kernel_packing
from onnxstream_nb.packed_file import PackedFile, read_header, remove_orphans, verify
from onnxstream_nb.packing import PackedProvider
from onnxstream_nb.session import Session
from onnxstream_nb.weights import RamProvider

pytestmark = pytest.mark.usefixtures("one_thread_afterwards", "panels_pay")

STRIPES = (1, 30_000, 8 << 20)
CHUNKS = (1, 5000, 4_000_000)


def packed_at_load(refs: list[WeightRef]) -> dict[str, bytes]:
    with closing(PackedProvider(RamProvider(), refs, packer())) as provider:
        weights = {ref.name: provider.get(ref) for ref in refs}
        return {n: bytes(w.buffer[: w.ref.nbytes]) for n, w in weights.items()}


# -- what is in it -------------------------------------------------------------------------------


@pytest.mark.parametrize("stripe", STRIPES)
@pytest.mark.parametrize("encoding", BLOCKED)
def test_panels_of_blocks_are_those_that_a_load_packs(
    encoding: str, stripe: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = matrices(tmp_path, encoding)
    wanted = packed_at_load(refs)
    for chunk in CHUNKS:
        monkeypatch.setattr(packed_weights, "STRIPE", stripe)
        monkeypatch.setattr(packing, "CHUNK_BYTES", chunk)
        file = PackedFile(tmp_path / "p", refs, packer().panel_bytes, packer().stamp)
        packed_weights.write(file, packer())
        assert file.is_whole() and contents(file.path) == wanted
        assert file.path.stat().st_size == file.size
        file.path.unlink()


@pytest.mark.parametrize("name", SHIPPED)
def test_panels_of_parts_are_those_that_a_load_packs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, folder = Shipped(tmp_path, name), tmp_path / "p"
    with Session(shipped.path, load="ram") as session:
        (ref,) = (ref for ref in session.graph.initializers.values() if ref.parts)
        weight = session.provider.get(ref)
        wanted = {ref.name: bytes(weight.buffer[: weight.ref.nbytes])}
    for stripe in STRIPES:
        for chunk in CHUNKS:
            monkeypatch.setattr(packed_weights, "STRIPE", stripe)
            monkeypatch.setattr(packing, "CHUNK_BYTES", chunk)
            shipped.y(packed=folder)
            assert contents(only_file(folder)) == wanted
            only_file(folder).unlink()


def test_every_weight_begins_at_a_page_and_its_reference_says_where(tmp_path: Path) -> None:
    tied = Tied(tmp_path, "q4_k")
    folder = tmp_path / "p"
    with exact(tied.model.graph, packed=folder) as session:
        refs = dict(session.graph.initializers)
    held, own = contents(only_file(folder)), tied.model.graph.initializers
    for name in ("a", "head"):
        ref = refs[name]
        assert ref.source == only_file(folder) and ref.offset % PAGE == 0
        assert ref.source.read_bytes()[ref.offset : ref.offset + ref.nbytes] == held[name]
        assert (ref.shape, ref.dtype, ref.encoding) == (own[name].shape, "float32", "q4_k")
        assert ref.panel == packer().panel_bytes(own[name]) == ref.nbytes // -(-ref.shape[1] // 16)
    assert refs["embedding"] == own["embedding"]  # its rows are looked up as they are stored


def test_panels_are_cut_by_panels(tmp_path: Path) -> None:
    ref = WeightRef("w", (64, 100), "float32", Path("f"), 4096, 7 * 2176, "q8_0", True, panel=2176)
    assert ref.cut_by_rows and ref.unit == (16, 2176) and ref.stored_shape == (100, 64)
    part = ref.rows(32, 100)
    assert (part.shape, part.offset, part.nbytes) == ((64, 68), 4096 + 2 * 2176, 5 * 2176)
    assert part.rows(16, 48).offset == ref.rows(48, 80).offset
    assert ref.rows(0, 100) == ref


# -- which weights -------------------------------------------------------------------------------


def unchanged(graph: Any, folder: Path, **options: Any) -> bool:
    with exact(graph, packed=folder, **options) as session:
        return dict(session.graph.initializers) == dict(graph.initializers) and not folder.exists()


def test_what_has_no_file_is_packed_at_every_load(tmp_path: Path) -> None:
    graph, _ = one_product("q8_0", 256, 35)
    assert unchanged(graph, tmp_path / "p", load="ram")


def test_models_without_panels_make_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(bytes(4 * 64 * 64))
    ref = WeightRef("w", (64, 64), "float32", path, 0, 4 * 64 * 64)
    graph = graph_of([Node("MatMul", ("x", "w"), ("y",))], [ref])
    assert unchanged(graph, tmp_path / "p")


def test_a_host_without_the_instruction_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_packing, "SUPPORTED", False)
    assert unchanged(Tied(tmp_path, "q4_0").model.graph, tmp_path / "p")


def test_weights_that_others_read_stay_as_they_are(tmp_path: Path) -> None:
    raw = stored("q8_0", 384, 384)
    (tmp_path / "w.bin").write_bytes(raw.tobytes())
    ref = matrix("w", "q8_0", raw, 384, tmp_path / "w.bin")
    nodes = [Node("MatMul", ("x", "w"), ("y",)), Node("Add", ("y", "w"), ("z",))]
    assert unchanged(graph_of(nodes, [ref], ("y", "z")), tmp_path / "p", optimize=False)


def test_a_matrix_of_two_names_is_kept_once(tmp_path: Path) -> None:
    raw = stored("q8_0", 96, 96)
    (tmp_path / "w.bin").write_bytes(raw.tobytes())
    ref = matrix("w", "q8_0", raw, 96, tmp_path / "w.bin")
    also = matrix("v", "q8_0", raw, 96, tmp_path / "w.bin")
    nodes = [Node("MatMul", ("x", "w"), ("y",)), Node("MatMul", ("y", "v"), ("z",))]
    with exact(graph_of(nodes, [ref, also], ("z",)), packed=tmp_path / "p") as session:
        refs = session.graph.initializers
        assert refs["w"].matrix == refs["v"].matrix and refs["w"].panel
    assert len(contents(only_file(tmp_path / "p"))) == 1


# -- the same file -------------------------------------------------------------------------------


def test_the_file_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied, folder = Tied(tmp_path, "q5_k"), tmp_path / "p"
    wanted = tied.logits(packed=folder)
    monkeypatch.setattr(packed_weights, "write", lambda *_: pytest.fail("written again"))
    for load in ("ram", "mmap", "stream", "auto"):
        assert (tied.logits(load=load, packed=folder) == wanted).all()


def test_another_way_to_the_same_model_finds_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, folder = Shipped(tmp_path, "4 bits"), tmp_path / "p"
    shipped.y(packed=folder)
    written = only_file(folder).stat().st_mtime_ns
    (tmp_path / "link.onnx").symlink_to(shipped.path)
    shipped.path = tmp_path / "link.onnx"
    shipped.y(packed=folder)
    monkeypatch.chdir(tmp_path)
    shipped.path = Path("model.onnx")
    shipped.y(packed="p")
    assert only_file(folder).stat().st_mtime_ns == written
    assert only_file(folder).name.startswith("model-")


def test_a_name_stands_for_one_content(tmp_path: Path) -> None:
    """Whatever makes the panels others makes the name another one."""
    refs = matrices(tmp_path, "q8_0")

    def name(refs: list[WeightRef], stamp: str = "s", size: int = 64) -> str:
        return PackedFile(tmp_path, refs, lambda ref: size, stamp).path.name

    os.utime(refs[0].source, ns=(10**18, 10**18))  # type: ignore[arg-type]
    names = {name(refs), name(refs[1:]), name(refs, "t"), name(refs, size=128)}
    (tmp_path / "w.bin").touch()
    names.add(name(refs))
    assert len(names) == 5 and all(n.startswith("w-") for n in names)


def test_a_model_that_is_gone_is_named(tmp_path: Path) -> None:
    refs = matrices(tmp_path, "q8_0")
    (tmp_path / "w.bin").unlink()
    message = refusal(lambda: PackedFile(tmp_path, refs, lambda ref: 64, ""), ModelError)
    assert "w.bin" in message and "missing" in message


# -- checks --------------------------------------------------------------------------------------


def written(folder: Path) -> PackedFile:
    tied = Tied(folder, "q4_1")
    tied.logits(packed=folder / "p")
    return file_of(tied.model.graph, folder / "p")


def test_the_header_says_what_was_packed(tmp_path: Path) -> None:
    file = written(tmp_path)
    assert file.is_whole() and only_file(tmp_path / "p") == file.path
    header = read_header(file.path)
    source = tmp_path / "tied_q4_1.bin"
    assert [(s.path, s.size) for s in header.sources] == [(str(source), source.stat().st_size)]
    assert header.stamp == packer().stamp and header.version == packed_file.VERSION
    assert [m.name for m in header.matrices] == ["head", "a"]
    assert [(m.offset, m.nbytes) for m in header.matrices] == list(file.places.values())


@pytest.mark.parametrize("where", [0, 1000, -1])
@pytest.mark.parametrize("name", ["head", "a"])
def test_a_flipped_bit_of_a_panel_is_found(name: str, where: int, tmp_path: Path) -> None:
    file = written(tmp_path)
    told: list[tuple[str, float | None]] = []
    verify(file.path, lambda *report: told.append(report))
    assert [text for text, _ in told] == ["checking packed weights"] * 2
    (matrix,) = (m for m in read_header(file.path).matrices if m.name == name)
    data = bytearray(file.path.read_bytes())
    data[matrix.offset + where % matrix.nbytes] ^= 4
    file.path.write_bytes(data)
    message = refusal(lambda: verify(file.path), ModelError)
    assert str(file.path) in message and f" {name} is damaged" in message


def test_a_long_weight_is_checked_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path)
    monkeypatch.setattr(packed_file, "READ", 1000)
    verify(file.path)
    last = read_header(file.path).matrices[0]
    data = bytearray(file.path.read_bytes())
    data[last.offset + last.nbytes - 1] ^= 128
    file.path.write_bytes(data)
    assert "damaged" in refusal(lambda: verify(file.path), ModelError)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = written(tmp_path)
    os.truncate(file.path, file.size - 3 * PAGE)
    assert str(file.path) in refusal(lambda: verify(file.path), ModelError)
    file.path.unlink()
    assert str(file.path) in refusal(lambda: verify(file.path), ModelError)


# -- what is left of models that are gone ----------------------------------------------------------


def test_orphans_are_removed(tmp_path: Path) -> None:
    assert remove_orphans(tmp_path / "nowhere") == 0
    folder, sizes = tmp_path / "p", {}
    for encoding in ("q8_0", "q4_0", "q6_k"):
        tied = Tied(tmp_path, encoding)
        tied.logits(packed=folder)
        sizes[encoding] = file_of(tied.model.graph, folder).size
    assert remove_orphans(folder) == 0
    (folder / "x.panels").write_bytes(b"nothing of ours")
    (tmp_path / "tied_q4_0.bin").unlink()
    assert remove_orphans(folder) == sizes["q4_0"] + len(b"nothing of ours")
    left = [p.name[:9] for p in sorted(folder.glob("*.panels"))]
    assert left == ["tied_q6_k", "tied_q8_0"]


def test_the_header_is_json(tmp_path: Path) -> None:
    """For whoever wants to know what a file is."""
    data = written(tmp_path).path.read_bytes()
    found = json.loads(data[16 : 16 + int.from_bytes(data[8:16], "little")])
    assert set(found) == {"checksums", "version", "stamp", "sources", "weights"}
