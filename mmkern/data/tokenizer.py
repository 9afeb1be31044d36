"""CLIP's byte-pair tokenizer (Radford et al., arXiv 2103.00020, section 2.4).

Ids agree with open_clip's tokenizer, including what a caption's literal ``<start_of_text>``, html
entities, mojibake and curly quotes become. The vocabulary is OpenAI's ``bpe_simple_vocab_16e6``, a
list of merges that ships inside open_clip_torch; that package is found, not imported.
"""

import gzip
import html
import importlib.util
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

__all__ = ["ClipTokenizer", "clean", "find_vocabulary"]

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
WORD_END = "</w>"
SPECIAL_TOKENS = ("<start_of_text>", "<end_of_text>")
# OpenAI reads this many merges of a file that holds more: 49,152 ids less 256 bytes in two forms
# (inside and at the end of a word) less the two special tokens.
MERGES = 49_152 - 256 - 2
_WORDS = regex.compile(
    "|".join(SPECIAL_TOKENS) + r"|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_CACHE_SIZE = 1 << 16


def find_vocabulary() -> Path:
    """The vocabulary file of the installed open_clip_torch, without importing the package.

    Raises FileNotFoundError that says how to get it.
    """
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / VOCABULARY
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"ClipTokenizer: {VOCABULARY} not found. `pip install --no-deps open_clip_torch` brings it "
        "(nothing of the package is imported), or give the path of the file as `vocab`"
    )


def clean(text: str) -> str:
    """CLIP's cleaning: ftfy, html entities twice, single spaces, lower case."""
    # Printable ASCII without entities is what ftfy and html leave alone; skipping them there makes
    # the encoding of plain captions several times faster.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _byte_symbols() -> list[str]:
    """One visible character for each byte value, as in GPT-2's vocabulary.

    Printable Latin-1 characters stand for themselves, the others for the code points from 256 on.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(value if value in visible else next(hidden)) for value in range(256)]


class ClipTokenizer:
    """Texts to int64 [batch, context_length]: start, tokens, end, then zeros.

    Args:
        vocab: path of the merges, plain or gzipped; None takes the file of an installed
            open_clip_torch (:func:`find_vocabulary`).
        context_length: columns of the result, at least 2.

    Raises:
        FileNotFoundError: no vocabulary.
        ValueError: a malformed vocabulary file, or a context too short.
    """

    def __init__(self, vocab: str | Path | None = None, context_length: int = 77) -> None:
        if context_length < 2:
            raise ValueError(
                f"ClipTokenizer: context_length must be at least 2, got {context_length}"
            )
        self.context_length = context_length
        self._bytes = _byte_symbols()
        self._values = {symbol: value for value, symbol in enumerate(self._bytes)}
        merges = _read_merges(find_vocabulary() if vocab is None else Path(vocab))
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        # Ids of single bytes follow the order of their symbols, first those that stand for
        # themselves.
        symbols = sorted(self._bytes)
        tokens = [
            *symbols,
            *(s + WORD_END for s in symbols),
            *map("".join, merges),
            *SPECIAL_TOKENS,
        ]
        self._ids = {token: index for index, token in enumerate(tokens)}
        if len(self._ids) != len(tokens):
            raise ValueError(f"ClipTokenizer: {vocab} gives the same token twice")
        self._tokens = tokens
        self.vocab_size = len(tokens)
        self.sot_token_id, self.eot_token_id = (self._ids[token] for token in SPECIAL_TOKENS)
        self._cache: dict[str, list[int]] = {token: [self._ids[token]] for token in SPECIAL_TOKENS}

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, cleaned, without start and end."""
        return [index for word in _WORDS.findall(clean(text)) for index in self._word_ids(word)]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of one row of ids: up to the first end token, without the start token."""
        data = bytearray()
        for index in ids.tolist() if isinstance(ids, Tensor) else ids:
            if index == self.eot_token_id:
                break
            if index != self.sot_token_id:
                token = self._tokens[index]
                data.extend(self._values[symbol] for symbol in token.removesuffix(WORD_END))
                data.extend(b" " * token.endswith(WORD_END))
        return data.decode("utf-8", errors="replace").strip()

    def __call__(self, texts: str | Iterable[str], truncate: bool = True) -> Tensor:
        """int64 [batch, context_length]; one string is a batch of one.

        A text that is too long loses its tail and keeps the end token in the last column, or, with
        ``truncate=False``, raises ValueError that names its index and length. Anything that is not
        a string raises TypeError.
        """
        rows = []
        for index, text in enumerate([texts] if isinstance(texts, str) else texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"ClipTokenizer: texts[{index}] must be a str, got {type(text).__name__}"
                )
            ids = [self.sot_token_id, *self.encode(text), self.eot_token_id]
            if len(ids) > self.context_length:
                if not truncate:
                    raise ValueError(
                        f"ClipTokenizer: texts[{index}] has {len(ids)} tokens with start and end, "
                        f"the context length is {self.context_length}"
                    )
                ids = [*ids[: self.context_length - 1], self.eot_token_id]
            rows.append(ids + [0] * (self.context_length - len(ids)))
        return torch.tensor(rows, dtype=torch.long).view(-1, self.context_length)

    def _word_ids(self, word: str) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            symbols = [self._bytes[value] for value in word.encode()]
            symbols[-1] += WORD_END
            ids = [self._ids[token] for token in self._merge(symbols)]
            # Bounded: the words that come first are the frequent ones.
            if len(self._cache) < _CACHE_SIZE:
                self._cache[word] = ids
        return ids

    def _merge(self, symbols: list[str]) -> list[str]:
        """Join neighbours, those of lowest rank first and from the left, until none are a merge.

        A heap keeps a word of n symbols at O(n log n): captions hold base64 and missing spaces.
        Equal to joining all occurrences of the best pair at once, since every token comes from one
        merge, so that what a join makes possible always ranks behind it.
        """
        count, rank_of = len(symbols), self._ranks.get
        # An empty symbol bounds both ends (index -1 is the same): no merge holds one.
        symbols.append("")
        before, after = list(range(-1, count)), [*range(1, count + 1), count]
        ranked = ((rank_of(pair), left) for left, pair in enumerate(pairwise(symbols)))
        heap = [(rank, left) for rank, left in ranked if rank is not None]
        heapify(heap)
        while heap:
            rank, left = heappop(heap)
            right = after[left]
            if rank_of((symbols[left], symbols[right])) != rank:
                continue  # one of the two has been joined to another
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            before[after[right]] = left
            for start in (before[left], left):
                joined = rank_of((symbols[start], symbols[after[start]]))
                if joined is not None:
                    heappush(heap, (joined, start))
        return [symbol for symbol in symbols if symbol]


def _read_merges(path: Path) -> list[tuple[str, str]]:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    # The first line is a header, and there may be an empty last one.
    lines = data.decode("utf-8").split("\n")[1 : MERGES + 1]
    if lines and not lines[-1]:
        lines.pop()
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=2):
        match line.split():
            case [left, right]:
                merges.append((left, right))
            case _:
                raise ValueError(
                    f"ClipTokenizer: {path} line {number} is not a pair of symbols: {line[:40]!r}"
                )
    return merges
