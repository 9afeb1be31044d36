"""CLIP's encoders: vision transformer, modified ResNet, causal text transformer.

State-dict keys are OpenAI's and open_clip's. Sources: Radford et al., "Learning Transferable Visual
Models From Natural Language Supervision" (arXiv 2103.00020), section 2.4 and 2.5; the parameter
initialisation is the paper's, each tower in its ``reset_parameters``.

A transformer that feeds one pooled token runs its last block for that token alone: keys and values
of all tokens are needed, but the query, the output projection and the MLP of the other rows reach
nothing. The result is the same and the block costs about a sixth.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = [
    "AttentionPool2d",
    "ModifiedResNet",
    "QuickGELU",
    "TextMixin",
    "TextTransformer",
    "Transformer",
    "VisionTransformer",
    "resize_positions",
]


class QuickGELU(nn.Module):
    """``x·sigmoid(1.702·x)``, the activation of OpenAI's weights; any floating shape and dtype."""

    def forward(self, x: Tensor) -> Tensor:
        # silu keeps one tensor for backward where the product of x and a sigmoid keeps two.
        return F.silu(1.702 * x) / 1.702


class Attention(nn.Module):
    """Multi-head self-attention with one fused input projection.

    Keys are those of ``torch.nn.MultiheadAttention``; initialised as that class is.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Attention: width {width} must be a multiple of heads {heads}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        query: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """``x`` [B, L, W] attends to itself, or ``query`` [B, Lq, W] to ``x``."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, x.shape[-1]
        if query is None:
            q, k, v = self._split(F.linear(x, weight, bias), 3)
        else:
            (q,) = self._split(F.linear(query, weight[:width], bias[:width]), 1)
            k, v = self._split(F.linear(x, weight[width:], bias[width:]), 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, L, parts·W] to ``parts`` views of shape [B, heads, L, E]."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Block(nn.Module):
    """Pre-norm residual block: ``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, quick_gelu: bool) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, hidden),
                gelu=QuickGELU() if quick_gelu else nn.GELU(),
                c_proj=nn.Linear(hidden, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, row: int | Tensor | None = None, causal: bool = False) -> Tensor:
        """[B, L, W] to the same shape, or to [B, 1, W] when ``row`` names one row a sample."""
        normed = self.ln_1(x)
        if row is None:
            x = x + self.attn(normed, causal=causal)
        else:
            mask = _keys_up_to(row, x) if causal else None
            x = _take(x, row) + self.attn(normed, query=_take(normed, row), mask=mask)
        return x + self.mlp(self.ln_2(x))


def _take(x: Tensor, row: int | Tensor) -> Tensor:
    if isinstance(row, int):
        return x[:, row : row + 1]
    return x[torch.arange(x.shape[0], device=x.device), row].unsqueeze(1)


def _keys_up_to(row: int | Tensor, x: Tensor) -> Tensor:
    """The rows of the causal mask that belong to ``row``: bool [B or 1, 1, 1, L]."""
    last = torch.as_tensor(row, device=x.device).view(-1, 1, 1, 1)
    return torch.arange(x.shape[1], device=x.device) <= last


class Transformer(nn.Module):
    """``layers`` blocks. Checkpointing follows transformers: ``gradient_checkpointing`` is a flag
    that ``PreTrainedModel.gradient_checkpointing_enable`` sets, together with the function used."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"Transformer: layers must be at least 1, got {layers}")
        self.causal = causal
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = partial(
            checkpoint, use_reentrant=False
        )
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, quick_gelu) for _ in range(layers)
        )

    def forward(self, x: Tensor, row: int | Tensor | None = None) -> Tensor:
        """[B, L, W] to the same; with ``row`` (for all, or int64 [B]) to that row, [B, 1, W]."""
        last = len(self.resblocks) - 1
        for i, block in enumerate(self.resblocks):
            arguments = (x, row if i == last else None, self.causal)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, *arguments)
            else:
                x = block(*arguments)
        return x


