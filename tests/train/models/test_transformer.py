import pytest
import torch

from train.models.transformer import Transformer


def some_transformer(*, causal: bool) -> Transformer:
    torch.manual_seed(0)
    return Transformer(width=32, depth=3, heads=4, causal=causal).eval()


def test_causal_mask_hides_what_follows():
    model, sequence = some_transformer(causal=True), torch.randn(2, 9, 32)
    changed = sequence.clone()
    changed[:, 6:] = torch.randn(2, 3, 32)
    before, after = model(sequence)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 0.01


def test_without_a_mask_every_position_sees_every_other():
    model, sequence = some_transformer(causal=False), torch.randn(2, 9, 32)
    changed = sequence.clone()
    changed[:, -1] = torch.randn(2, 32)
    assert (model(sequence)[0] - model(changed)[0])[:, 0].abs().max() > 1e-3


@pytest.mark.parametrize("prefix", [1, 4, 8])
def test_keys_and_values_of_a_prefix_give_the_same_tail(prefix):
    model, sequence = some_transformer(causal=True), torch.randn(2, 9, 32)
    whole, _ = model(sequence)
    _, past = model(sequence[:, :prefix])
    tail, present = model(sequence[:, prefix:], past)
    torch.testing.assert_close(tail, whole[:, prefix:], rtol=1e-5, atol=2e-6)
    assert present[0][0].shape[2] == 9


def test_attention_agrees_with_torch_multihead_attention():
    attention = some_transformer(causal=True).blocks[0].attention
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.out.weight,
            "out_proj.bias": attention.out.bias,
        }
    )
    sequence = torch.randn(2, 9, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(9)
    expected, _ = theirs(sequence, sequence, sequence, attn_mask=mask, is_causal=True)
    torch.testing.assert_close(attention(sequence)[0], expected, rtol=1e-5, atol=1e-6)


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match="width 30 is not a multiple of heads 4"):
        Transformer(width=30, depth=1, heads=4, causal=True)
