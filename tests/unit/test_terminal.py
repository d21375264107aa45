"""Commands in broken surroundings: each ends soon, in one line at most on stderr, with the right exit code."""

import argparse
import os
import subprocess
import sys

import pytest

from cluster.cli import _parser, main, running, terminal
from cluster.errors import SetupError
from cluster.runtime import operate

DEAD = "127.0.0.1:1"
GENERATE = f"generate hi --address {DEAD}"
NO_SERVER = f"moe-cluster: no server answers at {DEAD}: start one with `moe-cluster serve MODEL_DIR`\n"
FULL = "moe-cluster: the output cannot be written: No space left on device\n"


def run(command, *, surroundings="", streams="", stdin=None):
    """Of a shell: (exit code, stdout, stderr). `streams` are its redirections."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{surroundings} {sys.executable} -m cluster.cli {command} {streams}"],
        capture_output=True, stdin=stdin or subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout.decode("utf-8", "backslashreplace"), done.stderr.decode()


@pytest.mark.parametrize(
    ("command", "streams", "code", "line"),
    [
        ("--help", ">/dev/full", 1, FULL),
        ("keys new x 2>&1", "| head -c0", 141, ""),
        ("ray-env", ">&- 2>&- <&-", 0, ""),
        (GENERATE, ">&-", 1, NO_SERVER),
        (GENERATE, "2>/dev/full", 1, ""),
        ("generate $'\\xff'", "", 2, "moe-cluster: argument 2 is not valid UTF-8 at byte 0: give it as UTF-8\n"),
        (f"chat --address {DEAD}", "<&-", 1, NO_SERVER.replace("answers", "is ready")),
    ],
)
def test_a_command_with_broken_streams_ends_in_one_line(command, streams, code, line):
    found, _, error = run(command, streams=streams)
    assert (found, error) == (code, line)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "the following arguments are required: COMMAND: see `moe-cluster --help`"),
        ("bogus", "invalid choice: 'bogus'"),
        ("serve --grpc-port abc", "argument --grpc-port: invalid int value: 'abc': see `moe-cluster serve --help`"),
        ("serve --rope-scaling {bad", "is no JSON: "),
        ("eval x", "one of the arguments --text --token-ids is required"),
        ("bench throughput --batch x", "see `moe-cluster bench throughput --help`"),
    ],
)
def test_wrong_usage_is_one_line(command, words, capsys):
    """argparse would print up to twenty lines of options first."""
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("moe-cluster: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "eval demo --text /dev/zero",
        "eval demo --token-ids /dev/zero",
        f"generate hi --address {DEAD} --tls-ca /dev/zero",
        f"generate hi --address {DEAD} --json-schema /dev/zero",
        f"chat --address {DEAD} --tools /dev/zero",
    ],
)
def test_a_file_without_an_end_is_refused(command, capsys, monkeypatch):
    monkeypatch.setattr("cluster.cli.evaluate.MAX_TEXT_BYTES", 1 << 20)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert "/dev/zero has more than" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--requests 0", "--requests is 0, 1 to 1000000 is needed"),
        ("--requests 1000001", "--requests is 1000001, 1 to"),
        (f"--requests {10**400}", "--requests is a whole number of 1329 bits, 1 to"),
        ("--concurrency 1025", "--concurrency is 1025, 1 to 1024 is needed"),
        ("--faults -1", "--faults is -1, 0 to 100000 is needed"),
        ("--faults 100001", "--faults is 100001, 0 to"),
        ("--recovery-timeout nan", "--recovery-timeout is nan, above 0"),
        ("--recovery-timeout 1e9", "--recovery-timeout is 1e+09, above 0 and at most 86400"),
        ("--json /dev/null/figures.json", "--json /dev/null/figures.json: its directory does not exist"),
    ],
)
def test_chaos_takes_no_number_beyond_use_and_no_file_that_cannot_be(given, words, capsys):
    """Before it looks for a cluster: at its end the figures would be lost."""
    assert main(["chaos", "--ray-address", DEAD, *given.split()]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_batch_names_files_that_cannot_be_its_own(capsys, tmp_path):
    """A pipe and a device are read once, or for ever; a folder takes no answers."""
    given = tmp_path / "in.jsonl"
    given.write_text("{}\n")
    os.mkfifo(tmp_path / "pipe")
    for source in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        assert main(["batch", source, str(tmp_path / "out")]) == 2
        assert "is no file that can be read more than once" in capsys.readouterr().err
    assert main(["batch", str(given), str(tmp_path)]) == 2
    assert "cannot be written (Is a directory): choose another file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--kv-cache-bytes=0", "--dtype=", "--device=", "--quantization="])
def test_an_empty_value_is_not_the_default(option, capsys, tmp_path):
    (tmp_path / "text").write_text("a text")
    assert main(["eval", "demo", "--text", str(tmp_path / "text"), option]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_huge_argument_is_named_in_short_with_the_advice(capsys):
    assert main(["plan", "x" * 100_000]) == 2
    error = capsys.readouterr().err
    assert len(error) < 2100
    assert error.startswith("moe-cluster: xxx")
    assert main(["top", "--interval", "x" * 100_000]) == 2
    assert capsys.readouterr().err.endswith("see `moe-cluster top --help`\n")


def test_a_pipe_gets_whole_lines_unless_it_names_a_width(demo_checkpoint):
    """So that a program can look for words in a line. pytest's readline sets COLUMNS for its children."""
    _, whole, _ = run(f"plan {demo_checkpoint}", surroundings="env -u COLUMNS", streams="| cat")
    assert [line for line in whole.splitlines() if line.startswith("KV cache: ") and line.endswith("utilization)")]
    _, narrow, _ = run(f"plan {demo_checkpoint}", surroundings="COLUMNS=60", streams="| cat")
    assert max(map(len, narrow.splitlines())) <= 60


