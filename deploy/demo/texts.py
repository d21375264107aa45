"""The questions and answers that the demo's model learns, and their wordings. Knows no model.

A file of questions/ is a topic. A pair is a few lines, and an empty line ends it:

    ? a wording; [a|b|] stands for each of its parts
    ~ a wording that is kept out of training, to measure with
    = the answer
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

FOLDER = Path(__file__).resolve().parent / "questions"
SIGNS = ("? ", "~ ", "= ")

_REWRITINGS = {
    "What is ": ("What's ", "Explain ", "Tell me about ", "Describe ", "Can you explain ", "Please explain ", ""),
    "What are ": ("Explain ", "Tell me about ", "Describe ", "Can you explain "),
    "What does ": ("Tell me what ", "Explain what ", "So what does "),
    "What happens ": ("Tell me what happens ", "And what happens ", "What would happen ", "What will happen "),
    "How do I ": ("How can I ", "How does one ", "How would I ", "I want to ", "Tell me how to ", "How to "),
    "How does ": ("Explain how ", "Tell me how ", "And how does "),
    "Is there ": ("Do you have ", "Does it have "),
    "Can I ": ("May I ", "Is it possible to ", "Could I "),
    "Which ": ("Tell me which ", "What ", "And which "),
    "Why ": ("Tell me why ", "And why ", "Explain why "),
}
_BEFORE = ("Please: ", "Hey, ", "Tell me: ", "A question: ", "So, ", "I wonder, ", "Hi! ", "Can you tell me, ", "And ")
_AFTER = (" please", ", please?", " exactly?", " here?", " in this project?", " again?")


@dataclass(frozen=True, slots=True)
class Pair:
    """wordings: those to train with.  held_out: those to measure with."""

    topic: str
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str


def read_pairs(folder: Path = FOLDER) -> list[Pair]:
    """All pairs, by topic. Raises ValueError for a pair without a question or without one answer."""
    pairs = []
    for path in sorted(folder.glob("*.txt")):
        for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
            lines = [(line[:2], line[2:].strip()) for line in block.splitlines()]
            wordings, held_out, answers = ([text for sign, text in lines if sign == kind] for kind in SIGNS)
            if not wordings or len(answers) != 1 or len(wordings) + len(held_out) + 1 != len(lines):
                raise ValueError(f"{path.name}: a pair has lines with ?, perhaps with ~, and one with =: {block}")
            pairs.append(Pair(path.stem, tuple(wordings), tuple(held_out), answers[0]))
    return pairs


def expanded(wording: str) -> list[str]:
    """Each text that a wording with [a|b] stands for."""
    parts = re.split(r"\[([^\]]*)\]", wording)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return [" ".join("".join(chosen).split()) for chosen in itertools.product(*choices)]


def varied(wording: str, rng: Random) -> str:
    """One text of a wording, as another person might type it."""
    text = rng.choice(expanded(wording))
    if rng.random() < 0.35:
        text = _rewritten(text, rng)
    if rng.random() < 0.12:
        text = rng.choice(_BEFORE) + text[0].lower() + text[1:]
    if rng.random() < 0.08:
        text = text.rstrip("?.! ") + rng.choice(_AFTER)
    words = text.split(" ")
    if len(words) > 3 and rng.random() < 0.12:
        del words[rng.randrange(len(words))]
        text = " ".join(words)
    if rng.random() < 0.06:
        at = rng.randrange(len(text))
        text = text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]  # two letters change places
    if rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.25:
        text = text.rstrip("?.!") + rng.choice(("", "?", "??", ".", "!"))
    return text.strip() or "?"


def _rewritten(text: str, rng: Random) -> str:
    for begin, others in _REWRITINGS.items():
        if text.startswith(begin):
            other = rng.choice(others)
            text = other + text.removeprefix(begin)
            return text if other.endswith("does ") or other == "" else text.rstrip("?")
    return text
