"""Constraints as llguidance reads them, and a check of them without a tokenizer. Compiles nothing for a model."""

import json
import re
from itertools import takewhile

from llguidance import LLMatcher, LLParserLimits, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from cluster.errors import InvalidRequest
from cluster.structured import FIELD, Constraint

MAX_LEXER_STATES = 20_000  # of one sequence, up to 2 kB each: a pattern like ".*a.{20}" makes a million of them
MAX_ROW_ITEMS = 20_000  # of a parser: an object with 2,000 optional properties has 8,000 after its brace
MAX_REASON_CHARS = 400
_QUOTED, _PLACE = re.compile(r"\s*\d+ \|"), re.compile(r"^at \d+\(\d+\): ")
# Of the tokens whose bytes fit, llguidance would leave only the one that its tokenizer takes where a text is certain.
_EXACT = '%llguidance {"no_forcing": true}\n'


def limits() -> LLParserLimits:
    """Bounds of time and memory: a grammar that reaches one ends its request. The others are llguidance's own: about
    20 ms for the lexer when it is made, 20 ms for a mask."""
    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, max_items_in_row=MAX_ROW_ITEMS, verbose_errors=False)


def grammar_of(constraint: Constraint) -> str:
    """A constraint as a grammar for `LLMatcher`. Raises InvalidRequest."""
    kind, text = constraint
    match kind:
        case "json":
            lark = f"{_EXACT}start: %json {text}"
        case "regex":
            message = LLMatcher.validate_grammar(LLMatcher.grammar_from_regex(text), limits=limits())
            if message:
                raise refusal(constraint, message)
            lark = f"{_EXACT}start: /{regex_to_lark(text, 'd') or '(?:)'}/"
        case "choice":
            lark = f"{_EXACT}start: {' | '.join(map(json.dumps, json.loads(text)))}"
        case "grammar":
            lark = _lark(text)
        case _:
            raise InvalidRequest(f"{FIELD} has the kind {kind!r}, which this version does not know", FIELD)
    return LLMatcher.grammar_from_lark(lark)


def check(constraint: Constraint) -> None:
    """Raises InvalidRequest for what is no grammar. Blocks: up to a second for the largest, without the interpreter
    lock."""
    message = LLMatcher.validate_grammar(grammar_of(constraint), limits=limits())
    if message and not message.startswith("WARNING"):
        raise refusal(constraint, message)


def refusal(constraint: Constraint, message: str) -> InvalidRequest:
    """Of a grammar, with llguidance's reason, in one line."""
    lines = message.partition("<non-verbose/>")[0].splitlines()
    kept = takewhile(lambda line: not _QUOTED.match(line), lines)  # the grammar around the place, which is ours in part
    reason = " ".join(_PLACE.sub("", " ".join(kept)).split())[:MAX_REASON_CHARS]
    if reason.startswith("NoExtension"):
        reason = "no text satisfies it"
    return InvalidRequest(f"{FIELD}.{constraint[0]} cannot be used: {reason}", FIELD)


def _lark(text: str) -> str:
    try:
        lark = str(any_to_lark(text))
    except Exception as error:
        raise InvalidRequest(f"{FIELD}.grammar cannot be read: {type(error).__name__}: {error}", FIELD) from error
    return lark if "%llguidance" in lark else f"{lark}\n{_EXACT}"
