from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import ADDED, HELLO, IM_END, IM_START, NUM_TOKENS, VOCAB_SIZE, byte_ids, write_tokenizer

from cluster.serving.text.detokenizer import StreamDetokenizer
from cluster.serving.text.tokenizer import Tokenizer

EURO = byte_ids("€")  # three bytes, three tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def detokenize(tokenizer, pushes, **options):
    """Returns (pieces with the flushed one last, the detokenizer)."""
    detokenizer = StreamDetokenizer(tokenizer, **options)
    pieces = [detokenizer.push(ids) for ids in pushes]
    return [*pieces, detokenizer.flush()], detokenizer


def splits(ids, cuts):
    """Cuts ids at the given positions."""
    borders = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[a:b] for a, b in pairwise(borders)]


# Often whole characters, often torn ones, special and unknown ids in between.
TOKEN_IDS = st.lists(
    st.one_of(
        st.integers(0, VOCAB_SIZE - 1),
        st.sampled_from([*EURO, *byte_ids("🙂é a"), HELLO, IM_START, IM_END, ADDED, NUM_TOKENS]),
    ),
    max_size=40,
)
CUTS = st.lists(st.integers(0, 1000), max_size=8)


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    pieces, _ = detokenize(tokenizer, [[i] for i in EURO])
    assert pieces == ["", "", "€", ""]


def test_a_torn_character_is_resolved_at_the_end_or_by_the_next_one(tokenizer):
    assert detokenize(tokenizer, [EURO[:2]])[0] == ["", "\ufffd"]
    assert detokenize(tokenizer, [EURO[:2], byte_ids("a")])[0] == ["", "\ufffda", ""]


@settings(max_examples=300, deadline=None)
@given(ids=TOKEN_IDS, cuts=CUTS)
def test_pieces_make_up_the_one_shot_decode(tokenizer, ids, cuts):
    pieces, detokenizer = detokenize(tokenizer, splits(ids, cuts))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert detokenizer.num_tokens == len(ids)


def test_a_possible_stop_string_is_held_back_across_tokens(tokenizer):
    pushes = [byte_ids(c) for c in "aENxEND!"]
    pieces, detokenizer = detokenize(tokenizer, pushes, stop=("END",))
    assert pieces == ["a", "", "", "ENx", "", "", "", "", ""]
    assert detokenizer.stopped == "END"
    assert detokenizer.num_tokens == 7


def test_held_text_comes_at_the_end(tokenizer):
    pieces, detokenizer = detokenize(tokenizer, [byte_ids("aEN")], stop=("END",))
    assert pieces == ["a", "EN"]
    assert detokenizer.stopped is None


def test_tokens_after_the_stop_string_do_not_belong_to_the_answer(tokenizer):
    """ "hello" is one token with "ll" inside: it completes the stop string as token 2 of 4."""
    pieces, detokenizer = detokenize(tokenizer, [(*byte_ids("a"), HELLO, *byte_ids("bc"))], stop=("ll",))
    assert pieces == ["ahe", ""]
    assert (detokenizer.stopped, detokenizer.num_tokens) == ("ll", 2)
    assert detokenizer.push(byte_ids("x")) == ""
    assert detokenizer.num_tokens == 2


def test_min_tokens_lets_an_early_stop_string_through(tokenizer):
    """ "ab" is complete at tokens 2, 4 and 6; the first two are before token 5."""
    pieces, detokenizer = detokenize(tokenizer, [byte_ids("abababab")], stop=("ab",), min_tokens=5)
    assert "".join(pieces) == "abab"
    assert detokenizer.num_tokens == 6


def test_the_stop_string_complete_first_counts_and_the_longer_of_two(tokenizer):
    assert detokenize(tokenizer, [byte_ids("abcd")], stop=("abcd", "bc"))[0] == ["a", ""]
    assert detokenize(tokenizer, [byte_ids("xabc")], stop=("bc", "abc"))[0] == ["x", ""]


def oracle(tokenizer, ids, stop, min_tokens):
    """Text, stop string and number of tokens by decoding every beginning of `ids` anew, one character at a time."""
    seen = 0
    for n in range(1, len(ids) + 2):
        text = tokenizer.decode(ids[:n])
        if n <= len(ids):
            while text.endswith("\ufffd"):  # open unless the next tokens prove otherwise
                text = text[:-1]
        if n >= min_tokens or n > len(ids):
            for end in range(seen + 1, len(text) + 1):
                found = [s for s in stop if text[:end].endswith(s)]
                armed = min(n, len(ids)) >= min_tokens
                if found and armed:
                    longest = max(found, key=len)
                    return text[: end - len(longest)], longest, min(n, len(ids))
        seen = max(seen, len(text))
    return tokenizer.decode(ids), None, len(ids)


@settings(max_examples=400, deadline=None)
@given(
    ids=st.lists(st.sampled_from([*byte_ids("abc"), *EURO, HELLO, IM_END, ADDED]), max_size=30),
    stop=st.lists(st.text("abchelo€日本", min_size=1, max_size=4), min_size=1, max_size=4),
    min_tokens=st.integers(0, 8),
    cuts=CUTS,
)
def test_stop_strings_agree_with_a_naive_search(tokenizer, ids, stop, min_tokens, cuts):
    pieces, detokenizer = detokenize(tokenizer, splits(ids, cuts), stop=tuple(stop), min_tokens=min_tokens)
    expected = oracle(tokenizer, ids, stop, min_tokens)
    assert ("".join(pieces), detokenizer.stopped, detokenizer.num_tokens) == expected


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab", max_size=40), stop=st.text("ab", min_size=1, max_size=5), cuts=CUTS)
def test_no_piece_shows_the_beginning_of_a_stop_string(tokenizer, text, stop, cuts):
    """After each push what is shown is the longest text of which no end may still become the stop string."""
    detokenizer = StreamDetokenizer(tokenizer, stop=(stop,))
    shown = taken = ""
    for part in splits(text, cuts):
        shown += detokenizer.push(byte_ids(part))
        taken += part
        if detokenizer.stopped is None:
            held = max(n for n in range(len(stop)) if taken.endswith(stop[:n]))
            assert shown == taken[: len(taken) - held]
