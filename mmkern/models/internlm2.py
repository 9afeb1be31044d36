"""InternLM2 with partial LoRA: the language model of InternLM-XComposer2, as our own decoder.

Cai et al., "InternLM2 Technical Report" (arXiv 2403.17297); Dong et al., "InternLM-XComposer2"
(arXiv 2401.16420), section 3.2. A LLaMA whose q, k and v are one product, ``wqkv``: its rows lie in
groups [q of the group | k | v], one group a key head. State-dict keys are those of the released
checkpoints; :func:`from_llama` and :func:`to_llama` map them to transformers' LLaMA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmkern.layout import RowIntervals, VisualSpans
from mmkern.models.clip_checkpoints import State, raise_for_keys
from mmkern.models.internlm2_checkpoints import from_llama, to_llama
from mmkern.models.internlm2_config import InternLM2Config
from mmkern.models.language import positions
from mmkern.nn.plora import PLoRALinear
from mmkern.ops import attention, linear_cross_entropy

__all__ = [
    "InternLM2Config",
    "InternLM2ForCausalLM",
    "from_llama",
    "internlm2_1_8b",
    "internlm2_7b",
    "to_llama",
]


@dataclass
class Context:
    """What all layers share: where tokens stand, what they see, which of them are visual.

    Attributes:
        cos, sin: of the rotation, fp32 [1 or B, L, 1, 1, E].
        mask: of attention, for B · G samples (or 1) where G queries share a key head.
        kv_row: int64 [B · G], whose keys each of them reads; None if G = 1.
        spans: the visual rows; None: all text.
    """

    cos: Tensor
    sin: Tensor
    mask: RowIntervals
    kv_row: Tensor | None
    spans: VisualSpans | None


class RMSNorm(nn.Module):
    """``w · x / sqrt(mean(x²) + eps)``; the mean in fp32, x rounded again before the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class _Linear(nn.Linear):
    """A layer without an adapter, called as one with."""

    def forward(self, x: Tensor, spans: VisualSpans | None = None) -> Tensor:
        return super().forward(x)


def _linear(config: InternLM2Config, name: str, inputs: int, outputs: int) -> nn.Linear:
    rank, alpha = config.adapter(name)
    bias = config.bias and name.startswith("attention.")
    if not config.plora_rank:
        return _Linear(inputs, outputs, bias)
    dropout = config.plora_dropout
    return PLoRALinear(inputs, outputs, bias, rank=rank, alpha=alpha, dropout=dropout)


class Attention(nn.Module):
    """Causal attention with shared key heads, rotated positions and one packed projection."""

    def __init__(self, config: InternLM2Config, layer: int) -> None:
        super().__init__()
        width, heads, kv_heads = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads or config.num_attention_heads,
        )
        self.layer, self.kv_heads, self.groups = layer, kv_heads, heads // kv_heads
        self.head_dim = width // heads
        packed = (heads + 2 * kv_heads) * self.head_dim
        self.wqkv = _linear(config, "attention.wqkv", width, packed)
        self.wo = _linear(config, "attention.wo", width, width)

    def forward(self, x: Tensor, context: Context, cache: Any = None) -> Tensor:
        """[B, L, W] to the same; `cache` is read and extended."""
        shape = (self.kv_heads, self.groups + 2, self.head_dim)
        qkv = self.wqkv(x, context.spans).unflatten(-1, shape)  # [B, L, Hkv, G + 2, E]
        rotated = _rotate(qkv[..., :-1, :], context)
        keys, values = (t.transpose(1, 2) for t in (rotated[..., -1, :], qkv[..., -1, :]))
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        # The G queries of a key head are G samples that read one sample's keys: no copies of them.
        queries = rotated[..., :-1, :].permute(0, 3, 2, 1, 4).flatten(0, 1)  # [B G, Hkv, L, E]
        out = attention(queries, keys, values, context.mask, kv_row=context.kv_row)
        out = out.unflatten(0, (-1, self.groups)).permute(0, 3, 2, 1, 4)  # [B, L, Hkv, G, E]
        return self.wo(out.flatten(2), context.spans)


def _rotate(x: Tensor, context: Context) -> Tensor:
    """Rotary positions; the first half of a head's width is paired with the second."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return x * context.cos.to(x.dtype) + turned * context.sin.to(x.dtype)


class FeedForward(nn.Module):
    """``w2(silu(w1 x) · w3 x)``."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.w1 = _linear(config, "feed_forward.w1", width, hidden)
        self.w3 = _linear(config, "feed_forward.w3", width, hidden)
        self.w2 = _linear(config, "feed_forward.w2", hidden, width)

    def forward(self, x: Tensor, spans: VisualSpans | None) -> Tensor:
        pair = (self.w1, self.w3)
        if all(type(layer) is PLoRALinear for layer in pair):  # and not wrapped by PEFT
            gate, up = PLoRALinear.together(pair, x, spans)  # type: ignore[arg-type]
        else:
            gate, up = (layer(x, spans) for layer in pair)
        return self.w2(F.silu(gate) * up, spans)


