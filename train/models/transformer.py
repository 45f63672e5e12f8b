"""One Transformer for the text encoder and the priors: pre-norm blocks, fused qkv, scaled_dot_product_attention.

With a causal mask a prefix never sees what follows it, so its keys and values can be computed once and handed back
as `past`: the diffusion prior samples 64 steps over three tokens this way, not over the whole sequence.

Shapes: B batch, S sequence, P positions held in `past`, H heads, D width of a head, C width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # each (B, H, P, D)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}: choose heads that divide it")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BSC: Tensor, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        q, k, v = self.qkv(x_BSC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # B H S D
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mask = None
        if self.causal and past is not None:  # is_causal aligns to the top left corner; a tail's mask is the bottom
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and past is None)
        return self.out(attended.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=causal)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width), nn.Dropout(dropout)
        )

    def forward(self, x_BSC: Tensor, past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        attended, keys_values = self.attention(self.norm_attention(x_BSC), past)
        x_BSC = x_BSC + attended
        return x_BSC + self.mlp(self.norm_mlp(x_BSC)), keys_values


class Transformer(nn.Module):
    """`depth` blocks and a last norm; positions are the caller's business."""

    def __init__(
        self, *, width: int, depth: int, heads: int, causal: bool, mlp_ratio: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, causal=causal, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.2.weight")):
                # A residual stream of 2·depth branches keeps unit variance (GPT-2 §2.3).
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth))
            elif name.endswith(("qkv.weight", "mlp.0.weight")):
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith(("qkv.bias", "out.bias", "mlp.0.bias", "mlp.2.bias")):
                nn.init.zeros_(parameter)

    def forward(self, x_BSC: Tensor, past: list[KeysValues] | None = None) -> tuple[Tensor, list[KeysValues]]:
        """The sequence, and every block's keys and values (those of `past` first)."""
        present: list[KeysValues] = []
        for index, block in enumerate(self.blocks):
            x_BSC, keys_values = block(x_BSC, None if past is None else past[index])
            present.append(keys_values)
        return self.norm(x_BSC), present
