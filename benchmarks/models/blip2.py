"""Stage 1 of BLIP-2, two passes with shared keys and values, against separate passes.

The peers compute the same losses with scaled_dot_product_attention, dense masks and dense logits:
"separate" passes contrast (queries, text), matching and generation apart; "cached" takes generation
from the queries' cached keys and values, as LAVIS does.

Sizes: B pairs; L image tokens of width 768; a Q-Former of BERT-base's width with `layers` layers
and 32 queries; a frozen encoder with `vision` layers of width 768 before it (0: its tokens are
given, so only the Q-Former's part is timed); T text slots. Distributions: texts fill all slots
("full") or 6 to 20 of them ("captions"; the peers pad to T, as LAVIS does); "dropout" trains with
0.1, as published. Without dropout and with two pairs, where each has one possible negative, the
result is determined and held to fp64.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import OURS, Case, Plan, Suite, Variant
from benchmarks.harness import Bench
from mmkern.models.blip2 import Blip2Config, Blip2ForPretraining, ClipVisionConfig
from tests.models.plain_blip2 import Sizes, stage1

WIDTH, INNER, HEADS, QUERIES, VOCABULARY, PATCH = 768, 3072, 12, 32, 30523, 14


def cases(plan: Plan) -> Iterator[Case]:
    small = {"B": 2, "L": 50, "layers": 2, "vision": 0, "T": 32}
    large = {"B": 16, "L": 257, "layers": 2, "vision": 0, "T": 32}
    for dtype in ("float32", "bfloat16"):
        yield Case(small, dtype, "fwd+bwd", "captions", plan.device)
        if not plan.short:
            yield Case(large, dtype, "fwd+bwd", "captions, dropout", plan.device)
            yield Case(large, dtype, "fwd+bwd", "full, dropout", plan.device)
    if not plan.short:
        whole = {**large, "vision": 12}
        yield Case(whole, "bfloat16", "fwd+bwd", "captions, dropout", plan.device)


def small(case: Case) -> Case:
    return replace(case, shape={**case.shape, "B": 2, "layers": 1, "vision": 0})


def dropout(case: Case) -> float:
    return 0.1 if "dropout" in case.distribution else 0.0


@functools.lru_cache(maxsize=2)
def _model(tokens: int, layers: int, vision: int, probability: float, device: str) -> Any:
    config = Blip2Config(
        vision_config=ClipVisionConfig(
            hidden_size=WIDTH,
            image_size=PATCH * round((tokens - 1) ** 0.5),
            patch_size=PATCH,
            num_hidden_layers=max(vision, 1),
            num_attention_heads=HEADS,
        ),
        qformer_config={
            "num_hidden_layers": layers,
            "vocab_size": VOCABULARY,
            "hidden_dropout_prob": probability,
            "attention_probs_dropout_prob": probability,
        },
    )
    torch.manual_seed(0)
    return Blip2ForPretraining(config).to(device).train()


def model(case: Case) -> Blip2ForPretraining:
    sizes = (case["L"], case["layers"], case["vision"])
    built: Blip2ForPretraining = _model(*sizes, dropout(case), case.device)
    return built


def trained(case: Case) -> dict[str, Tensor]:
    return {name: p for name, p in model(case).named_parameters() if p.requires_grad}


def lengths(case: Case) -> Tensor:
    if case.distribution.startswith("full"):
        return torch.full((case["B"],), case["T"])
    return torch.randint(6, 21, (case["B"],), generator=torch.Generator().manual_seed(2))


def inputs(case: Case) -> tuple[Any, ...]:
    """The case, image tokens or pixels, ids, lengths, and the trained parameters."""
    generator = torch.Generator().manual_seed(1)
    side = PATCH * round((case["L"] - 1) ** 0.5)
    shape = (3, side, side) if case["vision"] else (case["L"], WIDTH)
    image = torch.randn(case["B"], *shape, generator=generator)
    ids = torch.randint(1, VOCABULARY - 1, (case["B"], case["T"]), generator=generator)
    filled = torch.arange(case["T"]) < lengths(case)[:, None]
    fixed = [x.to(case.device) for x in (image, ids * filled, lengths(case))]
    return (case, *fixed, *trained(case).values())


def ours(case: Case, image: Tensor, ids: Tensor, lengths: Tensor, *parameters: Tensor) -> Tensor:
    """The model's own parameters are the inputs, so they need not be put in."""
    part = model(case)
    half = torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bfloat16")
    with half:
        raw = part.image_tokens(image) if case["vision"] else image
        columns = int(lengths.max()) if case.device == "cpu" else ids.shape[1]  # as `forward` does
        out = part.losses(raw, ids[:, :columns], lengths, negatives_seed=1)
    assert out.loss is not None
    return out.loss


def plain(
    case: Case,
    image: Tensor,
    ids: Tensor,
    lengths: Tensor,
    *parameters: Tensor,
    cached: bool = False,
) -> Tensor:
    """The separate passes on the parameters given."""
    named = dict(zip(trained(case), parameters, strict=True))
    part = model(case)
    norm: Any = part.vision_model.post_layernorm
    weight, bias = (named[f"vision_model.post_layernorm.{kind}"] for kind in ("weight", "bias"))
    exact = weight.dtype == torch.float64
    half = case.dtype == "bfloat16" and not exact
    with torch.autocast(case.device, torch.bfloat16, enabled=half), torch.device(case.device):
        raw = part.image_tokens(image) if case["vision"] else image
        with torch.autocast(case.device, enabled=False):
            tokens = F.layer_norm(raw.to(weight.dtype), (WIDTH,), weight, bias, norm.eps)
        sizes = Sizes(case["layers"], HEADS, dropout=dropout(case))
        dec = VOCABULARY - 1
        losses = stage1(named, sizes, tokens, ids, lengths, dec=dec, cached=cached)
    return losses.total


def flops(case: Case) -> int:
    """Matrix products that cannot be spared, forward and twice that backward; the frozen encoder's
    forward. A text counts its tokens, not its slots, and in the last layer those that are read."""
    layers, crossed = case["layers"], (case["layers"] + 1) // 2
    words = int(lengths(case).sum())
    keys, rest = 2 * WIDTH**2, 2 * WIDTH**2 + 2 * WIDTH * INNER  # of a row in a layer
    passes = 4 * case["B"] * QUERIES  # contrast with generation, and three of matching
    work = case["B"] * case["L"] * crossed * 2 * WIDTH**2  # keys and values, once an image
    work += passes * (layers * (keys + rest) + crossed * 2 * WIDTH**2)
    work += 5 * words * (layers * keys + (layers - 1) * rest) + (words + case["B"]) * rest
    work += (words - case["B"]) * (WIDTH**2 + WIDTH * VOCABULARY)
    encoder = case["B"] * case["L"] * case["vision"] * 12 * WIDTH**2
    return 2 * (3 * work + encoder)


def read_bytes(case: Case) -> int:
    """Parameters once, their gradients once."""
    return 2 * sum(p.nbytes for p in trained(case).values())


SUITE = Suite(
    op="blip2",
    module=__name__,
    cases=cases,
    variants={
        OURS: Variant(lambda: ours),
        "separate": Variant(lambda: plain),
        "cached": Variant(lambda: partial(plain, cached=True)),
    },
    inputs=inputs,
    names=("parameters",),
    exact=plain,
    small=small,
    flops=flops,
    read_bytes=read_bytes,
    kernel="attention_fwd",
    drawn=lambda case: dropout(case) > 0,
)


def test_blip2(case: Case, bench: Bench) -> None:
    """Time, memory and error of every variant at one case."""
    bench(SUITE, case)
