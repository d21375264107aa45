"""The documents as a site, and the commands in them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import proto_docs
import pytest

from cluster import cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "helm" / "moe-cluster" / "README.md"))


def lines_of_code(text):
    """The lines of fenced blocks without a language or with a shell's, and of indented ones."""
    fence = None
    for line in text.splitlines():
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
        elif fence in ("", "sh", "bash", "console") or (fence is None and line.startswith("    ")):
            yield line


def commands_of(text):
    """The lines of code that begin with `moe-cluster`, joined where one goes on, without comments."""
    for line in "\n".join(lines_of_code(text)).replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|", line):
            found = re.match(r"\s*(?:[A-Z_]+=\S+ )*moe-cluster (.*)", part)
            if found is not None:
                yield re.sub(r"\s*(>>?|#) .*", "", found[1])


def named_in(text):
    """The commands in a sentence or a table, between backquotes. One without arguments is only named."""
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " ")
    return {
        found
        for found in re.findall(r"`(?:[A-Z_]+=\S+ )*moe-cluster ([^`]+)`", sentences)
        if "-" in found and not found.startswith("COMMAND ")
    }


TEXTS = [path.read_text() for path in DOCUMENTS]
COMMANDS = sorted({command for text in TEXTS for command in (*commands_of(text), *named_in(text))})


def test_commands_are_found():
    assert len(COMMANDS) >= 30
    assert "chaos --requests 300 --faults 60" in COMMANDS
    assert "scale --attention-replicas N" in COMMANDS  # of the runbook
    assert [c.split() for c in commands_of("    X=1 moe-cluster a \\\n      --b  # c\n")] == [["a", "--b"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_each_command_of_the_documents(command):
    """A word in capitals stands for a value: PID, MODEL, HOST."""
    words = [re.sub(r"^[A-Z_]+$", "1", word) for word in shlex.split(command) if word != "…"]
    cli._parser().parse_args(words)


def test_the_site_builds_without_a_warning(tmp_path):
    """Strictly: every page is in the navigation, every link and anchor leads somewhere, every name has a docstring."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    assert all(f"cluster.llm.LLM.{name}" in api for name in ("generate", "chat", "embed"))
    http = (tmp_path / "site" / "reference" / "http" / "index.html").read_text()
    assert all(text in http for text in ("POST /v1/chat/completions", "max_completion_tokens", "integer, ≥ 1, ≤ 128"))
    options = (tmp_path / "site" / "reference" / "commands" / "index.html").read_text()
    assert all(f'id="moe-cluster-{name}"' in options for name in ("serve", "chaos", "bench-throughput"))
    assert "--expert-shards" in options
    assert (tmp_path / "site" / "files" / "deploy" / "serve.yaml").read_text().count("model:")


def test_the_page_of_the_grpc_api_is_made_from_the_protos():
    """`python tests/proto_docs.py` makes it."""
    assert proto_docs.page() == proto_docs.PAGE.read_text()
    assert "| `max_tokens` |" in proto_docs.page()
