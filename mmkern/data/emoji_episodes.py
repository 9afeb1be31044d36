"""Few-shot episodes of emoji: k pictures with their names, then a picture to be named.

The name of the last picture is among the shots, under another vendor's picture where there is one:
who looks at the shots can answer without having learned the name. Who only reads them guesses one
of k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from mmkern.data.emoji import EmojiView
from mmkern.data.epochs import EpochAware
from mmkern.data.randomness import Stream, sample_keys, uniform

__all__ = ["PROMPT", "EmojiEpisodes"]

PROMPT = " Output:"


class EmojiEpisodes(EpochAware, Dataset[dict[str, Any]]):
    """``[i]`` is an episode about picture i of the queries, as :mod:`mmkern.data.documents` takes
    it, with its ``answer``.

    Everything drawn derives from (seed, epoch, i): k among ``shots``, the shots, their order.

    Args:
        support: pictures that shots are taken from.
        queries: pictures to be named; `support` if not given.
        shots: numbers of shots.
        seed: of the draws.

    Raises:
        ValueError: no shots, a negative number, or more than there are names.
    """

    def __init__(
        self,
        support: EmojiView,
        queries: EmojiView | None = None,
        *,
        shots: Sequence[int] = (0, 2, 4),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.support, self.queries = support, support if queries is None else queries
        self.shots, self.seed = tuple(shots), seed
        self._rows: dict[int, list[int]] = {}
        for row, name in enumerate(support.name_ids.tolist()):
            self._rows.setdefault(name, []).append(row)
        self._names = sorted(self._rows)
        if not self.shots or min(self.shots) < 0 or max(self.shots) >= len(self._names):
            raise ValueError(
                f"EmojiEpisodes: shots must be 0 to {len(self._names) - 1}, got {list(shots)}"
            )

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"EmojiEpisodes: index {index} of {count} episodes")
        index %= count
        most = max(self.shots)
        key = sample_keys(self.seed, self.epoch, [index])
        draws = iter(uniform(key, 4 + 4 * most, Stream.QUESTION)[0].tolist())
        k = self.shots[int(next(draws) * len(self.shots))]
        rows = self._shots(index, k, draws)
        view = self.queries
        names = [self.support.names[int(self.support.name_ids[row])] for row in rows]
        answer = view.names[int(view.name_ids[index])]
        return {
            "images": [*(self.support.pictures[row] for row in rows), view.pictures[index]],
            "texts": ["", *(f"{PROMPT} {name}" for name in (*names, answer))],
            "answer": answer,
            "index": index,
            "epoch": self.epoch,
        }

    def _shots(self, index: int, k: int, draws: Any) -> list[int]:
        """Rows of the support: one of the query's name (if it has one), others of other names."""
        if k == 0:
            return []
        own, picture = int(self.queries.name_ids[index]), self.queries.picture_ids[index]
        place, pick = next(draws), next(draws)
        same = [r for r in self._rows.get(own, []) if self.support.picture_ids[r] != picture]
        found: list[int] = []
        taken = {own}
        while len(found) < k - bool(same):
            name = self._names[int(next(draws) * len(self._names))]
            while name in taken:  # the next one, and the first after the last
                name = self._names[(self._names.index(name) + 1) % len(self._names)]
            taken.add(name)
            rows = self._rows[name]
            found.append(rows[int(next(draws) * len(rows))])
        if same:
            found.insert(int(place * k), same[int(pick * len(same))])
        return found
