"""Image-text pairs from tar shards in webdataset's layout.

A shard is a tar file; files with one name up to the first dot are one sample: a picture
(``000012.jpg``) and its text (``000012.txt``, or ``000012.json`` with a field for it).
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from mmkern.data.epochs import EpochAware
from mmkern.data.images import ImageError, open_image
from mmkern.data.pairs import IMAGE_SUFFIXES, OnError, Sample
from mmkern.data.randomness import Stream, permutation, sample_keys

__all__ = ["MissingShardError", "ShardDataset", "ShardError"]

_LOGGER = logging.getLogger(__name__)
_SHOWN = 5
# "http://", "pipe:", "s3://" ...; a Windows drive has one letter.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


class ShardError(ValueError):
    """A shard or a sample in one that cannot be used; names the shard (and the sample)."""


class MissingShardError(ShardError, FileNotFoundError):
    """A shard that the pattern names does not exist."""


class ShardDataset(EpochAware, IterableDataset[Sample]):
    """Iterable data set over tar shards: {"image" (RGB PIL), "text", "index", "epoch"}.

    Shards are shuffled, then dealt to ranks and to workers, then samples pass a shuffle buffer. The
    order depends on (seed, epoch) and on the numbers of ranks and workers, never on time or on
    chance. ``index`` is a hash of the shard's and the sample's name, so a sample is augmented alike
    wherever it is read.

    Args:
        shards: a pattern with braces (``"train-{000000..000099}.tar"``), several joined by "::", or
            a list of patterns. URLs and ``pipe:`` commands are opened by webdataset.
        text_field: the field of the .json that holds the text, for samples without a .txt.
        on_error: ``"raise"``, or ``"skip"``: a sample without a picture, without a text or with a
            broken picture, and the rest of a damaged shard, are skipped, counted (``skipped``) and
            reported once an epoch.
        seed: of both shuffles.
        shuffle_buffer: samples (undecoded) among which the next is drawn; 0 keeps the order, of
            shards too.
        epoch_samples: samples an epoch over all ranks. Every rank then yields exactly its share
            (shards are read again if they hold fewer), which distributed training needs: a rank
            that runs dry leaves the others waiting. Without it an epoch is every sample once.
        rank, world_size: torch.distributed's by default. Give 0, 1 to a framework that deals
            samples of an iterable data set to ranks itself (accelerate does unless told not to).

    Raises:
        MissingShardError: a local shard does not exist.
        ShardError: no shards, or fewer than ranks.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        text_field: str = "text",
        on_error: OnError = "raise",
        seed: int = 0,
        shuffle_buffer: int = 1000,
        epoch_samples: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        if on_error not in ("raise", "skip"):
            raise ValueError(f"ShardDataset: on_error must be 'raise' or 'skip', got {on_error!r}")
        if shuffle_buffer < 0 or (epoch_samples is not None and epoch_samples < 1):
            raise ValueError(
                "ShardDataset: needs shuffle_buffer >= 0 and epoch_samples >= 1, got "
                f"{shuffle_buffer} and {epoch_samples}"
            )
        self.shards = _expand(shards)
        self.text_field = text_field
        self.on_error: OnError = on_error
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.epoch_samples = epoch_samples
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        if world_size is None:
            world_size = torch.distributed.get_world_size() if distributed else 1
        if not 0 <= rank < world_size:
            raise ValueError(
                f"ShardDataset: needs 0 <= rank < world_size, got {rank}, {world_size}"
            )
        if len(self.shards) < world_size:
            raise ShardError(
                f"ShardDataset: {len(self.shards)} shards cannot feed {world_size} ranks"
            )
        self.rank = rank
        self.world_size = world_size
        # In shared memory like the epoch: workers that persist must see it too.
        self._resume = torch.zeros(2, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        """Samples that this rank yields in an epoch.

        Raises:
            TypeError: without ``epoch_samples``, as tar files do not say how many they hold.
        """
        if self.epoch_samples is None:
            raise TypeError("ShardDataset: the length is unknown without epoch_samples")
        return self.epoch_samples // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch at its first sample; skipped samples of the last one are reported."""
        super().set_epoch(epoch)
        self._resume.zero_()

    def start_at(self, batches: int, batch_size: int) -> None:
        """Resume this epoch: leave out what a DataLoader used for its first ``batches`` batches.

        The DataLoader must have the same number of workers and this ``batch_size``; batch
        ``batches`` of the uninterrupted epoch is then its first. The samples left out are read and
        checked (a broken one does not count) but go nowhere. Without ``epoch_samples`` this holds
        up to the first batch that a worker could not fill.
        """
        if batches < 0 or batch_size < 1:
            raise ValueError(
                "ShardDataset.start_at: needs batches >= 0 and batch_size >= 1, got "
                f"{batches} and {batch_size}"
            )
        self._resume[0], self._resume[1] = batches, batch_size

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        done, batch_size = self._resume.tolist()
        # A DataLoader takes batch b from worker b % workers and begins with worker 0: to go on at
        # batch `done`, worker 0 takes the part of worker done % workers, and so on.
        part = (0 if worker is None else worker.id + done) % workers
        skip = (done // workers + (part < done % workers)) * batch_size
        stop = None
        if self.epoch_samples is not None:
            share = self.epoch_samples // self.world_size
            stop = share // workers + (part < share % workers)
        yield from islice(self._stream(part, workers, stop is not None), skip, stop)

    def _stream(self, part: int, workers: int, endless: bool) -> Iterator[Sample]:
        """The decoded samples of one worker; ``endless`` begins again when shards run out."""
        from webdataset.filters import shuffle

        epoch = self.epoch
        for cycle in count() if endless else range(1):
            order = list(range(len(self.shards)))
            if self.shuffle_buffer:
                stream = Stream.SHARD_ORDER + cycle
                order = permutation(self.seed, epoch, len(self.shards), stream).tolist()
            own = order[self.rank :: self.world_size]
            if len(own) < workers:
                raise ShardError(
                    f"ShardDataset: the {len(own)} shards of rank {self.rank} cannot feed "
                    f"{workers} workers; use num_workers <= {len(own)}"
                )
            raw = (entry for shard in own[part::workers] for entry in self._read(shard))
            if self.shuffle_buffer:
                place = (cycle * self.world_size + self.rank) * workers + part
                key = sample_keys(self.seed, epoch, [place, Stream.SHUFFLE_BUFFER])
                rng = random.Random(int(key[0] ^ key[1]))
                raw = shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(raw)
            empty = True
            for entry in raw:
                sample = self._decode(entry, epoch)
                if sample is not None:
                    empty = False
                    yield sample
            if endless and empty:
                names = [self.shards[shard] for shard in own[part::workers]]
                raise ShardError(f"ShardDataset: no usable sample in {names}")

    def _read(self, shard: int) -> Iterator[dict[str, Any]]:
        """The undecoded samples of one shard.

        One shard at a time: grouping over a damaged shard's end would pair its last picture with
        the next shard's first text.
        """
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys, tar_file_expander

        url = self.shards[shard]
        errors: list[Exception] = []

        def note(error: Exception) -> bool:
            errors.append(error)
            return True

        try:
            with gopen(url) as stream:
                files = tar_file_expander([{"url": url, "stream": stream}], handler=note)
                yield from group_by_keys(files, handler=note)
        except (OSError, tarfile.TarError, ValueError) as error:
            errors.append(error)
        if errors:
            kind = MissingShardError if isinstance(errors[0], FileNotFoundError) else ShardError
            damage = kind(f"{url}: damaged or unreadable: {errors[0]}")
            damage.__cause__ = errors[0]
            self._skip(damage)

    def _skip(self, error: ShardError | ImageError) -> None:
        if self.on_error == "raise":
            raise error
        self._count_skipped(error)

    def _decode(self, entry: dict[str, Any], epoch: int) -> Sample | None:
        shard, key = os.path.basename(str(entry["__url__"])), str(entry["__key__"])
        name = f"{shard}/{key}"
        suffix = next((s for s in entry if f".{s}" in IMAGE_SUFFIXES), None)
        try:
            if suffix is None:
                raise ShardError(f"{name}: no picture among {_parts(entry)}")
            text = self._text(entry, name)
            image = open_image(entry[suffix], name=f"{name}.{suffix}")
        except (ShardError, ImageError) as error:
            self._skip(error)
            return None
        digest = blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        # 63 bits: an index is an int64.
        index = int.from_bytes(digest, "little") >> 1
        return {"image": image, "text": text, "index": index, "epoch": epoch}

    def _text(self, entry: dict[str, Any], name: str) -> str:
        try:
            if "txt" in entry:
                text = entry["txt"].decode("utf-8-sig")
            elif "json" in entry:
                text = json.loads(entry["json"].decode("utf-8-sig"))[self.text_field]
            else:
                raise ShardError(f"{name}: no .txt or .json among {_parts(entry)}")
        except (KeyError, TypeError, IndexError) as error:
            raise ShardError(f"{name}.json: no field {self.text_field!r}") from error
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ShardError(f"{name}: its text cannot be read: {error}") from error
        if not isinstance(text, str) or not text.strip():
            raise ShardError(f"{name}: the text must not be empty, got {text!r}")
        return text.strip()


def _parts(entry: dict[str, Any]) -> list[str]:
    return sorted(part for part in entry if not part.startswith("__"))


def _expand(shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    from webdataset.shardlists import expand_urls

    patterns = [shards] if isinstance(shards, str | os.PathLike) else list(shards)
    urls = [url for pattern in patterns for url in expand_urls(str(os.fspath(pattern)))]
    if not urls:
        raise ShardError("ShardDataset: no shards given")
    missing = [u for u in urls if not _SCHEME.match(u) and not Path(u).is_file()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise MissingShardError(
            f"ShardDataset: {len(missing)} of {len(urls)} shards do not exist: "
            f"{', '.join(missing[:_SHOWN])}{more}"
        )
    return urls
