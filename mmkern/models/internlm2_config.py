"""Sizes of an InternLM2, and of its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from transformers import LlamaConfig, PretrainedConfig

__all__ = ["LINEARS", "InternLM2Config"]

# The linear layers of a decoder layer, all of which have an adapter.
LINEARS = (
    "attention.wqkv",
    "attention.wo",
    "feed_forward.w1",
    "feed_forward.w3",
    "feed_forward.w2",
)


class InternLM2Config(PretrainedConfig):
    """Sizes of an InternLM2; the defaults are the 7B's. Field names are the released ones'.

    ``rope_parameters`` is transformers' dictionary: ``rope_theta``, ``rope_type`` "default" or
    "dynamic", and the latter's ``factor``. The released ``rope_theta`` and ``rope_scaling`` are
    read as well.

    Args:
        bias: of ``wqkv`` and ``wo``.
        plora_rank: r of every adapter; 0 for a model without any.
        plora_alpha: s = alpha / r; None: s = 1.
        plora_dropout: of the adapters' input while training.
        plora_rank_pattern, plora_alpha_pattern: exceptions by layer, such as
            ``{"attention.wqkv": 8}``: the released 4KHD has r = 8 and alpha = 16 there and r = 256
            elsewhere.

    Raises:
        ValueError: sizes that do not divide, unknown layers in a pattern, another kind of rope.
    """

    model_type = "internlm2"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 92544
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_parameters: Any = None
    bias: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    plora_rank: int = 256
    plora_alpha: float | None = None
    plora_dropout: float = 0.05
    plora_rank_pattern: Any = None
    plora_alpha_pattern: Any = None
    pad_token_id: int | None = 2
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.plora_rank_pattern = dict(self.plora_rank_pattern or {})
        self.plora_alpha_pattern = dict(self.plora_alpha_pattern or {})
        for heads, of in (
            (self.num_attention_heads, self.hidden_size),
            (self.num_key_value_heads, self.num_attention_heads),
        ):
            if heads < 1 or of % heads:
                raise ValueError(f"{type(self).__name__}: {heads} heads must divide {of}")
        if unknown := {*self.plora_rank_pattern, *self.plora_alpha_pattern} - set(LINEARS):
            raise ValueError(
                f"{type(self).__name__}: patterns name some of {LINEARS}, got {sorted(unknown)}"
            )
        theta, scaling = kwargs.pop("rope_theta", None), kwargs.pop("rope_scaling", None)
        self.rope_parameters = _rope_parameters(self.rope_parameters or scaling, theta)
        super().__post_init__(**kwargs)

    def adapter(self, name: str) -> tuple[int, float]:
        """Rank and alpha of a layer's adapter."""
        rank = self.plora_rank_pattern.get(name, self.plora_rank)
        alpha = self.plora_alpha if self.plora_alpha is not None else rank
        return rank, self.plora_alpha_pattern.get(name, alpha)

    @classmethod
    def from_llama(cls, config: Any, **fields: Any) -> Self:
        """The sizes of a ``LlamaConfig``; ``fields`` are further ones, such as ``plora_rank``.

        Raises:
            ValueError: what InternLM2 does not have: heads of another width, biases in the MLP.
        """
        width = config.hidden_size // config.num_attention_heads
        if getattr(config, "head_dim", width) not in (None, width) or config.mlp_bias:
            raise ValueError(
                "InternLM2Config.from_llama: needs heads of hidden_size / num_attention_heads and "
                f"no bias in the MLP, got head_dim {config.head_dim}, mlp_bias {config.mlp_bias}"
            )
        same = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "rms_norm_eps", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id",
            "tie_word_embeddings",
        )  # fmt: skip
        taken = {name: getattr(config, name) for name in same}
        rope = dict(config.rope_parameters)
        return cls(**{**taken, "bias": config.attention_bias, "rope_parameters": rope, **fields})

    def to_llama(self) -> LlamaConfig:
        """The sizes as transformers' ``LlamaConfig``, which has no place for adapters."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=self.max_position_embeddings,
            rms_norm_eps=self.rms_norm_eps,
            initializer_range=self.initializer_range,
            rope_parameters=dict(self.rope_parameters),
            attention_bias=self.bias,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            tie_word_embeddings=self.tie_word_embeddings,
        )


def _rope_parameters(given: Mapping[str, Any] | None, theta: float | None) -> dict[str, Any]:
    given = dict(given or {})
    kind = given.get("rope_type", given.get("type", "default"))
    found = {"rope_type": kind, "rope_theta": theta or given.get("rope_theta") or 1e6}
    if kind == "dynamic":
        found["factor"] = float(given.get("factor", 1.0))
    elif kind != "default":
        raise ValueError(f"InternLM2Config: rope_type must be default or dynamic, got {kind!r}")
    return found
