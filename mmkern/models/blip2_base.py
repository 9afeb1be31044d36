"""What BLIP-2's stages and InstructBLIP share: configuration, image encoder, frozen parts.

Two image encoders fit: transformers' ``Blip2VisionModel`` (EVA ViT-g in the published models), and
the vision transformer of our CLIP without its last blocks. Both end in ``post_layernorm``, which is
trained and computed in fp32 while the rest is frozen (LAVIS calls it ``ln_vision``).
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2Config as TransformersConfig
from transformers import Blip2VisionModel, PretrainedConfig, PreTrainedModel

from mmkern.models.clip import CLIP, CLIPConfig
from mmkern.models.clip_checkpoints import raise_for_keys
from mmkern.nn.qformer import QFormer
from mmkern.nn.towers import VisionTransformer

__all__ = [
    "Blip2Base",
    "Blip2Config",
    "ClipVisionConfig",
    "ClipVisionModel",
    "qformer_sizes",
    "vision_tower",
]


class ClipVisionConfig(PretrainedConfig):
    """Sizes of a CLIP vision transformer as an image encoder; field names are transformers'."""

    model_type = "mmkern_clip_vision"

    hidden_size: int = 1024
    image_size: int = 224
    patch_size: int = 14
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    mlp_ratio: float = 4.0
    quick_gelu: bool = True
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_clip(cls, config: CLIPConfig, *, drop_layers: int = 1) -> Self:
        """The sizes of a CLIP's tower without its last `drop_layers` blocks.

        BLIP-2 takes ViT-L without its last block (section 3.1 of the paper): what the last one
        computes serves the class token.
        """
        if config.vision_patch_size is None:
            raise ValueError("ClipVisionConfig.from_clip: needs a ViT, this CLIP has a ResNet")
        layers = config.vision_layers - drop_layers
        if drop_layers < 0 or layers < 1:
            raise ValueError(
                f"ClipVisionConfig.from_clip: drop_layers must leave a block of "
                f"{config.vision_layers}, got {drop_layers}"
            )
        return cls(
            hidden_size=config.vision_width,
            image_size=config.image_size,
            patch_size=config.vision_patch_size,
            num_hidden_layers=layers,
            num_attention_heads=config.vision_heads,
            mlp_ratio=config.vision_mlp_ratio,
            quick_gelu=config.quick_gelu,
        )


class Blip2Config(TransformersConfig):
    """transformers' ``Blip2Config``, read from and written to the same ``config.json``, and more.

    ``vision_config`` may also be a :class:`ClipVisionConfig`. Further fields, which transformers
    ignores:

    Args:
        freeze_vision: the image encoder is fixed and in eval mode; its last norm is trained.
        vision_norm_eps: ε of that norm. LAVIS trained with 1e-5 and transformers computes with the
            encoder's 1e-6, a visible difference in logits; None keeps the encoder's.
        dec_token_id: the token that starts generation in stage 1, [DEC]; None: the last of the
            vocabulary, where LAVIS adds it.
        initial_temperature: τ of the contrastive loss at the start.
        freeze_language_model: in stage 2, the language model is fixed.
        lavis_gradients: the contrastive loss of a side trains that side alone, and the generation
            loss is averaged over ranks whatever their numbers of tokens, as LAVIS does.
    """

    vision_config: Any = None
    freeze_vision: bool = True
    vision_norm_eps: float | None = None
    dec_token_id: int | None = None
    initial_temperature: float = 0.07
    freeze_language_model: bool = True
    lavis_gradients: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        vision: Any = self.vision_config
        if isinstance(vision, dict) and vision.get("model_type") == ClipVisionConfig.model_type:
            self.vision_config = ClipVisionConfig(**vision)
        super().__post_init__(**kwargs)
        if self.dec_token_id is None:
            self.dec_token_id = self.qformer_config.vocab_size - 1


def qformer_sizes(config: Any) -> dict[str, Any]:
    """Arguments of :class:`~mmkern.nn.qformer.QFormer` from a Q-Former configuration."""
    fields = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
        "cross_attention_frequency",
        "encoder_hidden_size",
        "initializer_range",
    )
    return {name: getattr(config, name) for name in fields}


