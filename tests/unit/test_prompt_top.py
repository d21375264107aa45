"""A prompt's likeliest tokens beside its log-probabilities, against torch's own softmax and sort."""

import torch

from cluster.engine.outcomes import _columns, _of_next


def test_each_next_tokens_rank_and_the_likeliest_ones():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 7, 49, 3, 3])
    whole = _of_next(logits, tokens, 4)
    probs, order = logits.log_softmax(-1), logits.argsort(-1, descending=True)
    for row, (found, token) in enumerate(zip(whole, tokens, strict=True)):
        assert torch.isclose(found[0], probs[row, token])
        assert int(found[1]) == order[row].tolist().index(int(token)) + 1
        assert found[2:6].int().tolist() == order[row, :4].tolist()
        assert torch.allclose(found[6:], probs[row, order[row, :4]])
    assert torch.equal(_columns(whole, 0, 4), whole[:, 0])
    assert torch.equal(_columns(whole, 2, 4), whole[:, [0, 1, 2, 3, 6, 7]])
