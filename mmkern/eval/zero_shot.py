"""Zero-shot classification: a classifier made of text (CLIP, arXiv 2103.00020, section 3.1).

The classifier of C names is a matrix [D, C]. Column c is the mean over prompt templates of the unit
text embedding of "template with name c", made unit again:

    w_c = normalise(mean over t of normalise(encode_text(t(c))))

The score of a picture is its unit embedding times that matrix.
"""

import ast
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkern.eval.ranking import Answers, answer_mask, answer_sets, best_rank

EncodeText = Callable[[list[str]], Tensor]

# {} is the class name; {task} the kind of thing that the class is ("pet", "food"), if the caller
# knows it. A single template is a prompt, several are an ensemble.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "name": ("{}",),
    "photo": ("a photo of a {}.",),
    "photo_task": ("a photo of a {}, a type of {task}.",),
    "emoji": ("{} emoji", "a drawing of {}", "a small picture of {}", "an icon of {}"),
    "emoji_task": ("a picture of {}, a kind of {task}",),
}


def open_clip_templates(name: str = "OPENAI_IMAGENET_TEMPLATES") -> tuple[str, ...]:
    """Prompt templates of an installed ``open_clip_torch``, read from its source, not imported.

    Importing open_clip needs torchvision and timm; its templates are f-strings of one argument in
    ``zero_shot_metadata.py`` and can be read without running it.

    Args:
        name: ``"OPENAI_IMAGENET_TEMPLATES"`` (80) or ``"SIMPLE_IMAGENET_TEMPLATES"`` (7).

    Raises:
        ModuleNotFoundError: open_clip is not installed.
        ValueError: the file has no templates of that name.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "open_clip_templates: open_clip is not installed; pip install open_clip_torch --no-deps"
        )
    source = Path(next(iter(spec.submodule_search_locations))) / "zero_shot_metadata.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return tuple(_template(item) for item in getattr(node.value, "elts", []))
    raise ValueError(f"open_clip_templates: {source.name} has no templates named {name!r}")


def _template(node: ast.expr) -> str:
    """``lambda c: f'a photo of a {c}.'`` as ``"a photo of a {}."``."""
    if not isinstance(node, ast.Lambda) or not isinstance(node.body, ast.JoinedStr):
        raise ValueError(f"open_clip_templates: expected a lambda of an f-string, got {node!r}")
    pieces = node.body.values
    return "".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in pieces)


def fill(template: str, name: str, task: str | None = None) -> str:
    """``template`` with ``{}`` replaced by the class name and ``{task}`` by the task.

    Raises:
        ValueError: no ``{}`` in the template, or it asks for a task that is not given.
    """
    if "{}" not in template:
        raise ValueError(f"template: expected a place {{}} for the class name, got {template!r}")
    if "{task}" in template:
        if task is None:
            raise ValueError(f"template: {template!r} asks for a task and none was given")
        # Replaced in two pieces, so that a name with braces stays what it is.
        head, tail = template.split("{task}", 1)
        return head.replace("{}", name) + task + tail.replace("{}", name)
    return template.replace("{}", name)


@torch.no_grad()
def build_classifier(
    encode_text: EncodeText,
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    tasks: Sequence[str] | None = None,
    batch_size: int = 1024,
) -> Tensor:
    """Zero-shot classifier from class names and prompt templates.

    Args:
        encode_text: from a list of B strings to embeddings [B, D] (need not be unit).
        names: C class names.
        templates: prompts with ``{}`` for the name and, optionally, ``{task}``.
        tasks: for each class, the word for ``{task}``.
        batch_size: prompts encoded at a time.

    Returns:
        [D, C] float32, unit columns.

    Raises:
        ValueError: no names, no templates, tasks of another length, or a template without ``{}``.
    """
    if not names or not templates:
        raise ValueError(
            f"build_classifier: expected names and templates, got {len(names)} and {len(templates)}"
        )
    if isinstance(templates, str):
        raise ValueError("build_classifier: templates is one string; pass a sequence of strings")
    if tasks is not None and len(tasks) != len(names):
        raise ValueError(
            f"build_classifier: expected {len(names)} tasks, one for each name, got {len(tasks)}"
        )
    words: Sequence[str | None] = [None] * len(names) if tasks is None else tasks
    total: Tensor | None = None
    for template in templates:
        prompts = [fill(template, n, t) for n, t in zip(names, words, strict=True)]
        parts = [
            F.normalize(encode_text(prompts[i : i + batch_size]).float(), dim=-1)
            for i in range(0, len(prompts), batch_size)
        ]
        unit = torch.cat(parts)
        total = unit if total is None else total + unit
    if total is None:
        raise ValueError("build_classifier: no template was encoded")
    return F.normalize(total, dim=-1).T.contiguous()


@torch.no_grad()
def topk_accuracy(
    features: Tensor,
    classifier: Tensor,
    answers: Answers,
    ks: Sequence[int] = (1, 5),
    *,
    chunk: int = 4096,
) -> dict[int, float]:
    """Share of pictures with a right name among the k best.

    A name with the same score as the right one stands before it (see :func:`best_rank`): ties cost.
    When several names are right (one picture under several names), any of them will do.

    Args:
        features: [N, D] picture embeddings, unit or not (their length does not change the order).
        classifier: [D, C].
        answers: right classes of each picture: [N] integers, a [N, C] bool mask, or a sequence of
            integers or of sequences of integers.
        ks: the k of "top-k".
        chunk: pictures scored at a time; memory is chunk times C.

    Returns:
        ``{k: accuracy in [0, 1]}``.
    """
    ranks = name_ranks(features, classifier, answers, chunk=chunk)
    return {k: (ranks < k).double().mean().item() for k in ks}


@torch.no_grad()
def name_ranks(
    features: Tensor, classifier: Tensor, answers: Answers, *, chunk: int = 4096
) -> Tensor:
    """Rank of the best right name of each picture, 0 is first; arguments as ``topk_accuracy``.

    Returns:
        [N] int64.
    """
    if features.ndim != 2 or classifier.ndim != 2 or features.shape[1] != classifier.shape[0]:
        raise ValueError(
            f"topk_accuracy: expected features [N, D] and classifier [D, C], "
            f"got {tuple(features.shape)} and {tuple(classifier.shape)}"
        )
    count = classifier.shape[1]
    sets = answer_sets(answers, count)
    if len(sets) != len(features) or not sets:
        raise ValueError(
            f"topk_accuracy: expected one answer for each of {len(features)} pictures, "
            f"at least one picture, got {len(sets)} answers"
        )
    ranks = []
    for start in range(0, len(features), chunk):
        scores = features[start : start + chunk].float() @ classifier.float()
        mask = answer_mask(sets[start : start + chunk], count, scores.device)
        ranks.append(best_rank(scores, mask))
    return torch.cat(ranks)


def compare_prompts(
    encode_text: EncodeText,
    names: Sequence[str],
    features: Tensor,
    answers: Answers,
    prompts: Mapping[str, Sequence[str]],
    *,
    tasks: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5),
) -> dict[str, dict[int, float]]:
    """One row of accuracies for each way of wording the prompt, on the same pictures.

    Answers "does wording or ensembling help this model?": give it the bare name, one template, an
    ensemble, and a wording that names the task, and read the rows side by side.

    Args:
        prompts: label of the row -> its templates, for instance
            ``{"name alone": ("{}",), "ensemble": TEMPLATES["emoji"]}``.
        tasks: for each class, the word for ``{task}``.

    Returns:
        ``{label: {k: accuracy}}`` in the order given.
    """
    rows = {}
    for label, templates in prompts.items():
        classifier = build_classifier(encode_text, names, templates, tasks=tasks)
        rows[label] = topk_accuracy(features, classifier, answers, ks)
    return rows
