"""CLIP's tokenizer, id for id against open_clip's own file."""

import importlib.util
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ftfy")
pytest.importorskip("regex")
if importlib.util.find_spec("open_clip") is None:
    pytest.skip("open_clip_torch brings the vocabulary", allow_module_level=True)

from mmkern.data import tokenizer as module
from mmkern.data.tokenizer import ClipTokenizer, clean, find_vocabulary

HARD = [
    "",
    " ",
    "a photo of a dog",
    "A Photo\tof\n\na  DOG.",
    "it's the dog's bone, they're mine; I'd we'll you've I'm can't",
    "IT'S THE DOG'S",
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe",
    "cafe\u0301 combining A\u030a",
    "&lt;b&gt; &amp;amp; &amp;lt; &quot;x&quot; &#39;s &hearts; &notanentity; AT&T a&b",
    "<b> &lt; &amp;lt; &amp;amp;lt;",
    "bell\x07 null\x00 escape\x1b[31m tab\t",
    "\u201ccurly\u201d \u2018quotes\u2019 it\u2019s \u2013 \u2014 \u2026",
    "\u00e2\u20ac\u0153mojibake\u00e2\u20ac\u009d schÃ¶n cafÃ©",
    "\ufb01ne o\ufb03ce \uff26\uff35\uff2c\uff2c \uff11\uff12",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "<start_of_text> a <end_of_text> b",
    "<START_OF_TEXT><|startoftext|><|endoftext|>",
    "<start_of_text",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \u4e2d\u6587 \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\x00 a\x07b\x1b[31mred\x7f \x85 \u2028 \u200b \ufeff \u00ad",
    "12345 3.14 1\u00bd \u2167 \u00b2",
    "!!! ??? ,.;:-_ #hash @at 100% $5 C++ </w> a</w>b",
    "\u0130stanbul \u017f's '\u017f \u212a",
    "\U00010348 \ud7ff \uffff",
    "word" * 60,
    "\u3042" * 200,
    " ".join(["dog"] * 75),
    " ".join(["dog"] * 76),
    " ".join(["dog"] * 500),
    "lorem, " * 40,
    "a\u0300\u0301\u0302\u0303" * 9,
]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """open_clip's SimpleTokenizer, its one file loaded by path: the package needs torchvision."""
    path = find_vocabulary().with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer_oracle", path)
    assert spec is not None and spec.loader is not None
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    return oracle.SimpleTokenizer(str(find_vocabulary()))


@pytest.fixture(scope="module")
def ours() -> ClipTokenizer:
    return ClipTokenizer()


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_ids_are_open_clips(ours: ClipTokenizer, theirs: Any, text: str) -> None:
    """A caption would get other ids than the published weights were trained with."""
    assert ours.encode(text) == theirs.encode(text)
    assert torch.equal(ours(text), theirs(text))


def test_random_texts_are_open_clips(ours: ClipTokenizer, theirs: Any) -> None:
    """A mixture of scripts, controls and entities outside the list would get other ids."""
    rng = random.Random(0)
    pieces = [
        *"abcXYZ019 '\"&;<>!\t\n\x00\u00e9\u0301\u2019\u00c3\u20ac\u65e5\U0001f600",
        "&amp;",
        "'s",
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(1, 40))) for _ in range(1500)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), ascii(text)


def test_long_words_are_open_clips(ours: ClipTokenizer, theirs: Any) -> None:
    """Text without spaces (base64, Thai, Chinese) would be merged in another order."""
    rng = random.Random(1)
    for letters in (
        "ab",
        "etaoinshr",
        "abcdefghijklmnopqrstuvwxyz",
        "\u65e5\u672c\u8a9e\u0e01\u0e32\u0e23",
    ):
        for length in (*range(2, 40), 250, 800):
            text = "".join(rng.choices(letters, k=length))
            assert ours.encode(text) == theirs.encode(text), ascii(text)


def test_every_ascii_pair_is_cleaned_as_open_clip_does(theirs: Any) -> None:
    """The short cut that skips ftfy for plain ASCII would change a text that ftfy changes."""
    characters = [chr(code) for code in range(128)]
    printable = "".join(c for c in characters if c.isprintable() and c != "&")
    for first in characters:
        text = first.join(printable) + first
        assert clean(text) == theirs.clean_fn(text), ascii(first)


def test_every_code_point_is_open_clips(ours: ClipTokenizer, theirs: Any) -> None:
    """Letters of a rarer script would be split otherwise than in training."""
    for start in range(0x80, 0x3000, 64):
        text = "x".join(map(chr, range(start, start + 64)))
        assert ours.encode(text) == theirs.encode(text), hex(start)


