import pytest
import torch

from train.models.text_encoder import HiddenStateText, TokenText

TOKENS = torch.tensor([[97, 5, 6, 99, 0, 0, 0, 0], [97, 7, 99, 0, 0, 0, 0, 0]])


def encoders():
    torch.manual_seed(0)
    return [
        HiddenStateText(context=8, hidden_width=12, width=16),
        TokenText(vocabulary=100, context=8, width=16, depth=2, heads=2),
        TokenText(vocabulary=100, context=8, width=16, depth=0, heads=1),
    ]


@pytest.mark.parametrize("encoder", encoders())
def test_nothing_after_the_end_of_the_caption_is_read(encoder):
    hidden = torch.randn(2, 8, 12)
    elsewhere = hidden.clone()
    elsewhere[0, 4:], elsewhere[1, 3:] = 9.0, -9.0
    padded = TOKENS.clone()
    padded[0, 4:] = 3
    for one, other in zip(encoder(TOKENS, hidden), encoder(padded, elsewhere), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("encoder", encoders())
def test_tokens_and_summary_have_the_width(encoder):
    states, summary = encoder(TOKENS, torch.randn(2, 8, 12))
    assert states.shape == (2, 8, 16) and summary.shape == (2, 16)