class ClipVisionModel(VisionTransformer):
    """CLIP's vision transformer as an image encoder: [B, 3, S, S] to all its tokens [B, L, W].

    Keys are OpenAI's without ``visual.``; ``post_layernorm`` is new, ``ln_post`` and ``proj`` are
    gone.
    """

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__(
            config.image_size,
            config.patch_size,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            1,
            mlp_ratio=config.mlp_ratio,
            quick_gelu=config.quick_gelu,
        )
        del self.ln_post, self.proj
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def reset_parameters(self) -> None:
        for parameter in (self.class_embedding, self.positional_embedding):
            nn.init.normal_(parameter, std=self.class_embedding.shape[0] ** -0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        """The tokens before ``post_layernorm``."""
        return self.transformer(self.tokens(pixel_values))

    @torch.no_grad()
    def load_clip(self, clip: CLIP) -> None:
        """Copy the weights of a CLIP's tower; blocks beyond this depth are left out."""
        state, own = clip.state_dict(), self.state_dict()
        own.update({k: state[f"visual.{k}"] for k in own if not k.startswith("post_layernorm.")})
        self.load_state_dict(own)


def vision_tower(config: Any) -> Blip2VisionModel | ClipVisionModel:
    """The image encoder of a vision configuration, with random weights."""
    if isinstance(config, ClipVisionConfig):
        return ClipVisionModel(config)
    return Blip2VisionModel._from_config(config)


class Blip2Base(PreTrainedModel):
    """An image encoder, query tokens and a Q-Former; subclasses add what reads the queries.

    State-dict keys are transformers': ``vision_model.*``, ``query_tokens``, ``qformer.*``.
    """

    config_class = Blip2Config
    base_model_prefix = "blip"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # Losses are means over the batch; Trainer must not rescale them by a number of items.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    # What is trained keeps its precision when the rest is loaded in 16 bits.
    _keep_in_fp32_modules_strict: tuple[str, ...] = ("query_tokens", "qformer", "post_layernorm")
    _no_split_modules = ("Blip2EncoderLayer", "Block", "Layer")

    def build_image_side(self, config: Any, **qformer: Any) -> None:
        """Create ``vision_model``, ``query_tokens`` N(0, 0.02) and ``qformer``, and freeze.

        ``qformer`` are arguments of :class:`~mmkern.nn.qformer.QFormer` beyond the sizes in
        ``config.qformer_config`` (the text branch).
        """
        self.vision_model = vision_tower(config.vision_config)
        eps = getattr(config, "vision_norm_eps", None)
        if eps is not None:
            self.vision_model.post_layernorm.eps = eps
        width = config.qformer_config.hidden_size
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, width))
        self.reset_parameters()
        self.qformer = QFormer(**{**qformer_sizes(config.qformer_config), **qformer})
        self.freeze_vision = bool(getattr(config, "freeze_vision", True))
        self.freeze()

    def freeze(self) -> None:
        """Switch gradients off where nothing is trained; loading weights switches them on again."""
        if self.freeze_vision:
            self.vision_model.requires_grad_(False).eval()
            self.vision_model.post_layernorm.requires_grad_(True)

    def init_weights(self) -> None:
        """Nothing: the parts initialise themselves when they are built, and once is enough."""

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this, children first, for modules that a checkpoint left out.
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def reset_parameters(self) -> None:
        """Query tokens N(0, 0.02). (At zero all queries would compute the same.)"""
        nn.init.normal_(self.query_tokens, std=0.02)

    def train(self, mode: bool = True) -> Self:
        """As usual, but a frozen image encoder stays in eval mode."""
        super().train(mode)
        if self.freeze_vision:
            self.vision_model.eval()
        return self

    def image_tokens(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] to the encoder's tokens [B, L, W], before the last norm."""
        tower = self.vision_model
        size = self.config.vision_config.image_size
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: pixel_values must be floating point, got "
                f"{pixel_values.dtype}"
            )
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"{type(self).__name__}: pixel_values must be [batch, 3, {size}, {size}], got "
                f"{list(pixel_values.shape)}"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            if isinstance(tower, ClipVisionModel):
                return tower(pixel_values)
            return tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state

    def norm_image(self, tokens: Tensor) -> Tensor:
        """The trained last norm of the image encoder, in fp32 (fp64 for fp64 tokens)."""
        norm = self.vision_model.post_layernorm
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
            return F.layer_norm(tokens.to(dtype), norm.normalized_shape, weight, bias, norm.eps)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] to what the Q-Former reads, [B, L, W] in fp32."""
        return self.norm_image(self.image_tokens(pixel_values))

    @classmethod
    def from_pretrained(cls, *args: Any, strict: bool = True, **kwargs: Any) -> Any:
        """transformers' ``from_pretrained`` for its own folders and ours, but strict.

        Raises ValueError naming the keys when the file misses some or holds unknown ones;
        ``strict=False`` initialises and drops them, as transformers does.
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model.freeze()
        if strict:
            missing = [key for key in info["missing_keys"] if not cls.may_miss(key)]
            raise_for_keys(f"{cls.__name__}.from_pretrained", missing, info["unexpected_keys"])
        return (model, info) if with_info else model

    @staticmethod
    def may_miss(key: str) -> bool:
        """Whether a checkpoint of transformers has no counterpart of this key."""
        return False
