"""What ``mmkern compose`` does: composition with models from packages, folders and runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmkern.compose.document import CompositionError
from mmkern.compose.html import render
from mmkern.compose.language_model import CausalLanguageModel
from mmkern.compose.retriever import ClipRetriever, PictureIndex, describe, picture_names
from mmkern.compose.steps import compose, split_sections

Progress = Callable[[str], None]


def run(chosen: argparse.Namespace, progress: Progress) -> tuple[Path, Path]:
    """Compose as the command line says; the page and the document's JSON that were written.

    Raises:
        FileNotFoundError, CompositionError: what the user named is not there or does not fit; said
            before any model is loaded, as far as it can be.
        CheckpointError: ``--clip`` is no finished run.
    """
    out, table = Path(chosen.out), Path(chosen.out).with_suffix(".json")
    if out.suffix not in (".html", ".htm"):
        raise CompositionError(f"--out must end in .html, got {out}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder to write {out.name} to")
    if chosen.count is not None and chosen.places is not None:
        raise CompositionError("give --count or --places, not both")
    if chosen.count is not None and chosen.count < 1:
        raise CompositionError(f"--count must be at least 1, got {chosen.count}")
    picture_names(chosen.pictures)
    places = None if chosen.places is None else _places(chosen.places)
    sections = None
    if chosen.text is not None:
        sections = split_sections(Path(chosen.text).read_text(encoding="utf-8-sig"))
        if not sections:
            raise CompositionError(f"{chosen.text}: no text in it")
        if places and max(places) >= len(sections):
            raise CompositionError(
                f"--places: {max(places)} is no paragraph, {chosen.text} has 0 to "
                f"{len(sections) - 1}"
            )
    retriever = _retriever(chosen, progress)
    lm = _language_model(chosen.language_model, chosen.pictures)
    document = compose(
        lm,
        retriever,
        chosen.title,
        count=chosen.count,
        sections=sections,
        places=places,
        progress=progress,
    )
    if chosen.count is not None and len(document.illustrations) < chosen.count:
        progress(f"{len(document.illustrations)} places of the {chosen.count} that were asked for")
    link = Path(os.path.relpath(chosen.pictures, out.parent)).as_posix() if chosen.link else None
    _write(out, render(document, chosen.pictures, link=link))
    _write(table, document.to_json())
    return out, table


def _places(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise CompositionError(
            f"--places must be numbers of paragraphs from 0, as 0,2; got {text!r}"
        ) from None


def _retriever(chosen: argparse.Namespace, progress: Progress) -> ClipRetriever:
    from mmkern import data
    from mmkern.models.clip import CLIP
    from mmkern.train.run import load_run

    recipe, model = load_run(chosen.clip)
    if not isinstance(model, CLIP):
        raise CompositionError(f"--clip {chosen.clip}: a run of {type(model).__name__}, not a CLIP")
    source, encoder = recipe.data, str(chosen.clip)
    transform = data.ClipTransform(
        model.config.image_size, source.mean or data.MEAN, source.std or data.STD
    )
    index = None
    if chosen.index is not None and Path(f"{chosen.index}.json").is_file():
        index = PictureIndex.load(chosen.index)
        if list(index.names) != picture_names(chosen.pictures):
            progress(f"{chosen.index} is of other pictures than {chosen.pictures} has: made anew")
            index = None
    if index is None:
        progress("index of pictures")
        index = ClipRetriever.build(model, transform, chosen.pictures, encoder=encoder)
        if chosen.index is not None:
            index.save(chosen.index)
    return ClipRetriever(
        model,
        data.ClipTokenizer(source.vocabulary, model.config.context_length),
        index,
        template=source.templates[0],
        encoder=encoder,
    )


def _language_model(name: str, pictures: Path) -> CausalLanguageModel:
    """SmolLM2, or a causal model of transformers in a folder; pictures are shown to it in words."""

    def show(picture: str) -> str:
        return f"[picture: {describe(pictures, picture)}]"

    if name == "smollm2":
        from mmkern.data.emoji import cache_directory
        from mmkern.models.packaged import smollm2, smollm2_tokenizer

        cache = cache_directory()
        model, tokenizer = smollm2(cache), smollm2_tokenizer(cache)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not Path(name).is_dir():
            raise FileNotFoundError(
                f"--language-model {name}: smollm2, or a folder; no such folder"
            )
        model = AutoModelForCausalLM.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    user, assistant = _marks(tokenizer)
    return CausalLanguageModel(model, tokenizer, show, user=user, assistant=assistant)


def _marks(tokenizer: Any) -> tuple[str, str]:
    """What a tokenizer's chat template puts before and behind a user's turn; "" and a line feed
    without one."""
    if not getattr(tokenizer, "chat_template", None):
        return "", "\n"
    body = "\x1f"  # a character that no template has
    turns = [{"role": "user", "content": body}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, _, behind = text.partition(body)
    start = tokenizer.bos_token or ""
    return (before.removeprefix(start) if _starts(tokenizer) else before), behind


def _starts(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its own beginning before every text."""
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _write(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
