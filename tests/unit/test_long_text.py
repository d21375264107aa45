"""A text in parts has the tokens of the whole: against transformers' tokenizer over the whole text."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.client.long_text import tokenize_in_parts
from cluster.errors import InvalidRequest

PIECES = st.sampled_from([
    "word", "don't", " ", "  ", "\n", "\r\n", "\t", "。", "你好", "é", "e\u0301", "日本語", "123", "<|im_end|>",
    "<|im_", "!?", "...", "_", "-", "'s", "🙂", "कि", " A",
])  # fmt: skip


@pytest.fixture(scope="module")
def theirs(demo_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_checkpoint)


class Counted:
    """Tokenizes, and keeps the lengths of its texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.lengths: list[int] = []

    def __call__(self, text: str) -> list[int]:
        self.lengths.append(len(text))
        return list(self._tokenizer(text)["input_ids"])


@given(pieces=st.lists(PIECES, max_size=60))
@example(["word", "<|im_", "end|>"] * 12)
@settings(max_examples=150, deadline=None)
def test_parts_have_the_tokens_of_the_whole(theirs: PreTrainedTokenizerBase, pieces: list[str]) -> None:
    text = "".join(pieces)
    try:
        found = tokenize_in_parts(text, Counted(theirs), 40)
    except InvalidRequest:
        return  # no word ends there
    assert found == list(theirs(text)["input_ids"])


def test_no_part_is_longer_than_a_request_may_be_and_usual_texts_need_few(theirs: PreTrainedTokenizerBase) -> None:
    text = "The experts answered.\n\nAll of them, twice; nobody's word was lost.\r\n" * 200
    counted = Counted(theirs)
    assert tokenize_in_parts(text, counted, 3000) == list(theirs(text)["input_ids"])
    parts = -(-len(text) // 2900)
    assert max(counted.lengths) <= 3000
    assert parts <= len(counted.lengths) <= 4 * parts + 1


def test_a_text_that_fits_is_sent_once(theirs: PreTrainedTokenizerBase) -> None:
    counted = Counted(theirs)
    assert tokenize_in_parts("a b c", counted, 5) == list(theirs("a b c")["input_ids"])
    assert counted.lengths == [5]


@pytest.mark.parametrize("text", ["1" * 100, "a" * 100, " " * 100])
def test_a_text_without_a_place_to_cut_is_refused_with_another_way(theirs: PreTrainedTokenizerBase, text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"characters 0 to 40 of the text cannot be cut .* --token-ids"):
        tokenize_in_parts(text, Counted(theirs), 40)


def test_a_tokenizer_that_adds_a_token_to_each_text_is_found_out(demo_checkpoint: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    adding = Reference.from_file(str(demo_checkpoint / "tokenizer.json"))
    adding.post_processor = TemplateProcessing(single="<|im_end|> $A", special_tokens=[("<|im_end|>", 5)])
    with pytest.raises(InvalidRequest, match="cannot be cut"):
        tokenize_in_parts("some words and more " * 10, lambda text: adding.encode(text).ids, 40)
