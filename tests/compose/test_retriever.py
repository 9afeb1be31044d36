"""The index of pictures: exact, without copies, the same after saving; and CLIP's search in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmkern.compose.document import CompositionError
from mmkern.compose.retriever import ClipRetriever, PictureIndex, describe, picture_names
from mmkern.data import ClipTransform


def index(count: int = 40, width: int = 6, **options: Any) -> PictureIndex:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(count, width, generator=generator), dim=1)
    names = tuple(f"{n:02}.png" for n in range(count))
    return PictureIndex(names, features, names, **options)


def test_search_is_exact() -> None:
    """A picture that fits better would not be offered."""
    found = index()
    query = torch.randn(6, generator=torch.Generator().manual_seed(1))
    cosines = [float(torch.cosine_similarity(row, query, dim=0)) for row in found.features]
    best = sorted(range(40), key=lambda i: -cosines[i])
    assert [n for n, _ in found.search(query, 5)] == [found.names[i] for i in best[:5]]
    assert found.search(query, 1)[0][1] == pytest.approx(max(cosines))
    excluded = [found.names[best[0]], found.names[best[2]], "unknown.png"]
    rest = [found.names[i] for i in best if found.names[i] not in excluded]
    assert [n for n, _ in found.search(query, 4, excluded)] == rest[:4]
    assert len(found.search(query, 99)) == 40
    for wrong in (torch.zeros(5), torch.zeros(1, 6)):
        with pytest.raises(ValueError, match=r"query must be \[6\]"):
            found.search(wrong, 1)


def test_copies_are_offered_once() -> None:
    """Four options would be one picture four times, or one that the page shows already."""
    rows = F.normalize(
        torch.tensor([[1.0, 0, 0], [1, 0.02, 0], [0.9, 0.5, 0], [0.9, 0.5, 0], [0, 0, 1]]), dim=1
    )
    found = PictureIndex(("a", "b", "c", "d", "e"), rows, ("1", "2", "3", "3", "1"))
    query = torch.tensor([1.0, 0.1, 0.0])
    names = [name for name, _ in found.search(query, 5)]
    assert names == ["b", "c", "e"]  # a is b's neighbour, d has c's pixels; e is neither's
    assert [n for n, _ in found.search(query, 5, copy=1.1)] == ["b", "a", "c"]
    # e has the pixels of the excluded a, b its embedding.
    assert [n for n, _ in found.search(query, 5, ["a"])] == ["c"]


def test_saved_index_is_the_same(tmp_path: Path) -> None:
    """A search tomorrow would find other pictures than today, or a damaged file anything."""
    found = index(encoder="clip")
    found.save(tmp_path / "more" / "emoji.v1")
    again = PictureIndex.load(tmp_path / "more" / "emoji.v1")
    assert torch.equal(again.features, found.features)
    assert (again.names, again.digests, again.encoder) == (found.names, found.digests, "clip")
    assert len(list((tmp_path / "more").iterdir())) == 2
    table = tmp_path / "more" / "emoji.v1.json"
    facts = json.loads(table.read_text())
    for change in ({"names": facts["names"][1:]}, {"format": 9}, {"names": ["x"] * 40}):
        table.write_text(json.dumps({**facts, **change}))
        with pytest.raises(CompositionError, match=r"not a whole index"):
            PictureIndex.load(tmp_path / "more" / "emoji.v1")
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"emoji.v1.json: no such file"):
        PictureIndex.load(tmp_path / "more" / "emoji.v1")


class Colours:
    """A CLIP that sees mean colours and reads their names."""

    device = torch.device("cpu")

    def eval(self) -> Colours:
        return self

    def encode_image(self, pixels: Tensor, normalize: bool) -> Tensor:
        return F.normalize(pixels.mean((2, 3)), dim=1)

    def encode_text(self, ids: Tensor, normalize: bool) -> Tensor:
        return F.normalize(ids.float(), dim=1)


def colour_ids(texts: list[str]) -> Tensor:
    return torch.tensor([[c in text for c in ("red", "green", "blue")] for text in texts])


def test_folder_is_searched_by_words(tmp_path: Path) -> None:
    """`mmkern compose` would miss pictures of a folder, or name them so that none is found."""
    (tmp_path / "deep").mkdir()
    for name in ("red", "green", "deep/blue"):
        Image.new("RGB", (9, 7), name.rpartition("/")[2]).save(tmp_path / f"{name}.png")
    Image.new("RGB", (9, 7), "red").save(tmp_path / "red again.png")
    (tmp_path / "notes.md").write_text("no picture")
    assert picture_names(tmp_path) == ["deep/blue.png", "green.png", "red again.png", "red.png"]
    transform = ClipTransform(4, mean=(0, 0, 0), std=(1, 1, 1))
    made = ClipRetriever.build(Colours(), transform, tmp_path, encoder="colours", batch_size=3)
    retriever = ClipRetriever(Colours(), colour_ids, made, encoder="colours", template="a {}")
    assert retriever.search("blue", 1) == ["deep/blue.png"]
    assert retriever.search("red", 4)[0] == "red again.png"
    assert "red.png" not in retriever.search("red", 4)
    assert retriever.search("red", 4, {"red.png"}) == ["deep/blue.png", "green.png"]
    with pytest.raises(CompositionError, match="made by 'colours', the retriever is 'other'"):
        ClipRetriever(Colours(), colour_ids, made, encoder="other")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"broken\.png"):
        ClipRetriever.build(Colours(), transform, tmp_path)


def test_folders_without_pictures(tmp_path: Path) -> None:
    """A mistyped folder would give an empty article instead of a word."""
    with pytest.raises(FileNotFoundError, match="no such folder"):
        picture_names(tmp_path / "gone")
    with pytest.raises(CompositionError, match="no pictures in it"):
        picture_names(tmp_path)


def test_words_for_a_picture(tmp_path: Path) -> None:
    """A model of text alone would be told nothing of a picture, or its file's ending."""
    (tmp_path / "x.txt").write_text("A red  fox.\nde.utf8=Ein Fuchs.\n", encoding="utf-8")
    assert describe(tmp_path, "x.png") == "A red fox."
    assert describe(tmp_path, "sub/polar-bear_2.png") == "polar bear 2"
