"""webdataset shards: order, splitting, resuming, damage."""

import itertools
import logging

import pytest
from torch.utils.data import DataLoader

from mmkern.data.images import ImageError
from mmkern.data.shards import MissingShardError, ShardDataset, ShardError
from tests.data.pictures import as_list, number_of, png, shard_files, write_shard, write_shards


def numbers(data):
    samples = list(data)
    assert all(s["text"] == f"text {number_of(s['image'])}" for s in samples)
    return [number_of(s["image"]) for s in samples]


def batches(data, size, workers, **options):
    loader = DataLoader(
        data, batch_size=size, num_workers=workers, collate_fn=as_list, drop_last=True, **options
    )
    return [[number_of(s["image"]) for s in batch] for batch in loader]


def test_reads_every_sample_once(tmp_path):
    """Samples would be lost, repeated or paired with another's text."""
    data = ShardDataset(write_shards(tmp_path, 3, 10), shuffle_buffer=0)
    assert numbers(data) == list(range(30))
    shuffled = ShardDataset(write_shards(tmp_path, 3, 10), shuffle_buffer=8)
    assert sorted(numbers(shuffled)) == list(range(30))


def test_order_depends_on_seed_and_epoch_alone(tmp_path):
    """A rerun would see another order, or every epoch the same."""
    pattern = write_shards(tmp_path, 4, 10)
    orders = []
    for seed, epoch in itertools.product((0, 1), (0, 1)):
        data = ShardDataset(pattern, seed=seed, shuffle_buffer=16)
        data.set_epoch(epoch)
        orders.append(numbers(data))
        assert numbers(data) == orders[-1]
        other_path = ShardDataset(pattern, seed=seed, shuffle_buffer=16)
        other_path.set_epoch(epoch)
        assert [s["index"] for s in other_path] == [s["index"] for s in data]
    assert len({tuple(order) for order in orders}) == 4
    assert all(len(set(order)) == 40 for order in orders)


def test_patterns(tmp_path):
    """Lists, several patterns or a plain path would not be understood."""
    pattern = write_shards(tmp_path, 4, 2)
    one, two = tmp_path / "s-000.tar", tmp_path / "s-{001..003}.tar"
    for shards in (pattern, [one, str(two)], f"{one}::{two}", f"file:{one}::{two}"):
        assert sorted(numbers(ShardDataset(shards))) == list(range(8))
    assert numbers(ShardDataset(one, shuffle_buffer=0)) == [0, 1]


def test_missing_shards(tmp_path):
    """A mistyped pattern would train on the shards that happen to exist."""
    write_shards(tmp_path, 2, 2)
    with pytest.raises(
        MissingShardError, match=r"7 of 9 shards do not exist: .*2\.tar.* and 2 more"
    ):
        ShardDataset(str(tmp_path / "s-{000..008}.tar"))
    with pytest.raises(FileNotFoundError):
        ShardDataset([str(tmp_path / "gone.tar")])
    with pytest.raises(ShardError, match="no shards"):
        ShardDataset([])
    data = ShardDataset(f"file:{tmp_path}/gone.tar")
    with pytest.raises(MissingShardError, match=r"gone\.tar"):
        list(data)


def test_ranks_and_workers_share_the_samples(tmp_path):
    """Two ranks or workers would train on the same samples, or none on some."""
    pattern = write_shards(tmp_path, 8, 6)
    seen = []
    for rank in range(2):
        data = ShardDataset(pattern, rank=rank, world_size=2, shuffle_buffer=10)
        loaded = batches(data, 3, 2)
        assert loaded == batches(data, 3, 2)
        flat = [number for batch in loaded for number in batch]
        assert sorted(flat) == sorted(numbers(data))
        seen += flat
    assert sorted(seen) == list(range(48))


def test_equal_epochs_on_unequal_shards(tmp_path):
    """A rank with fewer samples would leave the others waiting for ever."""
    sizes = (3, 9, 5)
    for shard, size in enumerate(sizes):
        write_shard(tmp_path / f"{shard}.tar", shard_files(100 * shard, size))
    for rank in range(3):
        data = ShardDataset(
            str(tmp_path / "{0..2}.tar"),
            rank=rank,
            world_size=3,
            epoch_samples=24,
            shuffle_buffer=4,
        )
        drawn = numbers(data)
        assert len(drawn) == len(data) == 8
    small = ShardDataset(str(tmp_path / "0.tar"), epoch_samples=9, shuffle_buffer=3)
    assert sorted(numbers(small)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len({tuple(numbers(small)[i : i + 3]) for i in (0, 3, 6)}) > 1
    with pytest.raises(TypeError, match="unknown without epoch_samples"):
        len(ShardDataset(str(tmp_path / "0.tar")))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 3])
