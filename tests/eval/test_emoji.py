"""The emoji run's measurements: chance, tied names, what may be tested, the table."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkern.data.emoji import EmojiData, EmojiView
from mmkern.eval import emoji_report
from mmkern.eval.emoji import (
    EmojiEncoder,
    best_names,
    category_probe,
    chance,
    retrieval,
    tasks,
    vendor_accuracy,
)
from mmkern.eval.zero_shot import build_classifier


@pytest.fixture
def data():
    """Two vendors, four names; names 2 and 3 are one picture at vendor 5 (Twtr)."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(40, 215, (4, 4, 4, 3), generator=generator)
    second = base + torch.randint(-8, 9, base.shape, generator=generator)
    second[3] = second[2]
    return EmojiData(
        pictures=torch.cat([base, second]).to(torch.uint8),
        name_ids=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]),
        vendor_ids=torch.tensor([0, 0, 0, 0, 5, 5, 5, 5]),
        picture_ids=torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]),
        names=("apple", "bee", "cake", "pie"),
        category_ids=torch.tensor([0, 1, 0, -1]),
        categories=("Food & Drink", "Animals & Nature"),
    )


class Lookup(nn.Module):
    """A model whose embedding of a name is the pixels of its picture at the first vendor."""

    device = torch.device("cpu")

    def __init__(self, data):
        super().__init__()
        self.rows = {name: row for row, name in enumerate(data.names)}
        view = data.view(["Appl"])
        self.table = EmojiEncoder(nn.Identity(), None).pixels(view).flatten(1)

    def visual(self, pixels, project=True):
        return pixels.flatten(1)

    def encode_text(self, rows):
        return self.table[rows]


@pytest.fixture
def encoder(data):
    model = Lookup(data)
    return EmojiEncoder(model, lambda texts: torch.tensor([model.rows[t] for t in texts]))


def test_chance_counts_every_right_name():
    """The baseline beside the model would be too low where names are tied."""
    answers = torch.zeros(2, 10, dtype=torch.bool)
    answers[0, 0] = True
    answers[1, :3] = True
    assert chance(answers, 1) == pytest.approx((1 / 10 + 3 / 10) / 2)
    drawn = torch.rand(40_000, 10, generator=torch.Generator().manual_seed(0)).topk(5).indices
    want = [answers[i][drawn].any(1).double().mean().item() for i in (0, 1)]
    assert chance(answers, 5) == pytest.approx(sum(want) / 2, abs=0.01)


def test_accuracy_counts_tied_names_and_stands_beside_pixels(data, encoder):
    """A model that knows the data by heart would not score 1, or a shuffled one would."""
    train, test = data.view(["Appl"]), data.view(["Twtr"])
    classifier = build_classifier(encoder.texts, data.names)
    row = vendor_accuracy(encoder, train, test, classifier)
    assert row["top1"] == row["pixel_top1"] == 1.0
    assert row["chance_top1"] == pytest.approx((1 + 1 + 2 + 2) / 4 / 4)
    wrong = classifier[:, [1, 0, 0, 1]]
    assert vendor_accuracy(encoder, train, test, wrong)["top1"] == 0.0


def test_features_belong_to_the_view_asked_for(data, encoder):
    """One vendor would be scored with another vendor's pictures."""
    first, second = data.view(["Appl"]), data.view(["Twtr"])
    assert not torch.equal(encoder.images(first), encoder.images(second))
    assert torch.equal(encoder.images(first), encoder.pixels(first).flatten(1))
    assert encoder.images(first) is encoder.images(first)


def test_retrieval_accepts_any_tied_name(data, encoder):
    """Two names of one picture would count as errors for each other."""
    found = retrieval(encoder, data.view(["Twtr"]))
    # The pie's picture is the cake's, so its nearest text is "cake"; "pie" itself looks elsewhere.
    assert found["image_to_text_r1"] == 1.0
    assert found["text_to_image_r1"] == 0.75


