"""What the emoji run is measured by: vendors that were never trained on.

Every figure stands beside its dull baselines: chance, and the name of the nearest training picture
in pixel space. Names whose picture is the same at every vendor are no part of a test, and where one
picture has several names any of them is right (:mod:`mmkern.data.emoji`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.data.emoji import EmojiView, pixel_neighbour_top1
from mmkern.data.images import PixelTransform
from mmkern.data.randomness import Stream, sample_keys, uniform
from mmkern.eval.linear_probe import linear_probe
from mmkern.eval.retrieval import recall_at_k
from mmkern.eval.zero_shot import (
    TEMPLATES,
    compare_prompts,
    topk_accuracy,
)

VENDOR_TITLES = {
    "Appl": "Apple",
    "FB": "Facebook",
    "Goog": "Google",
    "Joy": "JoyPixels",
    "Sams": "Samsung",
    "Twtr": "Twitter",
    "Wind": "Windows",
}


def check_vendors(vendors: Sequence[str], trained: Sequence[str]) -> None:
    """``evaluation.options.vendors`` must be vendors, and none that was trained on.

    Raises:
        ValueError: they are not.
    """
    if not vendors or set(vendors) - set(VENDOR_TITLES):
        raise ValueError(
            f"evaluation.options.vendors: expected some of {list(VENDOR_TITLES)}, got {vendors}"
        )
    if seen := set(vendors) & set(trained):
        raise ValueError(f"evaluation.options.vendors: the run was trained on {sorted(seen)}")


# What an emoji of each category is "a kind of"; for prompts that name the task.
KINDS = {
    "Activities": "activity",
    "Animals & Nature": "living thing",
    "Component": "part",
    "Flags": "flag",
    "Food & Drink": "food",
    "Objects": "object",
    "People & Body": "person",
    "Smileys & Emotion": "face",
    "Symbols": "symbol",
    "Travel & Places": "place",
}


class EmojiEncoder:
    """A CLIP with its tokenizer and transform: pictures and texts to embeddings, in eval mode.

    The model computes where it lies; embeddings are returned on the CPU.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        transform: PixelTransform | None = None,
        *,
        batch_size: int = 256,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.transform = transform or PixelTransform()
        self.batch_size = batch_size
        self._texts: dict[str, Tensor] = {}
        # Each measurement asks for the same features; the view is kept so that its id stays its.
        self._features: dict[tuple[int, bool], tuple[EmojiView, Tensor]] = {}

    def pixels(self, view: EmojiView) -> Tensor:
        """[n, 3, size, size], normalised, not augmented."""
        return self.transform.batch(view.pictures, sample_keys(0, 0, range(len(view))))

    @torch.no_grad()
    def images(self, view: EmojiView, *, project: bool = True) -> Tensor:
        """[n, D] in the shared space, or what the tower has before the projection."""
        key = (id(view), project)
        if key not in self._features:
            parts = self.pixels(view).split(self.batch_size)
            device = self.model.device
            found = [self.model.visual(part.to(device), project=project) for part in parts]
            self._features[key] = (view, torch.cat(found).cpu())
        return self._features[key][1]

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """[n, D]. Each vendor is asked about the same prompts, so what was encoded is kept."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            tokens = self.tokenizer(new).to(self.model.device)
            self._texts.update(zip(new, self.model.encode_text(tokens).cpu(), strict=True))
        return torch.stack([self._texts[text] for text in texts])


def chance(answers: Tensor, k: int) -> float:
    """Expected top-k accuracy of names drawn at random: answers [N, C] bool.

    With a right names among C a picture is hit with probability ``1 - C(C-a, k) / C(C, k)``.
    """
    count = answers.shape[1]
    k = min(k, count)
    rights = answers.sum(1).tolist()
    miss = [math.comb(count - a, k) / math.comb(count, k) for a in rights]
    return 1 - sum(miss) / len(miss)


def tasks(view: EmojiView) -> list[str]:
    """For each name, the word for what kind of thing it is."""
    titles = [*(KINDS.get(c, "symbol") for c in view.categories), "symbol"]
    return [titles[i] for i in view.category_ids.tolist()]


def vendor_accuracy(
    encoder: EmojiEncoder, train: EmojiView, test: EmojiView, classifier: Tensor
) -> dict[str, float]:
    """Zero-shot accuracy among all names, beside chance and pixel lookup."""
    answers = test.answer_matrix()
    found = topk_accuracy(encoder.images(test), classifier, answers, (1, 5))
    return {
        "top1": found[1],
        "top5": found[5],
        "chance_top1": chance(answers, 1),
        "chance_top5": chance(answers, 5),
        "pixel_top1": pixel_neighbour_top1(train, test),
        "pictures": len(test),
    }


def prompt_rows(
    encoder: EmojiEncoder, test: EmojiView, templates: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Accuracy by prompt wording.

    The bare name, the first of ``templates``, all of them, other wordings than those, and wordings
    that name what kind of thing each candidate is.
    """
    prompts = {
        "name alone": TEMPLATES["name"],
        "one template": tuple(templates[:1]),
        "ensemble": tuple(templates),
        "ensemble of other wordings": TEMPLATES["emoji"],
        "template with task": TEMPLATES["emoji_task"],
        "ensemble with task": (*templates, *TEMPLATES["emoji_task"]),
    }
    rows = compare_prompts(
        encoder.texts,
        test.names,
        encoder.images(test),
        test.answer_matrix(),
        prompts,
        tasks=tasks(test),
    )
    return {label: {f"top{k}": share for k, share in row.items()} for label, row in rows.items()}


