"""CLIP: two towers, one temperature, InfoNCE (Radford et al., arXiv 2103.00020).

State-dict keys are OpenAI's, which open_clip's ``CLIP`` shares. :meth:`CLIP.from_state_dict` reads
OpenAI's archives and dictionaries, open_clip's files and transformers' ``CLIPModel``, strictly;
:meth:`CLIP.to_state_dict` writes each of them (layouts in :mod:`mmkern.models.clip_checkpoints`).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, CLIPModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mmkern.models import clip_checkpoints as checkpoints
from mmkern.nn.towers import ModifiedResNet, TextMixin, VisionTransformer
from mmkern.ops import info_nce

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CLIPOutput",
    "clip_rn50",
    "clip_rn50x4",
    "clip_rn50x16",
    "clip_rn50x64",
    "clip_rn101",
    "clip_vit_b_16",
    "clip_vit_b_32",
    "clip_vit_l_14",
    "clip_vit_l_14_336",
]

MAX_LOGIT_SCALE = math.log(100)


class CLIPConfig(PretrainedConfig):
    """Sizes of a CLIP; the defaults are ViT-B/32 with an exact GELU.

    ``vision_layers`` is a depth (ViT) or four depths (ResNet, which takes no patch size).
    ``vision_heads`` and ``text_heads`` default to heads of width 64. ``vision_pool`` is "tok" or
    "avg". ``eot_token_id=None`` pools the text at each row's largest id.
    """

    model_type = "mmkern_clip"

    def __init__(
        self,
        embed_dim: int = 512,
        image_size: int = 224,
        vision_layers: int | tuple[int, ...] | list[int] = 12,
        vision_width: int = 768,
        vision_patch_size: int | None = 32,
        vision_heads: int | None = None,
        vision_mlp_ratio: float = 4.0,
        context_length: int = 77,
        vocab_size: int = 49408,
        text_width: int = 512,
        text_heads: int | None = None,
        text_layers: int = 12,
        quick_gelu: bool = False,
        vision_pool: str = "tok",
        init_logit_scale: float = math.log(1 / 0.07),
        eot_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        resnet = not isinstance(vision_layers, int)
        if resnet != (vision_patch_size is None):
            raise ValueError(
                "CLIPConfig: a ViT has one depth and a patch size, a ResNet four depths and "
                f"vision_patch_size=None; got vision_layers={vision_layers} and "
                f"vision_patch_size={vision_patch_size}"
            )
        self.embed_dim = embed_dim
        self.image_size = image_size
        # A list, as the configuration file has it.
        self.vision_layers: Any = (
            vision_layers if isinstance(vision_layers, int) else [*vision_layers]
        )
        self.vision_width = vision_width
        self.vision_patch_size = vision_patch_size
        # The ResNet pools 32 times its width.
        pooled = 32 * vision_width if resnet else vision_width
        self.vision_heads = _heads("vision", pooled, vision_heads)
        self.vision_mlp_ratio = vision_mlp_ratio
        self.context_length = context_length
        self.vocab_size = vocab_size
        self.text_width = text_width
        self.text_heads = _heads("text", text_width, text_heads)
        self.text_layers = text_layers
        self.quick_gelu = quick_gelu
        self.vision_pool = vision_pool
        self.init_logit_scale = init_logit_scale
        self.eot_token_id = eot_token_id
        super().__init__(**kwargs)


def _heads(tower: str, width: int, heads: int | None) -> int:
    if heads is None and width % 64:
        raise ValueError(
            f"CLIPConfig: {tower}_heads must be given: the width {width} is no multiple of 64"
        )
    heads = width // 64 if heads is None else heads
    if heads < 1 or width % heads:
        raise ValueError(f"CLIPConfig: {tower}_heads must divide the width {width}, got {heads}")
    return heads


@dataclass
class CLIPOutput(ModelOutput):
    """What :meth:`CLIP.forward` returns.

    ``loss`` is a scalar or None; the features are [B, embed_dim] of unit norm, None where their
    input was; ``logit_scale`` is exp of the parameter. Logits: ``scale · image @ text.T``.
    """

    loss: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    logit_scale: Tensor | None = None


class CLIP(TextMixin, PreTrainedModel):
    """Image and text towers trained to pick each other out of the batch.

    ``loss = ½·(CE(S, i) + CE(Sᵀ, i))`` with ``S = exp(logit_scale)·Î·T̂ᵀ``, by
    :func:`mmkern.ops.info_nce`; initialised as the paper says. Gradient checkpointing
    (``gradient_checkpointing_enable``) covers the transformers; a ResNet's stages always keep their
    activations, since recomputing them would update the batch statistics twice.
    """

    config_class = CLIPConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    # The loss is a mean over the batch; Trainer must not rescale it by a number of items.
    accepts_loss_kwargs = False
    _input_embed_layer = "token_embedding"
    _no_split_modules = ("Block", "Bottleneck")

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.visual = _vision_tower(config)
        self.build_text(
            config.vocab_size,
            config.context_length,
            config.text_width,
            config.text_layers,
            config.text_heads,
            config.embed_dim,
            quick_gelu=config.quick_gelu,
            eot_token_id=config.eot_token_id,
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        self.post_init()

    def init_weights(self) -> None:
        """Nothing: the towers initialise themselves when they are built, and once is enough."""

    def _init_weights(self, module: nn.Module) -> None:
        # transformers calls this, children first, for modules that a checkpoint left out.
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def reset_parameters(self) -> None:
        self.reset_text_parameters()
        nn.init.constant_(self.logit_scale, self.config.init_logit_scale)

    def encode_image(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """[B, 3, S, S] to [B, embed_dim]; S must be ``config.image_size``.

        ``model.visual(pixel_values, project=False)`` gives the features before the projection.
        """
        features = self.visual(pixel_values)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, input_ids: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, L], L up to ``config.context_length``, to [B, embed_dim]."""
        features = self.text_features(input_ids)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        return_loss: bool | None = None,
        group: ProcessGroup | None = None,
        **unused: Any,
    ) -> CLIPOutput:
        """Features of what is given, and the loss over the batch when both are.

        ``group`` makes the loss global over its ranks. Other keyword arguments, such as the
        ``attention_mask`` of a processor, are ignored: attention is causal and pools at the end.

        Raises ValueError when neither input is given, when ``return_loss`` is asked of one, or when
        the batch sizes differ.
        """
        if pixel_values is None or input_ids is None:
            if pixel_values is input_ids:
                raise ValueError("CLIP.forward: give pixel_values, input_ids or both")
            if return_loss:
                raise ValueError("CLIP.forward: return_loss=True needs pixel_values and input_ids")
        elif len(pixel_values) != len(input_ids):
            raise ValueError(
                f"CLIP.forward: pixel_values has {len(pixel_values)} samples and input_ids "
                f"{len(input_ids)}"
            )
        image = None if pixel_values is None else self.encode_image(pixel_values, normalize=True)
        text = None if input_ids is None else self.encode_text(input_ids, normalize=True)
        scale = self.logit_scale.exp()
        loss = None
        if image is not None and text is not None and return_loss is not False:
            loss = info_nce(image, text, scale, group=group)
        return CLIPOutput(loss=loss, image_features=image, text_features=text, logit_scale=scale)

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Hold the temperature parameter in [0, ln 100]; call it after each optimizer step."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def set_image_size(self, image_size: int) -> Self:
        """Take images of another size: position embeddings are interpolated, bicubic with
        anti-aliasing as open_clip does."""
        self.visual.set_image_size(image_size)
        self.config.image_size = image_size
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, strict: bool = True, **kwargs: Any) -> Any:
        """transformers' ``from_pretrained`` for a folder of ``save_pretrained``, but strict.

        Raises ValueError naming the keys when the file misses some or holds unknown ones;
        ``strict=False`` initialises and drops them, as transformers does.
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if strict:
            checkpoints.raise_for_keys(
                "CLIP.from_pretrained", info["missing_keys"], info["unexpected_keys"]
            )
        return (model, info) if with_info else model

    @classmethod
    def from_state_dict(
        cls,
        state: dict[str, Tensor] | str | Path,
        *,
        quick_gelu: bool | None = None,
        config: CLIPConfig | None = None,
        **overrides: Any,
    ) -> Self:
        """Build the model that a checkpoint of any known layout describes, in eval mode.

        ``state`` is a state dict or a file: OpenAI's JIT archive, a ``torch.save`` file (training
        checkpoints of open_clip too), safetensors. Weights are copied into the default dtype.

        Without ``config`` the sizes come from the shapes; what shapes cannot tell is in
        ``overrides`` (``vision_heads``, ``text_heads``, ``vision_pool``, ``eot_token_id``) and
        ``quick_gelu``, which must be given: True for OpenAI's weights and open_clip's
        ``-quickgelu`` models. (JIT archives are OpenAI's, there it is known.) An ``image_size`` in
        ``overrides`` interpolates the positions.

        Raises ValueError with the missing, unexpected and misshapen keys.
        """
        if not isinstance(state, dict):
            state = checkpoints.read(state)
        archive = state.keys() >= checkpoints.ARCHIVE_KEYS
        state = checkpoints.to_openai(state)
        image_size = overrides.pop("image_size", None)
        if config is None:
            if quick_gelu is None and not archive:
                raise ValueError(
                    "CLIP.from_state_dict: shapes do not tell the activation; give quick_gelu=True "
                    "(OpenAI's weights) or False (most of open_clip's)"
                )
            quick_gelu = True if quick_gelu is None else quick_gelu
            inferred = checkpoints.infer_sizes(state)
            config = CLIPConfig(**{**inferred, "quick_gelu": quick_gelu, **overrides})
        elif overrides or quick_gelu is not None:
            raise ValueError("CLIP.from_state_dict: give either config or overrides, not both")
        with torch.device("meta"):
            model = cls(config)
        checkpoints.check("CLIP.from_state_dict", state, model.state_dict())
        model.to_empty(device="cpu").load_state_dict(state)
        if image_size is not None:
            model.set_image_size(image_size)
        return model.eval()

    def to_state_dict(self, layout: str = "openai") -> dict[str, Tensor]:
        """The weights as "openai", "open_clip" (the same keys), "open_clip_custom_text"
        (``CustomTextCLIP``) or "transformers" has them; copies, in the model's dtype."""
        return checkpoints.from_openai(self.state_dict(), layout)

    @classmethod
    def from_transformers(cls, model: CLIPModel) -> Self:
        """Our model with the weights and settings of a ``transformers.CLIPModel``, in eval mode."""
        config = CLIPConfig(**checkpoints.sizes_from_transformers(model.config))
        return cls.from_state_dict(model.state_dict(), config=config)

    def to_transformers(self) -> CLIPModel:
        """A ``transformers.CLIPModel`` that computes the same, in eval mode; save it from there."""
        model = CLIPModel(checkpoints.transformers_config(self.config)).to(self.dtype)
        model.load_state_dict(self.to_state_dict("transformers"))
        return model.eval()


def _vision_tower(config: CLIPConfig) -> VisionTransformer | ModifiedResNet:
    if config.vision_patch_size is None:
        return ModifiedResNet(
            config.image_size,
            config.vision_width,
            tuple(config.vision_layers),
            config.vision_heads,
            config.embed_dim,
        )
    return VisionTransformer(
        config.image_size,
        config.vision_patch_size,
        config.vision_width,
        config.vision_layers,
        config.vision_heads,
        config.embed_dim,
        mlp_ratio=config.vision_mlp_ratio,
        quick_gelu=config.quick_gelu,
        pool=config.vision_pool,
    )


# Paper, tables 19 and 20: (embed_dim, image_size, layers, width, patch size, text width).
_PUBLISHED: dict[str, tuple[int, int, int | tuple[int, ...], int, int | None, int]] = {
    "ViT-B/32": (512, 224, 12, 768, 32, 512),
    "ViT-B/16": (512, 224, 12, 768, 16, 512),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336": (768, 336, 24, 1024, 14, 768),
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024),
}


