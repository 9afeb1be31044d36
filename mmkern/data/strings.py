"""Many texts in a data set."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

__all__ = ["Strings"]


class Strings:
    """Strings in two arrays.

    A list of a million Python strings is copied into every worker page by page, because reading
    one writes its reference count.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index], self._ends[index + 1]
        return self._bytes[start:end].tobytes().decode("utf-8", "surrogateescape")