def test_shape_padding_and_special_ids(ours: ClipTokenizer) -> None:
    """Padding or special ids would differ from OpenAI's, and the pooled position with them."""
    ids = ours(["a dog", ""])
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    assert (ours.vocab_size, ours.sot_token_id, ours.eot_token_id) == (49408, 49406, 49407)
    assert ids[1].tolist() == [49406, 49407] + [0] * 75
    assert ids[0].tolist()[:5] == [49406, 320, 1929, 49407, 0]
    assert ours([]).shape == (0, 77)


def test_truncation_keeps_the_end_token() -> None:
    """A long caption would lose its end token, and the model would pool a random word."""
    short = ClipTokenizer(context_length=6)
    assert short(" ".join(["dog"] * 4))[0].tolist() == [49406, *[1929] * 4, 49407]
    assert short(" ".join(["dog"] * 500))[0].tolist() == [49406, *[1929] * 4, 49407]


def test_refusing_to_truncate_names_the_text(ours: ClipTokenizer) -> None:
    """A data set's one overlong caption could not be found from the message."""
    with pytest.raises(ValueError, match=r"texts\[1\] has 502 tokens.*77"):
        ours(["fine", " ".join(["dog"] * 500)], truncate=False)
    assert ours([" ".join(["dog"] * 75)], truncate=False)[0, -1] == ours.eot_token_id


def test_not_a_string_raises(ours: ClipTokenizer) -> None:
    """A missing caption (None, NaN) would be encoded as some word or fail without its index."""
    with pytest.raises(TypeError, match=r"texts\[1\].*NoneType"):
        ours(["a", None])  # type: ignore[list-item]


def test_decode_gives_the_cleaned_text_back(ours: ClipTokenizer) -> None:
    """Looking at what a model was fed would show another text."""
    text = "a photo of \u65e5\u672c caf\u00e9 \U0001f600 </w> x"
    assert ours.decode(ours(text)[0]) == "a photo of \u65e5\u672c caf\u00e9 \U0001f600 </ w > x"
    assert ours.decode(ours.encode("a dog")) == "a dog"


def test_cache_is_bounded_and_does_not_change_ids(
    monkeypatch: pytest.MonkeyPatch, theirs: Any
) -> None:
    """Hundreds of millions of captions would fill the memory of every data worker."""
    monkeypatch.setattr(module, "_CACHE_SIZE", 4)
    small = ClipTokenizer()
    for _ in range(2):
        assert small.encode("one two three four five") == theirs.encode("one two three four five")
    assert len(small._cache) == 4


def test_pickles_for_data_workers(ours: ClipTokenizer) -> None:
    """Data workers started by spawn could not receive the tokenizer."""
    copy = pickle.loads(pickle.dumps(ours))
    assert torch.equal(copy("a dog's life"), ours("a dog's life"))


def test_own_vocabulary_plain_or_gzipped(tmp_path: Path) -> None:
    """A vocabulary given by path would be ignored, or only read when compressed."""
    plain = tmp_path / "merges.txt"
    plain.write_text("#version\na b\nab c</w>\n")
    own = ClipTokenizer(plain, context_length=4)
    assert own.vocab_size == 512 + 2 + 2
    assert own("abc")[0].tolist() == [own.sot_token_id, 513, own.eot_token_id, 0]


@pytest.mark.parametrize(
    ("lines", "message"), [("a b c\n", "line 2"), ("a b\na b\n", "same token twice")]
)
def test_broken_vocabulary_raises(tmp_path: Path, lines: str, message: str) -> None:
    """A damaged or wrong file would give silently wrong ids."""
    path = tmp_path / "merges.txt"
    path.write_text("#version\n" + lines)
    with pytest.raises(ValueError, match=message):
        ClipTokenizer(path)


def test_without_open_clip_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without the vocabulary would see an import error instead of the command to run."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps open_clip_torch"):
        ClipTokenizer()
    with pytest.raises(FileNotFoundError):
        ClipTokenizer("/no/such/file")


def test_open_clip_is_not_imported(ours: ClipTokenizer) -> None:
    """Building a tokenizer would need torchvision and timm, and seconds of imports."""
    assert "open_clip" not in sys.modules


def test_too_short_a_context_raises() -> None:
    """A context without room for start and end would give rows of wrong length."""
    with pytest.raises(ValueError, match="context_length"):
        ClipTokenizer(context_length=1)
