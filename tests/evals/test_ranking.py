"""Where the first right candidate stands, by hand and by sorting."""

import pytest
import torch

from pipeline.evals.ranking import ranks, recall


def test_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1], [0.7, 0.7, 0.7]])
    relevant = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0]]).bool()
    assert ranks(scores, relevant).tolist() == [1, 0, 2]  # the tie counts against the model


def test_several_right_candidates_do_not_stand_in_each_others_way():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    assert ranks(scores, torch.tensor([[False, True, True, True]])).tolist() == [1]
    assert ranks(scores, torch.tensor([[True, True, False, True]])).tolist() == [0]


def test_equals_sorting_where_nothing_ties():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(50, 40, generator=generator, dtype=torch.float64)
    relevant = torch.rand(50, 40, generator=generator) < 0.1
    relevant[torch.arange(50), torch.randint(40, (50,), generator=generator)] = True
    order = scores.argsort(dim=1, descending=True)
    first = [int(row.int().argmax()) for row in relevant.gather(1, order)]
    assert ranks(scores, relevant, tie=0).tolist() == first


def test_a_collapsed_model_finds_nothing():
    scores = torch.full((10, 100), 0.3) + 1e-7 * torch.rand(10, 100)
    relevant = torch.eye(100)[:10].bool()
    assert recall(ranks(scores, relevant), at=(1, 5)) == {1: 0.0, 5: 0.0}


def test_recall():
    assert recall(torch.tensor([0, 1, 4, 9]), at=(1, 5, 10)) == {1: 0.25, 5: 0.75, 10: 1.0}


def test_what_cannot_be_ranked():
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="query 1 has no right candidate"):
        ranks(scores, torch.tensor([[True, False, False], [False, False, False]]))
    with pytest.raises(ValueError, match="not finite"):
        ranks(scores / 0, torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 2\)"):
        ranks(scores, torch.ones(2, 2).bool())
