"""Documents: what they refuse, their JSON, their page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmkern.compose.document import CompositionError, Document, Illustration, load_documents
from mmkern.compose.html import render
from tests.compose.test_steps import illustrated


@pytest.mark.parametrize(
    ("sections", "illustrations", "message"),
    [
        ((), (), "needs sections"),
        (("a", " "), (), "none of them empty"),
        (("a",), (Illustration(1),), "after section 1, there are sections 0 to 0"),
        (("a",), (Illustration(-1),), "after section -1"),
        (("a", "b"), (Illustration(1), Illustration(0)), r"in order, got \[1, 0\]"),
        (("a", "b"), (Illustration(0), Illustration(0)), "different sections"),
        (
            ("a", "b"),
            (Illustration(0, chosen="x.png"), Illustration(1, chosen="x.png")),
            "used twice",
        ),
    ],
)
def test_impossible_documents(sections: Any, illustrations: Any, message: str) -> None:
    """A page would show a picture in no place, or one picture twice."""
    with pytest.raises(CompositionError, match=message):
        Document("t", sections, illustrations)


def test_json_comes_back_and_is_checked(tmp_path: Path) -> None:
    """A document that was saved could not be edited, or a damaged one break later."""
    document = illustrated()
    text = document.to_json()
    assert Document.from_json(text) == document
    fields = json.loads(text)
    for change, message in (
        ({"format": 2}, "expected format 1, got 2"),
        ({"sections": "x"}, "sections has the wrong type"),
        ({"sections": [1]}, "a section must be text"),
        ({"more": 1}, "expected .*got .*more"),
        ({"illustrations": [{"after": 0}]}, "expected .*'after', 'candidates'"),
        ({"illustrations": ["x"]}, "must be a mapping"),
    ):
        with pytest.raises(CompositionError, match=message):
            Document.from_json(json.dumps({**fields, **change}))
    with pytest.raises(CompositionError, match="not JSON"):
        Document.from_json(text[:-9])
    lines = [json.dumps(fields), "", "{}"]
    table = tmp_path / "documents.jsonl"
    table.write_text("\n".join(lines[:2]))
    assert load_documents(table) == [document]
    table.write_text("\n".join(lines))
    with pytest.raises(CompositionError, match="line 3: document: expected format"):
        load_documents(table)


class Tags(HTMLParser):
    """Names of a page's tags, the sources of its images, its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.names.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_shows_text_and_pictures(tmp_path: Path) -> None:
    """Pictures would be lost, or a text's own tags run in the reader's browser."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / 'a "b" <i>.png')
    evil = '<script>alert("x")</script> & more'
    document = Document(
        evil, (evil, "second"), (Illustration(0, f'{evil}" onload="y', (), 'a "b" <i>.png'),)
    )
    for link in (None, "../my pictures/"):
        page = Tags(render(document, tmp_path, link=link))
        assert "script" not in page.names and page.names.count("img") == 1
        assert page.text.count(evil) == 4  # title, heading, paragraph, caption
        assert page.names.index("figure") == page.names.index("p") + 1
        start = "data:image/png;base64," if link is None else "../my%20pictures/a%20%22b%22"
        assert page.sources[0].startswith(start)
    assert Tags(render(document.delete(0), tmp_path)).names.count("img") == 0


def test_page_reads_no_other_files(tmp_path: Path) -> None:
    """A document from elsewhere would put a private file into the page."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "note.svg").write_text("<svg/>")
    for name, error, message in (
        ("../secret.png", CompositionError, "lies outside"),
        (str(tmp_path / "secret.png"), CompositionError, "lies outside"),
        ("gone.png", FileNotFoundError, "no such picture"),
        ("note.svg", CompositionError, "no format that a page can hold"),
    ):
        with pytest.raises(error, match=message):
            render(Document("t", ("a",), (Illustration(0, "c", (), name),)), folder)
