"""The command `chat` with a client and a keyboard that a test plays."""

import io
import stat
from types import SimpleNamespace

import pytest

from cluster.cli.chat import slash
from cluster.cli.chat.answer import call_line
from cluster.cli.chat.command import Chat
from cluster.cli.chat.lines import PlainLines, is_open, meant
from cluster.cli.chat.session import Session
from cluster.conversation import ToolCall
from cluster.errors import InvalidRequest, SetupError, Unavailable
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.serving.tools.whole import WholeCalls
from cluster.types import SamplingParams


class Keyboard:
    """Types lines; an exception among them is raised."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def read(self):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


class Model:
    """Answers with the texts it is given, one a question; an exception ends that answer. asked: all conversations."""

    def __init__(self, *answers):
        self.answers, self.asked, self.params = list(answers), [], []

    def stream(self, prompt, params):
        self.asked.append([(turn["role"], turn.get("content", "")) for turn in prompt.messages])
        self.params.append(params)
        for part in self.answers.pop(0):
            if isinstance(part, BaseException):
                raise part
            yield pb.GenerateStreamResponse(text=part, token_ids=[1])
        usage = pb.Usage(prompt_tokens=3, completion_tokens=2)
        yield pb.GenerateStreamResponse(finish_reason=pb.FINISH_REASON_STOP, usage=usage)

    def model_info(self):
        return SimpleNamespace(model_id="tiny", max_model_len=128)


def chatted(model, *lines, person=True, **session):
    session = Session(SamplingParams(), **session)
    Chat(session, model, Keyboard(*lines), person=person).run()
    return session


def test_each_question_goes_out_with_all_turns_before_it(capsys):
    model = Model(["Hel", "lo"], ["fine"])
    chatted(model, "hi", "how are you?", system="be brief")
    begin = [("system", "be brief"), ("user", "hi")]
    assert model.asked == [begin, [*begin, ("assistant", "Hello"), ("user", "how are you?")]]
    assert "Hello\n" in capsys.readouterr().out


def test_ctrl_c_ends_the_answer_and_not_the_chat(capsys):
    model = Model(["half ", KeyboardInterrupt()], ["whole"])
    session = chatted(model, "one", KeyboardInterrupt(), "two")
    assert [turn["content"] for turn in session.turns] == ["one", "half ", "two", "whole"]
    assert "stopped" in capsys.readouterr().out


def test_without_a_person_ctrl_c_ends_the_command():
    with pytest.raises(KeyboardInterrupt):
        chatted(Model(["half ", KeyboardInterrupt()]), "one", person=False)


def test_a_failure_is_one_line_and_retry_asks_again(capsys):
    model = Model([Unavailable("gone\nfor now")], ["here"])
    session = chatted(model, "hi", "/retry")
    assert capsys.readouterr().err == "moe-cluster: gone for now\n"
    assert model.asked == [[("user", "hi")]] * 2
    assert [turn["content"] for turn in session.turns] == ["hi", "here"]


def test_a_question_without_an_answer_gives_way_to_the_next_one():
    model = Model([Unavailable("gone")], ["ok"])
    chatted(model, "too long", "short")
    assert model.asked[-1] == [("user", "short")]


def test_without_a_person_a_failure_ends_the_command():
    with pytest.raises(Unavailable):
        chatted(Model([Unavailable("gone")]), "hi", person=False)


def test_commands_change_the_conversation(capsys):
    model = Model(["a"], ["b"], ["c"], ["d"])
    lines = (
        "hi",
        "/retry",
        "more",
        "/undo",
        "/reset",
        "/system be kind",
        "/params temperature 0.5",
        "//x",
        "/exit",
        "?",
    )
    session = chatted(model, *lines)
    assert model.asked[1] == [("user", "hi")]
    assert model.asked[2] == [("user", "hi"), ("assistant", "b"), ("user", "more")]
    assert model.asked[3] == [("system", "be kind"), ("user", "/x")]
    assert model.params[3].temperature == 0.5
    assert [turn["content"] for turn in session.turns] == ["/x", "d"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/nothing", "/help lists them"),
        ("/params temperature", "needs a value"),
        ("/params heat 3", "'heat' is no parameter"),
        ("/params temperature warm", "temperature is"),
        ("/params top_p 2", "top_p is 2"),
        ("/save", "needs a file"),
        ("/load /nonexistent", "/nonexistent cannot be read: No such file"),
        ("/load -", "/load needs a file's name"),
        ("/save /nonexistent/x", "No such file"),
        ("/tools /nonexistent", "cannot be read"),
        ("/result 3", "no call"),
    ],
)
def test_a_wrong_command_is_one_line_and_the_chat_goes_on(line, words, capsys):
    model = Model(["ok"])
    chatted(model, line, "hi")
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert len(model.asked) == 1


def test_help_names_every_command():
    lines = []
    slash.run("/help", Session(SamplingParams()), lines.append)
    for name in slash.COMMANDS:
        assert any(line.startswith(f"/{name} ") for line in lines), name


def test_a_saved_chat_is_private_and_goes_on_where_it_was(tmp_path):
    path = tmp_path / "chat.json"
    params = SamplingParams(top_k=5, structured_outputs={"choice": ["a", "b"]})
    session = Session(params, "be brief", [{"type": "function"}])
    session.ask("höflich?")
    session.answer("", [ToolCall(name="f", arguments={"x": 1}, id="c1")])
    session.save(path)
    session.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    loaded = Session(SamplingParams())
    loaded.load(path)
    assert loaded == session
    assert [file.name for file in tmp_path.iterdir()] == ["chat.json"]


def test_a_file_that_is_no_chat_is_neither_loaded_nor_overwritten(tmp_path):
    path = tmp_path / "thesis.txt"
    session = Session(SamplingParams())
    for content in ("words", '{"a": 1}', '{"messages": [1]}', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(SetupError, match="thesis"):
            session.load(path)
    path.write_text("words")
    with pytest.raises(SetupError, match="choose another name"):
        session.save(path)
    assert path.read_text() == "words"


def test_messages_of_the_openai_api_can_be_loaded(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text('[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]')
    session = Session(SamplingParams())
    session.load(path)
    assert (session.system, session.turns) == ("s", [{"role": "user", "content": "u"}])


def test_calls_are_drawn_and_their_results_go_back(capsys):
    written = '<tool_call>\n{"name": "f", "arguments": {"city": "Zürich"}}\n</tool_call>'
    model = Model(["Let me see. ", written[:20], written[20:]], ["Sunny."])
    session = Session(SamplingParams(), tools=[{"type": "function", "function": {"name": "f"}}])
    chat = Chat(session, model, Keyboard("weather?", "/result sun"), person=True)
    chat.run()
    assert '→ f(city="Zürich")' in capsys.readouterr().out
    call = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": {"city": "Zürich"}}}
    assert session.turns[1] == {"role": "assistant", "content": "Let me see.", "tool_calls": [call]}
    assert session.turns[2] == {"role": "tool", "content": "sun", "tool_call_id": "call_0", "name": "f"}
    assert session.turns[3]["content"] == "Sunny."


def test_a_call_that_was_cut_off_is_text():
    reader = WholeCalls()
    parts = [*reader.feed('Ah. <tool_call>{"name": "f", "arguments": {"city": "Zü'), *reader.end()]
    assert not [part for part in parts if isinstance(part, ToolCall)]
    assert "Zü" in "".join(parts)


def test_without_tools_a_call_is_text():
    model, session = Model(['<tool_call>{"name": "f", "arguments": {}}</tool_call>']), Session(SamplingParams())
    Chat(session, model, Keyboard("hi"), person=True).run()
    assert session.turns[1]["content"].startswith("<tool_call>")


def test_a_result_without_a_call_is_refused():
    with pytest.raises(InvalidRequest, match="no call"):
        slash.run("/result x", Session(SamplingParams()), print)


def test_a_call_is_one_line():
    assert call_line(ToolCall(name="f", arguments={"a": "x\ny", "b": [1]})) == 'f(a="x\\ny", b=[1])'


@pytest.mark.parametrize(
    ("typed", "turns"),
    [
        ("one\ntwo", ["one", "two"]),
        ("one \\\ntwo\nthree", ["one \ntwo", "three"]),
        ('"""a\n\n b"""\nc', ["a\n\n b", "c"]),
        ('"""\na\n"""', ["a"]),
        ('"""never closed\nb', ["never closed\nb"]),
        ("ends \\", ["ends"]),
        ("  \n", [""]),
    ],
)
def test_a_turn_may_have_several_lines(typed, turns):
    lines = PlainLines(iter(io.StringIO(typed).readline, ""), lambda prompt: None)
    found = []
    with pytest.raises(EOFError):
        while True:
            found.append(lines.read())
    assert found == turns


def test_quotes_and_backslashes_leave_a_text_open():
    assert [is_open(text) for text in ('"""', '"""a', '"""a"""', "a\\", "a", "")] == [
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert meant('"""a"""') == "a"