class VisionTransformer(nn.Module):
    """ViT with CLIP's norm before the blocks: [B, 3, S, S] to [B, output_dim].

    ``pool="tok"`` projects the class token after ``ln_post``; ``"avg"`` the mean of the patch
    tokens after ``ln_post`` (open_clip's definition). Initialisation: class token, positions and
    projection N(0, 1/width), the blocks as torch's defaults.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        *,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        pool: str = "tok",
    ) -> None:
        super().__init__()
        if pool not in ("tok", "avg"):
            raise ValueError(f"VisionTransformer: pool must be 'tok' or 'avg', got {pool!r}")
        self.image_size, self.patch_size, self.pool = image_size, patch_size, pool
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        grid = self._grid(image_size)
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width, layers, heads, mlp_ratio=mlp_ratio, quick_gelu=quick_gelu
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, output_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=self.class_embedding.shape[0] ** -0.5)

    def forward(self, pixel_values: Tensor, project: bool = True) -> Tensor:
        """``project=False`` gives the pooled [B, width], what a linear probe reads."""
        x = self.tokens(pixel_values)
        if self.pool == "tok":
            x = self.ln_post(self.transformer(x, row=0)[:, 0])
        else:
            x = self.ln_post(self.transformer(x))[:, 1:].mean(1)
        return x @ self.proj if project else x

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] to what enters the blocks: class token and patches, [B, L, width]."""
        _check_pixels("VisionTransformer", pixel_values, self.image_size)
        x = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1).to(x.dtype), x], dim=1)
        return self.ln_pre(x + self.positional_embedding)

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Take images of another size from now on; positions are interpolated in place."""
        grid = self._grid(image_size)
        self.positional_embedding = nn.Parameter(resize_positions(self.positional_embedding, grid))
        self.image_size = image_size

    def _grid(self, image_size: int) -> int:
        if image_size < self.patch_size:
            raise ValueError(
                f"VisionTransformer: image_size must be at least patch_size {self.patch_size}, "
                f"got {image_size}"
            )
        return image_size // self.patch_size


class Bottleneck(nn.Module):
    """ResNet bottleneck whose stride is an average pool after ``conv2`` and in the shortcut."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            # The pool has no weights and OpenAI's keys count from the convolution: "-1", "0", "1".
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            layers["-1"] = nn.AvgPool2d(stride)
            layers["0"] = nn.Conv2d(inputs, outputs, 1, bias=False)
            layers["1"] = nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Each residual branch starts at zero.
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + self.downsample(x), inplace=True)


