"""Pictures and text in turns: documents, pairs and few-shot prompts, and Flamingo's batches.

A sample is ``images``, a list of n pictures, and ``texts``, n + 1 texts: the first stands before
any picture, the (i + 1)-th behind picture i. In tokens:

``[bos] texts₀ <image> texts₁ <|endofchunk|> <image> texts₂ <|endofchunk|> … [eos]``

What is trained on is OpenFlamingo's rule (arXiv 2308.01390, section 3.2 and its code). Documents:
from a picture's token to its ``<|endofchunk|>``, which is trained too; not what stands before the
first picture, nor behind an end until the next picture, nor picture tokens. Pairs: everything but
the picture token and pads. The rule looks at ids of tokens that no text can contain: a text that
spells ``<image>`` is encoded as the letters it has.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmkern.data.collator import BatchTransform
from mmkern.data.epochs import EpochAware
from mmkern.data.images import open_image
from mmkern.data.language import IGNORE
from mmkern.data.pairs import PairError
from mmkern.data.randomness import sample_keys

__all__ = ["Document", "DocumentCollator", "DocumentDataset", "as_document"]

_LOGGER = logging.getLogger(__name__)


class Document(TypedDict):
    """A sample: n pictures, n + 1 texts."""

    images: list[Any]
    texts: list[str]
    index: int
    epoch: int


class DocumentDataset(EpochAware, Dataset[Document]):
    """Documents in JSON lines, one a line, with pictures in files.

    Two forms: ``{"images": [path, ...], "texts": [text, ...]}`` with one text more than pictures;
    and MMC4's (arXiv 2304.06939), ``text_list`` and ``image_info`` of ``image_name``,
    ``matched_text_index`` and ``matched_sim``, where a picture stands before the sentence that it
    matches. Of MMC4's, pictures below ``min_similarity`` fall out (0.24 of ViT-L/14; OpenFlamingo's
    default of 30 would leave none), and of more than ``max_images`` the later ones.

    Args:
        path: the table.
        root: folder that pictures' paths start from; the table's own if not given.
        min_similarity, max_images: as above; max_images holds for both forms.
        check_files: look for every picture now.

    Raises:
        PairError: lines that are no document, naming the first, or no document with a picture.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        min_similarity: float = 0.24,
        max_images: int = 6,
        check_files: bool = True,
    ) -> None:
        super().__init__()
        if max_images < 1:
            raise ValueError(f"DocumentDataset: max_images must be at least 1, got {max_images}")
        table = Path(path)
        folder = table.parent if root is None else Path(root)
        self.documents: list[tuple[list[Path], list[str]]] = []
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{table}, line {number}"
            names, texts = _document(where, line, min_similarity, max_images)
            if not names:
                continue
            files = [folder / name for name in names]
            if check_files and (lacking := [f for f in files if not f.is_file()]):
                raise PairError(f"{where}: no such picture: {lacking[0]}")
            self.documents.append((files, texts))
        if not self.documents:
            raise PairError(f"{table}: no document has a picture")

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"DocumentDataset: index {index} of {count} documents")
        files, texts = self.documents[index]
        pictures = [open_image(file) for file in files]
        return {"images": pictures, "texts": texts, "index": index % count, "epoch": self.epoch}


def _document(
    where: str, line: str, min_similarity: float, max_images: int
) -> tuple[list[str], list[str]]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise PairError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise PairError(f"{where}: expected an object, got {line[:40]}")
    if "text_list" in fields:
        return _mmc4(where, fields, min_similarity, max_images)
    names: Any = fields.get("images")
    texts: Any = fields.get("texts")
    if not _strings(names) or not _strings(texts) or len(texts) != len(names) + 1:
        raise PairError(
            f"{where}: needs images and texts, lists of strings, one text more than images"
        )
    return names[:max_images], texts[: max_images + 1]


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _mmc4(
    where: str, fields: Mapping[str, Any], min_similarity: float, max_images: int
) -> tuple[list[str], list[str]]:
    try:
        before: dict[int, str] = {}
        for info in sorted(fields["image_info"], key=lambda i: -i["matched_sim"]):
            if info["matched_sim"] >= min_similarity:
                before.setdefault(int(info["matched_text_index"]), info["image_name"])
        sentences = [str(sentence) for sentence in fields["text_list"]]
    except (KeyError, TypeError, ValueError) as error:
        raise PairError(f"{where}: not a document of MMC4: {error!r}") from error
    chosen = sorted(place for place in before if 0 <= place < len(sentences))
    names, texts, start = [], [], 0
    for place in chosen[:max_images]:
        texts.append(" ".join(sentences[start:place]))
        names.append(before[place])
        start = place
    stop = chosen[max_images] if len(chosen) > max_images else len(sentences)
    return names, [*texts, " ".join(sentences[start:stop])]


