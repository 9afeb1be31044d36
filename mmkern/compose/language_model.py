"""A transformers causal language model as composition's, keeping the keys and values of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.compose.document import CompositionError, Picture, Pieces

__all__ = ["CausalLanguageModel"]

# A position of a prompt: a token, or a row of a picture's features.
_Slot = int | tuple[str, int]


class CausalLanguageModel:
    """Greedy and beam generation, and letters' logits, over texts and pictures.

    The keys and values of the last prompt are kept. Of the next one only what follows the longest
    common beginning is computed, so the prompts of one document cost what is new in them.

    Args:
        model: a causal model of transformers (our XComposer: its ``language_model``).
        tokenizer: its own.
        show: what stands for a picture, by its name: words (for a model of text alone) or features
            [n, H] of the model's width (:meth:`mmkern.models.xcomposer.XComposer.image_features`).
        user, assistant: what stands before a prompt and behind it (a chat model's marks).
        end: id that ends what is said; the tokenizer's end of sequence by default.

    Attributes:
        computed: positions that went through the model so far, prompts and what was said.

    Raises:
        ValueError: the tokenizer has no end of sequence.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        show: Callable[[str], str | Tensor],
        *,
        user: str = "",
        assistant: str = "\n",
        end: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.show = model.eval(), tokenizer, show
        self.user, self.assistant = user, assistant
        self.end = tokenizer.eos_token_id if end is None else end
        if self.end is None:
            raise ValueError("CausalLanguageModel: the tokenizer has no end of sequence; give end")
        # What every text of this tokenizer begins with (LLaMA's; SmolLM2's has nothing).
        bare, whole = (tokenizer("a", add_special_tokens=s)["input_ids"] for s in (False, True))
        self._start = [] if whole[:1] == bare[:1] else whole[:1]
        self.computed = 0
        self._slots: list[_Slot] = []
        self._cache: Any = None

    @torch.no_grad()
    def generate(
        self,
        prompt: Pieces,
        *,
        begin: str = "",
        stop: str | None = None,
        max_new_tokens: int,
        beams: int = 1,
        repetition_penalty: float = 1.0,
    ) -> str:
        """See :class:`~mmkern.compose.steps.LanguageModel`. Penalties count what was said only.

        Raises:
            CompositionError: prompt and answer do not fit the model's positions.
        """
        slots, pictures = self._read(prompt, begin)
        self._require_room(len(slots) + max_new_tokens)
        if beams > 1:
            said = self._beams(slots, pictures, max_new_tokens, beams, repetition_penalty)
            return self._text(said, stop)[0]
        said = []
        logits = self._logits(slots, pictures)
        while len(said) < max_new_tokens:
            token = int(_penalised(logits, said, repetition_penalty).argmax())
            if token == self.end:
                break
            said.append(token)
            text, stopped = self._text(said, stop)
            if stopped:
                return text
            if len(said) < max_new_tokens:
                slots.append(token)
                logits = self._logits(slots, pictures)
        return self._text(said, stop)[0]

    @torch.no_grad()
    def letter_logits(
        self, prompt: Pieces, letters: Sequence[str], *, begin: str = ""
    ) -> list[float]:
        """The logits of letters after the prompt and ``begin``, from one forward.

        After a word a letter has a space before it: "Answer: A".

        Raises:
            CompositionError: a letter that is not one token there; a prompt that does not fit the
                model's positions.
        """
        tail = self.assistant + begin
        before = self._ids(tail, marks=True)
        space = " " if tail and not tail[-1].isspace() else ""
        ids = []
        for letter in letters:
            after = self._ids(f"{tail}{space}{letter}", marks=True)
            if after[:-1] != before:
                raise CompositionError(
                    f"CausalLanguageModel: {letter!r} is not one token after {tail!r}, got "
                    f"{len(after) - len(before)}"
                )
            ids.append(after[-1])
        slots, pictures = self._read(prompt, begin)
        self._require_room(len(slots))
        logits = self._logits(slots, pictures)
        return [float(logits[i]) for i in ids]

    def _ids(self, text: str, *, marks: bool = False) -> list[int]:
        """Token ids; only in marks of the chat does "<|im_end|>" mean what it says."""
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not marks)
        ids: list[int] = found["input_ids"]
        return ids

    def _read(self, prompt: Pieces, begin: str) -> tuple[list[_Slot], dict[str, Tensor]]:
        """The positions of a prompt, and the features of the pictures in it."""
        slots: list[_Slot] = [*self._start, *self._ids(self.user, marks=True)]
        pictures: dict[str, Tensor] = {}
        text = ""
        for piece in prompt:
            shown = piece if isinstance(piece, str) else self.show(piece.name)
            if isinstance(shown, str):
                text += shown
            elif isinstance(piece, Picture):
                slots += self._ids(text)
                text = ""
                pictures[piece.name] = shown
                slots += [(piece.name, row) for row in range(len(shown))]
        slots += [*self._ids(text), *self._ids(self.assistant + begin, marks=True)]
        return slots, pictures

    def _logits(self, slots: list[_Slot], pictures: dict[str, Tensor]) -> Tensor:
        """[V] after the last position; computes what is not kept."""
        kept = _common(self._slots, slots[:-1])
        if self._cache is None or kept == 0:
            self._cache, kept = None, 0
        elif kept < len(self._slots):
            self._cache.crop(kept - len(self._slots))  # how many to remove, as a negative number
        self._slots = slots[:kept]
        new = slots[kept:]
        device = self.model.device
        output = self.model(
            inputs_embeds=self._embed(new, pictures)[None],
            attention_mask=torch.ones(1, len(slots), dtype=torch.long, device=device),
            position_ids=torch.arange(kept, len(slots), device=device)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.computed += len(new)
        self._cache, self._slots = output.past_key_values, list(slots)
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def _embed(self, slots: Sequence[_Slot], pictures: dict[str, Tensor]) -> Tensor:
        """[n, H]."""
        table = self.model.get_input_embeddings()
        ids = torch.tensor([s if isinstance(s, int) else 0 for s in slots])
        rows: Tensor = table(ids.to(self.model.device))
        for place, slot in enumerate(slots):
            if not isinstance(slot, int):
                rows[place] = pictures[slot[0]][slot[1]].to(rows)
        return rows

    def _beams(
        self,
        slots: list[_Slot],
        pictures: dict[str, Tensor],
        max_new_tokens: int,
        beams: int,
        repetition_penalty: float,
    ) -> list[int]:
        """transformers' beam search; it computes the prompt itself."""
        self.computed += len(slots)
        output: Tensor = self.model.generate(
            inputs_embeds=self._embed(slots, pictures)[None],
            attention_mask=torch.ones(1, len(slots), dtype=torch.long, device=self.model.device),
            max_new_tokens=max_new_tokens,
            num_beams=beams,
            do_sample=False,
            repetition_penalty=repetition_penalty,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        said: list[int] = output[0].tolist()
        return said[: said.index(self.end)] if self.end in said else said

    def _text(self, said: Sequence[int], stop: str | None) -> tuple[str, bool]:
        text: str = self.tokenizer.decode(said, skip_special_tokens=True)
        if stop is None or stop not in text:
            return text, False
        return text.partition(stop)[0], True

    def _require_room(self, positions: int) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and positions > most:
            raise CompositionError(
                f"CausalLanguageModel: prompt and answer take {positions} positions, the model has "
                f"{most}"
            )


def _common(a: Sequence[_Slot], b: Sequence[_Slot]) -> int:
    """Length of the longest common beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _penalised(logits: Tensor, said: Sequence[int], penalty: float) -> Tensor:
    """Logits of what was said already, divided by the penalty if positive, else times it."""
    if penalty == 1.0 or not said:
        return logits
    seen = torch.tensor(sorted(set(said)), device=logits.device)
    values = logits[seen]
    return logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))
