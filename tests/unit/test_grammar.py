"""Grammars without a model: masks against a brute force of another library, states, limits, refusals."""

import json
import re
import time

import numpy as np
import pytest
import regex

from cluster.checkpoint.special_tokens import read_tokenizer_config
from cluster.checkpoint.tokenizer_files import read_tokenizer
from cluster.errors import ClusterError, InvalidRequest, RequestFailed
from cluster.grammar.grammars import Grammars
from cluster.grammar.masks import MaskThreads
from cluster.grammar.source import check
from cluster.kernels.sampling.rule import bits, leaves_any
from cluster.serving.text.tokenizer import Tokenizer
from cluster.structured import StructuredOutputsParams

PADDING = 45  # tokens of the model without a text


@pytest.fixture(scope="module")
def vocabulary(demo_checkpoint):
    """Each token's bytes, special ones empty, and the id that ends an answer."""
    tokenizer = Tokenizer(demo_checkpoint)
    return [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)], tokenizer.encode("<|im_end|>")[0]


@pytest.fixture(scope="module")
def grammars(demo_checkpoint, vocabulary):
    tokens, eos = vocabulary
    config = read_tokenizer_config(demo_checkpoint)
    return Grammars(lambda: read_tokenizer(demo_checkpoint, config), len(tokens) + PADDING, [eos])


def begin(grammars, token_ids=(), **form):
    return grammars.begin(StructuredOutputsParams(**form).constraint, token_ids).result(60)


PATTERNS = (
    "[a-f]{2,5}-[0-9]+", "(yes|no|maybe)( then)?", "(a|ab)(c|bcd)*x", "[ -y]{0,9}z", "w(or(d|ld)s?)+",
    " *the( [a-z]+)*[.]",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(4))
def test_a_mask_has_the_tokens_after_which_the_pattern_is_still_possible(grammars, vocabulary, pattern, seed):
    """By `regex`, another implementation: a partial match of the text so far with each token's bytes behind it."""
    tokens, eos = vocabulary
    compiled = regex.compile(pattern.encode())
    random, text, state = np.random.default_rng(seed), b"", begin(grammars, regex=pattern)
    for _ in range(12):
        mask = bits(state.mask(), len(tokens) + PADDING)
        expected = {i for i, token in enumerate(tokens) if token and compiled.fullmatch(text + token, partial=True)}
        if compiled.fullmatch(text):
            expected.add(eos)
        assert set(np.flatnonzero(mask)) == expected
        chosen = int(random.choice(sorted(expected)))
        state.accept(chosen)
        text += tokens[chosen]
        if state.is_complete:
            break
    assert state.is_complete == (
        chosen == eos or not any(compiled.fullmatch(text + t, partial=True) for t in tokens if t)
    )


def test_a_state_that_is_made_of_the_tokens_so_far_goes_on_as_the_first(grammars, vocabulary):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "s": {"enum": ["x", "yy"]}},
        "required": ["n", "s"],
    }
    random, taken, state = np.random.default_rng(0), [], begin(grammars, json=schema)
    for _ in range(20):
        again = begin(grammars, taken, json=schema)
        np.testing.assert_array_equal(again.mask(), state.mask())
        assert again.is_complete == state.is_complete
        if state.is_complete:
            break
        taken.append(int(random.choice(np.flatnonzero(bits(state.mask(), len(vocabulary[0]))))))
        state.accept(taken[-1])


def test_a_token_that_may_not_come_is_refused(grammars, vocabulary):
    with pytest.raises(RequestFailed, match="does not satisfy"):
        begin(grammars, regex="a+").accept(vocabulary[0].index(b"b"))
    with pytest.raises(RequestFailed):
        begin(grammars, [vocabulary[0].index(b"b")], regex="a+")


def test_a_clients_token_that_may_not_come_is_its_own_fault(grammars, vocabulary):
    """Of the tokens so far, those that no client gave are the engine's own."""
    a, b = (vocabulary[0].index(letter) for letter in (b"a", b"b"))
    constraint = StructuredOutputsParams(regex="aaa").constraint
    for tokens, position in (([a, b], 1), ([a, a, a, a], 3)):
        with pytest.raises(InvalidRequest, match=f"continue_from at position {position}: token {tokens[-1]} ") as wrong:
            grammars.begin(constraint, tokens, len(tokens)).result(60)
        assert wrong.value.field == "continue_from"
        with pytest.raises(RequestFailed):
            grammars.begin(constraint, tokens, position).result(60)


