"""The ADM U-Net (ADM appendix; guided-diffusion) with GLIDE's text tokens as extra keys and values.

    pixels → [unshuffle by `patch`] → conv → (res-blocks [+ attention] → res-block down) × levels
           → middle → (res-blocks [+ attention] → res-block up) × levels → norm, SiLU, zero conv → [shuffle]

Res-blocks take the conditioning vector as a scale and shift after the second norm, and resample inside the block.
The last layer of every branch starts at zero: an untrained block is the identity, an untrained net answers zero.
`positions` adds a learned embedding to every pixel of the first feature map: a net of few layers otherwise knows where
it is only by the zeros that pad its convolutions. It ties the net to one size. The paper's nets do without.
`patch` 2 runs the whole net at half the resolution: on a CPU it halves a training step for small pictures.

Shapes: B batch, C channels, H W pixels, N = H·W, T context tokens, E width of the conditioning vector, X context width.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.embeddings import timestep_embedding


def normalization(channels: int) -> nn.GroupNorm:
    """32 groups as in ADM; fewer where a small model's channels do not divide."""
    return nn.GroupNorm(next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0), channels)


M = TypeVar("M", bound=nn.Module)


def zeroed(module: M) -> M:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_width: int,
        *,
        dropout: float,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_in = normalization(channels)
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embed = nn.Linear(embedding_width, 2 * out_channels)
        self.norm_out = normalization(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor) -> Tensor:
        h = F.silu(self.norm_in(x_BCHW))
        if self.resample == "up":
            h, x_BCHW = (F.interpolate(each, scale_factor=2.0, mode="nearest") for each in (h, x_BCHW))
        elif self.resample == "down":
            h, x_BCHW = F.avg_pool2d(h, 2), F.avg_pool2d(x_BCHW, 2)
        h = self.conv_in(h)
        scale, shift = self.embed(F.silu(embedding_BE))[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(h) * (1 + scale) + shift
        result: Tensor = self.skip(x_BCHW) + self.conv_out(self.dropout(F.silu(h)))
        return result


class AttentionBlock(nn.Module):
    """Every pixel attends to the pixels and to the context tokens (GLIDE §4, after DALL·E's joint sequence)."""

    def __init__(self, channels: int, *, head_channels: int, context_width: int | None) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"{channels} channels are not a multiple of head_channels {head_channels}")
        self.heads = channels // head_channels
        self.norm = normalization(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_width, 2 * channels) if context_width is not None else None
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x_BCHW: Tensor, context_BTX: Tensor | None) -> Tensor:
        height, width = x_BCHW.shape[2:]
        x_BNC = self.norm(x_BCHW).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x_BNC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.context_kv is not None and context_BTX is not None:
            context = self.context_kv(context_BTX).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
            k, v = torch.cat([context[0], k], dim=2), torch.cat([context[1], v], dim=2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = x_BCHW + self.out(attended).transpose(1, 2).unflatten(2, (height, width))
        return result


class Level(nn.Module):
    """One res-block, with attention where the level has it."""

    def __init__(self, block: ResBlock, attention: AttentionBlock | None) -> None:
        super().__init__()
        self.block, self.attention = block, attention
        self.enlarges = block.resample == "up"

    def forward(self, x_BCHW: Tensor, embedding_BE: Tensor, context_BTX: Tensor | None) -> Tensor:
        x_BCHW = self.block(x_BCHW, embedding_BE)
        return x_BCHW if self.attention is None else self.attention(x_BCHW, context_BTX)


class UNet(nn.Module):
    """Answers at x_t's resolution, `out_channels` deep.

    `attention_at` names the resolutions that carry attention, counted in the net's own pixels: of a picture of
    `image_size`, after unshuffling. The middle attends when its resolution is named.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_multipliers: tuple[int, ...],
        res_blocks: int,
        attention_at: tuple[int, ...] = (),
        head_channels: int = 64,
        context_width: int | None = None,
        dropout: float = 0.0,
        patch: int = 1,
        positions: bool = False,
    ) -> None:
        super().__init__()
        factor = patch * 2 ** (len(channel_multipliers) - 1)
        if image_size % factor:
            raise ValueError(
                f"image_size {image_size} cannot be divided by {factor} (patch {patch}, {len(channel_multipliers)} "
                "levels): use fewer channel_multipliers or a smaller patch"
            )
        self.patch, self.channels, self.size_multiple = patch, channels, factor
        self.embedding_width = 4 * channels
        self.embed_timestep = nn.Sequential(
            nn.Linear(channels, self.embedding_width), nn.SiLU(), nn.Linear(self.embedding_width, self.embedding_width)
        )

        def level(
            c_in: int, c_out: int, size: int, resample: Literal["up", "down"] | None = None, attend: bool = True
        ) -> Level:
            block = ResBlock(c_in, c_out, self.embedding_width, dropout=dropout, resample=resample)
            if not attend or size not in attention_at:
                return Level(block, None)
            return Level(block, AttentionBlock(c_out, head_channels=head_channels, context_width=context_width))

        size, c = image_size // patch, channels * channel_multipliers[0]
        self.conv_in = nn.Conv2d(in_channels * patch**2, c, 3, padding=1)
        self.positions = nn.Parameter(torch.zeros(c, size, size)) if positions else None
        self.down, skips = nn.ModuleList(), [c]
        for depth, multiplier in enumerate(channel_multipliers):
            for _ in range(res_blocks):
                self.down.append(level(c, channels * multiplier, size))
                c = channels * multiplier
                skips.append(c)
            if depth < len(channel_multipliers) - 1:
                size //= 2
                self.down.append(level(c, c, size, "down", attend=False))
                skips.append(c)
        self.middle = nn.ModuleList([level(c, c, size), level(c, c, size, attend=False)])
        self.up = nn.ModuleList()
        for depth, multiplier in reversed(list(enumerate(channel_multipliers))):
            for _ in range(res_blocks + 1):
                self.up.append(level(c + skips.pop(), channels * multiplier, size))
                c = channels * multiplier
            if depth > 0:
                size *= 2
                self.up.append(level(c, c, size, "up", attend=False))
        self.norm_out = normalization(c)
        self.conv_out = zeroed(nn.Conv2d(c, out_channels * patch**2, 3, padding=1))

    def forward(
        self,
        x_BCHW: Tensor,
        timestep_B: Tensor,
        *,
        condition_BE: Tensor | None = None,
        context_BTX: Tensor | None = None,
    ) -> Tensor:
        """`condition_BE` is added to the timestep's embedding; `context_BTX` are extra keys and values."""
        if x_BCHW.shape[2] % self.size_multiple or x_BCHW.shape[3] % self.size_multiple:
            raise ValueError(f"picture of {tuple(x_BCHW.shape[2:])} pixels: sides must divide by {self.size_multiple}")
        embedding = self.embed_timestep(timestep_embedding(timestep_B, self.channels).to(self.conv_in.weight.dtype))
        if condition_BE is not None:
            embedding = embedding + condition_BE
        h = self.conv_in(F.pixel_unshuffle(x_BCHW, self.patch).contiguous(memory_format=torch.channels_last))
        if self.positions is not None:
            h = h + self.positions
        skips = [h]
        for level in self.down:
            h = level(h, embedding, context_BTX)
            skips.append(h)
        for level in self.middle:
            h = level(h, embedding, context_BTX)
        for level in self.up:
            if not level.enlarges:
                h = torch.cat([h, skips.pop()], dim=1)
            h = level(h, embedding, context_BTX)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)
