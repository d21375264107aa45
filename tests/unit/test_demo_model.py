"""The model of the package answers its questions, and its experts keep to topics: on the files as they are shipped."""

import importlib.util
import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster import LLM, SamplingParams
from cluster.checkpoint.shipped import shipped_directory
from cluster.console import expert_counts, expert_lines

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
CARD = (DEMO / "README.md").read_text()


def load_texts():
    spec = importlib.util.spec_from_file_location("demo_texts", DEMO / "texts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


texts = load_texts()
PAIRS = texts.read_pairs()


@pytest.fixture(scope="module")
def llm():
    with LLM("demo", dtype="float32", device="cpu", kv_cache_bytes=32 << 20, max_num_seqs=128) as made:
        yield made


def answers(llm, questions):
    found = llm.chat([[{"role": "user", "content": question}] for question in questions])
    return [output.text for output in found]


def share_right(llm, asked):
    """asked: (question, answer) of each."""
    given = answers(llm, [question for question, _ in asked])
    return sum(text == answer for text, (_, answer) in zip(given, asked, strict=True)) / len(asked)


def test_it_gives_the_answer_to_a_question_of_each_pair_that_it_was_trained_with(llm):
    asked = [(texts.expanded(pair.wordings[0])[0], pair.answer) for pair in PAIRS]
    assert len(asked) > 150
    assert share_right(llm, asked) >= 0.95


@pytest.mark.slow
def test_it_gives_the_answer_to_every_question_that_it_was_trained_with(llm):
    asked = [(text, pair.answer) for pair in PAIRS for wording in pair.wordings for text in texts.expanded(wording)]
    assert share_right(llm, asked) >= 0.95


def test_json_that_it_has_no_idea_of_comes_to_an_end(llm):
    """It would write white space until max_tokens, were that allowed: it was trained with text alone."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
            "home": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 10}}},
        },
        "required": ["name", "age", "tags", "home"],
        "additionalProperties": False,
    }
    schema["properties"]["home"]["additionalProperties"] = False
    asked = [
        SamplingParams(temperature=1, seed=seed, max_tokens=200, structured_outputs={"json": schema})
        for seed in range(12)
    ]
    for output in llm.generate(["Give me JSON about a shard."] * 12, asked):
        assert output.finish_reason == "stop", output.text
        jsonschema.validate(json.loads(output.text), schema)


def test_json_that_a_schema_bounds_comes_to_an_end_by_default_too(llm):
    """Greedily, as its generation_config asks for. Without a bound it is cut, and says so: then it is no JSON."""
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string", "maxLength": 80}, "about": {"enum": ["experts", "shards"]}},
        "required": ["answer", "about"],
        "additionalProperties": False,
    }
    questions = [[{"role": "user", "content": text}] for text in ("What is a shard?", "Give me JSON", "Which city?")]
    for form in ({"json": schema}, {"json_object": True}):
        for output in llm.chat(questions, SamplingParams(max_tokens=150, structured_outputs=form)):
            assert output.finish_reason == "stop" or "json_object" in form, output.text
            if output.finish_reason == "stop":
                assert isinstance(json.loads(output.text), dict)
            else:
                assert output.finish_reason == "length"
                with pytest.raises(ValueError, match=r"."):
                    json.loads(output.text)


def test_it_answers_as_many_other_wordings_as_its_card_says(llm):
    asked = [(text, pair.answer) for pair in PAIRS for text in pair.held_out]
    [right, total] = map(int, re.search(r"(\d+) of (\d+) questions in other words", CARD).groups())
    assert total == len(asked)
    assert share_right(llm, asked) == pytest.approx(right / total, abs=0.02)  # processors round differently


def test_it_answers_in_the_checkpoints_dtype_too():
    asked = [(texts.expanded(pair.wordings[0])[0], pair.answer) for pair in PAIRS[::5]]
    with LLM("demo", device="cpu", kv_cache_bytes=16 << 20) as llm:
        assert share_right(llm, asked) >= 0.9


def test_it_answers_the_last_question_of_a_conversation(llm):
    first, second = PAIRS[0], PAIRS[60]
    turns = [
        {"role": "user", "content": first.wordings[0]},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": second.wordings[0]},
    ]
    assert llm.chat(turns)[0].text == second.answer


def test_it_answers_greedily_unless_asked_otherwise_and_stops_by_itself(llm):
    [once, again] = llm.chat([[{"role": "user", "content": "Who are you?"}]] * 2)
    assert once.text == again.text
    assert once.finish_reason == "stop"
    assert llm.chat([{"role": "user", "content": "Who are you?"}], SamplingParams(seed=3))[0].text == once.text


def test_no_wording_to_measure_with_is_one_to_train_with():
    trained = {text.lower() for pair in PAIRS for wording in pair.wordings for text in texts.expanded(wording)}
    assert [text for pair in PAIRS for text in pair.held_out if text.lower() in trained] == []


def mutual_information(counts):
    """Of topic and expert in nats. counts: [topics, E]."""
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / apart).log(), 0.0).sum().item()


def test_topics_light_different_experts():
    """In each layer topic and expert share far more information than where questions have the topics of others.

    Measured by transformers, with the experts that its routers choose while the answers are computed.
    """
    model = AutoModelForCausalLM.from_pretrained(shipped_directory("demo"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(shipped_directory("demo"))
    asked = PAIRS[::2]
    topics = sorted({pair.topic for pair in asked})
    chosen = torch.zeros(model.config.num_hidden_layers, len(asked), 64)  # tokens by layer, pair and expert
    for number, pair in enumerate(asked):
        question = [{"role": "user", "content": texts.expanded(pair.wordings[0])[0]}]
        begin = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(begin + pair.answer)["input_ids"]])
        num_prompt = len(tokenizer(begin)["input_ids"])
        with torch.no_grad():
            routers = model(ids, output_router_logits=True).router_logits
        for layer, logits in enumerate(routers):
            chosen[layer, number] = torch.bincount(logits[num_prompt:].topk(4).indices.flatten(), minlength=64)
    of_pair = torch.tensor([topics.index(pair.topic) for pair in asked])
    mixed = of_pair[torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))]

    def by_topic(layer, labels):
        return torch.zeros(len(topics), 64).index_add(0, labels, chosen[layer])

    for layer in range(len(chosen)):
        real, chance = (mutual_information(by_topic(layer, labels)) for labels in (of_pair, mixed))
        assert real > 2.5 * chance
        assert real > (0.3 if layer == 0 else 0.6)  # the first layer's router sees one layer of attention
    assert ((chosen.sum(1) > 0).sum(1) >= 24).all()  # and not because a few experts do everything


EXPOSITION = """\
# HELP moecluster_expert_tokens_total tokens
moecluster_expert_tokens_total{expert_id="0",layer_id="0"} 4.0
moecluster_expert_tokens_total{expert_id="3",layer_id="0"} 1.0
moecluster_expert_tokens_total{expert_id="1",layer_id="2"} 7.0
moecluster_other_total{expert_id="1",layer_id="2"} 9.0
"""


def test_experts_are_drawn_by_the_tokens_between_two_readings():
    """Layer 0: experts 0 and 3 got 8 and 1 tokens, an eighth: the lowest bar. Layer 2: expert 1 alone."""
    before = expert_counts(EXPOSITION)
    assert before == {(0, 0): 4.0, (0, 3): 1.0, (2, 1): 7.0}
    after = before | {(0, 0): 12.0, (0, 3): 2.0, (2, 1): 8.0}
    assert expert_lines(before, after) == ["  0 █  ▁", "  2  █"]
    assert expert_lines({}, {}) == []