def test_the_doctor_is_readable_where_a_table_finds_no_room():
    code, text, _ = run("doctor", surroundings="COLUMNS=40")
    assert code == 0
    assert "ok  Python: 3." in text
    assert max(map(len, text.splitlines())) <= 40


# A user without a passwd entry; the capability lets him read this interpreter wherever it lies.
STRANGER = (
    "setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search "
    "env -u HOME"
)
SURROUNDINGS = [
    "PYTHONIOENCODING=ascii", "PYTHONIOENCODING=latin-1", "LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0",
    "TERM=dumb COLUMNS=1 NO_COLOR=1", "HOME=/nonexistent", "env -i", "TMPDIR=/proc", "cd /proc;", "PYTHONUNBUFFERED=1",
    "http_proxy=http://127.0.0.1:1 https_proxy=http://127.0.0.1:1", *([STRANGER] if os.getuid() == 0 else []),
]  # fmt: skip
STREAMS = [">/dev/full", ">/dev/full 2>&1", "| head -c1", ">&-", "2>&-", "<&-", ">&- 2>&- <&-", "2>/dev/full"]


# Of each command: arguments with which it ends soon, and its exit code. {} is a checkpoint.
COMMANDS = {
    "demo": (f"--ray-address {DEAD}", 2),
    "serve": ("/nonexistent", 2),
    "generate": (f"hi --address {DEAD}", 1),
    "chat": (f"--address {DEAD}", 1),
    "batch": ("/nonexistent /nonexistent/out", 2),
    **dict.fromkeys(("status", "top", "rebalance", "roll", "chaos"), (f"--ray-address {DEAD}", 2)),
    "scale": (f"--expert-shards 2 --ray-address {DEAD}", 2),
    "plan": ("{}", 0),
    "doctor": ("", 0),
    "ray-env": ("", 0),
    "completion": ("bash", 0),
    "keys new": ("x", 0),
    **dict.fromkeys(("convert", "upcycle"), ("/nonexistent /nonexistent/new", 2)),
    "eval": ("/nonexistent --text /nonexistent", 2),
    **dict.fromkeys(("bench throughput", "bench latency", "bench kernels"), ("/nonexistent", 2)),
    "bench transport": (f"--ray-address {DEAD}", 2),
    **dict.fromkeys(("bench growth", "bench context"), ("--context 0", 2)),
    "bench gpu": ("--layers 0", 2),
    **dict.fromkeys(("bench serve", "bench prefixes"), (f"--address {DEAD}", 1)),
    "bench calibrate": ("--output /no/such/directory/file", 2),
    **dict.fromkeys(("bench plan-check", "bench scale"), ("--json /no/such/directory/file", 2)),
}
# Lines on stderr, where they are more than one: progress before the fault, and a key's advice.
LINES = {"demo": 3, "bench throughput": 2, "bench latency": 2, "keys new": 4}