def test_best_names_are_the_scores_order(data, encoder):
    """The picture grid would show names that the model did not give."""
    test = data.view(["Twtr"])
    classifier = F.normalize(encoder.texts(list(data.names)), dim=1).T
    five_names = torch.cat([classifier, -classifier], dim=1)
    view = EmojiView(data, torch.arange(4, 8))
    view.names = (*data.names, "not a", "not b", "not c", "not d")
    pictures, best, right = best_names(encoder, view, five_names, 4)
    for picture, names, truth in zip(pictures, best, right, strict=True):
        row = int((test.pictures == picture).flatten(1).all(1).nonzero()[0])
        order = (encoder.images(test)[row] @ five_names).argsort(descending=True)[:5]
        assert names == [view.names[i] for i in order.tolist()]
        assert test.names[test.name_ids[row]] in truth


def test_tasks_cover_names_without_category(data):
    """A name without a category would take the last category's word."""
    assert tasks(data.view(["Appl"])) == ["food", "living thing", "food", "symbol"]


def test_category_probe_reads_the_category_and_leaves_out_names_without_one():
    """The probe would be scored on labels that do not exist, or on shuffled ones."""
    names, generator = 60, torch.Generator().manual_seed(0)
    category = torch.arange(names) % 2
    category[:3] = -1
    dark = torch.randint(0, 90, (2, names, 2, 2, 3), generator=generator)
    pictures = (dark + 150 * (category == 1)[None, :, None, None, None]).flatten(0, 1)
    data = EmojiData(
        pictures=pictures.to(torch.uint8),
        name_ids=torch.arange(names).repeat(2),
        vendor_ids=torch.tensor([0, 5]).repeat_interleave(names),
        picture_ids=torch.arange(2 * names),
        names=tuple(f"{i:02}" for i in range(names)),
        category_ids=category,
        categories=("dark", "light"),
    )
    encoder = EmojiEncoder(Lookup(data), None)
    result = category_probe(encoder, data.view(["Appl"]), {"twitter_": data.view(["Twtr"])})
    assert result["twitter_accuracy"] == 1.0
    assert result["twitter_majority"] == pytest.approx(29 / 57)
    assert result["strength"] in [strength for strength, _ in result["curve"]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"vendors": ["Appl"]}, "trained on"),
        ({"vendors": ["Nokia"]}, "Nokia"),
        ({}, "vendors"),
        ({"vendors": ["Twtr"], "parts": ["speed"]}, "speed"),
        ({"vendors": ["Twtr"], "part": []}, "part"),
        ({"vendors": ["Twtr"], "parts": ["robustness"]}, "reserve"),
    ],
)
def test_impossible_evaluations_are_refused(options, says):
    """A vendor that was trained on would be reported as never seen."""
    with pytest.raises(ValueError, match=says):
        emoji_report.check_options(options, ["Appl", "Goog"], None)


def test_table_shows_baselines_beside_the_model():
    """A reader would see an accuracy without what it is to be compared with."""
    metrics = {
        "vendors": {"": "Twitter", "windows_": "Windows"},
        "names": 1853,
        "pairs": 8804,
        "train_seconds": 150.2,
        "backend": "cpp",
    }
    for prefix in metrics["vendors"]:
        for key, value in {"top1": 0.1712, "top5": 0.4, "pixel_top1": 0.47}.items():
            metrics[prefix + key] = value
        metrics |= {f"{prefix}chance_top1": 0.00054, f"{prefix}chance_top5": 0.0027}
    lines = emoji_report.table(metrics).splitlines()
    assert "8,804 pairs in 2 min 30 s" in lines[0]
    rows = {line[:30].strip(): line.split("%")[:-1] for line in lines[4:]}
    assert rows["chance"][0].endswith("0.05") and rows["CLIP zero-shot"][0].endswith("17.1")
    assert rows["nearest training pixels"][0].endswith("47.0")