def as_document(sample: Mapping[str, Any]) -> tuple[list[Any], list[str], bool]:
    """Pictures, texts, and whether it is a pair (``image`` and ``text``), of any sample.

    Raises:
        ValueError: another number of texts than pictures need.
    """
    if "images" not in sample:
        return [sample["image"]], ["", sample["text"]], True
    images, texts = sample["images"], sample["texts"]
    if len(texts) != len(images) + 1:
        raise ValueError(
            f"sample {sample['index']}: {len(images)} pictures need {len(images) + 1} texts, got "
            f"{len(texts)}"
        )
    return images, texts, False


class DocumentCollator:
    """Samples with pictures in turns, for a :class:`mmkern.models.flamingo.Flamingo`.

    Gives ``pixel_values`` [M, 3, S, S] of all samples' pictures, ``image_index`` int64 [B, N],
    ``input_ids``, ``attention_mask``, ``labels`` int64 [B, T], ``loss_weights`` float [B]. Pairs
    and documents may be mixed.

    The loss is ``Σ_s w_s · (mean over the labels of source s)``: OpenFlamingo adds the losses of
    its two loaders with 0.2 (pairs) and 1 (documents). A sample's weight is w_s over the labels
    that its source has in the batch; without ``weights``, over those of the whole batch.

    Text beyond ``length`` is cut. A picture whose token is cut falls out whole. A sample that keeps
    no label is counted in ``unlabelled`` and trains nothing.

    Args:
        transform: as ``ContrastiveCollator`` takes it.
        tokenizer: the language model's.
        image_token_id, end_of_chunk_token_id: as the model has them.
        length: tokens of a sample at most.
        weights: of sources, by a sample's ``source``; 1 where not given.
        bos, eos: ids that begin and end a text; None for none.
        pad: an id for pads; the end of chunk if the tokenizer has none.
        seed: of augmentation.
    """

    def __init__(
        self,
        transform: BatchTransform,
        tokenizer: Any,
        image_token_id: int,
        end_of_chunk_token_id: int,
        *,
        length: int = 256,
        weights: Mapping[str, float] | None = None,
        bos: int | None = None,
        eos: int | None = None,
        seed: int = 0,
    ) -> None:
        if length < 2:
            raise ValueError(f"DocumentCollator: length must be at least 2, got {length}")
        self.transform, self.tokenizer = transform, tokenizer
        self.image, self.end = image_token_id, end_of_chunk_token_id
        self.length, self.seed = length, seed
        self.weights = None if weights is None else dict(weights)
        self.bos = [] if bos is None else [bos]
        self.eos = [] if eos is None else [eos]
        pad = tokenizer.pad_token_id
        self.pad: int = self.end if pad is None else pad
        self.unlabelled = 0

    def encode(self, texts: Sequence[str], *, prompt: bool = False) -> list[int]:
        """Ids of n + 1 texts around n pictures; as a prompt, the last chunk is left open."""
        found = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        first, *chunks = found["input_ids"]
        for text, chunk in zip(texts, [first, *chunks], strict=True):
            if self.image in chunk or self.end in chunk:
                raise ValueError(
                    f"DocumentCollator: a text has the id of a special token: {text[:60]!r}"
                )
        row = [*self.bos, *first]
        for number, chunk in enumerate(chunks, 1):
            last = prompt and number == len(chunks)
            row += [self.image, *chunk, *([] if last else [self.end])]
        return row if prompt else [*row, *self.eos]

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate for training.

        Raises:
            ValueError: no samples; see ``as_document``; a text that holds a special token's id.
        """
        rows, labels, pictures = [], [], []
        for sample in samples:
            images, texts, pair = as_document(sample)
            row = self.encode(texts)[: self.length]
            rows.append(row)
            labels.append(self._labels(row, pair))
            pictures.append(images[: row.count(self.image)])
        counts = [sum(label != IGNORE for label in row[1:]) for row in labels]
        self._count_unlabelled(samples, counts)
        return {
            **self._pictures(samples, pictures),
            "input_ids": self._pad(rows, self.pad),
            "attention_mask": self._pad([[1] * len(row) for row in rows], 0),
            "labels": self._pad(labels, IGNORE),
            "loss_weights": self._weights(samples, counts),
        }

    def prompts(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The same with the last chunk left open and pads on the left: what ``generate`` takes.

        Raises:
            ValueError: as above, and a prompt longer than ``length``: no shot is left out.
        """
        rows, pictures = [], []
        for sample in samples:
            images, texts, _ = as_document(sample)
            rows.append(self.encode(texts, prompt=True))
            pictures.append(images)
            if len(rows[-1]) > self.length:
                raise ValueError(
                    f"DocumentCollator: the prompt of sample {sample['index']} has "
                    f"{len(rows[-1])} tokens, at most {self.length}"
                )
        return {
            **self._pictures(samples, pictures),
            "input_ids": self._pad(rows, self.pad, left=True),
            "attention_mask": self._pad([[1] * len(row) for row in rows], 0, left=True),
        }

    def _labels(self, row: Sequence[int], pair: bool) -> list[int]:
        labels, inside = [], pair
        for token in row:
            labels.append(token if inside and token != self.image else IGNORE)
            if token in (self.image, self.end):
                inside = pair or token == self.image
        return labels

    def _weights(self, samples: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> Tensor:
        sources = [str(s.get("source", "")) if self.weights else "" for s in samples]
        totals: dict[str, int] = {}
        for source, count in zip(sources, counts, strict=True):
            totals[source] = totals.get(source, 0) + count
        weights = self.weights or {}
        return torch.tensor([weights.get(s, 1.0) / max(totals[s], 1) for s in sources])

    def _count_unlabelled(
        self, samples: Sequence[Mapping[str, Any]], counts: Sequence[int]
    ) -> None:
        for sample, count in zip(samples, counts, strict=True):
            if not count:
                self.unlabelled += 1
                _LOGGER.warning(
                    "sample %s has nothing to train on in its first %d tokens (%d so far)",
                    sample["index"],
                    self.length,
                    self.unlabelled,
                )

    def _pictures(
        self, samples: Sequence[Mapping[str, Any]], pictures: Sequence[Sequence[Any]]
    ) -> dict[str, Tensor]:
        if not samples:
            raise ValueError("DocumentCollator: got no samples")
        flat = [picture for own in pictures for picture in own]
        owners = [s for s, own in zip(samples, pictures, strict=True) for _ in own]
        # Pictures of one sample are augmented each in its own way.
        places = [place for own in pictures for place in range(len(own))]
        epochs = [s["epoch"] for s in owners]
        indices = [s["index"] * 64 + place for s, place in zip(owners, places, strict=True)]
        index = torch.full((len(samples), max(map(len, pictures))), -1)
        start = 0
        for row, own in enumerate(pictures):
            index[row, : len(own)] = torch.arange(start, start + len(own))
            start += len(own)
        if not flat:  # a batch of plain text: the model takes no pixels at all
            return {"image_index": index}
        keys = sample_keys(self.seed, epochs, indices)
        return {"pixel_values": self.transform.batch(flat, keys), "image_index": index}

    @staticmethod
    def _pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
        width = max(map(len, rows))
        table = torch.full((len(rows), width), value)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            table[number, place] = torch.tensor(row, dtype=torch.long)
        return table
