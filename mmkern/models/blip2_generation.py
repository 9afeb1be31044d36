"""BLIP-2's second stage: query outputs, projected, in front of a frozen language model.

Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large
Language Models" (arXiv 2301.12597), section 3.2 and figure 3. The language model is any causal one
or a T5 of transformers. State-dict keys are those of transformers'
``Blip2ForConditionalGeneration``: its folders load and ours load there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    OPTConfig,
    PretrainedConfig,
    T5Config,
)

from mmkern.models.bert import shared_name
from mmkern.models.blip2_base import Blip2Base, Blip2Config
from mmkern.models.blip2_checkpoints import check, from_lavis, to_lavis
from mmkern.models.clip_checkpoints import State, raise_for_keys
from mmkern.models.language import (
    GenerationOutput,
    LanguageLoss,
    check_placeholders,
    insert_images,
)

__all__ = [
    "Blip2ForConditionalGeneration",
    "GenerationOutput",
    "LanguageSide",
    "blip2_flan_t5_xl",
    "blip2_flan_t5_xxl",
    "blip2_opt_2_7b",
    "blip2_opt_6_7b",
]


class LanguageSide(Blip2Base, GenerationMixin):
    """What BLIP-2's second stage and InstructBLIP share: a language model behind the Q-Former.

    Subclasses say how the image becomes features of the language model's width; what happens to
    them, checks, loss, generation and checkpoints, is here.
    """

    # The loss divides by Trainer's number of labelled tokens when it is given.
    accepts_loss_kwargs = True
    # What is trained stays in fp32 when the frozen rest is loaded in half precision.
    _keep_in_fp32_modules_strict = (
        "query_tokens",
        "qformer",
        "post_layernorm",
        "language_projection",
    )
    # Whether LAVIS's checkpoint is InstructBLIP's.
    lavis_instruct = False

    def build_language_side(self, config: Any, given: Any = None) -> None:
        """Create ``language_projection`` and ``language_model``, or take a given model; freeze."""
        self.language_model = _language_model(config.text_config) if given is None else given
        if given is not None:
            config.text_config = given.config
        vocabulary, width = self.language_model.get_input_embeddings().weight.shape
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, width)
        if config.image_token_index is None:
            config.image_token_index = vocabulary
        self._language_loss = LanguageLoss(self._name)
        if config.freeze_language_model:
            self.language_model.requires_grad_(False)

    @torch.no_grad()
    def start_from(self, earlier: nn.Module | State, *, strict: bool = True) -> list[str]:
        """Take over the image side of an earlier stage, and its projection where it fits.

        Args:
            earlier: a model of BLIP-2 (either stage) or InstructBLIP, or its state dict. What this
                model has no place for, heads and unneeded text networks, is left behind.
            strict: raise for weights of the image side that the earlier stage does not have.

        Returns:
            The names, but for the language model's, that keep what they had.

        Raises:
            ValueError: with `strict`, missing or misshapen weights, by name.
        """
        state = earlier.state_dict() if isinstance(earlier, nn.Module) else earlier
        found = {shared_name(name): value for name, value in state.items()}
        own = {n: v for n, v in self.state_dict().items() if not n.startswith("language_model.")}
        kept = []
        for name, value in own.items():
            source = found.get(shared_name(name))
            if source is None or source.shape != value.shape:
                kept.append(name)
            else:
                value.copy_(source)
        missing = [name for name in kept if not name.startswith("language_projection.")]
        if strict:
            raise_for_keys(f"{self._name}.start_from", missing, ())
        return kept

    @classmethod
    def from_lavis(
        cls,
        state: State | str | Path,
        config: Any,
        *,
        language_model: Any = None,
        vision: State | str | Path | None = None,
    ) -> Self:
        """The model of a LAVIS checkpoint, in eval mode; weights in the default dtype.

        LAVIS saves no frozen weights: give transformers' language model, which is used as it is,
        and the image encoder's own file as ``vision`` (see
        :func:`mmkern.models.blip2_checkpoints.from_lavis`), where the file lacks them.

        Raises ValueError with the missing, unexpected and misshapen keys.
        """
        mapped = from_lavis(state, instruct=cls.lavis_instruct, vision=vision)
        given = _language_model(config.text_config) if language_model is None else language_model
        with torch.device("meta"):
            model = cls(config, given)
        expected = model.state_dict()
        if language_model is not None:
            expected = {n: v for n, v in expected.items() if not n.startswith("language_model.")}
        check(f"{cls.__name__}.from_lavis", mapped, expected)
        dtype = torch.get_default_dtype()
        mapped = {name: value.to(dtype, copy=True) for name, value in mapped.items()}
        outside = {n: v for n, v in mapped.items() if not n.startswith("language_model.")}
        model.load_state_dict(outside, strict=False, assign=True)
        if language_model is None:
            prefix = "language_model."
            given.load_state_dict(
                {n.removeprefix(prefix): v for n, v in mapped.items() if n.startswith(prefix)}
            )
        return model.eval()

    def to_lavis(self) -> State:
        """The weights under LAVIS's keys, the frozen ones too; copies, in the model's dtype."""
        kind = self.config.text_config.model_type
        language = kind if kind in ("opt", "t5") else "llm"
        return to_lavis(self.state_dict(), instruct=self.lavis_instruct, language=language)

    def project(self, queries: Tensor) -> Tensor:
        """The Q-Former's rows [B, Q, D] to the language model's width [B, Q, H]."""
        return self.language_projection(queries.to(self.language_projection.weight.dtype))

    def no_features(self) -> Tensor:
        """Image features of a batch of nothing, [0, Q, H]."""
        weight = self.language_projection.weight
        return weight.new_zeros(0, self.config.num_query_tokens, weight.shape[0])

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Embeddings [B, T, H] of the ids, with the image's features [B, Q, H] in their places."""
        token, wanted = self.config.image_token_index, self.config.num_query_tokens
        on_host = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        table: Any = self.get_input_embeddings()
        if features is not None and len(features) != len(input_ids):
            raise ValueError(
                f"{self._name}: {len(features)} images for {len(input_ids)} samples; every sample "
                "has one image, or none has"
            )
        if on_host:
            expected = 0 if features is None else wanted
            check_placeholders(self._name, input_ids, token, expected)
        elif features is not None and input_ids.device.type == "cuda":
            torch._assert_async(((input_ids == token).sum(1) == wanted).all())
        # The placeholder may lie outside the vocabulary: any other id serves, it is overwritten.
        ids = input_ids if features is None else input_ids.masked_fill(input_ids == token, 0)
        if on_host and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= table.weight.shape[0]:
                raise ValueError(
                    f"{self._name}: input_ids must lie in [0, {table.weight.shape[0]}) or be the "
                    f"image token {token}, got {low} to {high}"
                )
        embeddings = table(ids)
        if features is None:
            return embeddings
        return insert_images(embeddings, input_ids, token, features.to(embeddings.dtype))

    def check_text(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Raise ValueError unless the shapes fit each other and the language model's positions."""
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"{self._name}: input_ids must be integers [batch, length], got "
                f"{input_ids.dtype} {list(input_ids.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"{self._name}: attention_mask must be {list(input_ids.shape)} as input_ids, got "
                f"{list(attention_mask.shape)}"
            )
        longest = getattr(self.config.text_config, "max_position_embeddings", None)
        if longest is not None and input_ids.shape[1] > longest:
            raise ValueError(
                f"{self._name}: input_ids may have at most {longest} columns (the language model's "
                f"positions), got {input_ids.shape[1]}"
            )

    def forward_language(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        features: Tensor | None,
        return_logits: bool | None,
        num_items_in_batch: Tensor | int | None,
        **options: Any,
    ) -> GenerationOutput:
        """What is left of a forward once the image's features [B, Q, H] are there."""
        if input_ids is None:
            raise ValueError(f"{self._name}.forward: input_ids must be given")
        self.check_text(input_ids, attention_mask)
        embeddings = self.embed(input_ids, features)
        if labels is not None:
            self.check_labels(input_ids, labels)
        if not len(input_ids):
            return self._empty(embeddings, labels, features)
        loss, output = self._language_loss(
            self.language_model,
            embeddings,
            attention_mask,
            labels,
            return_logits,
            num_items_in_batch,
            {name: value for name, value in options.items() if value is not None},
        )
        return GenerationOutput(
            loss=loss,
            logits=None if output is None else output.logits,
            image_features=features,
            language_model_outputs=output,
        )

    def _empty(
        self, embeddings: Tensor, labels: Tensor | None, features: Tensor | None
    ) -> GenerationOutput:
        """Of a batch of nothing, which transformers' language models do not take."""
        if labels is not None:
            trained = [p.flatten()[:0].sum() for p in self.parameters() if p.requires_grad]
            loss = torch.stack(trained).sum() if trained else embeddings.sum()
            return GenerationOutput(loss=loss, image_features=features)
        head: Any = self.get_output_embeddings()
        vocabulary = head.weight.shape[0]
        logits = embeddings.new_zeros(0, embeddings.shape[1], vocabulary)
        return GenerationOutput(logits=logits, image_features=features)

    def check_labels(self, input_ids: Tensor, labels: Tensor) -> None:
        """Raise ValueError unless labels fit; on a CPU also if a placeholder has one."""
        seq2seq = self.language_model.config.is_encoder_decoder
        fits = labels.dim() == 2 and labels.shape[0] == input_ids.shape[0]
        if not fits or not (seq2seq or labels.shape == input_ids.shape):
            expected = [input_ids.shape[0], "any"] if seq2seq else list(input_ids.shape)
            raise ValueError(f"{self._name}: labels must be {expected}, got {list(labels.shape)}")
        if seq2seq or input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        labelled = (input_ids == self.config.image_token_index) & (labels != -100)
        if bool(labelled.any()):
            i = int(labelled.any(1).nonzero()[0])
            raise ValueError(
                f"{self._name}: sample {i} has labels at {int(labelled[i].sum())} image tokens, "
                "expected -100"
            )

    def generate_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        features: Tensor | None,
        options: dict[str, Any],
    ) -> Any:
        """What transformers' ``generate`` gives for the prompt with the image in it."""
        model = self.language_model
        self.check_text(input_ids, attention_mask)
        inputs: dict[str, Any] = {
            "inputs_embeds": self.embed(input_ids, features),
            "attention_mask": torch.ones_like(input_ids)
            if attention_mask is None
            else attention_mask,
        }
        if model.config.is_encoder_decoder:
            return model.generate(**inputs, **options)
        # transformers puts the prompt before what is new, and lets penalties read it: ids outside
        # the vocabulary are not for its eyes.
        outside = input_ids >= model.get_input_embeddings().weight.shape[0]
        filler = model.generation_config.pad_token_id or 0
        inputs["input_ids"] = input_ids.masked_fill(outside, filler)
        output = model.generate(**inputs, **options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        copies = sequences.shape[0] // max(len(input_ids), 1)
        sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(copies, 0)
        return output

    def default_prompt(self, batch: int, device: torch.device) -> Tensor:
        """The image and, where the language model has one, its beginning of a text: [B, Q + 1]."""
        config = self.config
        begin = config.text_config.bos_token_id
        row = [config.image_token_index] * config.num_query_tokens
        row += [] if begin is None else [begin]
        return torch.tensor([row], device=device).repeat(batch, 1)


class Blip2ForConditionalGeneration(LanguageSide):
    """Image encoder, Q-Former without text, projection, language model.

    ``input_ids`` hold ``config.image_token_index`` ``config.num_query_tokens`` times a sample,
    anywhere, as transformers' processor and our collators write it (first); the id may lie outside
    the language model's vocabulary.

    The loss is the language-modelling loss of a causal model (position t predicts t + 1) or a T5's
    (labels are the decoder's targets), through :func:`mmkern.ops.linear_cross_entropy`: only
    labelled rows meet the head, and a frozen head gets no weight gradient.

    ``language_model`` is used as it is, and its configuration with it; without one, transformers'
    model of ``config.text_config`` is built with random weights.
    """

    def __init__(self, config: Blip2Config, language_model: Any = None) -> None:
        super().__init__(config)
        self.build_image_side(config)
        self.build_language_side(config, language_model)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **language_model_options: Any,
    ) -> GenerationOutput:
        """Loss, and logits where they are wanted.

        Args:
            pixel_values: [B, 3, S, S]; None for a batch of plain text.
            input_ids: [B, T]. Text may stand after pads: [image][pads][text] is a text after an
                image, pads taking no position.
            attention_mask: [B, T], 0 at pads; None: all attended.
            labels: [B, T] for a causal model, [B, T'] for a T5; -100 is ignored.
            decoder_input_ids, decoder_attention_mask: a T5's; by default from the labels.
            return_logits: None: only without labels. With True the loss is computed from them.
            num_items_in_batch: divides the sum of the labelled positions' losses; None: their
                number in this batch. (Trainer gives that of all accumulated batches.)
            language_model_options: for the language model, such as ``output_hidden_states``.

        Raises:
            ValueError: sizes that do not fit; on a CPU also, naming the sample, another number of
                image tokens than the image needs, and ids outside the vocabulary. Elsewhere wrong
                numbers of image tokens are a device-side assertion.
            NotImplementedError: a loss without logits of a language model that does more behind its
                head than a bias.
        """
        features = None if pixel_values is None else self.image_features(pixel_values)
        return self.forward_language(
            input_ids,
            attention_mask,
            labels,
            features,
            return_logits,
            num_items_in_batch,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            **language_model_options,
        )

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] to what the language model reads of the image, [B, Q, H]."""
        if not len(pixel_values):
            return self.no_features()
        return self.project(self.qformer(self.query_tokens, image=self.encode_image(pixel_values)))

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """transformers' ``generate``: beams, sampling, lengths and penalties are ``options``.

        Without ``input_ids`` the prompt is the image and the language model's first token. A causal
        model returns the prompt and what follows, a T5 what its decoder says. Say
        ``max_new_tokens`` and ``min_new_tokens``: ``max_length`` counts a prompt with its image
        tokens. The paper's captions take ``num_beams=5, length_penalty=-1``, with ``max_new_tokens=
        30, min_new_tokens=8`` on COCO; answers to questions ``max_new_tokens=10``.
        """
        if input_ids is None:
            if pixel_values is None:
                raise ValueError(f"{self._name}.generate: give pixel_values, input_ids or both")
            input_ids = self.default_prompt(len(pixel_values), pixel_values.device)
        features = None if pixel_values is None else self.image_features(pixel_values)
        return self.generate_text(input_ids, attention_mask, features, options)


def _language_model(config: Any) -> Any:
    """transformers' model of a text configuration, with random weights: causal, else T5-like."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(config)


