"""Image-text pairs from a folder, a CSV table or JSON lines."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmkern.data.epochs import EpochAware
from mmkern.data.images import ImageError, open_image
from mmkern.data.randomness import Stream, sample_keys, uniform
from mmkern.data.strings import Strings

__all__ = ["MissingPairsError", "OnError", "PairDataset", "PairError", "Sample"]

OnError = Literal["raise", "skip"]

IMAGE_SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
)

_LOGGER = logging.getLogger(__name__)
_REPLACEMENTS = 16
_SHOWN = 5


class PairError(ValueError):
    """A table or a row of image-text pairs that cannot be used; names the file and the line."""


class MissingPairsError(PairError, FileNotFoundError):
    """The table or the folder does not exist."""


class Sample(TypedDict):
    """One image-text pair; ``index`` and ``epoch`` are what augmentation derives from."""

    image: Image.Image | Tensor
    text: str
    index: int
    epoch: int


class _Row(NamedTuple):
    """A pair, or what is wrong with it."""

    image: str
    text: str
    problem: str = ""


class PairDataset(EpochAware, Dataset[Sample]):
    """Map-style data set of image-text pairs: ``ds[i] -> {"image", "text", "index", "epoch"}``.

    ``image`` is an RGB PIL image. Build it with ``from_folder``, ``from_csv`` or ``from_jsonl``, or
    directly from two sequences.

    Args:
        images: paths.
        texts: one text an image.
        on_error: ``"raise"`` stops at the first broken picture with an ``ImageError`` that names
            it. ``"skip"`` puts another pair in its place, one that depends on (seed, epoch, index)
            alone, counts it (``skipped``) and reports the count once an epoch (``set_epoch``,
            ``report_skipped``).
        seed: for the choice of the other pair.

    Attributes:
        dropped: rows that the table had and that were unusable (``on_error="skip"`` only).

    Raises:
        PairError: no pairs, or unequal numbers of images and texts.
    """

    def __init__(
        self,
        images: Sequence[str],
        texts: Sequence[str],
        *,
        on_error: OnError = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if on_error not in ("raise", "skip"):
            raise ValueError(f"PairDataset: on_error must be 'raise' or 'skip', got {on_error!r}")
        if len(images) != len(texts) or not images:
            raise PairError(
                "PairDataset: needs one text an image and at least one pair, got "
                f"{len(images)} images and {len(texts)} texts"
            )
        self.on_error: OnError = on_error
        self.seed = seed
        self.dropped = 0
        self._images = Strings(images)
        self._texts = Strings(texts)

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        *,
        image_column: str = "image",
        text_column: str = "text",
        delimiter: str | None = None,
        root: str | os.PathLike[str] | None = None,
        on_error: OnError = "raise",
        seed: int = 0,
        check_files: bool = True,
    ) -> PairDataset:
        """Read a table with a header line, in UTF-8.

        Args:
            path: the table.
            image_column, text_column: names in its header (open_clip's are "filepath", "title").
            delimiter: a tab if the file ends in .tsv, else a comma.
            root: what relative image paths are relative to; the table's folder by default.
            on_error: rows without an image, without a text, with a wrong number of fields, or
                with a file that does not exist raise together (the first five are shown), or are
                dropped and counted in ``dropped``.
            seed: see the class.
            check_files: look for each file now (a stat a row) rather than when it is opened.

        Raises:
            MissingPairsError: there is no such table.
            PairError: a column is missing, the file is not UTF-8, a row is bad, no row is usable.
        """
        table = existing_table(path)
        delimiter = delimiter or ("\t" if table.suffix.lower() == ".tsv" else ",")
        rows = _csv_rows(table, image_column, text_column, delimiter)
        folder = Path(root) if root is not None else table.parent
        return cls._from_rows(rows, table, folder, on_error, seed, check_files)

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        *,
        image_column: str = "image",
        text_column: str = "text",
        root: str | os.PathLike[str] | None = None,
        on_error: OnError = "raise",
        seed: int = 0,
        check_files: bool = True,
    ) -> PairDataset:
        """Read one JSON object a line, in UTF-8; arguments and errors as in ``from_csv``."""
        table = existing_table(path)
        rows = _jsonl_rows(table, image_column, text_column)
        folder = Path(root) if root is not None else table.parent
        return cls._from_rows(rows, table, folder, on_error, seed, check_files)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        image_column: str = "image",
        text_column: str = "text",
        on_error: OnError = "raise",
        seed: int = 0,
    ) -> PairDataset:
        """Read a folder: its one .csv, .tsv or .jsonl table, else every X.png with its X.txt.

        Without a table the folder is searched to any depth, in sorted order; the text is the whole
        .txt file, stripped. A picture without a .txt is a bad row; a .txt without a picture is not
        looked at.

        Raises:
            MissingPairsError: there is no such folder.
            PairError: more than one table; and as ``from_csv``.
        """
        folder = existing_table(folder)
        if not folder.is_dir():
            raise PairError(f"{folder}: not a folder")
        tables = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in _READERS]
        if len(tables) > 1:
            names = ", ".join(p.name for p in tables)
            raise PairError(f"{folder}: more than one table ({names}); use from_csv or from_jsonl")
        if tables:
            read = getattr(cls, _READERS[tables[0].suffix.lower()])
            return read(
                tables[0],
                image_column=image_column,
                text_column=text_column,
                on_error=on_error,
                seed=seed,
            )
        return cls._from_rows(_sidecar_rows(folder), folder, folder, on_error, seed, False)

    @classmethod
    def _from_rows(
        cls,
        rows: Iterator[_Row],
        source: Path,
        root: Path,
        on_error: OnError,
        seed: int,
        check_files: bool,
    ) -> PairDataset:
        pairs = (((row.image, row.text), row.problem) for row in rows)
        good, dropped = usable_rows(pairs, source, root, on_error, check_files)
        images, texts = zip(*good, strict=True)
        data = cls(images, texts, on_error=on_error, seed=seed)
        data.dropped = dropped
        return data

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """Pair ``index`` (negative ones count from the end).

        Raises:
            IndexError: outside the data set.
            ImageError: the picture is broken and ``on_error="raise"``.
            PairError: ``on_error="skip"``, and 16 pairs drawn in its place are broken too.
        """
        return self._open(index)[0]

    def _open(self, index: int) -> tuple[Sample, int]:
        """The sample, and the row that its picture and text come from."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"PairDataset: index {index} of {count} pairs")
        index %= count
        epoch = self.epoch
        source = index
        try:
            image = open_image(self._images[index])
        except ImageError as error:
            if self.on_error == "raise":
                raise
            self._count_skipped(error)
            source, image = self._replacement(index, epoch, error)
        text = self._texts[source]
        return {"image": image, "text": text, "index": index, "epoch": epoch}, source

    def _replacement(self, index: int, epoch: int, error: ImageError) -> tuple[int, Image.Image]:
        keys = sample_keys(self.seed, epoch, [index])
        draws = uniform(keys, _REPLACEMENTS, Stream.REPLACEMENT)[0]
        for candidate in (draws * len(self)).astype(int).tolist():
            try:
                return candidate, open_image(self._images[candidate])
            except ImageError:
                continue
        raise PairError(
            f"PairDataset: {error}; {_REPLACEMENTS} pairs drawn in its place are broken too"
        ) from error


def usable_rows(
    rows: Iterable[tuple[tuple[str, ...], str]],
    source: Path,
    root: Path,
    on_error: OnError,
    check_files: bool,
) -> tuple[list[tuple[str, ...]], int]:
    """Rows ((image, text, ...), what is wrong) with images as whole paths, and how many were bad.

    Raises:
        PairError: bad rows and ``on_error="raise"``, all together; no usable row.
    """
    good: list[tuple[str, ...]] = []
    problems: list[str] = []
    for fields, problem in rows:
        path = os.path.join(root, fields[0]) if fields else ""
        if not problem and check_files and not os.path.isfile(path):
            problem = f"no such file: {path}"
        if problem:
            problems.append(problem)
        else:
            good.append((path, *fields[1:]))
    if problems and (on_error == "raise" or not good):
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PairError(f"{source}: {len(problems)} bad rows:\n  {shown}{more}")
    if not good:
        raise PairError(f"{source}: no image-text pairs in it")
    if problems:
        _LOGGER.warning(
            "%s: dropped %d bad rows of %d, the first: %s",
            source,
            len(problems),
            len(problems) + len(good),
            problems[0],
        )
    return good, len(problems)


_READERS = {".csv": "from_csv", ".tsv": "from_csv", ".jsonl": "from_jsonl"}


def existing_table(path: str | os.PathLike[str]) -> Path:
    """A path that exists.

    Raises:
        MissingPairsError: it does not.
    """
    path = Path(path)
    if not path.exists():
        raise MissingPairsError(f"{path}: no such file or folder")
    return path


def _row(where: str, image: Any, text: Any, image_column: str, text_column: str) -> _Row:
    for column, value in ((image_column, image), (text_column, text)):
        if not isinstance(value, str) or not value.strip():
            return _Row("", "", f"{where}: {column!r} must be text, got {value!r}")
    return _Row(image.strip(), text.strip())


def _csv_rows(table: Path, image_column: str, text_column: str, delimiter: str) -> Iterator[_Row]:
    with open(table, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            header = reader.fieldnames or []
            for column in (image_column, text_column):
                if column not in header:
                    raise PairError(f"{table}: no column {column!r}; the header has {header}")
            for fields in reader:
                where = f"line {reader.line_num}"
                if None in fields or None in fields.values():
                    yield _Row("", "", f"{where}: {len(header)} fields expected, got other")
                else:
                    yield _row(
                        where, fields[image_column], fields[text_column], image_column, text_column
                    )
        except UnicodeDecodeError as error:
            raise PairError(f"{table}: not UTF-8: {error}") from error
        except csv.Error as error:
            raise PairError(f"{table}: line {reader.line_num}: {error}") from error


def json_lines(table: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(where, fields, what is wrong) of each line of a table of JSON objects."""
    with open(table, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number}"
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield where, {}, f"{where}: {error}"
                continue
            if not isinstance(fields, dict):
                kind = type(fields).__name__
                yield where, {}, f"{where}: a JSON object expected, got {kind}"
                continue
            yield where, fields, ""


def _jsonl_rows(table: Path, image_column: str, text_column: str) -> Iterator[_Row]:
    for where, fields, problem in json_lines(table):
        if problem:
            yield _Row("", "", problem)
        else:
            yield _row(
                where, fields.get(image_column), fields.get(text_column), image_column, text_column
            )


def _sidecar_rows(folder: Path) -> Iterator[_Row]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        where = str(path.relative_to(folder))
        try:
            text = path.with_suffix(".txt").read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            yield _Row("", "", f"{where}: no {path.with_suffix('.txt').name} beside it")
        except UnicodeDecodeError as error:
            yield _Row("", "", f"{where}: its .txt is not UTF-8: {error}")
        else:
            yield _row(where, where, text, "image", "text")
