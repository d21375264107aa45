"""Steps that cannot be captured are computed as they are: without a GPU, so capturing is played."""

from types import SimpleNamespace

import numpy as np
import torch

from cluster import LLM, SamplingParams
from cluster.engine.graphs import DecodeGraphs


def test_a_size_that_cannot_be_captured_is_tried_once(caplog):
    tried = []

    def no_room(size, longest):
        tried.append((size, longest))
        raise torch.OutOfMemoryError("no room")

    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs._sizes, graphs._block_size, graphs._captured, graphs._refused = [1, 2, 4], 16, {}, set()
    graphs._capture = no_room
    for context in (10, 20, 300):
        arrays = SimpleNamespace(query_lens=[1, 1, 1], context_lens=np.array([1, 5, context]))
        assert graphs.run(arrays, None) is None
    assert tried == [(4, 256), (4, 512)]
    assert caplog.text.count("steps of 4 sequences are not captured") == 2


def test_such_steps_give_the_same_tokens(demo_checkpoint, monkeypatch):
    params = SamplingParams(temperature=0, repetition_penalty=1.0, max_tokens=12, ignore_eos=True)

    def answers():
        with LLM(demo_checkpoint, skip_tokenizer=True, dtype="float32", kv_cache_bytes=4 << 20) as llm:
            return [output.token_ids for output in llm.generate([[5], list(range(1, 40)), [9, 8, 7]], params)]

    expected, asked = answers(), []
    graphs = SimpleNamespace(take=lambda scheduled: True, run=lambda arrays, experts: asked.append(arrays))
    monkeypatch.setattr("cluster.engine.load.decode_graphs", lambda *args, **options: graphs)
    assert answers() == expected
    assert asked
