"""The command `generate` with many prompts, and the forms in which it reads them."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import cli
from cluster.cli import generate, prompts
from cluster.cli.prompts import read_prompts
from cluster.client import options
from cluster.conversation import Conversation
from cluster.errors import InvalidRequest, Overloaded, SetupError
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.types import SamplingParams


def prompts_in(text, form, tmp_path, name="in.txt"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_prompts([], [path], form, SamplingParams(max_tokens=9))


def test_lines_are_prompts_and_empty_ones_are_none(tmp_path):
    found = prompts_in("\ufeffone\r\n\n  \n two \u2028x\n", None, tmp_path)
    assert [one.prompt for one in found] == ["one", " two \u2028x"]


def test_a_whole_file_is_one_prompt(tmp_path):
    [one] = prompts_in("one\ntwo\n", "whole", tmp_path)
    assert one.prompt == "one\ntwo\n"


def test_objects_have_a_prompt_of_three_kinds_and_parameters_of_their_own(tmp_path):
    lines = [
        {"prompt": "a", "max_tokens": 2, "id": 7},
        {"messages": [{"role": "user", "content": "b"}]},
        {"token_ids": [1, 2], "temperature": 0},
    ]
    found = prompts_in("\n".join(map(json.dumps, lines)), None, tmp_path, "in.jsonl")
    assert [type(one.prompt) for one in found] == [str, Conversation, list]
    assert [(one.params.max_tokens, one.params.temperature) for one in found] == [(2, None), (9, None), (9, 0)]
    assert found[0].given == {"id": 7, "prompt": "a"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "no prompt"),
        ("{", "no JSON"),
        ('{"prompt": 1}', "a text is needed"),
        ('{"prompt": "a", "messages": []}', "prompt and messages"),
        ('{"messages": []}', "0 messages"),
        ('{"token_ids": ["a"]}', "token_ids"),
        ('{"prompt": "a", "max_tokns": 1}', "'max_tokns' is unknown"),
        ('{"prompt": "a", "top_p": 3}', "top_p is 3"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_sent(line, words, tmp_path):
    with pytest.raises(SetupError, match=r"line 2 of .*in\.jsonl") as caught:
        prompts_in('{"prompt": "good"}\n' + line, None, tmp_path, "in.jsonl")
    assert words in str(caught.value)


def test_what_is_no_text_and_no_input_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SetupError, match="not valid UTF-8 at byte 1"):
        prompts_in(b"a\xff", None, tmp_path)
    with pytest.raises(SetupError, match="cannot be read"):
        read_prompts([], [tmp_path / "nothing"], None, SamplingParams())
    with pytest.raises(SetupError, match="every line is empty"):
        prompts_in("\n\n", None, tmp_path)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(SetupError, match="no prompt is given"):
        read_prompts([], [], None, SamplingParams())


class Server:
    """Answers each prompt with its upper case; refuses "busy" once, and "bad" always."""

    def __init__(self):
        self.refused = 0
        self.params = []

    def stream(self, prompt, params):
        self.params.append(params)
        if prompt == "bad":
            raise InvalidRequest("it is bad")
        if prompt == "busy" and not self.refused:
            self.refused += 1
            raise Overloaded("full", 0.0)
        yield pb.GenerateStreamResponse(text=prompt.upper())
        usage = pb.Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=1)
        yield pb.GenerateStreamResponse(finish_reason=pb.FINISH_REASON_LENGTH, usage=usage)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(options, "connect", lambda args: server)
    monkeypatch.setattr(generate.time, "sleep", lambda seconds: None)
    return server


def test_an_input_without_an_end_is_refused_before_anything_is_sent(tmp_path, monkeypatch):
    """As of `yes | moe-cluster generate`."""
    monkeypatch.setattr(prompts, "MAX_INPUT_BYTES", 8)
    (tmp_path / "fits").write_text("1234567\n")
    assert len(read_prompts([], [tmp_path / "fits"], None, SamplingParams())) == 1
    with open("/dev/zero", "rb") as endless, pytest.raises(SetupError, match="standard input has more than 8 bytes"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(endless))
        read_prompts([], [Path("-")], None, SamplingParams())


def test_many_answers_come_in_the_order_of_their_prompts(server, capsys):
    assert cli.main(["generate", "a", "busy", "c", "--output", "jsonl", "--concurrency", "2"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in answers] == ["A", "BUSY", "C"]
    assert [one["index"] for one in answers] == [0, 1, 2]
    assert answers[0]["finish_reason"] == "length"
    assert answers[0]["usage"] == {"prompt_tokens": 1, "cached_tokens": 1, "completion_tokens": 2}


@pytest.mark.parametrize("form", ["text", "jsonl"])
def test_a_failed_prompt_harms_no_other_and_makes_the_exit_code_1(server, capsys, form):
    assert cli.main(["generate", "a", "bad", "c", "--output", form]) == 1
    shown = capsys.readouterr()
    if form == "text":
        assert shown.out == "A\nC\n"
        assert "moe-cluster: prompt 2: it is bad\n" in shown.err
    else:
        error = json.loads(shown.out.splitlines()[1])["error"]
        assert error == {"code": "INVALID_ARGUMENT", "message": "it is bad"}


def test_a_pipe_has_prompts_too(server, monkeypatch, capsys):
    pipe = SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"x\ny\n"))
    monkeypatch.setattr("sys.stdin", pipe)
    assert cli.main(["generate"]) == 0
    assert capsys.readouterr().out == "X\nY\n"


def test_a_concurrency_that_is_none_is_wrong_usage(capsys):
    assert cli.main(["generate", "a", "--concurrency", "0"]) == 2
    assert capsys.readouterr().err.startswith("moe-cluster: --concurrency is 0")


SPACES = r'"x-guidance": {"whitespace_pattern": " |\\n {0,8}"}'
FORMS = {
    "--json-schema": (["--json-schema", "FILE"], '{"type": "string"}', ("json", f'{{"type": "string", {SPACES}}}')),
    "--json-object": (["--json-object"], "", ("json", f'{{"type": "object", {SPACES}}}')),
    "--regex": (["--regex", "a+"], "", ("regex", "a+")),
    "--choice": (["--choice", "yes", "--choice", "no"], "", ("choice", '["yes", "no"]')),
    "--grammar": (["--grammar", "FILE"], 'start: "a"', ("grammar", 'start: "a"')),
}


@pytest.mark.parametrize(("options", "content", "constraint"), FORMS.values(), ids=FORMS)
def test_options_ask_for_a_form(server, tmp_path, options, content, constraint):
    path = tmp_path / "form"
    path.write_text(content)
    given = [str(path) if one == "FILE" else one for one in options]
    assert cli.main(["generate", "a", *given]) == 0
    assert [params.constraint for params in server.params] == [constraint]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json-schema", "/nowhere"], "--json-schema: /nowhere cannot be read"),
        (["--json-schema", "FILE"], "--json-schema: structured_outputs.json is no JSON"),
        (["--choice", ""], "--choice: "),
        (["--regex", "a", "--json-object"], "not allowed with"),
    ],
)
def test_a_form_that_is_none_is_wrong_usage(server, tmp_path, capsys, options, words):
    path = tmp_path / "form"
    path.write_bytes(b"{")
    try:
        code = cli.main(["generate", "a", *(str(path) if one == "FILE" else one for one in options)])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert not server.params
