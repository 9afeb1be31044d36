"""InternLM2 against transformers' LLaMA, and its partial LoRA against loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmkern.layout import VisualSpans
from mmkern.models import internlm2
from mmkern.models.internlm2 import InternLM2Config, InternLM2ForCausalLM, causal_intervals
from mmkern.models.internlm2_checkpoints import from_llama, to_llama
from mmkern.nn.plora import PLoRALinear

VOCABULARY = 40
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "dynamic 1": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0},
    "dynamic 2": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}
# As the released 4KHD mixes them.
MIXED = {"plora_rank_pattern": {"attention.wqkv": 2}, "plora_alpha_pattern": {"attention.wqkv": 4}}


def llama(rope: str = "default", **fields: Any) -> LlamaForCausalLM:
    """A small LLaMA with 2 queries a key head and 16 positions."""
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
        "max_position_embeddings": 16, "rope_parameters": dict(ROPES[rope]),
        "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **fields})).eval()


def ours(theirs: LlamaForCausalLM, **fields: Any) -> InternLM2ForCausalLM:
    """InternLM2 with the weights of a LLaMA, and adapters that are not zero."""
    config = InternLM2Config.from_llama(
        theirs.config, **{"plora_rank": 4, "plora_dropout": 0.0, **fields}
    )
    torch.manual_seed(1)
    model = InternLM2ForCausalLM(config).to(theirs.dtype).eval()
    model.load_llama(theirs)
    shake(model)
    return model


def shake(model: torch.nn.Module) -> None:
    """Random adapters, which start as zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "Plora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


@pytest.mark.parametrize("length", [12, 24])
@pytest.mark.parametrize("rope", ROPES)
def test_logits_and_gradients_are_llamas(rope: str, length: int) -> None:
    """Weights of InternLM2 would compute another model, beyond 16 positions with dynamic rope."""
    theirs = llama(rope).double()
    model = ours(theirs)
    ids = tokens(3, length)
    labels = ids.clone()
    labels[0, :5] = -100
    logits = theirs(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=0, atol=1e-6)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    mapped = from_llama(gradients, model.config)
    for name, parameter in model.named_parameters():
        if "Plora_" in name:
            assert not parameter.grad.any(), f"{name}: a batch of text trains no adapter"
        else:
            torch.testing.assert_close(parameter.grad, mapped[name], rtol=0, atol=1e-7, msg=name)


def test_dynamic_rope_of_factor_1_acts_beyond_the_longest_position() -> None:
    """XComposer2's configuration says dynamic 1.0; taken for "off", long images would go wrong."""
    plain, dynamic = ours(llama()), ours(llama("dynamic 1"))
    short, long = tokens(1, 16), tokens(1, 17)
    assert torch.equal(plain(input_ids=short).logits, dynamic(input_ids=short).logits)
    change = plain(input_ids=long).logits - dynamic(input_ids=long).logits
    assert change.abs().max() > 1e-4


def pads(kind: str, batch: int, length: int) -> Tensor:
    """A mask with pads on one side, or between two runs of tokens."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch - 1):
        start = {"left": 0, "right": length - 2 - row, "between": 4}[kind]
        mask[row, start : start + 2 + row] = 0
    return mask


@pytest.mark.parametrize("kind", ["left", "right", "between"])
def test_pads_change_nothing(kind: str) -> None:
    """What a sample says would depend on the length of its neighbours."""
    model = ours(llama())
    ids, mask = tokens(3, 14), pads(kind, 3, 14)
    logits = model(input_ids=ids, attention_mask=mask).logits
    for row in range(3):
        kept = mask[row] == 1
        alone = model(input_ids=ids[row : row + 1, kept]).logits[0]
        torch.testing.assert_close(logits[row, kept], alone, rtol=0, atol=1e-5)


def test_mask_of_three_runs_is_refused() -> None:
    """A mask that two intervals cannot hold would quietly let pads in."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match="sample 1 has tokens in 3 runs, expected at most 2"):
        ours(llama())(input_ids=tokens(2, 6), attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 6\].*got \[2, 5\]"):
        ours(llama())(input_ids=tokens(2, 6), attention_mask=mask[:, :5])