class InternLM2DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual layer: attention, then the feed-forward network."""

    def __init__(self, config: InternLM2Config, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Context, past_key_values: Any = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), context, past_key_values)
        return x + self.feed_forward(self.ffn_norm(x), context.spans)


class InternLM2PreTrainedModel(PreTrainedModel):
    config_class = InternLM2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("InternLM2DecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)

    def init_weights(self) -> None:
        """Ties the head; the parts initialise themselves when they are built."""
        self.tie_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this for modules that a checkpoint left out, children first.
        if isinstance(module, PLoRALinear | _Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]


class InternLM2Model(InternLM2PreTrainedModel):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            InternLM2DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.tok_embeddings = value

    def forward(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        spans: VisualSpans | None = None,
    ) -> Tensor:
        """Embeddings [B, L, W] to the hidden states before the head, [B, L, W].

        Args:
            attention_mask: [B, P + L], 0 at pads, P what the cache holds; None: no pads.
            position_ids: int [1 or B, L]; by default pads take no position.
            cache: read and extended; None for none.
            spans: visual rows of [B, L].
        """
        batch, length = embeddings.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and tuple(attention_mask.shape) != (batch, past + length):
            raise ValueError(
                f"InternLM2: attention_mask must be {[batch, past + length]}, one entry a token "
                f"and cached token, got {list(attention_mask.shape)}"
            )
        if position_ids is None:
            position_ids = (
                torch.arange(past, past + length, device=embeddings.device)[None]
                if attention_mask is None
                else positions(attention_mask)[:, past:]
            )
        cos, sin = self._rotation(position_ids, past + length)
        mask = causal_intervals(attention_mask, length, past + length, embeddings.device)
        groups, kv_row = self.config.num_attention_heads // self.config.num_key_value_heads, None
        if groups > 1:
            kv_row = torch.arange(batch, device=embeddings.device).repeat_interleave(groups)
            if mask.batch > 1:
                rows = mask.intervals.repeat_interleave(groups, 0)
                mask = RowIntervals(rows, mask.keys)
        context = Context(cos, sin, mask, kv_row, spans)
        x = embeddings
        for layer in self.layers:
            x = layer(x, context, past_key_values=cache)
        return self.norm(x)

    def _rotation(self, position_ids: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1 or B, L, 1, 1, E] in fp32.

        Dynamic NTK: once L keys exceed Lmax, theta becomes theta · (F L / Lmax - (F - 1)) to the
        power E / (E - 2). With F = 1 that is theta · (L / Lmax)^..., no identity.
        """
        rope, longest = self.config.rope_parameters, self.config.max_position_embeddings
        width = self.config.hidden_size // self.config.num_attention_heads
        theta = rope["rope_theta"]
        if rope["rope_type"] == "dynamic" and keys > longest:
            factor = rope["factor"]
            theta *= (factor * keys / longest - (factor - 1)) ** (width / (width - 2))
        powers = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
        angles = position_ids[..., None].float() * (1.0 / theta**powers)
        angles = torch.cat([angles, angles], -1)[:, :, None, None]
        return angles.cos(), angles.sin()


def causal_intervals(
    attention_mask: Tensor | None, queries: int, keys: int, device: torch.device
) -> RowIntervals:
    """The last `queries` of `keys` tokens, each seeing itself and what is before it but no pads.

    Args:
        attention_mask: [B, keys], 0 at pads; tokens may lie in two runs, one left of each gap.

    Raises:
        ValueError: more than two runs; on a CPU only, where looking costs nothing.
    """
    stop = torch.arange(keys - queries + 1, keys + 1, device=device)
    if attention_mask is None:
        bounds = [torch.zeros_like(stop), stop, stop, stop]
        return RowIntervals(torch.stack(bounds, 1).int()[None], keys)
    kept = F.pad(attention_mask != 0, (1, 1))
    edges = kept.int().diff()  # [B, keys + 1]
    if device.type == "cpu" and not torch.compiler.is_compiling():
        runs = (edges > 0).sum(1)
        if bool((runs > 2).any()):
            i = int((runs > 2).nonzero()[0])
            raise ValueError(
                f"InternLM2: attention_mask of sample {i} has tokens in {int(runs[i])} runs, "
                "expected at most 2"
            )
    place = torch.arange(keys + 1, device=device)
    first = torch.where(edges > 0, place, keys).amin(1, keepdim=True)
    end = torch.where(edges < 0, place, keys).amin(1, keepdim=True)
    begin = torch.where(edges > 0, place, 0).amax(1, keepdim=True)
    last = torch.where(edges < 0, place, 0).amax(1, keepdim=True)
    a1 = torch.maximum(torch.minimum(end, stop), first)
    b0 = torch.maximum(begin, a1)  # one run: an empty second interval behind it
    b1 = torch.maximum(torch.minimum(last, stop), b0)
    rows = torch.stack([first.expand_as(a1), a1, b0, b1], 2)
    return RowIntervals(rows.int(), keys)


