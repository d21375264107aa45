"""Sequences whose experts are lost leave their step; the others finish it. Over a dispatcher that loses on command."""

import pytest
import torch

from cluster.errors import ShardUnavailable
from cluster.experts.step import EverySequenceLost, StepExperts


class Flight:
    def __init__(self, ids):
        self.ids, self.abandoned = ids, False

    def abandon(self):
        self.abandoned = True


class Losing:
    """Answers zeros; loses the rows that ask for one of the `lost` experts. Keeps the ids that it was sent."""

    def __init__(self, lost=()):
        self.lost, self.sent, self.alone, self.epoch = set(lost), [], [], 1

    def dispatch(self, layer_id, hidden_states, topk_ids, topk_weights, *, alone=True):
        self.sent.append(topk_ids.tolist())
        self.alone.append(alone)
        return Flight(topk_ids)

    def combine(self, flight, losses):
        rows = torch.tensor([any(int(e) in self.lost for e in row) for row in flight.ids]).nonzero().squeeze(1)
        if rows.numel():
            if losses is None:
                raise ShardUnavailable("shard 1 is gone", 1)
            losses.lose(rows, ShardUnavailable("shard 1 is gone", 1))
        return torch.zeros(len(flight.ids), 1)


CPU = torch.device("cpu")


def call(part, *ids):
    rows = torch.tensor(ids)
    return part.combine(part.dispatch(0, torch.zeros(len(ids), 1), rows, torch.ones(rows.shape)))


def test_a_lost_row_takes_its_sequence_along_and_no_other():
    """Three sequences of 2, 1 and 2 rows; the second row of the first one, and one of the third, need expert 9."""
    losing = Losing({9})
    step = StepExperts(losing, 3)
    part = step.part(0, [2, 1, 2], CPU)
    call(part, [0, 1], [9, 2], [3, 4], [5, 6], [7, 9])
    assert sorted(step.lost) == [0, 2]
    call(part, [0, 1], [1, 2], [3, 4], [5, 6], [7, 8])
    assert step.epoch == 1
    assert losing.sent[1] == [[-1, -1], [-1, -1], [3, 4], [-1, -1], [-1, -1]], "nothing more is computed for them"


def test_a_step_knows_the_plan_that_lacked_an_expert_first():
    """The next plan may have it already: the engine then hears of it as news."""
    losing = Losing({9})
    step = StepExperts(losing, 3)
    part = step.part(0, [1, 1, 1], CPU)
    call(part, [9], [2], [3])
    losing.epoch = 2
    call(part, [1], [9], [3])
    assert (sorted(step.lost), step.epoch) == ([0, 1], 1)


def test_micro_batches_share_what_they_know_of_silent_shards():
    step = StepExperts(Losing(), 2)
    first, second = step.part(0, [1], CPU), step.part(1, [1], CPU)
    first.hung.add((1, 3))
    assert second.hung == step.hung == {(1, 3)}


@pytest.mark.parametrize("num_parts", [1, 2])
def test_rows_of_a_step_in_parts_are_not_alone_under_way(num_parts):
    losing = Losing()
    step = StepExperts(losing, 2)
    for part in [step.part(number, [1], CPU) for number in range(num_parts)]:
        call(part, [1])
    assert losing.alone == [num_parts == 1] * num_parts


def test_micro_batches_count_their_sequences_on():
    step = StepExperts(Losing({9}), 3)
    first, second = step.part(0, [1, 1], CPU), step.part(2, [2], CPU)
    call(first, [1], [2])
    call(second, [3], [4])
    assert step.lost == {}
    call(first, [1], [9])
    assert list(step.lost) == [1]


def test_a_step_without_a_living_sequence_ends():
    step = StepExperts(Losing({9}), 2)
    first, second = step.part(0, [1], CPU), step.part(1, [1], CPU)
    flight = second.dispatch(0, torch.zeros(1, 1), torch.tensor([[9]]), torch.ones(1, 1))
    call(first, [9])
    with pytest.raises(EverySequenceLost):
        second.combine(flight)
    step.abandon()
    assert flight.abandoned