def flan_t5(size: str) -> T5Config:
    """Flan-T5 "xl" or "xxl" as LAVIS runs it: an exact GELU, and a beginning of texts."""
    sizes = {
        "xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32},
        "xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64},
    }
    return T5Config(
        **sizes[size],
        d_kv=64,
        num_layers=24,
        num_decoder_layers=24,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        bos_token_id=1,
    )


def _opt(hidden_size: int, ffn_dim: int) -> OPTConfig:
    # LAVIS ends a caption with a line feed, id 50118.
    return OPTConfig(
        hidden_size=hidden_size,
        ffn_dim=ffn_dim,
        word_embed_proj_dim=hidden_size,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=50304,
        eos_token_id=50118,
    )


def _published(text: PretrainedConfig, image_token: int, overrides: dict[str, Any]) -> Any:
    fields: dict[str, Any] = {
        "vision_config": {"initializer_range": 0.02},
        "vision_norm_eps": 1e-5,
        "text_config": text,
        "image_token_index": image_token,
    }
    return Blip2ForConditionalGeneration(Blip2Config(**{**fields, **overrides}))


def blip2_opt_2_7b(**overrides: Any) -> Blip2ForConditionalGeneration:
    """ViT-g and OPT-2.7B, random weights; ``overrides`` are fields of :class:`Blip2Config`."""
    return _published(_opt(2560, 10240), 50265, overrides)


def blip2_opt_6_7b(**overrides: Any) -> Blip2ForConditionalGeneration:
    """ViT-g and OPT-6.7B, random weights; ``overrides`` are fields of :class:`Blip2Config`."""
    return _published(_opt(4096, 16384), 50265, overrides)


def blip2_flan_t5_xl(**overrides: Any) -> Blip2ForConditionalGeneration:
    """ViT-g and Flan-T5 XL, random weights; ``overrides`` are fields of :class:`Blip2Config`."""
    return _published(flan_t5("xl"), 32100, overrides)


def blip2_flan_t5_xxl(**overrides: Any) -> Blip2ForConditionalGeneration:
    """ViT-g and Flan-T5 XXL, random weights; ``overrides`` are fields of :class:`Blip2Config`."""
    return _published(flan_t5("xxl"), 32100, overrides)