class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin):
    """InternLM2 with its head; keys ``model.*`` and ``output.weight``.

    Which rows are visual is told by ``spans``, in training and in the first step of generation.
    Without visual rows, the loss is that of the model without adapters, bit for bit.
    """

    # The loss divides by Trainer's number of labelled tokens when it is given.
    accepts_loss_kwargs = True
    _tied_weights_keys = {"output.weight": "model.tok_embeddings.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq$",)

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.output = _Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, PLoRALinear | _Linear | nn.Embedding):
                self._init_weights(module)
        self.build(config)
        self.post_init()

    def build(self, config: Any) -> None:
        """What a subclass adds."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.tok_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.output = new_embeddings  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        spans: VisualSpans | Tensor | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """Loss, and logits where they are wanted.

        Args:
            input_ids: [B, L]; or ``inputs_embeds`` [B, L, W].
            attention_mask: [B, P + L], 0 at pads; P tokens are in the cache.
            labels: [B, L], -100 is ignored; position t predicts the label at t + 1.
            use_cache: by default the configuration's, but not with labels.
            spans: the visual rows, or a bool mask [B, L]; None: text.
            logits_to_keep: only those of so many last positions; 0: all.
            return_logits: None: only without labels.
            num_items_in_batch: divides the sum of the labelled positions' losses; None: their
                number in this batch.

        Raises:
            ValueError: shapes that do not fit, neither or both of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("InternLM2: give one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.model.tok_embeddings(input_ids)
        if isinstance(spans, Tensor):
            spans = VisualSpans.from_mask(spans)
        if labels is not None and labels.shape != inputs_embeds.shape[:2]:
            raise ValueError(
                f"InternLM2: labels must be {list(inputs_embeds.shape[:2])}, got "
                f"{list(labels.shape)}"
            )
        cached = use_cache if use_cache is not None else self.config.use_cache and labels is None
        if cached and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        hidden = self.model(inputs_embeds, attention_mask, position_ids, past_key_values, spans)
        loss = None if labels is None else self.language_loss(hidden, labels, num_items_in_batch)
        logits = None
        if return_logits or (return_logits is None and labels is None):
            logits = self.output(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values, hidden_states=(hidden,)
        )

    def language_loss(
        self, hidden: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Next-token cross-entropy; costs what the labelled rows cost, 0 if there are none."""
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        weight = self.output.weight
        if num_items_in_batch is None:
            return linear_cross_entropy(hidden, weight, targets)
        total = linear_cross_entropy(hidden, weight, targets, reduction="sum")
        items = num_items_in_batch
        return total / (items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1))

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers', but the visual rows are those of the prompt: later steps are text."""
        # transformers looks for the parameter inputs_embeds.
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            *args, inputs_embeds=inputs_embeds, **kwargs
        )
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            inputs.pop("spans", None)
        return inputs

    @torch.no_grad()
    def load_llama(self, llama: nn.Module | State) -> None:
        """Copy the weights of a LLaMA, or its state dict, of the same sizes.

        Adapters are taken if it has them (see :func:`to_llama`), and keep what they had if not.

        Raises:
            ValueError: keys that are missing, unknown or of another shape; nothing is copied then.
        """
        state = llama.state_dict() if isinstance(llama, nn.Module) else llama
        found = from_llama(state, self.config)
        outside = ("model.layers.", "model.tok_embeddings.", "model.norm.", "output.")
        own = {n: v for n, v in self.state_dict().items() if n.startswith(outside)}
        if not any("Plora_" in name for name in found):
            own = {n: v for n, v in own.items() if "Plora_" not in n}
        missing, unexpected = own.keys() - found.keys(), found.keys() - own.keys()
        if self.config.tie_word_embeddings:
            missing -= {"output.weight"}
        misshapen = [
            f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
            for name, value in own.items()
            if name in found and found[name].shape != value.shape
        ]
        raise_for_keys("InternLM2.load_llama", missing, unexpected, misshapen)
        for name, value in own.items():
            if name in found:
                value.copy_(found[name])


def internlm2_7b(**overrides: Any) -> InternLM2ForCausalLM:
    """The 7B with adapters of rank 256, random weights; ``overrides``: configuration fields."""
    return InternLM2ForCausalLM(InternLM2Config(**overrides))


def internlm2_1_8b(**overrides: Any) -> InternLM2ForCausalLM:
    """The 1.8B: 24 layers, 2048 wide, 16 heads; as :func:`internlm2_7b`."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
    }
    return InternLM2ForCausalLM(InternLM2Config(**{**sizes, **overrides}))
