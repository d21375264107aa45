"""Server-sent events as clients read them, whatever a model writes and wherever the network cuts."""

import json

from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder
from pydantic import BaseModel

from cluster.serving.openai.responses.writing import event_text
from cluster.serving.openai.sse import DONE, error_event, event

ODD = st.text(st.sampled_from('a"\\\r\n\t\0\x0b\x0c\x1c\x1e\x7f\x85\u2028\u2029\ufeff\U0001f600:é'), max_size=12)
TEXTS = st.lists(ODD | st.text(st.characters(exclude_categories=["Cs"])), max_size=5)


class Piece(BaseModel):
    content: str


def pieces_of(data, cuts):
    places = sorted({min(cut, len(data)) for cut in cuts})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@given(TEXTS, st.lists(st.integers(0, 400), max_size=8), st.sampled_from(["", "delta"]))
def test_openais_client_reads_the_texts_wherever_the_bytes_are_cut(texts, cuts, name):
    data = "".join(event(Piece(content=text), name) for text in texts).encode() + DONE.encode()
    *events, last = SSEDecoder().iter_bytes(iter(pieces_of(data, cuts)))
    assert [json.loads(one.data)["content"] for one in events] == texts
    assert {one.event or "" for one in events} <= {name}
    assert last.data == "[DONE]"


@given(TEXTS)
def test_a_client_that_ends_lines_where_python_does_reads_them_too(texts):
    """As httpx does, whose `iter_lines` many users have. Every event is a line of its kind, of its data, and none."""
    for text in texts:
        for written in (
            event(Piece(content=text), "delta"),
            event_text({"type": "delta", "content": text}),
            "event: delta\n" + error_event(ValueError(text), "id"),
        ):
            kind, data, end = written.splitlines()
            assert (kind, end) == ("event: delta", "")
            assert json.loads(data.removeprefix("data: "))
