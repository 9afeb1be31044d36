"""A document as a page: one HTML file, its pictures inside it or linked."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from urllib.parse import quote

from mmkern.compose.document import CompositionError, Document

__all__ = ["render"]

# What browsers show; other formats are not inlined.
_TYPES = {
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}
_STYLE = (
    "body{max-width:42em;margin:2em auto;padding:0 1em;font:1.1em/1.5 Georgia,serif}"
    "figure{margin:1.5em 0;text-align:center}img{max-width:100%;min-width:8em}"
    "figcaption{color:#555;font-style:italic}"
)


def render(document: Document, pictures: str | Path, *, link: str | None = None) -> str:
    """The page's HTML.

    Everything that comes from the document is escaped. Places without a picture are left out.

    Args:
        document: the article.
        pictures: folder that its pictures' names are in.
        link: where the page finds that folder, a URL or a path from the page, and so links to the
            pictures' files; None puts the pictures into the page.

    Raises:
        FileNotFoundError: a picture is not there.
        CompositionError: a picture outside the folder, or one whose format browsers do not show.
    """
    title = escape(document.title)
    chosen = {i.after: i for i in document.illustrations if i.chosen is not None}
    lines = [
        "<!DOCTYPE html>",
        '<html><head><meta charset="utf-8">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
    ]
    for number, section in enumerate(document.sections):
        lines.append(f"<p>{escape(section)}</p>")
        if (illustration := chosen.get(number)) is not None:
            words = escape(illustration.caption)
            source = _source(Path(pictures), illustration.chosen or "", link)
            lines.append(
                f'<figure><img src="{source}" alt="{words}">'
                f"<figcaption>{words}</figcaption></figure>"
            )
    return "\n".join([*lines, "</body></html>", ""])


def _source(folder: Path, name: str, link: str | None) -> str:
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):  # a document is data: it must not read other files
        raise CompositionError(f"html: picture {name!r} lies outside {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"{folder / name}: no such picture")
    if link is not None:
        return f"{quote(link.rstrip('/'), safe=':/')}/{quote(name)}"
    kind = _TYPES.get(path.suffix.lower())
    if kind is None:
        raise CompositionError(f"html: {name!r} is of no format that a page can hold")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
