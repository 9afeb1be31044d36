"""LLaVA: CLIP's patch tokens through one or two linear layers into a language model.

Liu et al., "Visual Instruction Tuning" (arXiv 2304.08485, LLaVA 1.0: ``linear``) and "Improved
Baselines with Visual Instruction Tuning" (arXiv 2310.03744, 1.5: ``mlp2x_gelu``). The features are
those of the image encoder's second-last block. Checkpoints of transformers and of the authors:
:mod:`mmkern.models.llava_checkpoints`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers import LlavaConfig as TransformersConfig

from mmkern.models.blip2_base import ClipVisionConfig, ClipVisionModel
from mmkern.models.blip2_language import _language_model
from mmkern.models.clip_checkpoints import State, check, read
from mmkern.models.images_in_text import ImagesInText
from mmkern.models.language import LanguageLoss
from mmkern.models.llava_checkpoints import from_layout, projector_state, read_folder, to_layout
from mmkern.models.llava_config import LlavaConfig
from mmkern.nn.lora import LoRALinear, add_lora

__all__ = [
    "LlavaConfig",
    "LlavaForConditionalGeneration",
    "llava_1_5_7b",
    "llava_1_5_13b",
    "llava_7b",
    "llava_13b",
]

_HEAD = "language_model.lm_head.weight"


class FeatureTower(ClipVisionModel):
    """CLIP's vision transformer up to the features' block: [B, 3, S, S] to [B, g² (+ 1), W].

    No norm behind the blocks; the class token only with ``keep_class_token``.
    """

    def __init__(self, config: ClipVisionConfig, keep_class_token: bool) -> None:
        super().__init__(config)
        del self.post_layernorm
        self.keep_class_token = keep_class_token

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        tokens = super().forward(pixel_values)
        return tokens if self.keep_class_token else tokens[:, 1:]


class Projector(nn.Module):
    """[..., W] to [..., H]: one linear layer, or two with an exact GELU between them."""

    def __init__(self, inputs: int, outputs: int, kind: str) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs) if kind == "mlp2x_gelu" else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_1(x.to(self.linear_1.weight.dtype))
        return x if self.linear_2 is None else self.linear_2(F.gelu(x))


class LlavaForConditionalGeneration(ImagesInText):
    """Image encoder, projector, any causal language model of transformers.

    An image takes ``image_positions`` places in ``input_ids``, all ``config.image_token_index``
    (which may lie outside the vocabulary). A sample has any number of images; a batch may have
    none: the projector's gradients are then zero, not missing, so DistributedDataParallel goes on.

    The loss is the next token's, on labelled rows, through
    :func:`mmkern.ops.linear_cross_entropy`. ``language_model`` as in
    :class:`~mmkern.models.blip2_generation.Blip2ForConditionalGeneration`.

    State-dict keys are those of transformers' files for projector and language model, and
    OpenAI's for the image encoder.
    """

    config_class = LlavaConfig
    base_model_prefix = "llava"
    main_input_name = "input_ids"
    _keep_in_fp32_modules_strict = ("multi_modal_projector",)  # type: ignore[assignment]
    # LAVIS has no LLaVA; :meth:`load_projector` is what an earlier stage hands on.
    start_from = from_lavis = to_lavis = None  # type: ignore[assignment]

    def __init__(self, config: LlavaConfig, language_model: Any = None) -> None:
        super().__init__(config)
        keep = config.vision_feature_select_strategy == "full"
        self.vision_model = FeatureTower(config.vision_config, keep)
        if language_model is not None:
            config.text_config = language_model.config
        given = language_model is not None
        self.language_model = language_model if given else _language_model(config.text_config)
        if self.language_model.config.is_encoder_decoder:
            raise ValueError(f"{self._name}: the language model must be causal")
        width = self.language_model.get_input_embeddings().weight.shape[1]
        self.multi_modal_projector = Projector(
            config.vision_config.hidden_size, width, config.mm_projector_type
        )
        self._language_loss = LanguageLoss(self._name)
        if config.lora_rank:
            lora = (config.lora_targets, config.lora_rank, config.lora_alpha, config.lora_dropout)
            add_lora(self.language_model, *lora)
        self.freeze_vision = config.freeze_vision
        self.freeze()
        self.post_init()

    def freeze(self) -> None:
        """Switch gradients off where nothing is trained; loading weights switches them on again."""
        if self.freeze_vision:
            self.vision_model.requires_grad_(False).eval()
        if self.config.freeze_language_model:
            self.freeze_but_adapters()

    def reset_parameters(self) -> None:
        """Nothing of its own."""

    @property
    def image_positions(self) -> int:
        """What an image takes in a text: 256 of ViT-L/14 at 224 pixels, 576 at 336."""
        positions: int = self.config.image_tokens
        return positions

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] to what the language model reads of each, [N, P, H]."""
        if not len(pixel_values):
            return self.no_features()
        return self.multi_modal_projector(self.image_tokens(pixel_values))

    def no_features(self) -> Tensor:
        """Features of no image, [0, P, H]."""
        weight = self.multi_modal_projector.linear_1.weight
        return weight.new_zeros(0, self.image_positions, weight.shape[0])

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_counts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """transformers' ``generate``; prompts, padded on the left, and what follows them.

        Arguments as in :meth:`forward`. Say ``max_new_tokens``: ``max_length`` counts the image
        tokens.
        """
        if input_ids is None:
            raise ValueError(f"{self._name}.generate: input_ids must be given")
        features = self._features(input_ids, pixel_values, image_counts)
        return self.generate_text(input_ids, attention_mask, features, options)

    @torch.no_grad()
    def load_projector(self, source: State | str | Path) -> None:
        """Take over a projector: ``mm_projector.bin``, ``non_lora_trainables.bin``, or their keys.

        Raises ValueError with the missing, unexpected and misshapen keys.
        """
        found = projector_state(source)
        check(f"{self._name}.load_projector", found, self.multi_modal_projector.state_dict())
        self.multi_modal_projector.load_state_dict(found)

    def save_projector(self, path: str | Path) -> None:
        """Write the projector alone, under the authors' keys, as their first stage does."""
        torch.save(
            {n: v for n, v in self.to_checkpoint("original").items() if "mm_projector." in n}, path
        )

    @classmethod
    def from_checkpoint(
        cls,
        source: State | str | Path,
        config: LlavaConfig | None = None,
        *,
        vision: State | str | Path | None = None,
    ) -> Self:
        """The model of a checkpoint in transformers' or the authors' layout, in eval mode.

        Args:
            source: a state dict, a file, or a folder with all its files.
            config: by default that of transformers in the folder.
            vision: the CLIP whose image encoder a checkpoint of the authors leaves out.

        Raises:
            ValueError: missing, unexpected and misshapen keys, by name; no configuration.
        """
        if config is None:
            if isinstance(source, dict) or not (Path(source) / "config.json").is_file():
                raise ValueError(f"{cls.__name__}.from_checkpoint: give config")
            # The authors' config.json has the language model's fields only.
            fields = TransformersConfig.get_config_dict(source)[0]
            if "vision_config" not in fields:
                raise ValueError(
                    f"{cls.__name__}.from_checkpoint: give config, {source} has no sizes"
                )
            config = LlavaConfig(**{n: v for n, v in fields.items() if n != "model_type"})
        state = source if isinstance(source, dict) else read_folder(source)
        if isinstance(vision, str | Path):
            vision = read(vision)
        mapped = from_layout(state, config.vision_config.num_hidden_layers, vision=vision)
        model = cls(config)
        expected = model.state_dict()
        if config.text_config.tie_word_embeddings and _HEAD not in mapped:
            expected.pop(_HEAD)
        check(f"{cls.__name__}.from_checkpoint", mapped, expected)
        model.load_state_dict(mapped, strict=False)
        return model.eval()

    def to_checkpoint(self, layout: str) -> State:
        """Copies of the weights under the keys of a layout, LoRA merged.

        One of :data:`mmkern.models.llava_checkpoints.LAYOUTS`. The image encoder has the blocks
        that are used, so its features' layer is -1 there.
        """
        state = {n: v for n, v in self.state_dict().items() if ".lora_" not in n}
        for name, module in self.language_model.named_modules():
            if isinstance(module, LoRALinear):
                state[f"language_model.{name}.weight"] = module.merged().weight
        return to_layout(state, layout)

    def transformers_config(self) -> TransformersConfig:
        """The configuration with which transformers' class computes the same.

        Raises:
            ValueError: a linear projector, or an image token outside the vocabulary.
        """
        config = self.config
        if config.mm_projector_type != "mlp2x_gelu":
            raise ValueError(f"{self._name}: transformers' LLaVA has no linear projector")
        table: Any = self.get_input_embeddings()
        vocabulary = table.weight.shape[0]
        if not config.image_token_index < vocabulary:
            raise ValueError(
                f"{self._name}: transformers looks up the image token {config.image_token_index} "
                f"in the embeddings, which have {vocabulary} rows; resize_token_embeddings first"
            )
        vision = config.vision_config
        return TransformersConfig(
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": vision.hidden_size,
                "intermediate_size": round(vision.hidden_size * vision.mlp_ratio),
                "num_hidden_layers": vision.num_hidden_layers,
                "num_attention_heads": vision.num_attention_heads,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "hidden_act": "quick_gelu" if vision.quick_gelu else "gelu",
                "layer_norm_eps": 1e-5,
            },
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_index,
            image_seq_length=config.image_tokens,
            vision_feature_layer=-1,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )


