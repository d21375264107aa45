"""The command line as a user meets it: in a process of its own."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from served_tools import check_health_reflection_and_streaming

from cluster.cli import main, terminal
from cluster.console import print_status

pytestmark = pytest.mark.ray

COMMAND = [str(Path(sys.executable).parent / "moe-cluster")]


def run(*arguments, stdin="", timeout_s=120):
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize("command", ["", "demo", "serve", "generate", "chat", "plan", "bench"])
def test_help_says_what_a_command_does(command):
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert "usage: moe-cluster" in done.stdout


def test_plan_shows_uneven_slices_and_their_bytes(demo_checkpoint):
    """64 experts on 3 shards are 22, 21 and 21; one expert is 3 × 64 × 32 × 4 = 24,576 bytes, in each of 4 layers."""
    done = run("plan", demo_checkpoint, "--shards", 3)
    assert done.returncode == 0
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in done.stdout.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["expert shard 0"]] == ["0-21", "88", "2.163 MB"]
    assert [cell.strip() for cell in rows["expert shard 2"]] == ["43-63", "84", "2.064 MB"]


@pytest.fixture
def broken(tmp_path, demo_checkpoint):
    """Makes copies of the demo checkpoint that lack something."""

    def make(remove="", config=None):
        folder = tmp_path / "broken"
        folder.mkdir()
        for file in demo_checkpoint.iterdir():
            if file.name != remove:
                (folder / file.name).write_bytes(file.read_bytes())
        if config:
            path = folder / "config.json"
            path.write_text(path.read_text().replace(*config))
        return folder

    return make


def run_here(capsys, *arguments):
    """As `run`, without the 3 s in which a process imports torch and Ray."""
    code = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return subprocess.CompletedProcess(arguments, code, out, err)


def refused(done, *named):
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("moe-cluster: ")
    assert "Traceback" not in done.stderr + done.stdout
    for text in named:
        assert text in last


def test_a_directory_that_is_none_is_refused(tmp_path, capsys):
    refused(run_here(capsys, "serve", tmp_path / "nothing"), "nothing is not a directory")


def test_another_architecture_is_refused(broken, capsys):
    refused(
        run_here(capsys, "serve", broken(config=('"qwen2_moe"', '"llama"'))),
        "'llama', one of qwen2, qwen2_moe is needed",
    )


def test_a_missing_weight_file_is_refused(broken, capsys):
    name = "model-00002-of-00003.safetensors"
    refused(run_here(capsys, "serve", broken(remove=name)), name)


def test_a_dtype_that_is_none_is_refused(demo_checkpoint, capsys):
    refused(run_here(capsys, "serve", demo_checkpoint, "--dtype", "int3"), "dtype is 'int3', one of auto, float32")


def test_more_shards_than_experts_are_refused(demo_checkpoint, capsys):
    refused(run_here(capsys, "serve", demo_checkpoint, "--expert-shards", 65), "65 expert shards for 64 experts")
    refused(run_here(capsys, "plan", demo_checkpoint, "--shards", 65), "65 expert shards for 64 experts")


def test_more_copies_than_shards_are_refused(demo_checkpoint, capsys):
    refused(run_here(capsys, "serve", demo_checkpoint, "--min-copies", 3), "min_copies is 3, and 2 expert shards")


def test_what_is_no_port_and_no_address_of_this_machine_is_refused(demo_checkpoint, capsys):
    refused(
        run_here(capsys, "serve", demo_checkpoint, "--grpc-port", 99999), "grpc port is 99999, a port is 0 to 65535"
    )
    refused(
        run_here(capsys, "serve", demo_checkpoint, "--host", "203.0.113.9"),
        "--host 203.0.113.9 is no address of this machine",
    )


def test_a_ray_that_is_not_there_is_named_at_once(demo_checkpoint):
    """In a new process: this one is connected to a Ray already, and would use that."""
    free = "--grpc-port", "0", "--http-port", "0"  # a server of this machine's user may have the usual ones
    done = run("serve", demo_checkpoint, "--ray-address", "127.0.0.1:1", *free)
    refused(done, "no Ray answers at 127.0.0.1:1")


def test_a_port_in_use_is_refused(served, demo_checkpoint, capsys):
    taken = run_here(capsys, "serve", demo_checkpoint, "--grpc-port", served.grpc_port)
    refused(taken, f"grpc port {served.grpc_port} is taken")
    taken = run_here(capsys, "serve", demo_checkpoint, "--grpc-port", 0, "--http-port", served.http_port)
    refused(taken, f"http port {served.http_port} is taken")


def test_generate_streams_an_answer(served):
    done = run("generate", "hello", "--address", f"127.0.0.1:{served.grpc_port}", "--max-tokens", 5, "--seed", 1)
    assert done.returncode == 0
    assert done.stdout.strip()


def test_chat_answers_line_by_line_and_ends_with_the_input(served):
    address = f"127.0.0.1:{served.grpc_port}"
    done = run("chat", "--address", address, "--max-tokens", 5, "--temperature", 0, stdin="hi\nand again\n")
    assert done.returncode == 0
    assert done.stderr == ""


def test_chat_on_a_terminal_has_several_lines_commands_and_ctrl_c(served, tmp_path):
    """As a person types: the answer to the second question is stopped, its half stays in the conversation."""
    command = [*COMMAND, "chat", "--address", f"127.0.0.1:{served.grpc_port}", "--temperature", "0"]
    surroundings = {"TERM": "xterm", "NO_COLOR": "1", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path)}
    chat = pexpect.spawn(
        command[0], command[1:], env=os.environ | surroundings, timeout=60, encoding="utf-8", dimensions=(40, 200)
    )
    shown = chat.logfile_read = io.StringIO()
    chat.expect("/help lists commands")
    chat.send("/params ignore_eos true\r")
    chat.expect("ignore_eos=true")
    chat.send("/params max_tokens 3\r")
    chat.expect("max_tokens=3")
    chat.send("one\x1b\rtwo\r")  # Alt-Enter
    chat.expect("3 tokens in")
    chat.send("/params max_tokens 3000\r")
    chat.expect("max_tokens=3000")
    chat.send("\x1b[200~pasted\nlines\x1b[201~\r")
    chat.expect("\\?2004l[^\x1b]{20}")  # the line is taken, and the answer has begun
    chat.sendintr()
    chat.expect("stopped")
    chat.send(f"/save {tmp_path / 'chat.json'}\r")
    chat.expect("saved [34] turns.*you>")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    assert re.findall(r"\x1b\[[0-9;]*3[0-7]m", shown.getvalue()) == []
    turns = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [turn["content"] for turn in turns if turn["role"] == "user"] == ["one\ntwo", "pasted\nlines"]
    history = tmp_path / "moe-cluster" / "chat_history"
    assert "+one\n+two\n" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_generate_answers_a_pipe_of_prompts_as_json_lines(served):
    address = f"127.0.0.1:{served.grpc_port}"
    many = run("generate", "--address", address, "--max-tokens", 4, "--temperature", 0, "--output", "jsonl",
               stdin="".join(f"{number}\n" for number in range(40)))  # fmt: skip
    assert many.returncode == 0
    answers = [json.loads(line) for line in many.stdout.splitlines()]
    assert [one["prompt"] for one in answers] == [str(number) for number in range(40)]
    one = run("generate", "7", "--address", address, "--max-tokens", 4, "--temperature", 0)
    assert one.stdout == answers[7]["text"] + "\n"


def test_chat_takes_tools_from_a_file_and_refuses_what_is_none(served, tmp_path):
    address, tools = f"127.0.0.1:{served.grpc_port}", tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "f", "parameters": {}}}]')
    done = run("chat", "--tools", tools, "--address", address, "--max-tokens", 5, "--temperature", 0, stdin="hi\n")
    assert (done.returncode, done.stderr) == (0, "")
    for written, reason in (("{", "is no JSON: "), ("{}", "has no list of JSON objects"), (None, "cannot be read: No")):
        tools.unlink() if written is None else tools.write_text(written)
        bad = run("chat", "--tools", tools, "--address", address, stdin="hi\n")
        assert bad.returncode == 2
        assert bad.stderr.startswith(f"moe-cluster: --tools: {tools} {reason}")
        assert bad.stderr.count("\n") == 1


def test_chat_in_an_ascii_terminal_takes_utf8_and_refuses_what_is_none(served):
    address = f"127.0.0.1:{served.grpc_port}"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [*COMMAND, "chat", "--address", address, "--max-tokens", "5", "--temperature", "0"]
    good = subprocess.run(command, input="naïve\n".encode(), capture_output=True, timeout=120, env=ascii_only)
    assert (good.returncode, good.stderr) == (0, b"")
    assert good.stdout.isascii()
    bad = subprocess.run(command, input=b"\xff\n", capture_output=True, timeout=120)
    assert bad.returncode == 2
    assert bad.stderr == b"moe-cluster: the line is not valid UTF-8 at byte 0: give it as UTF-8\n"


@pytest.mark.parametrize(
    ("streams", "code", "error"),
    [
        (">/dev/full", 1, "moe-cluster: the output cannot be written: No space left on device\n"),
        ("| head -c0", 141, ""),
    ],
)
def test_an_answer_that_nobody_takes_ends_the_command_quietly(served, streams, code, error):
    command = f"{COMMAND[0]} generate hello --address 127.0.0.1:{served.grpc_port} --max-tokens 200 {streams}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (code, error)


def test_status_is_drawn_in_ascii_where_there_is_nothing_else(served):
    """Only this process has the token of the session's cluster, so it draws here."""
    out = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(out, encoding="ascii", errors="strict")) as stream:
        assert terminal.run(lambda: print_status(served.status()) or 0) == 0
        stream.flush()
    text = out.getvalue().decode("ascii")
    assert "SERVING" in text
    assert "attention" in text
    assert "???" not in text


def test_without_a_server_generate_says_how_to_start_one():
    done = run("generate", "hello", "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "moe-cluster: no server answers at 127.0.0.1:1: start one with `moe-cluster serve MODEL_DIR`"
    )


def test_health_reflection_and_streaming_work_behind_haproxy_too(served):
    check_health_reflection_and_streaming(f"127.0.0.1:{served.grpc_port}")


def test_a_checkpoint_without_a_tokenizer_is_refused_before_anything_starts(demo_checkpoint, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(demo_checkpoint, model, ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["serve", str(model)]) == 2
    error = capsys.readouterr().err
    assert "tokenizer.json" in error
    assert "Traceback" not in error