def _published(name: str, overrides: dict[str, Any]) -> CLIP:
    fields = ("embed_dim", "image_size", "vision_layers", "vision_width", "vision_patch_size")
    sizes = dict(zip((*fields, "text_width"), _PUBLISHED[name], strict=True))
    return CLIP(CLIPConfig(**{**sizes, "quick_gelu": True, **overrides}))


def clip_vit_b_32(**overrides: Any) -> CLIP:
    """ViT-B/32 with random weights; ``overrides`` are fields of :class:`CLIPConfig`."""
    return _published("ViT-B/32", overrides)


def clip_vit_b_16(**overrides: Any) -> CLIP:
    """ViT-B/16 with random weights; ``overrides`` are fields of :class:`CLIPConfig`."""
    return _published("ViT-B/16", overrides)


def clip_vit_l_14(**overrides: Any) -> CLIP:
    """ViT-L/14 with random weights; ``overrides`` are fields of :class:`CLIPConfig`."""
    return _published("ViT-L/14", overrides)


def clip_vit_l_14_336(**overrides: Any) -> CLIP:
    """ViT-L/14 at 336 pixels, random weights; ``overrides`` are :class:`CLIPConfig` fields."""
    return _published("ViT-L/14@336", overrides)


def clip_rn50(**overrides: Any) -> CLIP:
    """RN50 with random weights; ``overrides`` are fields of :class:`CLIPConfig`."""
    return _published("RN50", overrides)


def clip_rn101(**overrides: Any) -> CLIP:
    """RN101 with random weights; ``overrides`` are fields of :class:`CLIPConfig`."""
    return _published("RN101", overrides)


def clip_rn50x4(**overrides: Any) -> CLIP:
    """RN50x4 with random weights; ``overrides`` are fields of :class:`CLIPConfig`."""
    return _published("RN50x4", overrides)


def clip_rn50x16(**overrides: Any) -> CLIP:
    """RN50x16 with random weights; ``overrides`` are fields of :class:`CLIPConfig`."""
    return _published("RN50x16", overrides)


def clip_rn50x64(**overrides: Any) -> CLIP:
    """RN50x64 with random weights; ``overrides`` are fields of :class:`CLIPConfig`."""
    return _published("RN50x64", overrides)


AutoConfig.register(CLIPConfig.model_type, CLIPConfig)
# transformers compares class names first, and it has a CLIPConfig too; its own is not replaced.
AutoModel.register(CLIPConfig, CLIP, exist_ok=True)
