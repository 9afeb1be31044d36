"""Zero-shot classifier, prompt tables and top-k accuracy."""

import sys

import pytest
import torch
import torch.nn.functional as F

from mmkern.eval.zero_shot import (
    TEMPLATES,
    build_classifier,
    compare_prompts,
    fill,
    open_clip_templates,
    topk_accuracy,
)


def toy_encoder(texts):
    """Embeds a text by its letters: deterministic, of different lengths, never zero."""
    rows = torch.zeros(len(texts), 32)
    for i, text in enumerate(texts):
        for place, letter in enumerate(text):
            rows[i, ord(letter) % 32] += 1 + 0.1 * place
    return rows


def test_classifier_is_the_normalised_mean_of_normalised_templates():
    """Templates with long embeddings would outvote the others in an ensemble."""
    names = ["cat", "dog", "red car"]
    templates = ("{}", "a photo of a {}.")
    got = build_classifier(toy_encoder, names, templates, batch_size=2)
    for column, name in enumerate(names):
        units = [F.normalize(toy_encoder([fill(t, name)])[0], dim=0) for t in templates]
        torch.testing.assert_close(got[:, column], F.normalize(sum(units) / 2, dim=0))
    assert got.shape == (32, 3)


def test_fill_handles_names_with_braces_and_tasks():
    """A class named '{}' or a task word would break or change the prompt."""
    assert fill("a {}.", "{}") == "a {}."
    assert fill("a {}, a type of {task}", "{task}", "pet") == "a {task}, a type of pet"
    with pytest.raises(ValueError, match="place"):
        fill("a photo", "cat")
    with pytest.raises(ValueError, match="task"):
        fill("{} {task}", "cat")


def test_templates_all_have_a_place_for_the_name():
    """A shipped prompt would raise, or give every class one embedding."""
    for templates in TEMPLATES.values():
        assert len({fill(t, "cat", "pet") for t in templates}) == len(templates)


def test_open_clip_templates_are_read_without_importing_it():
    """Reading 80 lines of text would need torchvision and timm."""
    pytest.importorskip("numpy")
    if sys.modules.get("open_clip") is None and _missing("open_clip"):
        pytest.skip("open_clip_torch is not installed")
    before = set(sys.modules)
    full, simple = open_clip_templates(), open_clip_templates("SIMPLE_IMAGENET_TEMPLATES")
    assert (len(full), len(simple)) == (80, 7)
    assert all(t.count("{}") == 1 for t in full + simple)
    assert not {m for m in set(sys.modules) - before if m.startswith("open_clip")}
    with pytest.raises(ValueError, match="NO_SUCH"):
        open_clip_templates("NO_SUCH")


def _missing(module):
    import importlib.util

    return importlib.util.find_spec(module) is None


def test_topk_matches_a_sort_and_does_not_depend_on_the_chunk():
    """Top-k accuracy would be wrong, or change with the memory available."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(57, 8, generator=generator)
    classifier = torch.randn(8, 23, generator=generator)
    labels = torch.randint(23, (57,), generator=generator)
    order = (features @ classifier).argsort(1, descending=True)
    for k in (1, 5, 23):
        want = (order[:, :k] == labels[:, None]).any(1).double().mean().item()
        for chunk in (1, 10, 4096):
            got = topk_accuracy(features, classifier, labels, (k,), chunk=chunk)[k]
            assert got == pytest.approx(want)


def test_any_of_several_right_names_counts():
    """France's flag, also named Clipperton, would be counted wrong under one of its names."""
    features, classifier = torch.eye(2), torch.eye(2, 3)
    assert topk_accuracy(features, classifier, [[0, 2], [0, 1]], (1,))[1] == 1.0
    assert topk_accuracy(features, classifier, [[2], [1]], (1,))[1] == 0.5


def test_constant_model_scores_zero_not_one():
    """An encoder that collapsed to one point would be reported as perfect."""
    features, classifier = torch.ones(4, 8), torch.ones(8, 10)
    assert topk_accuracy(features, classifier, [0, 1, 2, 3], (1, 5, 10)) == {1: 0, 5: 0, 10: 1}


def test_compare_prompts_shows_each_wording():
    """The wordings would be scored with one another's classifier."""
    names, tasks = ["ab", "cd", "ef"], ["x", "y", "z"]
    prompts = {"name": ("{}",), "wrong on purpose": ("ab {task}",), "both": ("{}", "{} {task}")}
    features = toy_encoder(names)
    with pytest.raises(ValueError, match="place"):
        compare_prompts(toy_encoder, names, features, [0, 1, 2], prompts, tasks=tasks)
    prompts.pop("wrong on purpose")
    rows = compare_prompts(toy_encoder, names, features, [0, 1, 2], prompts, tasks=tasks, ks=(1,))
    assert list(rows) == ["name", "both"]
    assert rows["name"] == {1: 1.0}
    backwards = compare_prompts(
        toy_encoder, names, features, [2, 0, 1], prompts, tasks=tasks, ks=(1,)
    )
    assert backwards["name"] == {1: 0.0}


@pytest.mark.parametrize(
    ("names", "templates", "tasks"),
    [([], ("{}",), None), (["a"], (), None), (["a"], "{}", None), (["a"], ("{}",), ["b", "c"])],
    ids=["no names", "no templates", "a bare string", "tasks of another length"],
)
def test_impossible_classifiers_are_errors(names, templates, tasks):
    """A string given for a list of templates would be read letter by letter."""
    with pytest.raises(ValueError, match="build_classifier"):
        build_classifier(toy_encoder, names, templates, tasks=tasks)
