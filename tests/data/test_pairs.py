"""Image-text pairs from folders and tables."""

import json
import logging
import pickle

import pytest
from torch.utils.data import DataLoader

from mmkern.data.images import ImageError
from mmkern.data.pairs import MissingPairsError, PairDataset, PairError
from tests.data.pictures import as_list, number_of, png, write_pairs


def contents(data):
    samples = [data[i] for i in range(len(data))]
    return [(number_of(sample["image"]), sample["text"]) for sample in samples]


EXPECTED = [(n, f"text {n}") for n in range(4)]


def test_csv(tmp_path):
    """Captions would belong to other pictures."""
    write_pairs(tmp_path, 4)
    data = PairDataset.from_csv(tmp_path / "pairs.csv")
    assert contents(data) == EXPECTED
    assert data[-1]["index"] == 3 and data[3]["epoch"] == 0
    with pytest.raises(IndexError, match="index 4 of 4"):
        data[4]


def test_column_names_delimiter_and_root(tmp_path):
    """open_clip's tables (tabs, "filepath", "title") could not be read."""
    write_pairs(tmp_path / "pictures", 4)
    rows = [f'"te""xt, {n}"\t{n:03}.png\tmore' for n in range(4)]
    table = tmp_path / "table.tsv"
    table.write_bytes(("\ufeff" + "\r\n".join(["title\tfilepath\tx", *rows])).encode())
    data = PairDataset.from_csv(
        table, image_column="filepath", text_column="title", root=tmp_path / "pictures"
    )
    assert contents(data) == [(n, f'te"xt, {n}') for n in range(4)]


def test_jsonl(tmp_path):
    """JSON lines would be read differently from a table."""
    write_pairs(tmp_path, 4)
    lines = [json.dumps({"image": f"{n:03}.png", "text": f"text {n}", "x": [1]}) for n in range(4)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    assert contents(PairDataset.from_jsonl(tmp_path / "a.jsonl")) == EXPECTED
    (tmp_path / "pairs.csv").unlink()
    assert contents(PairDataset.from_folder(tmp_path)) == EXPECTED


def test_folder_with_sidecars(tmp_path):
    """A folder of X.png and X.txt would need a table first."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for number in range(4):
        stem = tmp_path / ("deep/er" if number > 1 else "") / f"{number}"
        stem.with_suffix(".PNG" if number % 2 else ".png").write_bytes(png(number))
        stem.with_suffix(".txt").write_text(f"\ufefftext {number}\n", encoding="utf-8")
    (tmp_path / "README.txt").write_text("not a caption")
    assert sorted(contents(PairDataset.from_folder(tmp_path))) == EXPECTED


def test_folder_prefers_its_table(tmp_path):
    """A folder's table would be ignored, or one of two chosen without a word."""
    write_pairs(tmp_path, 4)
    assert contents(PairDataset.from_folder(tmp_path)) == EXPECTED
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(PairError, match=r"more than one table \(b\.jsonl, pairs\.csv\)"):
        PairDataset.from_folder(tmp_path)


def test_many_texts(tmp_path):
    """Texts beyond ASCII would be cut in the wrong place."""
    texts = ["", "ü", "日本語", "😀 emoji", "a" * 1000, "\udc80 not unicode"]
    data = PairDataset([f"/{i}" for i in range(6)], texts)
    assert [data._texts[i] for i in range(6)] == texts
    assert pickle.loads(pickle.dumps(data))._texts[3] == "😀 emoji"


CSV_TROUBLE = {
    "image,text\n000.png,fine\nnowhere.png,lost\n": r"line 3: |no such file: .*nowhere\.png",
    "image,text\n000.png,fine\n001.png\n": "line 3: 2 fields expected",
    "image,text\n000.png,fine\n001.png,a,b\n": "line 3: 2 fields expected",
    "image,text\n000.png,fine\n001.png,  \n": "line 3: 'text' must be text, got '  '",
    "image,text\n000.png,fine\n,text\n": "line 3: 'image' must be text, got ''",
}


@pytest.mark.parametrize("table", CSV_TROUBLE)
def test_bad_csv_rows(table, tmp_path):
    """A bad row would surface hours into training, or vanish without being counted."""
    write_pairs(tmp_path, 2)
    path = tmp_path / "pairs.csv"
    path.write_text(table)
    with pytest.raises(PairError, match=CSV_TROUBLE[table]) as caught:
        PairDataset.from_csv(path)
    assert str(path) in str(caught.value) and "1 bad rows" in str(caught.value)
    data = PairDataset.from_csv(path, on_error="skip")
    assert contents(data) == [(0, "fine")] and data.dropped == 1


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "line 2: "),
        (b"[1]", "line 2: a JSON object expected, got list"),
        (b'{"image": "001.png"}', "line 2: 'text' must be text, got None"),
        (b'{"image": "001.png", "text": ["a"]}', r"line 2: 'text' must be text, got \['a'\]"),
        (b'{"image": 1, "text": "a"}', "line 2: 'image' must be text, got 1"),
        (b'"\xff"', "line 2: .*utf-8"),
        (b"[" * 100_000, "line 2: "),
    ],
)
def test_bad_json_lines(line, message, tmp_path):
    """A bad line would stop a run with an error that names no line."""
    write_pairs(tmp_path, 2)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"image": "000.png", "text": "fine"}\n' + line + b"\n")
    with pytest.raises(PairError, match=message):
        PairDataset.from_jsonl(path)
    data = PairDataset.from_jsonl(path, on_error="skip")
    assert contents(data) == [(0, "fine")] and data.dropped == 1


