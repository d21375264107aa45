import json

import pytest
from serving_fakes import ADDED, CHATML, HELL, HELLO, IM_END, IM_START, byte_ids, says, write_tokenizer

from cluster.conversation import ChatMessage, Conversation
from cluster.errors import CheckpointError, InvalidRequest
from cluster.serving.text.rendering import MAX_RENDERED_CHARS
from cluster.serving.text.tokenizer import Tokenizer

USER_HI = says("hi")


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer(write_tokenizer(tmp_path))


def test_encode_merges_bytes_and_decode_restores_them(tokenizer):
    """hello is one token after the merges he, ll, hell, hello; the added token takes its characters whole."""
    assert tokenizer.encode("hello!") == [HELLO, *byte_ids("!")]
    assert tokenizer.encode("hell日本") == [HELL, ADDED]
    assert tokenizer.decode([HELLO, ADDED, *byte_ids("!")]) == "hello日本!"


def test_special_tokens_in_a_text_are_special_tokens(tokenizer):
    assert tokenizer.encode("<|im_end|>") == [IM_END]
    assert tokenizer.decode([HELLO, IM_END]) == "hello"
    assert tokenizer.decode([HELLO, IM_END], skip_special_tokens=False) == "hello<|im_end|>"


def test_encode_chat_renders_chatml_up_to_the_answer(tokenizer):
    turns = (ChatMessage(role="system", content="s"), ChatMessage(role="user", content="hi"))
    expected = [
        IM_START, *byte_ids("system\ns"), IM_END, *byte_ids("\n"),
        IM_START, *byte_ids("user\nhi"), IM_END, *byte_ids("\n"),
        IM_START, *byte_ids("assistant\n"),
    ]  # fmt: skip
    assert tokenizer.encode_chat(Conversation(messages=turns)) == expected


def test_encode_chat_renders_as_transformers_does(tmp_path):
    from transformers import PreTrainedTokenizerFast

    template = (
        "{{ bos_token }}{%- for m in messages %}\n  {% if loop.index0 == 2 %}{% break %}{% endif %}\n"
        "{% generation %}[{{ m | tojson }}]{% endgeneration %}\n{% endfor %}\n{{ eos_token }}{% if tools %}x{% endif %}"
    )
    model_dir = write_tokenizer(tmp_path, chat_template=template, eos_token="<|im_end|>")
    oracle = PreTrainedTokenizerFast.from_pretrained(str(model_dir))
    turns = [{"role": "user", "content": f"<é {i}>"} for i in range(4)]
    expected = oracle.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert Tokenizer(model_dir).encode_chat(Conversation(messages=[ChatMessage(**turn) for turn in turns])) == expected


def test_chat_template_file_goes_before_the_config(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("!{{ messages[0].content }}")
    assert Tokenizer(tmp_path).encode_chat(USER_HI) == list(byte_ids("!hi"))


def test_named_templates_give_the_default_one(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "!{{ eos_token }}"}]
    assert Tokenizer(write_tokenizer(tmp_path, chat_template=named)).encode_chat(USER_HI) == [0, IM_END]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused by the model's chat template: roles must alternate"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ messages[7].role + 1 }}", "has no element 7"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)  # fmt: skip
def test_a_template_that_raises_is_an_invalid_request(tmp_path, template, reason):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequest) as refusal:
        tokenizer.encode_chat(USER_HI)
    assert refusal.value.field == "chat"
    assert reason in str(refusal.value)


def test_a_template_that_multiplies_its_input_is_stopped(tmp_path):
    template = "{% for i in range(90000) %}{{ messages[0].content }}{% endfor %}"
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(InvalidRequest, match=f"over {MAX_RENDERED_CHARS} characters"):
        tokenizer.encode_chat(says("x" * 100))


def test_chat_without_template_is_refused(tmp_path):
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat(USER_HI)


def test_a_lone_surrogate_is_not_valid_utf8(tokenizer):
    with pytest.raises(InvalidRequest, match="text is not valid UTF-8"):
        tokenizer.encode("ab\ud800")


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not valid JSON"):
        Tokenizer(tmp_path)
    path.write_text(json.dumps(json.loads(whole) | {"model": {"type": "Nothing"}}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer(tmp_path)
    path.write_text(json.dumps(json.loads(whole) | {"decoder": {"type": "Fuse"}}))
    with pytest.raises(CheckpointError, match="only byte-level"):
        Tokenizer(tmp_path)


def test_a_broken_template_is_a_fault_of_the_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be compiled"):
        Tokenizer(write_tokenizer(tmp_path, chat_template=CHATML + "{% if %}"))


def test_truncation_saved_in_the_file_does_not_cut_prompts(tmp_path):
    import tokenizers

    path = write_tokenizer(tmp_path) / "tokenizer.json"
    saved = tokenizers.Tokenizer.from_file(str(path))
    saved.enable_truncation(2)
    saved.save(str(path))
    assert len(Tokenizer(tmp_path).encode("a b c d")) == 7
