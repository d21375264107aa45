"""docs/clients.md: every block of it runs against the served application, as it stands but for the server's address."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from client_tools import run, with_clients, with_npm

pytestmark = pytest.mark.ray

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "clients.md").read_text()
ADDRESS = "http://localhost:8000"


def blocks(served, language, *words):
    """The page's blocks of a language that have one of the words."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found
    chosen = [block for block in found if any(word in block for word in words)]
    assert all(ADDRESS in block for block in chosen)
    return "\n".join(chosen).replace(ADDRESS, served.http_url)


def test_every_block_is_run_by_one_of_these_tests():
    languages = re.findall(r"^```(\w+)$", PAGE, flags=re.MULTILINE)
    imports = re.findall(r"^(?:import|from) (openai|anthropic|langchain_openai|litellm)\b", PAGE, flags=re.MULTILINE)
    assert languages.count("python") == len(imports) == 4
    assert set(languages) == {"shell", "python", "javascript"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(served):
    """The lines of Qwen's post and of the hub, and a stream as it comes."""
    text = blocks(served, "shell", "curl")
    written = run("bash", "-e", "-c", text.replace("curl ", "curl --fail-with-body --silent --show-error "))
    assert written.count('"chat.completion"') == 2
    assert written.count('"text_completion"') == 1
    assert written.count('"usage"') == 3
    assert written.count('data: {"id"') > 3
    assert written.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("client", ["openai", "anthropic"])
def test_python_clients_of_the_tests_own_environment(served, client):
    run(sys.executable, "-c", blocks(served, "python", f"import {client}\n"))


@with_clients
def test_python_clients_of_their_environment(served):
    run(os.environ["CLIENTS"], "-c", blocks(served, "python", "import litellm", "langchain_openai import"))


@with_npm
def test_openais_client_for_javascript(served, tmp_path):
    (tmp_path / "node_modules").symlink_to(Path(os.environ["OPENAI_NPM"]).resolve() / "node_modules")
    (tmp_path / "page.mjs").write_text(blocks(served, "javascript", "openai"))
    assert run("node", tmp_path / "page.mjs")