def test_intervals_are_the_dense_causal_mask() -> None:
    """A token of a cached sequence would see too much, or its own pads."""
    mask = torch.stack([pads("between", 2, 9)[0], pads("left", 2, 9)[0]])
    dense = torch.ones(9, 9).tril().bool() & mask.bool()[:, None]
    for queries in (9, 4, 1):
        found = causal_intervals(mask, queries, 9, mask.device).to_dense()
        assert torch.equal(found, dense[:, 9 - queries :])


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "no_repeat_ngram_size": 2}]
)
@pytest.mark.parametrize("rope", ["default", "dynamic 1"])
def test_generation_is_llamas(rope: str, options: dict[str, Any]) -> None:
    """The cache would be read at wrong positions; shows only once text is generated."""
    theirs = llama(rope)
    model = ours(theirs)
    ids, mask = tokens(3, 10), pads("left", 3, 10)
    wanted = {"max_new_tokens": 9, "do_sample": False, **options}
    expected = theirs.generate(input_ids=ids, attention_mask=mask, **wanted)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **wanted), expected)


def test_cache_continues_the_sequence() -> None:
    """Tokens after the first would be answered without what stands before them."""
    model = ours(llama())
    ids, spans = tokens(2, 12), VisualSpans.from_lengths([1, 13], [5, 5], (2, 12))
    whole = model(input_ids=ids, spans=spans).logits
    first = VisualSpans.from_lengths([1, 9], [5, 5], (2, 8))
    before = model(input_ids=ids[:, :8], spans=first, use_cache=True)
    torch.testing.assert_close(before.logits, whole[:, :8])
    cache = before.past_key_values
    for token in range(8, 12):
        step = model(input_ids=ids[:, token : token + 1], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(step.logits[:, 0], whole[:, token], rtol=0, atol=1e-5)


def test_visual_rows_are_those_of_the_prompt_only() -> None:
    """Generated words would be computed as if they were pieces of an image."""
    model = ours(llama())
    ids = tokens(2, 8)
    visual = torch.zeros(2, 8, dtype=torch.bool)
    visual[:, 1:5] = True
    seen: list[int] = []
    inner = model.model.layers[0].attention.wqkv
    inner.register_forward_pre_hook(
        lambda _, given: seen.append(0 if given[1] is None else len(given[1].rows))
    )
    model.generate(
        input_ids=ids, spans=visual, max_new_tokens=3, do_sample=False, eos_token_id=None
    )
    assert seen == [8, 0, 0]
    seen.clear()
    model.generate(input_ids=ids, spans=visual, max_new_tokens=2, num_beams=2, eos_token_id=None)
    assert seen == [16, 0]


def loop(model: InternLM2ForCausalLM, ids: Tensor, visual: Tensor) -> Tensor:
    """Logits by a plain computation, one row of a linear layer at a time."""
    config, state = model.config, model.state_dict()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads

    def linear(x: Tensor, name: str) -> Tensor:
        short = name.split(".", 3)[3]
        rank, alpha = config.adapter(short)
        rows = []
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                y = state[f"{name}.weight"] @ x[b, t]
                if visual[b, t]:
                    a, up = state[f"{name}.Plora_A.weight"], state[f"{name}.Plora_B.weight"]
                    assert len(a) == rank
                    y = y + alpha / rank * (up @ (a @ x[b, t]))
                rows.append(y)
        return torch.stack(rows).view(*x.shape[:2], -1)

    def norm(x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return x * scale * state[f"{name}.weight"]

    theta = config.rope_parameters["rope_theta"]
    frequency = 1 / theta ** (torch.arange(0, width, 2).float() / width)
    angle = torch.arange(ids.shape[1])[:, None].float() * frequency
    cos, sin = angle.cos().to(model.dtype), angle.sin().to(model.dtype)

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = state["model.tok_embeddings.weight"][ids]
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}"
        qkv = linear(norm(x, f"{name}.attention_norm"), f"{name}.attention.wqkv")
        outs = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            start = group * (heads // kv_heads + 2) * width
            place = start + (head % (heads // kv_heads)) * width
            key = start + (heads // kv_heads) * width
            q, k = rotate(qkv[..., place : place + width]), rotate(qkv[..., key : key + width])
            v = qkv[..., key + width : key + 2 * width]
            scores = q @ k.transpose(1, 2) / width**0.5
            scores = scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf)
            outs.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(outs, -1), f"{name}.attention.wo")
        normed = norm(x, f"{name}.ffn_norm")
        gate, up = (linear(normed, f"{name}.feed_forward.{w}") for w in ("w1", "w3"))
        x = x + linear(F.silu(gate) * up, f"{name}.feed_forward.w2")
    return norm(x, "model.norm") @ state["output.weight"].T


@pytest.mark.parametrize("fields", [{}, MIXED], ids=["one rank", "mixed ranks"])
def test_visual_rows_by_a_loop(fields: dict[str, Any]) -> None:
    """An adapter that reads wrong rows, or has another module's rank or scale, trains silently."""
    model = ours(llama().double(), **fields)
    ids = tokens(2, 7)
    visual = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]]).bool()
    expected = loop(model, ids, visual)
    found = model(input_ids=ids, spans=VisualSpans.from_mask(visual)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    text = model(input_ids=ids).logits
    assert (found - text).abs().max() > 0.01, "the adapters of this test do something"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_is_unchanged_to_the_bit(dtype: torch.dtype) -> None:
    """The language model would pay for images with its text: the promise of partial LoRA."""
    theirs = llama().to(dtype)
    model, bare = ours(theirs), ours(theirs, plora_rank=0)
    assert not any("Plora_" in name for name, _ in bare.named_parameters())
    ids, mask = tokens(3, 14), pads("right", 3, 14)
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "Plora_" in n):
            parameter.normal_(std=1e3)
    for spans in (None, VisualSpans.all_text((3, 14))):
        losses = [m(**inputs, spans=spans).loss for m in (model, bare)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        with torch.no_grad():
            assert torch.equal(*(m(**inputs, spans=spans).loss for m in (model, bare)))
    shared = dict(bare.named_parameters())
    if dtype != torch.float32:
        return  # w1 and w3 share one product for x's gradient: a rounding less than one by one
    for name, parameter in model.named_parameters():
        if "Plora_" in name:
            assert not parameter.grad.any()
        else:
            assert torch.equal(parameter.grad, shared[name].grad), name


@pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")
def test_recomputed_gradients_are_the_same() -> None:
    """Training with less memory would train another model: dropout must be drawn again alike."""
    models = [ours(llama(), plora_dropout=0.3).train() for _ in range(2)]
    models[0].gradient_checkpointing_enable()
    calls: list[int] = []
    models[0].model.layers[0].attention_norm.register_forward_pre_hook(lambda *_: calls.append(1))
    ids, spans = tokens(2, 9), VisualSpans.from_lengths([1, 10], [4, 4], (2, 9))
    for model in models:
        torch.manual_seed(7)
        model(input_ids=ids, labels=ids, spans=spans).loss.backward()
    assert len(calls) == 2
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-7, msg=name)