def retrieval(encoder: EmojiEncoder, test: EmojiView) -> dict[str, float]:
    """R@1/5/10 both ways between a vendor's pictures and the names that it draws."""
    groups = test.group_ids()
    names, first = torch.unique(test.name_ids, return_inverse=True)
    text_groups = torch.empty(len(names), dtype=torch.long)
    text_groups[first] = groups
    text = encoder.texts([test.names[i] for i in names.tolist()])
    return recall_at_k(encoder.images(test), text, image_ids=groups, text_ids=text_groups)


def category_probe(
    encoder: EmojiEncoder, train: EmojiView, tests: dict[str, EmojiView], *, max_iter: int = 50
) -> dict[str, Any]:
    """Linear probe of the nine categories on the tower's features before the projection.

    λ is chosen on pictures of names that the other part does not have, since one name's pictures
    resemble each other across vendors. Fewer iterations than the paper's 1,000 and steps of half a
    decade: the paper's search would take longer than all other measurements together.
    """
    features, labels = encoder.images(train, project=False), train.category_ids[train.name_ids]
    draw = uniform(sample_keys(0, 0, train.name_ids.numpy()), 1, Stream.RESERVE)[:, 0]
    held = torch.from_numpy(draw < 0.15) & (labels >= 0)
    fitted = ~held & (labels >= 0)
    probe = linear_probe(
        (features[fitted], labels[fitted]),
        (features[held], labels[held]),
        finest_step=0.5,
        max_iter=max_iter,
    )
    result: dict[str, Any] = {
        "strength": probe.strength,
        "curve": probe.curve,
        "fits_at_iteration_limit": probe.unconverged,
    }
    for prefix, test in tests.items():
        truth = test.category_ids[test.name_ids]
        known = truth >= 0
        result[f"{prefix}accuracy"] = probe.score(
            encoder.images(test, project=False)[known], truth[known]
        )
        result[f"{prefix}majority"] = truth[known].bincount().max().item() / int(known.sum())
    return result


def best_names(
    encoder: EmojiEncoder, test: EmojiView, classifier: Tensor, count: int, seed: int = 0
) -> tuple[Tensor, list[list[str]], list[list[str]]]:
    """A random sample of pictures with the five best names and the right ones.

    Returns:
        pictures [count, size, size, 3] uint8, five names each (best first), right names each (its
        own first).
    """
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:count]
    scores = encoder.images(test)[rows] @ classifier
    best = [[test.names[i] for i in row] for row in scores.topk(5, dim=1).indices.tolist()]
    answers = test.answer_matrix()[rows]
    right = []
    for own, allowed in zip(test.name_ids[rows].tolist(), answers, strict=True):
        others = [i for i in allowed.nonzero().flatten().tolist() if i != own]
        right.append([test.names[i] for i in [own, *others]])
    return test.pictures[rows], best, right