def commands_of(parser, names=()):
    """The names of all commands that run something."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        return {" ".join(names)}
    return set().union(*(commands_of(inner, (*names, name)) for name, inner in below[0].choices.items()))


def test_every_command_is_tried_in_broken_surroundings():
    """A new one needs a line in COMMANDS."""
    assert commands_of(_parser()) == COMMANDS.keys()


def check(command, code, line, *, surroundings="", streams=""):
    """By exit code: an output that cannot be written makes 1 of 0, a reader that has gone 141."""
    unwritten = streams.startswith(">/dev/full") or (streams == "2>/dev/full" and command == "keys new")
    if code == 0 and unwritten:
        code = 1
    found, _, error = run(f"{command} {line}", surroundings=surroundings, streams=streams)
    allowed = {code} | ({141} if "head" in streams and code == 0 else set())
    if "/dev/full" in streams and command in LINES:
        allowed.add(1)  # the progress meets the full output before the command meets its fault
    assert found in allowed, (command, error)
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    if "COLUMNS=1" not in surroundings:  # there progress is drawn in a line for each character
        assert error.count("\n") <= LINES.get(command, 1), error


def test_a_cheap_command_without_an_environment_and_with_a_full_output():
    line, code = COMMANDS["ray-env"]
    check("ray-env", code, line, surroundings="env -i", streams=">/dev/full")


def test_a_dead_ray_is_refused_before_the_wait_for_a_busy_one(monkeypatch, capsys):
    """A busy one may take CONNECT_TIMEOUT_S; nobody waits so long for a port where nothing listens."""

    def bounded(seconds, message):
        raise AssertionError("it waits")

    monkeypatch.setattr(terminal, "bounded", bounded)
    assert main(["status", "--ray-address", DEAD]) == 2
    assert capsys.readouterr().err.startswith(f"moe-cluster: no Ray answers at {DEAD} ")


def test_the_wait_for_a_busy_ray_has_room_for_all_that_it_asks():
    """To connect is to ask for the status too, which may take its own time."""
    assert running.CONNECT_TIMEOUT_S >= 2 * operate.STATUS_TIMEOUT_S


CELLS = [*((around, "") for around in SURROUNDINGS), *(("", streams) for streams in STREAMS)]
SHARES = 5  # a command takes its turn in every fifth cell: each of them in each takes eight minutes


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(len(CELLS)), ids=[" ".join(filter(None, cell)) for cell in CELLS])
def test_commands_in_every_broken_surrounding(demo_checkpoint, number):
    surroundings, streams = CELLS[number]
    check("", 0, "--help", surroundings=surroundings, streams=streams)
    check("status", 2, f"--ray-address {DEAD}", surroundings=surroundings, streams=streams)
    for command, (line, code) in list(COMMANDS.items())[number % SHARES :: SHARES]:
        check(command, code, line.format(demo_checkpoint), surroundings=surroundings, streams=streams)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("naïve", "naïve"), ("na\udcc3\udcafve", "naïve"), ("", ""), ("\U0001f600", "\U0001f600")],
)
def test_text_that_an_ascii_locale_gives_is_utf8_all_the_same(given, expected):
    assert terminal.utf8(given, "the line") == expected


@pytest.mark.parametrize("given", ["\udcff", "a\udcc3\ud800"])
def test_bytes_that_are_no_text_are_refused(given):
    with pytest.raises(SetupError, match="the line"):
        terminal.utf8(given, "the line")


def test_characters_that_an_encoding_lacks_are_drawn_in_ascii():
    text = "import sys; from cluster.cli import terminal; terminal.run(lambda: print('▁█ … ─ é') or 0)"
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b".# ... ? ?\n", b"")


def test_a_call_that_hangs_in_foreign_code_ends_with_one_line():
    """The block writes to stderr and sleeps where no Python code can be interrupted."""
    text = (
        "import os, time; from cluster.cli import terminal\n"
        "def hang():\n"
        "    with terminal.bounded(0.2, 'it hangs'):\n"
        "        os.write(2, b'log line\\n'); time.sleep(100)\n"
        "terminal.run(hang)"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"moe-cluster: it hangs\n")


def test_an_error_of_the_machine_is_one_line(capsys):
    def command():
        raise PermissionError(13, "Permission denied", "/x/y")

    assert terminal.run(command) == 1
    assert capsys.readouterr().err == "moe-cluster: /x/y: Permission denied\n"
