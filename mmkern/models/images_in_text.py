"""Any number of images in a text's placeholders: what LLaVA and InternLM-XComposer share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern.models.blip2_language import LanguageSide
from mmkern.models.language import GenerationOutput, place_images
from mmkern.nn.lora import LoRALinear


class ImagesInText(LanguageSide):
    """A language model that reads ``image_positions`` features of each image in its places.

    A model has ``image_positions``, ``image_features`` [N, 3, S, S] -> [N, P, H] and
    ``no_features`` [0, P, H].
    """

    @property
    def image_positions(self) -> int:
        """P, what an image takes in a text."""
        raise NotImplementedError

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """[N, 3, S, S] to what the language model reads of each, [N, P, H]."""
        raise NotImplementedError

    def no_features(self) -> Tensor:
        """Features of no image, [0, P, H]."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_counts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **language_model_options: Any,
    ) -> GenerationOutput:
        """Loss, and logits where they are wanted.

        Args:
            input_ids: int64 [B, T]; ``image_positions`` times the image token for each image.
            pixel_values: [N, 3, S, S], images of all samples in the order of their places; None
                without images.
            image_counts: int [B], images of each sample, summing to N. None: as the ids say.
            attention_mask: [B, T], 0 at pads, on either side; None: all attended.
            labels: [B, T]; -100 is ignored.
            return_logits: None: only without labels. With True the loss is computed from them.
            num_items_in_batch: divides the sum of the labelled positions' losses; None: their
                number in this batch.
            language_model_options: for the language model.

        Raises:
            ValueError: sizes that do not fit; on a CPU also, naming the sample: places that are no
                whole images, other numbers of places than images, labels on images, ids outside the
                vocabulary. Elsewhere another number of places than the images need is a device-side
                assertion.
        """
        features = self._features(input_ids, pixel_values, image_counts)
        output = self.forward_language(
            input_ids,
            attention_mask,
            labels,
            features,
            return_logits,
            num_items_in_batch,
            **language_model_options,
        )
        if output.loss is not None and not len(features):
            # Of every trained parameter a sum over nothing: zero gradients where no image came.
            unused = [p.flatten()[:0].sum() for p in self.parameters() if p.requires_grad]
            output.loss = output.loss + sum(part.to(output.loss) for part in unused)
        return output

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Embeddings [B, T, H] of the ids, with the images' features [N, P, H] in their places."""
        token: int = self.config.image_token_index
        features = self.no_features() if features is None else features
        table: Any = self.get_input_embeddings()
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_places(input_ids, len(features))
            words = input_ids[input_ids != token]
            if words.numel():
                low, high = (int(bound) for bound in words.aminmax())
                if low < 0 or high >= table.weight.shape[0]:
                    raise ValueError(
                        f"{self._name}: input_ids must lie in [0, {table.weight.shape[0]}) or be "
                        f"the image token {token}, got {low} to {high}"
                    )
        elif input_ids.device.type == "cuda":
            expected = len(features) * self.image_positions
            torch._assert_async((input_ids == token).sum() == expected)
        # The placeholder may lie outside the vocabulary: any other id serves, it is overwritten.
        embeddings = table(input_ids.masked_fill(input_ids == token, 0))
        return place_images(embeddings, input_ids, token, features.to(embeddings.dtype))

    def check_places(
        self, input_ids: Tensor, images: int, image_counts: Tensor | None = None
    ) -> None:
        """Raise ValueError, naming the sample, unless places and images fit; for ids on a CPU."""
        each = self.image_positions
        places = (input_ids == self.config.image_token_index).sum(1).tolist()
        for i, found in enumerate(places):
            if found % each:
                raise ValueError(
                    f"{self._name}: sample {i} has {found} image tokens in input_ids, expected a "
                    f"multiple of {each}: it is cut inside an image"
                )
            if image_counts is not None and found != each * int(image_counts[i]):
                raise ValueError(
                    f"{self._name}: sample {i} has {found} image tokens in input_ids, its "
                    f"{int(image_counts[i])} images become {each * int(image_counts[i])}"
                )
        if sum(places) != each * images:
            # Images belong to samples in order: the first sample that is not filled, or the last.
            filled, sample = images, max(len(places) - 1, 0)
            for i, found in enumerate(places):
                filled -= found // each
                if filled < 0:
                    sample = i
                    break
            raise ValueError(
                f"{self._name}: input_ids have places for {sum(places) // each} images, "
                f"pixel_values has {images}: they do not fit from sample {sample} on"
            )

    def _features(
        self, input_ids: Tensor | None, pixel_values: Tensor | None, image_counts: Tensor | None
    ) -> Tensor:
        """Features of the images; what can be wrong about them is said before they are computed."""
        images = 0 if pixel_values is None else len(pixel_values)
        if input_ids is not None:
            if image_counts is not None and image_counts.shape != input_ids.shape[:1]:
                raise ValueError(
                    f"{self._name}: image_counts must be {list(input_ids.shape[:1])}, one a "
                    f"sample, got {list(image_counts.shape)}"
                )
            if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
                self.check_text(input_ids, None)
                self.check_places(input_ids, images, image_counts)
        return self.no_features() if pixel_values is None else self.image_features(pixel_values)

    def freeze_but_adapters(self) -> None:
        """Of the language model only LoRA is trained."""
        self.language_model.requires_grad_(False)
        for module in self.language_model.modules():
            if isinstance(module, LoRALinear):
                module.lora_A.requires_grad_(True)
                module.lora_B.requires_grad_(True)
