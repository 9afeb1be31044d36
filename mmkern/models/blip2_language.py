"""What BLIP-2's second stage and InstructBLIP share: a language model behind the Q-Former."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationMixin

from mmkern.models.bert import shared_name
from mmkern.models.blip2_base import Blip2Base
from mmkern.models.blip2_checkpoints import check, from_lavis, to_lavis
from mmkern.models.clip_checkpoints import State, raise_for_keys
from mmkern.models.language import (
    GenerationOutput,
    LanguageLoss,
    check_placeholders,
    insert_images,
)
from mmkern.nn.lora import cast_but_adapters

__all__ = ["LanguageSide"]


class LanguageSide(Blip2Base, GenerationMixin):
    """A language model behind an image encoder and a Q-Former.

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
    # A buffer that transformers used to save.
    _keys_to_ignore_on_load_unexpected = (r"\.position_ids$",)
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

    def cast_language_model(self, dtype: torch.dtype) -> None:
        """Hold a frozen language model in 16 bits; adapters stay as they are."""
        cast_but_adapters(self.language_model, dtype)

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
        seq2seq = model.config.is_encoder_decoder
        if not len(input_ids):
            return input_ids[:, :0] if seq2seq else input_ids
        if seq2seq:
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


def _language_model(config: Any) -> Any:
    """transformers' model of a text configuration, with random weights: causal, else T5-like."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return kind.from_config(config)