def _published(llama: dict[str, Any], fields: dict[str, Any], overrides: dict[str, Any]) -> Any:
    text = LlamaConfig(vocab_size=32000, pad_token_id=0, rms_norm_eps=1e-5, **llama)
    # Vicuna has no token for an image: the authors write -200, here it is the first free id.
    common = {"text_config": text, "image_token_index": 32000}
    return LlavaForConditionalGeneration(LlavaConfig(**{**common, **fields, **overrides}))


_7B: dict[str, Any] = {"max_position_embeddings": 2048}
_13B: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "max_position_embeddings": 2048,
}
_FIRST: dict[str, Any] = {
    "mm_projector_type": "linear",
    "vision_config": {"image_size": 224, "num_hidden_layers": 24},
}
_LONG = {"max_position_embeddings": 4096}


def llava_7b(**overrides: Any) -> LlavaForConditionalGeneration:
    """LLaVA 1.0: ViT-L/14 at 224 pixels, a linear projector, Vicuna-7B; random weights.

    ``overrides`` are fields of :class:`LlavaConfig`, here and below.
    """
    return _published(_7B, _FIRST, overrides)


def llava_13b(**overrides: Any) -> LlavaForConditionalGeneration:
    """LLaVA 1.0 on Vicuna-13B; random weights."""
    return _published(_13B, _FIRST, overrides)


def llava_1_5_7b(**overrides: Any) -> LlavaForConditionalGeneration:
    """LLaVA 1.5: ViT-L/14 at 336 pixels, an MLP, Vicuna-7B v1.5; random weights."""
    return _published({**_7B, **_LONG}, {}, overrides)


def llava_1_5_13b(**overrides: Any) -> LlavaForConditionalGeneration:
    """LLaVA 1.5 on Vicuna-13B v1.5; random weights."""
    return _published({**_13B, **_LONG}, {}, overrides)