def test_labels_divide_by_what_trainer_counts() -> None:
    """Accumulated batches of unequal length would weigh their tokens unequally."""
    model, ids = ours(llama()), tokens(2, 8)
    labels = ids.clone()
    labels[0, :4] = -100
    mean = model(input_ids=ids, labels=labels).loss
    count = int((labels[:, 1:] != -100).sum())
    total = model(input_ids=ids, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(2 * total, mean)
    nothing = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    nothing.backward()
    assert nothing == 0 and all(not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("fields", [{}, MIXED], ids=["one rank", "mixed ranks"])
def test_keys_go_both_ways(fields: dict[str, Any]) -> None:
    """A released adapter would not load, or be split as the converter of InternLM2 splits it."""
    model = ours(llama(attention_bias=True), **fields)
    state = model.state_dict()
    rank = 2 if fields else 4
    assert state["model.layers.1.attention.wqkv.Plora_A.weight"].shape == (rank, 32)
    assert state["model.layers.1.attention.wqkv.Plora_B.weight"].shape == (64, rank)
    assert state["model.layers.1.feed_forward.w2.Plora_A.weight"].shape == (4, 48)
    mapped = to_llama(state, model.config)
    back = from_llama(mapped, model.config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    # A wqkv applied to x is q, k and v applied to x, adapters included.
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    layer: Any = model.model.layers[0].attention.wqkv
    packed = layer(x, torch.ones(5, dtype=torch.bool)).unflatten(1, (2, 4, 8))
    for part, expected in zip(
        "qkv", (packed[:, :, :2], packed[:, :, 2], packed[:, :, 3]), strict=True
    ):
        name = f"model.layers.0.self_attn.{part}_proj"
        a, b = mapped[f"{name}.Plora_A.weight"], mapped[f"{name}.Plora_B.weight"]
        y = x @ mapped[f"{name}.weight"].T + mapped[f"{name}.bias"]
        y = y + layer.scaling * (x @ a.T) @ b.T
        torch.testing.assert_close(y, expected.flatten(1), rtol=0, atol=1e-5)


def test_the_converters_trap() -> None:
    """Plora_A split by rows, as every key with wqkv in it once was, gives q, k and v other inputs.

    With a rank that the groups divide, the wrong split goes through without an error.
    """
    model = ours(llama(), plora_rank=8)
    state = model.state_dict()
    key = "model.layers.0.attention.wqkv.Plora_A.weight"
    mapped = to_llama({key: state[key]}, model.config)
    assert len(mapped) == 3 and all(torch.equal(v, state[key]) for v in mapped.values())
    other = {name: value + i for i, (name, value) in enumerate(mapped.items())}
    with pytest.raises(
        ValueError, match=r"wqkv.Plora_A.weight is shared, but q, k and v have diff"
    ):
        from_llama(other, model.config)
    mapped.popitem()
    with pytest.raises(ValueError, match=r"needs model.layers.0.self_attn.v_proj.*missing"):
        from_llama(mapped, model.config)


def test_unknown_and_missing_weights_are_named() -> None:
    """Half of a language model would be loaded, the rest random."""
    theirs = llama()
    model = ours(theirs)
    state = theirs.state_dict()
    gone = {n: v for n, v in state.items() if "layers.1.mlp.up_proj" not in n}
    with pytest.raises(ValueError, match=r"missing: model.layers.1.feed_forward.w3.weight"):
        model.load_llama(gone)
    with pytest.raises(ValueError, match=r"no place in a LLaMA for the key score.weight"):
        model.load_llama({**state, "score.weight": state["lm_head.weight"]})
    with pytest.raises(ValueError, match=r"misshapen: output.weight \[39, 32\] instead"):
        model.load_llama({**state, "lm_head.weight": state["lm_head.weight"][:-1]})


def test_tied_head_of_a_small_llama() -> None:
    """SmolLM2's head is its embedding: untied, training would tear them apart."""
    theirs = llama(tie_word_embeddings=True)
    model = ours(theirs)
    assert model.output.weight is model.model.tok_embeddings.weight
    ids = tokens(2, 6)
    torch.testing.assert_close(
        model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("tied", [False, True])
def test_folders_go_round(tied: bool, tmp_path: Path) -> None:
    """What was trained would not come back."""
    model = ours(llama(tie_word_embeddings=tied), **MIXED)
    model.save_pretrained(tmp_path)
    again = InternLM2ForCausalLM.from_pretrained(tmp_path)
    assert again.config.plora_rank_pattern == MIXED["plora_rank_pattern"]
    ids, spans = tokens(2, 6), VisualSpans.from_lengths([1], [3], (2, 6))
    assert torch.equal(
        again(input_ids=ids, spans=spans).logits, model(input_ids=ids, spans=spans).logits
    )


def test_adapters_that_a_file_lacks_start_at_nothing(tmp_path: Path) -> None:
    """Upstream draws them at random: stage 1 then starts from a broken language model."""
    model = ours(llama())
    state = {n: v for n, v in model.state_dict().items() if "Plora_" not in n}
    model.save_pretrained(tmp_path, state_dict=state)
    again = InternLM2ForCausalLM.from_pretrained(tmp_path)
    layers = [m for m in again.modules() if isinstance(m, PLoRALinear)]
    assert len(layers) == 10
    for layer in layers:
        assert not layer.Plora_B.weight.any() and layer.Plora_A.weight.std() > 0.05
    for name, value in state.items():
        assert torch.equal(again.state_dict()[name], value), name


def test_released_configurations_are_read() -> None:
    """The rope of a released config.json would be lost, or its sizes refused."""
    read = InternLM2Config(rope_theta=1000000, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert read.rope_parameters == {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    assert InternLM2Config(rope_scaling=None).rope_parameters["rope_type"] == "default"
    for wrong, message in (
        ({"num_attention_heads": 3}, "3 heads must divide 4096"),
        ({"plora_rank_pattern": {"wqkv": 8}}, r"patterns name some of .* got \['wqkv'\]"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "must be default or dynamic, got 'yarn'"),
    ):
        with pytest.raises(ValueError, match=message):
            InternLM2Config(**wrong)


def test_published_sizes() -> None:
    """A released checkpoint would not fit the model that is named after it."""
    with torch.device("meta"):
        large, small = internlm2.internlm2_7b(), internlm2.internlm2_1_8b()
    state = large.state_dict()
    adapters = sum(v.numel() for n, v in state.items() if "Plora_" in n)
    assert adapters == 603_979_776
    assert sum(v.numel() for v in state.values()) - adapters == 7_737_708_544
    assert state["model.layers.31.attention.wqkv.weight"].shape == (6144, 4096)
    assert state["output.weight"].shape == (92544, 4096)
    assert small.state_dict()["model.layers.23.feed_forward.w2.weight"].shape == (2048, 8192)
