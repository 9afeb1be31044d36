"""`mmkern compose`: mistakes in one line, and a page from a text."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmkern import cli, composition
from mmkern.compose.document import Document
from tests.compose.scripted import Script, Toy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Toy pictures, and a text of two paragraphs beside them."""
    (tmp_path / "pictures").mkdir()
    for name in Toy().index.names:
        Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures" / name)
    (tmp_path / "text.txt").write_text("The tiger sleeps.\n\nSnow falls.\n")
    return tmp_path


def arguments(folder: Path, **changes: str | None) -> list[str]:
    given = {"title": "A day", "pictures": f"{folder}/pictures", "out": f"{folder}/a.html"}
    options = {**given, "text": f"{folder}/text.txt", **changes}
    return ["compose", *(f"--{name}={value}" for name, value in options.items() if value)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pictures": "nowhere"}, "nowhere: no such folder of pictures"),
        ({"out": "a.pdf"}, "--out must end in .html, got a.pdf"),
        ({"out": "nowhere/a.html"}, "nowhere: no such folder to write a.html to"),
        ({"text": "nowhere.txt"}, "nowhere.txt"),
        ({"count": "0"}, "--count must be at least 1, got 0"),
        ({"count": "2", "places": "0"}, "not both"),
        ({"places": "first"}, "numbers of paragraphs from 0, as 0,2; got 'first'"),
        ({"places": "0,7"}, "--places: 7 is no paragraph"),
        ({"clip": "nowhere"}, "nowhere is not a run"),
    ],
)
def test_mistakes_are_one_line(
    changes: dict[str, str],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mistyped folder would cost the loading of a language model, and end in a traceback."""
    monkeypatch.setattr(
        composition, "_language_model", lambda *_: pytest.fail("a model was loaded")
    )
    assert cli.main(arguments(folder, **changes)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("mmkern compose: ") and message in said[-1]
    assert not (folder / "a.html").exists()


def test_language_model_that_is_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped folder would be looked for on the network."""
    monkeypatch.setattr(composition, "_retriever", lambda *_: Toy())
    assert cli.main(arguments(folder, **{"language-model": "nowhere"})) == 2
    assert "--language-model nowhere" in capsys.readouterr().err


def test_page_and_document_are_written(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command would show an article that cannot be edited afterwards, or none."""
    lm = Script('a tiger"', 'snow"', logits=[[9, 0, 0, 0], [9, 0, 0, 0]])
    monkeypatch.setattr(composition, "_retriever", lambda *_: Toy())
    monkeypatch.setattr(composition, "_language_model", lambda *_: lm)
    assert cli.main([*arguments(folder, places="1,0"), "--link"]) == 0
    document = Document.from_json((folder / "a.json").read_text())
    assert [i.chosen for i in document.illustrations] == ["tiger.png", "snow.png"]
    page = (folder / "a.html").read_text()
    assert '<img src="pictures/tiger.png"' in page and "Snow falls." in page
    assert "a.html" in capsys.readouterr().out
    lm.said, lm.logits = ["0>", 'a tiger"'], [[9, 0, 0, 0]]
    assert cli.main(arguments(folder, count="2")) == 0
    assert "1 places of the 2 that were asked for" in capsys.readouterr().err
