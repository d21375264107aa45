"""The texts that the demo's model is trained with, and a training that is broken off and gone on with."""

import importlib
import math
import random
import sys
from pathlib import Path

import pytest
import torch

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"


@pytest.fixture(scope="module")
def modules():
    """texts, batches and train of deploy/demo, which import one another as scripts do."""
    sys.path.insert(0, str(DEMO))
    try:
        yield [importlib.import_module(name) for name in ("texts", "batches", "train")]
    finally:
        sys.path.remove(str(DEMO))
        for name in ("texts", "batches", "train"):
            sys.modules.pop(name)


def test_a_wording_stands_for_each_of_its_choices(modules):
    texts, _, _ = modules
    assert texts.expanded("[What|Who] is [this|]?") == ["What is this?", "What is ?", "Who is this?", "Who is ?"]
    assert texts.expanded("Hello") == ["Hello"]


def test_a_pair_without_an_answer_or_with_a_stray_line_is_refused(modules, tmp_path):
    texts, _, _ = modules
    file = tmp_path / "topic.txt"
    file.write_text("? one\n~ two\n= three\n\n? four\n= five\n")
    [first, second] = texts.read_pairs(tmp_path)
    assert first == texts.Pair("topic", ("one",), ("two",), "three")
    assert second == texts.Pair("topic", ("four",), (), "five")
    for wrong in ("? one\n", "= three\n", "? one\n= two\n= three\n", "? one\nstray\n= two\n"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"^topic\.txt: a pair has"):
            texts.read_pairs(tmp_path)


def test_every_varied_wording_is_a_text(modules):
    texts, _, _ = modules
    rng = random.Random(0)
    found = {texts.varied(wording, rng) for _ in range(500) for wording in ("?", "Why?", "What is a router?")}
    assert all(text.strip() == text and text for text in found)
    assert len(found) > 50


def test_a_short_row_ends_in_an_answer_and_names_its_pair_once(modules):
    """A character is a token here."""
    texts, batches, _ = modules
    pairs = [texts.Pair("a", ("x",), (), "first"), texts.Pair("unknown", ("y",), (), "second")]

    def encode(text):
        return [ord(text[0])] if text == batches.ENDOFTEXT else [ord(char) for char in text]

    row = batches.Row(encode)
    drawn = batches.Conversations(pairs, encode, seed=0)
    drawn._turn(row, pairs[1])
    text = "".join(map(chr, row.ids))
    begin = text.index("second")
    assert [at for at, number in enumerate(row.pairs) if number >= 0] == [begin - 1]
    assert row.pairs[begin - 1] == 1
    assert row.weights[begin : begin + 6] == [3.0, 3.0, 3.0, 3.0, 1.0, 1.0]
    assert set(row.topics[begin:]) == {1}
    assert row.topics[0] == -1
    batch = drawn.batch(short=True)
    assert batch.ids.shape == batch.weights.shape == batch.topics.shape == batch.pairs.shape == (28, 28)


def test_the_mutual_information_is_that_of_experts_that_keep_to_topics_and_of_those_that_do_not(modules):
    """Two topics with an expert each share ln 2 nats, and none where both use both alike."""
    _, _, train = modules
    topics = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert train.mutual_information(apart, topics, 2).item() == pytest.approx(math.log(2), abs=1e-6)
    assert train.mutual_information(torch.full((4, 2), 0.5), topics, 2).item() == pytest.approx(0.0, abs=1e-6)


@pytest.fixture
def one_thread():
    """With several, torch adds a gradient's parts up in the order in which they come."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_a_training_that_was_broken_off_ends_as_one_that_was_not(modules, one_thread, tmp_path):
    texts, batches, train = modules
    pairs = texts.read_pairs()

    def begin():
        torch.manual_seed(0)
        conversations = batches.Conversations(pairs, lambda text: [ord(char) % 64 for char in text][:1] or [0], seed=0)
        return train.Training(train.make_model(64, 1, 0), conversations)

    whole = begin()
    for _ in range(3):
        whole.run_step(100)
    broken = begin()
    broken.run_step(100)
    broken.keep(tmp_path / "kept")
    resumed = begin()
    resumed.go_on_from(tmp_path / "kept")
    for _ in range(2):
        resumed.run_step(100)
    assert resumed.step == whole.step == 3
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
