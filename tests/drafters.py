"""Drafters that tests give an engine, and a payoff that always tries what is drafted."""

import random

from cluster.engine.speculation import SpeculatingRunner


class Always:
    """In the place of a `Payoff`. Keeps how many tokens each step tried."""

    def __init__(self):
        self.tried = []

    def lengths(self, chances, room):
        lengths = []
        for most, _ in chances:
            lengths.append(min(most, room))
            room -= lengths[-1]
        return lengths

    def record(self, num_sequences, num_drafted, seconds):
        self.tried.append(num_drafted)


class Told:
    """Knows the answers, by prompt; each of its tokens is wrong with a probability, so drafts break off anywhere."""

    prior = 0.5
    steady = True

    def __init__(self, answers, wrong=0.0, vocab_size=2, seed=0):
        self.answers = {tuple(prompt): list(answer) for prompt, answer in answers}
        self.wrong, self.vocab_size, self.random = wrong, vocab_size, random.Random(seed)

    def offers(self, sequences, rooms):
        return rooms

    def drafts(self, sequences, lengths):
        return [self.draft(s, length) for s, length in zip(sequences, lengths, strict=True)]

    def draft(self, sequence, length):
        answer = self.answers.get(tuple(sequence.request.prompt_token_ids), [])
        tokens = answer[sequence.num_output_tokens : sequence.num_output_tokens + length]
        return tuple(self.random.randrange(self.vocab_size) if self.random.random() < self.wrong else t for t in tokens)


def with_drafts(engine, drafter, num_ahead=3):
    """Gives a running engine drafts; returns the payoff."""
    payoff, max_rows = Always(), engine.scheduler.max_num_batched_tokens
    engine.runner = SpeculatingRunner(engine.runner, drafter, payoff, num_ahead=num_ahead, max_rows=max_rows)
    engine.scheduler.num_ahead = num_ahead
    return payoff


def always(llm, drafter=None):
    """Makes an `LLM` try all that is drafted; returns the payoff."""
    runner = llm.engine.runner
    runner.payoff = Always()
    if drafter is not None:
        runner.drafter = drafter
    return runner.payoff
