"""The completion of commands, as the shells themselves compute it."""

import shutil
import subprocess

import pytest

from cluster import cli
from cluster.cli.completion import SHELLS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A file for each shell."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        with open(folder / shell, "w") as out, pytest.MonkeyPatch.context() as outside:
            outside.setattr("sys.stdout", out)
            assert cli.main(["completion", shell]) == 0
    return folder


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["moe-cluster", "che"], set()),
        (["moe-cluster", "cha"], {"chat", "chaos"}),
        (["moe-cluster", "chat", "--tem"], {"--temperature"}),
        (["moe-cluster", "bench", "lat"], {"latency"}),
        (["moe-cluster", "completion", "b"], {"bash"}),
    ],
)
def test_bash_completes_commands_options_and_choices(scripts, typed, expected):
    words = " ".join(f"'{word}'" for word in typed)
    ask = f"source {scripts / 'bash'}; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; "
    ask += '_shtab_moe_cluster; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60)
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_one_that_its_shell_reads(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert subprocess.run([shell, "-n", scripts / shell], timeout=60).returncode == 0


def test_a_shell_that_is_none_is_wrong_usage(capsys):
    assert cli.main(["completion", "ksh"]) == 2
    assert "invalid choice: 'ksh'" in capsys.readouterr().err
