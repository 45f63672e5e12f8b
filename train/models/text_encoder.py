"""Caption tokens for a prior or a decoder: the frozen CLIP's hidden states, or a Transformer of its own (GLIDE §4).

The vocabulary's embedding (49,408 × width) costs a small model more than all its other weights, and hidden states
of the frozen CLIP come free with each batch; the paper trains its own encoder, 24 blocks of width 2,048.

Both put a *learned padding vector* in the places after the caption's end (GLIDE's code), so the network never
reads what an encoder happens to say there, and need no mask. The caption's end is its largest token id, which is
CLIP's end-of-text.

Shapes: B batch, T context, W the hidden states' width, C width of the tokens handed out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from train.models.transformer import Transformer


def last_token(tokens_BT: Tensor) -> Tensor:
    """(B,) place of end-of-text in each caption."""
    return tokens_BT.argmax(dim=1)


def places_of(tokens_BT: Tensor) -> Tensor:
    """(1, T): 0 … T−1."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]


class HiddenStateText(nn.Module):
    """Projects the frozen CLIP's hidden states; its summary is the projected state at end-of-text.

    That state is what CLIP learned to say things with. The mean over the caption's states, which looks like the more
    complete summary, is a far worse one: from the caption alone backgrounds fell from all right to one in five.
    """

    def __init__(self, *, context: int, hidden_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_width)
        self.project = nn.Linear(hidden_width, width)
        self.padding = nn.Parameter(torch.randn(context, width) * 0.02)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)

    def forward(self, tokens_BT: Tensor, hidden_BTW: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C), and their summary (B, C)."""
        states = self.project(self.norm(hidden_BTW.to(self.project.weight.dtype))) + self.position
        end_B = last_token(tokens_BT)
        summary = states[torch.arange(len(states), device=states.device), end_B]
        inside_BT = places_of(tokens_BT) <= end_B[:, None]
        return torch.where(inside_BT[..., None], states, self.padding.to(states.dtype)), summary


class TokenText(nn.Module):
    """A Transformer over the caption's own tokens (GLIDE's text encoder), causal as CLIP's is.

    With `depth` 0 it is the embedding alone, for a prior whose own Transformer reads the caption.
    """

    def __init__(
        self, *, vocabulary: int, context: int, width: int, depth: int, heads: int, out_width: int | None = None
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.01)
        self.padding = nn.Parameter(torch.randn(context, width) * 0.01)
        self.transformer = Transformer(width=width, depth=depth, heads=heads, causal=True) if depth else None
        self.project = nn.Linear(width, out_width) if out_width is not None else nn.Identity()
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens_BT: Tensor, hidden_BTW: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C), and their summary (B, C)."""
        end_B = last_token(tokens_BT)
        states = self.embedding(tokens_BT) + self.position
        states = torch.where((places_of(tokens_BT) <= end_B[:, None])[..., None], states, self.padding)
        if self.transformer is not None:
            states, _ = self.transformer(states)
        summary = states[torch.arange(len(states), device=states.device), end_B]
        return self.project(states), self.project(summary)