def test_copies_of_one_compiled_grammar_go_their_own_ways(grammars, vocabulary):
    first, second = (begin(grammars, choice=["ab", "cd"]) for _ in range(2))
    first.accept(vocabulary[0].index(b"a"))
    assert bits(second.mask(), 999)[vocabulary[0].index(b"c")]
    assert not bits(first.mask(), 999)[vocabulary[0].index(b"c")]


EXPLODING = {
    "a pattern inside counts": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "deep brackets": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "products of alternatives": {
        "json": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}": {"type": t}}} for t in ("integer", "string")]} for i in range(16)
            ]
        }
    },
    "a reference to itself": {"json": {"$ref": "#"}},
    "references in a circle": {
        "json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    },
    "many properties": {"json": {"properties": {f"p{i}": {"type": "integer"} for i in range(1900)}}},
    "many values": {"json": {"enum": [f"v{i}" for i in range(6000)]}},
    "terms of terms": {"grammar": "start: A0\nA40: \"x\"\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40))},
    "repeated repetitions": {"grammar": 'start: ("a"~1..100000)~1..100000'},
    "ambiguous rules": {"grammar": 'start: a\na: a a a | a a | "x" |'},
    "nothing satisfies it": {"grammar": "start: start"},
    "no end of states": {"regex": "(.*a.{18}b.{18}c)*"},
    "deep rules": {"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000},
}  # fmt: skip


@pytest.mark.parametrize("form", EXPLODING.values(), ids=EXPLODING)
def test_grammars_that_explode_end_in_a_refusal_or_serve(grammars, vocabulary, form):
    """Whichever: neither takes long nor fails otherwise than by InvalidRequest. The bound is of CPU time, and wide."""
    random, started, refused = np.random.default_rng(0), time.process_time(), None
    try:
        check(StructuredOutputsParams(**form).constraint)
        state = begin(grammars, **form)
        for _ in range(500):
            if state.is_complete:
                break
            state.accept(int(random.choice(np.flatnonzero(bits(state.mask(), len(vocabulary[0]))))))
    except InvalidRequest as error:
        refused = error
    if refused is not None:
        assert refused.field == "structured_outputs"
        assert "\n" not in str(refused)
        assert len(str(refused)) < 600
    assert time.process_time() - started < 60


LARGE = {
    "choices": {"choice": [f"x{i}" for i in range(4096)]},
    "optional properties": {"json": {"type": "object", "properties": {f"property{i}": {} for i in range(1800)}}},
}


@pytest.mark.parametrize("form", LARGE.values(), ids=LARGE)
def test_as_many_choices_and_properties_as_a_form_may_have_are_served(grammars, vocabulary, form):
    """A parser's row has an item for each at first: llguidance's own limit of 2,000 refused them at the first token."""
    state = begin(grammars, **form)
    first = np.flatnonzero(bits(state.mask(), len(vocabulary[0])))
    state.accept(int(first[0]))
    assert len(first)
    state.mask()


BROKEN = {
    "look-ahead": ({"regex": "(?=a)b"}, "look-around"),
    "an open bracket": ({"regex": "a)|(b"}, "unopened group"),
    "no type": ({"json": {"type": "strin"}}, "Invalid type: strin"),
    "a keyword that is not there yet": ({"json": {"not": {}}}, "not"),
    "another document": ({"json": {"$ref": "http://localhost/x"}}, "localhost"),
    "an unknown rule": ({"grammar": "start: foo"}, 'unknown name: "foo"'),
    "half a rule": ({"grammar": "root ::= [a-z"}, "Unexpected end of input"),
}


@pytest.mark.parametrize(("form", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_grammar_is_refused_with_its_reason_before_anything_runs(form, reason):
    with pytest.raises(InvalidRequest, match=re.escape(reason)) as refused:
        check(StructuredOutputsParams(**form).constraint)
    assert "\n" not in str(refused.value)
    assert "no_forcing" not in str(refused.value)


SHAPELESS = [
    {}, {"json": "{"}, {"json": "[1]"}, {"json": 7}, {"json": {"a": float("nan")}}, {"json": {"a": {1, 2}}},
    {"regex": 7}, {"regex": "a", "json": "{}"}, {"choice": []}, {"choice": "yes"}, {"choice": ["a", 1]},
    {"choice": [""]},    {"grammar": "\ud800"}, {"json_object": False}, {"json_object": "yes"}, {"regex": "a" * 70_000},
    {"json": "[" * 100_000}, {"choice": ["a"] * 5000},
]  # fmt: skip


@pytest.mark.parametrize("form", SHAPELESS, ids=range(len(SHAPELESS)))
def test_a_form_that_is_none_is_refused(form):
    with pytest.raises(InvalidRequest) as refused:
        StructuredOutputsParams(**form)
    assert "structured_outputs" in refused.value.field or "structured_outputs" in str(refused.value)


def test_a_schema_is_the_same_as_an_object_and_as_its_text():
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    assert StructuredOutputsParams(json=schema) == StructuredOutputsParams(json=json.dumps(schema))


DEEP = {"a": 1, "b": [1, {"c": [2]}], "d": {}}
WRITTEN = {
    "compact": {"separators": (",", ":")}, "plain": {}, "indent 0": {"indent": 0}, "indent 1": {"indent": 1},
    "indent 2": {"indent": 2},
}  # fmt: skip
OTHERWISE = {
    "two spaces": '{"a":  1}',
    "two lines": '{\n\n"a": 1}',
    "a far indent": '{\n         "a": 1}',
    "a tab": '{\t"a": 1}',
    "a space before a line": '{ \n"a": 1}',
    "a line behind it": '{"a": 1}\n',
    "a space before it": ' {"a": 1}',
}


def possible(grammars, vocabulary, text, **form):
    """Whether a text, byte by byte, is an answer."""
    state = begin(grammars, **form)
    for byte in text.encode():
        token_id = vocabulary[0].index(bytes([byte]))
        if not bits(state.mask(), len(vocabulary[0]))[token_id]:
            return False
        state.accept(token_id)
    return bool(bits(state.mask(), len(vocabulary[0]))[vocabulary[1]])


@pytest.mark.parametrize("form", [{"json_object": True}, {"json": {"type": "object"}}], ids=["any object", "a schema"])
def test_json_has_the_white_space_that_pythons_writer_gives_it_and_no_more(grammars, vocabulary, form):
    """An indent of two spaces is four levels of this object deep: 8 spaces."""
    for options in WRITTEN.values():
        assert possible(grammars, vocabulary, json.dumps(DEEP, **options), **form), options
    for name, text in OTHERWISE.items():
        assert not possible(grammars, vocabulary, text, **form), name


@pytest.mark.parametrize(
    ("options", "text", "allowed"),
    [
        ({"whitespace_flexible": False}, '{"a":1}', True),
        ({"whitespace_flexible": False}, '{"a": 1}', False),
        ({"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}, '{"a": 1,"b":2}', True),
        ({"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}, '{ "a": 1}', False),
        ({"whitespace_pattern": "[ \\t\\n]{1,20}"}, '{"a":\t\n  1}', True),
        ({"whitespace_flexible": True}, "{" + " " * 99 + "}", True),
    ],
)
def test_a_schema_has_its_own_rule_for_white_space(grammars, vocabulary, options, text, allowed):
    schema = {"type": "object", "x-guidance": options}
    assert possible(grammars, vocabulary, text, json=schema) == allowed


def test_a_model_without_a_tokenizer_says_so(grammars):
    def none():
        raise ClusterError("tokenizer.json is missing")

    with pytest.raises(InvalidRequest, match="needs the tokenizer"):
        begin(Grammars(none, 300, [1]), regex="a")


def test_masks_are_there_when_they_are_asked_for_and_one_rows_exception_is_its_own(grammars):
    class Broken:
        def mask(self):
            raise InvalidRequest("too complex")

    states = {row: begin(grammars, regex="[a-z]{" + str(row + 1) + "}") for row in (0, 2, 5)}
    with MaskThreads(2).beside({**states, 3: Broken()}) as masks:
        assert masks.of(1) is None
        for row, state in states.items():
            np.testing.assert_array_equal(masks.of(row), state.mask())
        with pytest.raises(InvalidRequest, match="too complex"):
            masks.of(3)


def test_leaves_any_looks_at_the_tokens_that_are_not_taken_away():
    mask = np.zeros(3, dtype=np.int32)
    mask[2] = 1 << 5 | -(1 << 31)  # tokens 69 and 95
    assert leaves_any(mask, [69, 4000])
    assert not leaves_any(mask, [69, 95])
