"""Pictures of a folder, found by words: a CLIP, an exact index, no picture twice."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mmkern.compose.document import CompositionError
from mmkern.data.images import open_image
from mmkern.data.pairs import IMAGE_SUFFIXES

__all__ = ["ClipRetriever", "PictureIndex", "describe", "picture_names"]

FORMAT = 1
# Pictures whose embeddings are at least this similar are copies of each other.
COPY = 0.995


def picture_names(folder: str | Path) -> list[str]:
    """Names of the pictures in a folder and below it, sorted.

    Raises:
        FileNotFoundError: no such folder.
        CompositionError: no picture in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of pictures")
    found = (p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    names = sorted(path.relative_to(root).as_posix() for path in found)
    if not names:
        raise CompositionError(f"{root}: no pictures in it")
    return names


def describe(folder: str | Path, name: str) -> str:
    """A picture in words: the first line of the .txt beside it, else its file's name."""
    path = Path(folder) / name
    try:
        lines = path.with_suffix(".txt").read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        lines = []
    words = lines[0] if lines else path.stem.replace("_", " ").replace("-", " ")
    return " ".join(words.split())


@dataclass(frozen=True, eq=False)
class PictureIndex:
    """Embeddings of pictures, searched by comparing with every one.

    Attributes:
        names: of the pictures, each once.
        features: fp32 [N, D], rows of unit norm.
        digests: a hash of each picture's pixels; equal hashes are equal pictures.
        encoder: what made the features; an index serves that encoder only.

    Raises:
        CompositionError: numbers that differ, a name twice, features that are not finite.
    """

    names: tuple[str, ...]
    features: Tensor
    digests: tuple[str, ...]
    encoder: str = ""

    def __post_init__(self) -> None:
        count = len(self.names)
        shape = tuple(self.features.shape)
        if len(shape) != 2 or shape[0] != count or len(self.digests) != count or not count:
            raise CompositionError(
                f"index: needs a row and a digest for each of at least one picture, got {count} "
                f"names, features {list(shape)} and {len(self.digests)} digests"
            )
        if len(set(self.names)) < count:
            raise CompositionError("index: a picture's name comes twice")
        if not bool(self.features.isfinite().all()):
            raise CompositionError("index: features must be finite")

    def search(
        self, query: Tensor, k: int, exclude: Collection[str] = (), copy: float = COPY
    ) -> list[tuple[str, float]]:
        """The k pictures nearest to a query by cosine, nearest first, with their cosines.

        Exact: every picture is compared; of equal ones the first in order of names comes first.
        Left out are the excluded pictures, their copies, and copies of a nearer one: pictures with
        the same pixels, or whose embeddings' cosine is at least `copy`. Fewer than k are found when
        fewer are left.

        Raises:
            ValueError: a query that is not [D], or k below 1.
        """
        if tuple(query.shape) != tuple(self.features.shape[1:]) or k < 1:
            raise ValueError(
                f"PictureIndex.search: query must be [{self.features.shape[1]}] and k at least 1, "
                f"got {list(query.shape)} and {k}"
            )
        scores = self.features @ F.normalize(query.float().cpu(), dim=0)
        hidden = set(exclude)
        taken = [row for row, name in enumerate(self.names) if name in hidden]
        found: list[tuple[str, float]] = []
        for row in scores.argsort(descending=True, stable=True).tolist():
            if len(found) == k:
                break
            if not self._is_copy(row, taken, copy):
                taken.append(row)
                found.append((self.names[row], float(scores[row])))
        return found

    def _is_copy(self, row: int, taken: list[int], copy: float) -> bool:
        if not taken:
            return False
        if row in taken or self.digests[row] in {self.digests[other] for other in taken}:
            return True
        return bool((self.features[taken] @ self.features[row]).max() >= copy)

    def save(self, path: str | Path) -> None:
        """Write PATH.safetensors (features) and PATH.json (all else), each aside and renamed."""
        stem = Path(path)
        stem.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "format": FORMAT,
            "encoder": self.encoder,
            "names": self.names,
            "digests": self.digests,
        }
        tensors, table = _files(stem)
        save_file({"features": self.features.contiguous()}, f"{tensors}.new")
        os.replace(f"{tensors}.new", tensors)
        new = Path(f"{table}.new")
        new.write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(new, table)

    @classmethod
    def load(cls, path: str | Path) -> PictureIndex:
        """What :meth:`save` wrote.

        Raises:
            FileNotFoundError: one of the two files is missing.
            CompositionError: a file that cannot be read, or two that do not fit each other.
        """
        tensors, table = _files(Path(path))
        for file in (tensors, table):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no such file of an index")
        try:
            facts = json.loads(table.read_text(encoding="utf-8"))
            features = load_file(tensors)["features"]
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']}, expected {FORMAT}")
            names, digests = (tuple(facts[key]) for key in ("names", "digests"))
            return cls(names, features, digests, facts["encoder"])
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CompositionError(f"{path}: not a whole index: {error}") from error


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.safetensors"), path.with_name(f"{path.name}.json")


class ClipRetriever:
    """Searches an index by a CLIP's text tower.

    Args:
        model: with ``encode_image``, ``encode_text`` and ``device``, such as our CLIP.
        tokenizer: texts to ids, such as ``ClipTokenizer``.
        index: made by :meth:`build` with the same model.
        template: what a text is put into, in the place of "{}".
        encoder: the model's name; the index must say the same.

    Raises:
        CompositionError: the index of another encoder, or of another width.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        index: PictureIndex,
        *,
        template: str = "{}",
        encoder: str = "",
    ) -> None:
        if index.encoder != encoder:
            raise CompositionError(
                f"index: it was made by {index.encoder!r}, the retriever is {encoder!r}"
            )
        self.model, self.tokenizer, self.index = model.eval(), tokenizer, index
        self.template = template

    @torch.no_grad()
    def search(self, text: str, k: int, exclude: Collection[str] = ()) -> list[str]:
        """Names of the at most k pictures nearest to a text; see :meth:`PictureIndex.search`."""
        tokens = self.tokenizer([self.template.replace("{}", text)]).to(self.model.device)
        query = self.model.encode_text(tokens, normalize=True)[0]
        return [name for name, _ in self.index.search(query, k, exclude)]

    @staticmethod
    @torch.no_grad()
    def build(
        model: Any,
        transform: Any,
        folder: str | Path,
        *,
        encoder: str = "",
        batch_size: int = 64,
    ) -> PictureIndex:
        """The index of all pictures of a folder.

        Args:
            model: with ``encode_image`` and ``device``.
            transform: a picture to fp32 [3, S, S], such as ``ClipTransform``.
            folder: of pictures, and below.
            encoder: the model's name.
            batch_size: pictures at once.

        Raises:
            FileNotFoundError, CompositionError: see :func:`picture_names`.
            ImageError: a picture that cannot be read, naming it.
        """
        names = picture_names(folder)
        model.eval()
        features, digests = [], []
        for start in range(0, len(names), batch_size):
            pictures = [open_image(Path(folder) / n) for n in names[start : start + batch_size]]
            pixels = torch.stack([transform(picture) for picture in pictures])
            features.append(model.encode_image(pixels.to(model.device), normalize=True).cpu())
            for picture in pictures:
                content = f"{picture.size}".encode() + picture.tobytes()
                digests.append(blake2b(content, digest_size=16).hexdigest())
        rows = F.normalize(torch.cat(features).float(), dim=1)
        return PictureIndex(tuple(names), rows, tuple(digests), encoder)
