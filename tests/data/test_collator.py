"""Batches: shapes, determinism, templates, workers."""

import pytest
import torch
from torch.utils.data import DataLoader

from mmkern.data.collator import ContrastiveCollator
from mmkern.data.images import ClipTransform, PixelTransform
from mmkern.data.pairs import PairDataset
from mmkern.data.shards import ShardDataset
from tests.data.pictures import letters, write_pairs, write_shards


def tensor_samples(count, epoch=0):
    pictures = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8)
    return [
        {"image": pictures[i], "text": f"name {i}", "index": i, "epoch": epoch}
        for i in range(count)
    ]


def equal(one, two):
    return all(torch.equal(one[key], two[key]) for key in one)


def test_batch_of_small_pictures():
    """The model would get other shapes or types than it takes."""
    batch = ContrastiveCollator(PixelTransform(train=True), letters)(tensor_samples(6))
    assert set(batch) == {"pixel_values", "input_ids"}
    assert batch["pixel_values"].shape == (6, 3, 8, 8)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], letters([f"name {i}" for i in range(6)]))


def test_random_choices_belong_to_the_sample():
    """Augmentation would depend on the batch a sample is in: no resumed run would be equal."""
    collator = ContrastiveCollator(
        PixelTransform(train=True), letters, seed=3, templates=("{}", "my {}", "{} {{x}}")
    )
    samples = tensor_samples(12)
    whole = collator(samples)
    part = collator(samples[7:9])
    assert torch.equal(part["pixel_values"], whole["pixel_values"][7:9])
    assert torch.equal(part["input_ids"], whole["input_ids"][7:9])
    assert not equal(collator([{**s, "epoch": 1} for s in samples]), whole)
    other = ContrastiveCollator(PixelTransform(train=True), letters, seed=4)
    assert not torch.equal(other(samples)["pixel_values"], whole["pixel_values"])


def test_templates():
    """Only one of the templates would be used, or braces in a caption would raise."""
    templates = ("{}", "an emoji of {}", "{} {0}")
    collator = ContrastiveCollator(PixelTransform(), lambda texts: texts, templates=templates)
    samples = [{**s, "text": "a {thing} {}"} for s in tensor_samples(60)]
    captions = collator(samples)["input_ids"]
    counts = [captions.count(template.replace("{}", "a {thing} {}")) for template in templates]
    assert sum(counts) == 60 and min(counts) > 8
    for bad in ((), ("no place",), ("{} {}",)):
        with pytest.raises(ValueError, match=r"one '\{\}' each"):
            ContrastiveCollator(PixelTransform(), letters, templates=bad)


def test_pretokenized_captions():
    """Captions would be tokenized in every step, or looked up wrongly."""
    calls = []

    def counting(texts):
        calls.append(list(texts))
        return letters(texts)

    samples = tensor_samples(5)
    options = {"templates": ("{}", "my {}"), "seed": 1}
    collator = ContrastiveCollator(PixelTransform(), counting, **options)
    collator.pretokenize(s["text"] for s in samples * 2)
    assert [len(texts) for texts in calls] == [10]
    plain = ContrastiveCollator(PixelTransform(), letters, **options)
    assert equal(collator(samples), plain(samples)) and len(calls) == 1
    new = [{**samples[0], "text": "unseen"}, samples[1]]
    assert equal(collator(new), plain(new)) and len(calls) == 2
    with pytest.raises(ValueError, match="no samples"):
        collator([])


@pytest.mark.parametrize("source", ["folder", "shards"])
def test_workers_change_nothing(source, tmp_path):
    """Batches would depend on the number of workers, or on which run this is."""
    if source == "folder":
        data = PairDataset.from_folder(write_pairs(tmp_path, 24, broken=(5,)), on_error="skip")
        workers = (0, 2)
    else:
        data = ShardDataset(write_shards(tmp_path, 2, 12), shuffle_buffer=4)
        workers = (1, 1)
    collator = ContrastiveCollator(
        ClipTransform(6, train=True), letters, templates=("{}", "see {}"), seed=9
    )
    data.set_epoch(2)
    runs = []
    for number in workers:
        loader = DataLoader(data, batch_size=8, num_workers=number, collate_fn=collator)
        torch.rand(number + 1)
        runs.append(list(loader))
    assert len(runs[0]) == 3
    assert all(equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.slow
def test_spawned_workers(tmp_path):
    """On systems that spawn workers the epoch and the count of skipped samples would be lost."""
    data = PairDataset.from_folder(write_pairs(tmp_path, 8, broken=(5,)), on_error="skip")
    collator = ContrastiveCollator(ClipTransform(6, train=True), letters)
    data.set_epoch(3)
    options = {"batch_size": 4, "collate_fn": collator}
    spawned = list(DataLoader(data, num_workers=1, multiprocessing_context="spawn", **options))
    assert data.report_skipped() == 1
    assert all(equal(a, b) for a, b in zip(spawned, DataLoader(data, **options), strict=True))