def test_resume_inside_an_epoch(workers, tmp_path):
    """A resumed run would repeat samples or take them in another order."""
    pattern = write_shards(tmp_path, 6, 7)
    data = ShardDataset(pattern, seed=2, shuffle_buffer=5, epoch_samples=40, on_error="skip")
    data.set_epoch(3)
    whole = batches(data, 4, workers)
    assert sum(map(len, batches(data, 1, workers))) == 40
    for done in (1, 2, 5):
        resumed = ShardDataset(pattern, seed=2, shuffle_buffer=5, epoch_samples=40, on_error="skip")
        resumed.set_epoch(3)
        resumed.start_at(done, 4)
        assert batches(resumed, 4, workers) == whole[done:]
    resumed.set_epoch(3)
    assert batches(resumed, 4, workers) == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_more_workers_than_shards(tmp_path):
    """Idle workers would go unnoticed and resuming would lose its order."""
    data = ShardDataset(write_shards(tmp_path, 2, 2))
    with pytest.raises(ShardError, match="2 shards of rank 0 cannot feed 3 workers"):
        batches(data, 1, 3)
    with pytest.raises(ShardError, match="2 shards cannot feed 3 ranks"):
        ShardDataset(write_shards(tmp_path, 2, 2), rank=0, world_size=3)


BAD_SAMPLES = {
    "picture": ({"b.png": b"junk", "b.txt": b"x"}, r"s\.tar/b\.png: not a picture"),
    "no picture": ({"b.txt": b"x"}, r"s\.tar/b: no picture among \['txt'\]"),
    "no text": ({"b.png": png(1)}, r"s\.tar/b: no \.txt or \.json among \['png'\]"),
    "empty text": ({"b.png": png(1), "b.txt": b" \n"}, "text must not be empty"),
    "not UTF-8": ({"b.png": png(1), "b.txt": b"\xff\xfe\xfa"}, "its text cannot be read"),
    "json": ({"b.png": png(1), "b.json": b"{"}, "its text cannot be read"),
    "json field": ({"b.png": png(1), "b.json": b'{"caption": "x"}'}, "no field 'text'"),
    "json list": ({"b.png": png(1), "b.json": b"[]"}, "no field 'text'"),
    "json number": ({"b.png": png(1), "b.json": b'{"text": 3}'}, "must not be empty, got 3"),
    "twice": ({"b.png": png(1), "b.PNG": png(1), "b.txt": b"x"}, "duplicate"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples(name, tmp_path, caplog):
    """One bad sample in a shard would end a run, or vanish without being counted."""
    files, message = BAD_SAMPLES[name]
    good = shard_files(0, 4)
    first, last = dict(list(good.items())[:4]), dict(list(good.items())[4:])
    path = write_shard(tmp_path / "s.tar", {**first, **files, **last})
    with pytest.raises((ShardError, ImageError), match=message):
        list(ShardDataset(path, shuffle_buffer=0))
    data = ShardDataset(path, shuffle_buffer=0, on_error="skip")
    kept = [number_of(s["image"]) for s in data if s["text"] != "x"]
    assert kept == [0, 1, 2, 3] and data.skipped == 1
    data.set_epoch(1)
    assert data.skipped == 0
    assert [r.levelno for r in caplog.records].count(logging.WARNING) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "junk"])
def test_damaged_shards(damage, tmp_path):
    """A shard cut off by a full disk would end a run, or pair a picture with another's text."""
    pattern = write_shards(tmp_path, 3, 4)
    middle = tmp_path / "s-001.tar"
    # Names repeat from shard to shard, as they do in the wild.
    for shard in range(3):
        renamed = {f"{int(n[:4]) % 4:04}{n[4:]}": d for n, d in shard_files(4 * shard, 4).items()}
        write_shard(tmp_path / f"s-{shard:03}.tar", renamed)
    whole = middle.read_bytes()
    # In the last sample, between picture and text: 512 bytes of header before each file.
    cut = whole.rfind(b"0003.json") + 100
    middle.write_bytes({"cut": whole[:cut], "empty": b"", "junk": b"junk" * 999}[damage])
    with pytest.raises(ShardError, match=r"s-001\.tar"):
        list(ShardDataset(pattern, shuffle_buffer=0))
    data = ShardDataset(pattern, shuffle_buffer=0, on_error="skip")
    expected = [0, 1, 2, 3, *([4, 5, 6] if damage == "cut" else []), 8, 9, 10, 11]
    assert numbers(data) == expected
    assert data.skipped >= 1


def test_nothing_usable(tmp_path):
    """An endless epoch over shards without a good sample would hang."""
    path = write_shard(tmp_path / "s.tar", {"a.png": b"junk", "a.txt": b"x"})
    data = ShardDataset(path, epoch_samples=4, on_error="skip")
    with pytest.raises(ShardError, match="no usable sample"):
        list(data)


def test_bad_arguments(tmp_path):
    """A mistyped option would be taken for another."""
    path = write_shard(tmp_path / "s.tar", shard_files(0, 1))
    for options in (
        {"on_error": "ignore"},
        {"shuffle_buffer": -1},
        {"epoch_samples": 0},
        {"rank": 1, "world_size": 1},
    ):
        with pytest.raises(ValueError, match="ShardDataset"):
            ShardDataset(path, **options)
    with pytest.raises(ValueError, match="start_at"):
        ShardDataset(path).start_at(-1, 4)