class AttentionPool2d(nn.Module):
    """One attention query, the spatial mean, over the grid and itself: [B, C, G, G] to [B, D].

    Initialisation: positions and the four projections' weights N(0, 1/C).
    """

    def __init__(self, grid: int, width: int, heads: int, output_dim: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"AttentionPool2d: width {width} must be a multiple of heads {heads}")
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(grid**2 + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        projections = (self.k_proj, self.q_proj, self.v_proj, self.c_proj)
        for weight in (self.positional_embedding, *(p.weight for p in projections)):
            nn.init.normal_(weight, std=self.k_proj.in_features**-0.5)

    def forward(self, x: Tensor, project: bool = True) -> Tensor:
        """``project=False`` leaves out ``c_proj``: [B, C]."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
        q, k, v = (
            projection(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, tokens in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        pooled = F.scaled_dot_product_attention(q, k, v).flatten(1)
        return self.c_proj(pooled) if project else pooled


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: [B, 3, S, S] to [B, output_dim] (paper, section 2.4).

    Three 3x3 stem convolutions, anti-aliased strides (average pools), attention pooling at the end.
    ``layers`` are the four stages' depths; the pooled width is ``32·width``.
    """

    def __init__(
        self, image_size: int, width: int, layers: tuple[int, ...], heads: int, output_dim: int
    ) -> None:
        super().__init__()
        if len(layers) != 4 or min(layers) < 1:
            raise ValueError(f"ModifiedResNet: layers must be four positive numbers, got {layers}")
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        inputs = width
        for stage, depth in enumerate(layers):
            planes = width * 2**stage
            blocks = []
            for index in range(depth):
                blocks.append(Bottleneck(inputs, planes, 2 if stage and not index else 1))
                inputs = 4 * planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool2d(self._grid(image_size), inputs, heads, output_dim)

    def forward(self, pixel_values: Tensor, project: bool = True) -> Tensor:
        """``project=False`` gives the attention-pooled [B, 32·width]."""
        _check_pixels("ModifiedResNet", pixel_values, self.image_size)
        x = pixel_values.to(self.conv1.weight.dtype)
        for i in (1, 2, 3):
            norm, conv = self.get_submodule(f"bn{i}"), self.get_submodule(f"conv{i}")
            x = F.relu(norm(conv(x)), inplace=True)
        x = F.avg_pool2d(x, 2)
        for i in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{i}")(x)
        return self.attnpool(x, project)

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Take images of another size from now on; positions are interpolated in place."""
        grid = self._grid(image_size)
        positions = resize_positions(self.attnpool.positional_embedding, grid)
        self.attnpool.positional_embedding = nn.Parameter(positions)
        self.image_size = image_size

    @staticmethod
    def _grid(image_size: int) -> int:
        if image_size < 32 or image_size % 32:
            raise ValueError(
                f"ModifiedResNet: image_size must be a positive multiple of 32, got {image_size}"
            )
        return image_size // 32


class TextMixin:
    """The text tower's parts, held by whichever module inherits this.

    OpenAI's layout keeps them at the model's top level (``transformer.*``, ``ln_final.*`` ...), so
    the whole model inherits; :class:`TextTransformer` is the tower alone. The class that inherits
    is an ``nn.Module`` and calls :meth:`build_text` after that class's ``__init__``.
    """

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Transformer
    ln_final: nn.LayerNorm
    text_projection: nn.Parameter
    eot_token_id: int | None

    def build_text(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        *,
        quick_gelu: bool = False,
        eot_token_id: int | None = None,
    ) -> None:
        """Create the parts; ``eot_token_id=None`` pools at a row's largest id, as OpenAI does."""
        self.eot_token_id = eot_token_id
        self.transformer = Transformer(width, layers, heads, quick_gelu=quick_gelu, causal=True)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, output_dim))
        self.reset_text_parameters()

    def reset_text_parameters(self) -> None:
        """The paper's initialisation, with d the width and L the layers.

        N(0, σ): tokens 0.02, positions 0.01, attention input d^-½, both residual outputs
        d^-½·(2L)^-½, first MLP layer (2d)^-½, projection d^-½; the rest are torch's defaults.
        """
        width = self.ln_final.weight.shape[0]
        residual = (2 * width * len(self.transformer.resblocks)) ** -0.5
        deviations = {
            "attn.in_proj_weight": width**-0.5,
            "attn.out_proj.weight": residual,
            "mlp.c_fc.weight": (2 * width) ** -0.5,
            "mlp.c_proj.weight": residual,
        }
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for name, parameter in self.transformer.resblocks.named_parameters():
            _, leaf = name.split(".", 1)
            if leaf in deviations:
                nn.init.normal_(parameter, std=deviations[leaf])

    def text_features(self, input_ids: Tensor) -> Tensor:
        """int64 or int32 [B, L] to [B, output_dim]; L at most the context length.

        Attention is causal, so columns behind the last pooled position reach nothing: on a CPU,
        where looking at the ids is free, they are cut off and the ids are checked.
        """
        limit = self.positional_embedding.shape[0]
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                "encode_text: input_ids must be integers [batch, length], got "
                f"{input_ids.dtype} {list(input_ids.shape)}"
            )
        if not 1 <= input_ids.shape[1] <= limit:
            raise ValueError(
                f"encode_text: input_ids must have 1 to {limit} columns (the context length), "
                f"got {input_ids.shape[1]}"
            )
        ends = input_ids if self.eot_token_id is None else (input_ids == self.eot_token_id).int()
        row = ends.argmax(-1)
        on_host = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and input_ids.numel():
            self._check_ids(input_ids, ends)
            input_ids = input_ids[:, : int(row.max()) + 1]
        x = self.token_embedding(input_ids) + self.positional_embedding[: input_ids.shape[1]]
        return self.ln_final(self.transformer(x, row=row)[:, 0]) @ self.text_projection

    def _check_ids(self, input_ids: Tensor, ends: Tensor) -> None:
        vocabulary = self.token_embedding.num_embeddings
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"encode_text: input_ids must lie in [0, {vocabulary}), got {low} to {high}"
            )
        if self.eot_token_id is not None and not bool(ends.any(-1).all()):
            sample = int(ends.any(-1).logical_not().int().argmax())
            raise ValueError(
                f"encode_text: input_ids[{sample}] has no end token {self.eot_token_id}"
            )


class TextTransformer(TextMixin, nn.Module):
    """CLIP's text tower alone: ids [B, L] to [B, output_dim] (paper, section 2.4).

    Arguments are those of :meth:`TextMixin.build_text`. The feature is the pooled token of the
    last layer, after ``ln_final``, times ``text_projection``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.build_text(*args, **kwargs)

    def reset_parameters(self) -> None:
        self.reset_text_parameters()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_features(input_ids)


def resize_positions(positions: Tensor, grid: int, *, antialias: bool = True) -> Tensor:
    """Positions [1 + g², W] of a class token and a g×g grid, resampled to [1 + grid², W].

    Bicubic with anti-aliasing, as open_clip does, or without (another kernel, also for larger
    grids), as transformers and XComposer2 do; the first row is kept. An equal grid returns a copy,
    bit for bit.
    """
    old = round((positions.shape[0] - 1) ** 0.5)
    if old == grid:
        return positions.detach().clone()
    square = positions[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=antialias)
    square = square.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(positions.dtype)
    return torch.cat([positions[:1], square])


def _check_pixels(tower: str, pixel_values: Tensor, image_size: int) -> None:
    if not pixel_values.is_floating_point():
        raise TypeError(f"{tower}: pixel_values must be floating point, got {pixel_values.dtype}")
    if tuple(pixel_values.shape[1:]) != (3, image_size, image_size) or pixel_values.ndim != 4:
        raise ValueError(
            f"{tower}: pixel_values must be [batch, 3, {image_size}, {image_size}], "
            f"got {list(pixel_values.shape)}"
        )