def test_unusable_tables(tmp_path):
    """A wrong path, header or encoding would look like an empty data set."""
    write_pairs(tmp_path, 2)
    with pytest.raises(MissingPairsError, match=r"gone\.csv"):
        PairDataset.from_csv(tmp_path / "gone.csv")
    with pytest.raises(FileNotFoundError):
        PairDataset.from_folder(tmp_path / "gone")
    with pytest.raises(PairError, match="not a folder"):
        PairDataset.from_folder(tmp_path / "pairs.csv")
    with pytest.raises(PairError, match=r"no column 'caption'; the header has \['image', 'text'\]"):
        PairDataset.from_csv(tmp_path / "pairs.csv", text_column="caption")
    for content, message in (
        (b"", "no column"),
        (b"image,text\n", "no image-text pairs"),
        (b"image,text\n000.png,\xff\n", "not UTF-8"),
        (b'image,text\n000.png,"never closed\n', "line "),
    ):
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(PairError, match=message):
            PairDataset.from_csv(tmp_path / "bad.csv", on_error="skip")
    with pytest.raises(PairError, match="needs one text an image"):
        PairDataset(["a"], [])
    with pytest.raises(ValueError, match="on_error must be"):
        PairDataset(["a"], ["b"], on_error="ignore")


def test_all_problems_are_shown_at_once(tmp_path):
    """A table with ten bad rows would take ten runs to mend, or fill the screen."""
    rows = "\n".join(f"{n}.png,x" for n in range(8))
    (tmp_path / "a.csv").write_text(f"image,text\n{rows}\n")
    with pytest.raises(PairError, match="8 bad rows") as caught:
        PairDataset.from_csv(tmp_path / "a.csv", on_error="skip")
    assert str(caught.value).count("no such file") == 5 and "and 3 more" in str(caught.value)


def test_broken_picture_raises(tmp_path):
    """A broken picture would be replaced where nobody asked for it."""
    data = PairDataset.from_folder(write_pairs(tmp_path, 4, broken=(2,)))
    with pytest.raises(ImageError, match=r"002\.png"):
        data[2]
    assert number_of(data[1]["image"]) == 1


def test_broken_pictures_are_replaced(tmp_path, caplog):
    """Broken downloads would stop training, be retried at random, or go unnoticed."""
    folder = write_pairs(tmp_path, 20, broken=(2, 3, 11))
    data = PairDataset.from_folder(folder, on_error="skip", seed=5)
    replaced = {}
    for epoch in range(6):
        data.set_epoch(epoch)
        seen = contents(data)
        assert data.skipped == 3
        assert all(text == f"text {number}" for number, text in seen)
        assert [n for i, (n, _) in enumerate(seen) if i not in (2, 3, 11)] == [
            n for n in range(20) if n not in (2, 3, 11)
        ]
        assert {n for n, _ in seen}.isdisjoint((2, 3, 11)) and data[2]["index"] == 2
        replaced[epoch] = (seen[2][0], seen[3][0], seen[11][0])
    assert len(set(replaced.values())) > 3
    again = PairDataset.from_folder(folder, on_error="skip", seed=5)
    again.set_epoch(4)
    assert number_of(again[3]["image"]) == replaced[4][1]
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 5 and "4 broken samples were skipped in epoch 0" in warnings[0]


def test_workers_change_nothing(tmp_path):
    """With workers the epoch would stay 0, and what they skip would not be counted."""
    folder = write_pairs(tmp_path, 24, broken=(2, 3, 11))
    data = PairDataset.from_folder(folder, on_error="skip")
    loader = DataLoader(
        data, batch_size=4, num_workers=2, persistent_workers=True, collate_fn=as_list
    )
    for epoch in (0, 3):
        data.set_epoch(epoch)
        loaded = [s for batch in loader for s in batch]
        assert data.report_skipped() == 3 and data.skipped == 0
        assert {s["epoch"] for s in loaded} == {epoch}
        assert [(number_of(s["image"]), s["text"]) for s in loaded] == contents(data)
        data.report_skipped()


def test_nothing_but_broken_pictures(tmp_path):
    """A folder in which every picture is broken would loop for ever."""
    data = PairDataset.from_folder(write_pairs(tmp_path, 3, broken=(0, 1, 2)), on_error="skip")
    with pytest.raises(PairError, match=r"000\.png.*broken too"):
        data[0]
