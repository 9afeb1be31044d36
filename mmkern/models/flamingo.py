"""Flamingo: a frozen language model that reads pictures through gated cross-attention.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (arXiv 2204.14198), as
OpenFlamingo trains it (arXiv 2308.01390). A frozen CLIP tower sees each picture, a perceiver
resampler makes 64 latents of its patches, and blocks in front of every n-th layer of the language
model let each text segment read the latents of its own picture. Trained are the resampler, the
blocks and the embeddings of two tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from mmkern.models.blip2_base import ClipVisionConfig
from mmkern.models.clip_checkpoints import State, raise_for_keys, read
from mmkern.models.flamingo_checkpoints import from_openflamingo, to_openflamingo
from mmkern.models.flamingo_layers import Media, MediaAttention, decoder_layers
from mmkern.models.flamingo_loss import FlamingoLoss, SpecialTokens
from mmkern.models.flamingo_vision import FlamingoConfig, FlamingoVisionModel
from mmkern.models.language import GenerationOutput
from mmkern.nn.gated_cross_attention import image_of_token
from mmkern.nn.resampler import PerceiverResampler

__all__ = [
    "Flamingo",
    "FlamingoConfig",
    "FlamingoVisionModel",
    "GenerationOutput",
    "flamingo_3b",
    "flamingo_9b",
]


class Flamingo(PreTrainedModel, GenerationMixin):
    """Vision tower, resampler, gated cross-attention, language model.

    State-dict keys: ``vision_model.*`` (OpenAI's), ``perceiver.*`` and
    ``gated_cross_attn_layers.j.*`` (OpenFlamingo's), ``language_model.*`` (transformers', as the
    model alone has them), ``special_embeddings`` [2, H], the rows of ``<|endofchunk|>`` and
    ``<image>``: the only embeddings that are trained, read in place of the frozen table's, and in
    place of the head's rows where head and table are one.

    Args:
        config: sizes.
        language_model: used as it is, and its configuration with it; None: transformers' model of
            ``config.text_config`` with random weights.

    Raises:
        ValueError: special tokens outside the vocabulary or equal, and what
            :class:`~mmkern.models.flamingo_layers.MediaAttention` raises.
    """

    config_class = FlamingoConfig
    base_model_prefix = "flamingo"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Losses are means; Trainer must not rescale them by a number of items.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ("perceiver", "gated_cross_attn_layers", "special_embeddings")
    _no_split_modules = ("Block", "GatedCrossAttentionBlock")

    def __init__(self, config: FlamingoConfig, language_model: Any = None) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        else:
            config.text_config = language_model.config
        self.language_model = language_model
        vocabulary, width = self.get_input_embeddings().weight.shape
        self.special = SpecialTokens(config.end_of_chunk_token_id, config.image_token_id)
        self.special.check(vocabulary)
        self.vision_model = FlamingoVisionModel(config.vision_config, config.apply_ln_post)
        sizes: dict[str, Any] = {
            "heads": config.heads,
            "head_width": config.head_width,
            "mult": config.ff_mult,
        }
        self.perceiver = PerceiverResampler(
            config.vision_config.hidden_size,
            depth=config.resampler_depth,
            latents=config.num_latents,
            frames=config.max_frames,
            media=config.max_media,
            **sizes,
        )
        self.gated_cross_attn_layers = MediaAttention(
            language_model,
            config.cross_attn_every_n_layers,
            width=width,
            media_width=config.vision_config.hidden_size,
            **sizes,
        )
        self.special_embeddings = nn.Parameter(torch.empty(2, width))
        self.reset_parameters()
        self.get_input_embeddings().register_forward_hook(self._embed)
        self.get_output_embeddings().register_forward_hook(self._head)
        self._loss = FlamingoLoss(self)
        self.freeze()
        self.post_init()

    def freeze(self) -> None:
        """Switch gradients off for the tower and the language model."""
        self.vision_model.requires_grad_(False).eval()
        self.language_model.requires_grad_(False)

    def init_weights(self) -> None:
        """Nothing: the parts initialise themselves when they are built, and once is enough."""

    def _init_weights(self, module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The special tokens' rows are the language model's."""
        rows = self.get_input_embeddings().weight[list(self.special)]
        self.special_embeddings.copy_(rows)

    def train(self, mode: bool = True) -> Self:
        """As usual, but the vision tower stays in eval mode."""
        super().train(mode)
        self.vision_model.eval()
        return self

    def get_input_embeddings(self) -> Any:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    @property
    def tied(self) -> bool:
        """Whether the language model's head is its table of embeddings."""
        return self.get_output_embeddings().weight is self.get_input_embeddings().weight

    def _embed(self, table: Any, arguments: Any, out: Tensor) -> Tensor:
        # Some tables scale what they give.
        rows = self.special_embeddings.to(out.dtype) * getattr(table, "embed_scale", 1.0)
        for token, row in zip(self.special, rows, strict=True):
            out = torch.where((arguments[0] == token)[..., None], row, out)
        return out

    def _head(self, head: Any, arguments: Any, logits: Tensor) -> Tensor:
        # The difference to the frozen rows, so that rows that were not trained change no bit.
        if self.tied:
            change = self.special_embeddings - head.weight[list(self.special)].detach()
            # As matrices: F.linear's bits depend on who wants gradients.
            x = arguments[0].flatten(0, -2)
            columns = (x @ change.to(x.dtype).T).to(logits.dtype).view(*logits.shape[:-1], 2)
            index = torch.tensor(list(self.special), device=logits.device)
            logits = logits.index_add(-1, index, columns)
        return logits

    def image_latents(self, pixel_values: Tensor, places: Tensor | None = None) -> Tensor:
        """Pictures [M, 3, S, S] to latents [M, n, W]; `places` in their samples, [M], from 0.

        Raises:
            TypeError: integers. ValueError: another shape.
        """
        size = self.config.vision_config.image_size
        if not pixel_values.is_floating_point():
            raise TypeError(
                f"Flamingo: pixel_values must be floating point, got {pixel_values.dtype}"
            )
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"Flamingo: pixel_values must be [pictures, 3, {size}, {size}], got "
                f"{list(pixel_values.shape)}"
            )
        with torch.no_grad():
            patches = self.vision_model(pixel_values)
        return self.perceiver(patches.to(self.perceiver.latents.dtype), places)

    def media(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        image_index: Tensor | None = None,
        *,
        keep: bool = False,
    ) -> Media:
        """What the blocks read of a batch; arguments as :meth:`forward` takes them.

        With `keep`, keys and values are computed once for all calls of the language model.

        Raises:
            ValueError: naming the sample, where the number of its ``<image>`` tokens is not that of
                its pictures (on a GPU a device-side assertion).
        """
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"Flamingo: input_ids must be integers [batch, length], got {input_ids.dtype} "
                f"{list(input_ids.shape)}"
            )
        batch = len(input_ids)
        if pixel_values is None:
            size = self.config.vision_config.image_size
            pixel_values = self.special_embeddings.new_zeros(0, 3, size, size)
        if pixel_values.dim() == 5 and image_index is None:
            if len(pixel_values) != batch:
                raise ValueError(
                    f"Flamingo: pixel_values are for {len(pixel_values)} samples, input_ids for "
                    f"{batch}"
                )
            pixel_values = pixel_values.flatten(0, 1)
        count = len(pixel_values)
        if image_index is None:
            if batch and count % batch:
                raise ValueError(
                    f"Flamingo: {count} pictures for {batch} samples: image_index must say which "
                    "picture belongs to which"
                )
            each = count // batch if batch else 0
            image_index = torch.arange(count, device=input_ids.device).view(batch, each)
        self._check_media(input_ids, image_index, count)
        places = None
        if self.perceiver.media_time_embs is not None:
            order = torch.arange(image_index.shape[1], device=input_ids.device)
            shown = image_index.clamp(min=0).flatten()
            order = order.expand_as(image_index) * (image_index >= 0)
            places = torch.zeros(count, dtype=torch.int64, device=input_ids.device)
            places = places.scatter_reduce(0, shown, order.flatten(), "amax") if count else places
        return Media(
            self.image_latents(pixel_values, places),
            image_index,
            image_of_token(input_ids, self.special.image),
            all_previous=not self.config.only_attend_immediate_media,
            cached={} if keep else None,
        )

    def _check_media(self, input_ids: Tensor, image_index: Tensor, count: int) -> None:
        if image_index.dim() != 2 or len(image_index) != len(input_ids):
            raise ValueError(
                f"Flamingo: image_index must be [{len(input_ids)}, pictures], got "
                f"{list(image_index.shape)}"
            )
        asked = (input_ids == self.special.image).sum(1)
        shown = (image_index >= 0).sum(1)
        if input_ids.device.type == "cuda":
            torch._assert_async((asked == shown).all() & (image_index < count).all())
            return
        if torch.compiler.is_compiling():
            return
        for sample in (asked != shown).nonzero().flatten().tolist():
            raise ValueError(
                f"Flamingo: sample {sample} has {int(asked[sample])} image tokens (id "
                f"{self.special.image}) in input_ids and {int(shown[sample])} pictures"
            )
        holes = (image_index[:, 1:] >= 0) & (image_index[:, :-1] < 0)
        wrong = holes.any(1) | (image_index >= count).any(1)
        for sample in wrong.nonzero().flatten().tolist():
            raise ValueError(
                f"Flamingo: image_index of sample {sample} must name pictures 0 to {count - 1}, "
                f"then -1, got {image_index[sample].tolist()}"
            )

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        loss_weights: Tensor | None = None,
        return_logits: bool | None = None,
        **language_model_options: Any,
    ) -> GenerationOutput:
        """Loss, and logits where they are wanted.

        Args:
            pixel_values: [M, 3, S, S], the pictures of all samples; [B, N, 3, S, S] if each has N.
                None: plain text, which no block's attention changes.
            input_ids: [B, T]; ``<image>`` where a picture stands, its text behind it.
            attention_mask: [B, T], 0 at pads, on either side; None: all attended.
            labels: [B, T], the ids where they are trained on, else -100; position t predicts t + 1.
            image_index: int64 [B, N], which picture is the n-th of a sample, then -1; None: the
                pictures of the samples in order, as many in each.
            loss_weights: [B], factors of the samples' summed losses; None: the mean over labels.
            return_logits: None: only without labels. With True the loss is computed from them.
            language_model_options: for the language model, such as ``output_hidden_states``.

        Raises:
            ValueError: as :meth:`media`; labels or a mask of another shape, labels at ``<image>``.
            NotImplementedError: a language model that does more behind its head than a bias.
        """
        if input_ids is None:
            raise ValueError("Flamingo.forward: input_ids must be given")
        media = self.media(pixel_values, input_ids, image_index)
        for name, value in (("attention_mask", attention_mask), ("labels", labels)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"Flamingo: {name} must be {list(input_ids.shape)} as input_ids, got "
                    f"{list(value.shape)}"
                )
        if loss_weights is not None and loss_weights.shape != input_ids.shape[:1]:
            raise ValueError(
                f"Flamingo: loss_weights must be [{len(input_ids)}], got {list(loss_weights.shape)}"
            )
        if labels is not None and labels.device.type == "cpu":
            for sample in (labels == self.special.image).any(1).nonzero().flatten().tolist():
                raise ValueError(f"Flamingo: sample {sample} has a label at an image token")
        with self.gated_cross_attn_layers.reading(media):
            loss, output = self._loss(
                self.language_model,
                self.get_input_embeddings()(input_ids),
                attention_mask,
                labels,
                return_logits,
                loss_weights,
                language_model_options,
            )
        return GenerationOutput(
            loss=loss,
            logits=None if output is None else output.logits,
            image_features=media.latents,
            language_model_outputs=output,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """transformers' ``generate``: the prompt and what follows, until ``<|endofchunk|>``.

        Pictures are seen once, and each block's keys and values kept for all steps. Prompts of
        unequal lengths are padded on the left. ``<image>`` is never generated.
        """
        if input_ids is None:
            raise ValueError("Flamingo.generate: input_ids must be given")
        media = self.media(pixel_values, input_ids, image_index, keep=True)
        ends = self.language_model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        options.setdefault("eos_token_id", [self.special.end_of_chunk, *ends])
        options.setdefault("pad_token_id", self.special.end_of_chunk)
        hidden = [*(options.pop("suppress_tokens", None) or ()), self.special.image]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with self.gated_cross_attn_layers.reading(media):
            return self.language_model.generate(
                input_ids=input_ids, attention_mask=mask, suppress_tokens=hidden, **options
            )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``from_pretrained``, but strict.

        Raises ValueError naming the keys when the file misses some or holds unknown ones.
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model.freeze()
        raise_for_keys(
            f"{cls.__name__}.from_pretrained", info["missing_keys"], info["unexpected_keys"]
        )
        return (model, info) if with_info else model

    @torch.no_grad()
    def load_openflamingo(self, state: State | str | Path) -> None:
        """Take over the weights of an OpenFlamingo checkpoint.

        It holds what was trained and the table of embeddings; vision tower and language model are
        taken where it has them, and else stay.

        Raises:
            ValueError: keys that are unknown, missing or misshapen.
        """
        given = state if isinstance(state, dict) else read(state)
        mapped = from_openflamingo(
            given, decoder_layers(self.language_model)[0], self.config.cross_attn_every_n_layers
        )
        table = f"language_model.{self._table}"
        if table in mapped:
            mapped["special_embeddings"] = mapped[table][list(self.special)]
        own = self.state_dict()
        frozen = ("vision_model.", "language_model.")
        missing = [n for n in own if n not in mapped and not n.startswith(frozen)]
        wrong = [n for n in mapped if n not in own or own[n].shape != mapped[n].shape]
        raise_for_keys("Flamingo.load_openflamingo", missing, wrong)
        for name, value in mapped.items():
            own[name].copy_(value)

    def to_openflamingo(self) -> State:
        """Copies of what OpenFlamingo saves, under its keys: resampler, blocks, embeddings."""
        own = self.state_dict()
        kept = {n: v for n, v in own.items() if n.startswith(("perceiver.", "gated_cross_attn"))}
        table = self.get_input_embeddings().weight.detach().clone()
        table[list(self.special)] = self.special_embeddings.detach().to(table.dtype)
        kept[f"language_model.{self._table}"] = table
        path, every = decoder_layers(self.language_model)[0], self.config.cross_attn_every_n_layers
        return to_openflamingo(kept, path, every)

    @property
    def _table(self) -> str:
        table = self.get_input_embeddings()
        return next(f"{n}.weight" for n, m in self.language_model.named_modules() if m is table)


def _published(text: dict[str, Any], every: int, overrides: dict[str, Any]) -> Flamingo:
    vision = ClipVisionConfig(num_hidden_layers=24)
    fields = {"vision_config": vision, "text_config": text, "cross_attn_every_n_layers": every}
    return Flamingo(FlamingoConfig(**{**fields, **overrides}))


def flamingo_3b(**overrides: Any) -> Flamingo:
    """OpenFlamingo-3B: CLIP ViT-L/14, MPT-1B, a block before every layer; random weights.

    ``overrides`` are fields of :class:`FlamingoConfig`.
    """
    text = {"model_type": "mpt", "d_model": 2048, "n_heads": 16, "n_layers": 24}
    return _published({**text, "vocab_size": 50280, "max_seq_len": 2048}, 1, overrides)


def flamingo_9b(**overrides: Any) -> Flamingo:
    """OpenFlamingo-9B: CLIP ViT-L/14, MPT-7B, a block before every fourth layer; random weights.

    ``overrides`` are fields of :class:`FlamingoConfig`.
    """
    text = {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32}
    return _published({**text, "vocab_size": 50280, "max_seq_len": 2048}, 4, overrides)
