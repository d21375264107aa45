"""Every command and every program of the documents is run, or stands in `not_run.TABLE` with the reason why not."""

import json
import re
import shutil

import pytest
import yaml
from documents import LANGUAGES, PAGES, PROGRAMS, ROOT, Example, examples, json_lines
from hosts import needs_namespaces
from machine import SERVES, Machine
from not_run import ELSEWHERE, TABLE, find, is_parsed

EVERY = [example for page in PAGES for example in examples(page)]
COMMANDS = [one for one in EVERY if one.language in ("", "python", "shell", "javascript") and one.page not in ELSEWHERE]
RUN = [one for one in COMMANDS if find(one) is None]
# They need a server, or start one, or actors of Ray.
NEEDS_SERVER = re.compile(
    r"127\.0\.0\.1:\d|HOST:|^moe-cluster (serve|demo|chaos|scale|rebalance|roll|status|top|chat|generate)\b|"
    r"^moe-cluster batch (?!.*--model)|num_expert_shards"
)
ALONE = [one for one in RUN if not NEEDS_SERVER.search(one.text)]
A_SERVER = Example("README.md", 0, "", "moe-cluster serve")


def start_of(page):
    """Orders the pages so that few servers start: the README's answers the pages that need any, and those that begin
    with the same; then come those that start others."""
    served = [one.text for one in RUN if one.page == page and SERVES.match(one.text)]
    return page != "README.md", bool(served), A_SERVER.text not in served, page


SERVED_PAGES = sorted({one.page for one in RUN if one not in ALONE}, key=start_of)
# In a command's output, beside an exit code of 0.
SHOWS = {
    r"curl .*chat/completions": r'"role": ?"assistant"',
    r"moe-cluster chaos": r"failed +0\n.*different +0\n",
    r"moe-cluster eval": r"perplexity",
    r"moe-cluster (plan|convert|upcycle|generate|chat|scale|rebalance|roll|status)\b": r"\S",
}


def check(example, machine):
    if example.text.startswith("buf ") and shutil.which("buf", path=machine.path) is None:
        return  # .ci/run has it
    output = machine.run(example)
    for pattern, shown in SHOWS.items():
        if re.match(pattern, example.text, re.DOTALL):
            assert re.search(shown, output, re.DOTALL), f"{example.id}: {output}"
    if example.text.startswith("moe-cluster batch"):
        answers = [json.loads(line) for line in (machine.folder / "out.jsonl").read_text().splitlines()]
        assert [answer["response"]["status_code"] for answer in answers] == [200] * len(json_lines("docs/http.md"))


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    made = Machine(tmp_path_factory.mktemp("machine"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def separate_machine(tmp_path_factory):
    made = Machine(tmp_path_factory.mktemp("separate"))
    made.separate()
    yield made
    made.close()


def test_examples_are_found_whole_and_without_comments():
    commands = "    X=1 moe-cluster a \\\n      --b  # it's c\n    curl -d '{\n      \"x\": 1}' && b\n"
    text = f'a\n\n{commands}    {{"a": 1}}\n\n```text\nd\n```\n'
    found = [(one.line, one.language, one.text) for one in examples("page", text)]
    assert found == [
        (3, "", "X=1 moe-cluster a   --b"),
        (5, "", "curl -d '{\n  \"x\": 1}'"),
        (5, "", "b"),
        (7, "json", '{"a": 1}'),
        (9, "text", "d"),
    ]
    assert len(RUN) > 20
    assert len(ALONE) > 5


@pytest.mark.parametrize("page", PAGES)
def test_every_fence_names_its_language_and_outputs_have_no_commands(page):
    for one in examples(page):
        if one.language:
            assert one.language in LANGUAGES, f"{one.id}: {one.language}"
        if one.language == "text":
            assert not PROGRAMS.search(one.text), f"{one.id}: indent a command, to have it run"


def test_every_row_of_the_table_has_a_command_and_every_test_that_it_names_exists():
    assert [row.pattern for row in TABLE if not any(find(one) is row for one in EVERY)] == []
    for row in TABLE:
        if isinstance(row.check, str):
            path, _, name = row.check.partition("::")
            assert f"def {name}(" in (ROOT / path).read_text()
    for page, why in ELSEWHERE.items():
        [path] = re.findall(r"tests/\S+\.py", why)
        assert (ROOT / page).is_file()
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("example", [one for one in COMMANDS if find(one)], ids=lambda one: one.id)
def test_a_command_that_cannot_run_here_is_checked(example):
    row = find(example)
    if not isinstance(row.check, str):
        row.check(example)


def test_the_unit_of_systemd_starts_a_command_that_there_is():
    [unit] = [one for one in EVERY if one.language == "ini"]
    [command] = re.findall(r"^ExecStart=\S+/(moe-cluster .*)$", unit.text, re.MULTILINE)
    assert find(Example(unit.page, unit.line, "", command)) is None
    is_parsed(Example(unit.page, unit.line, "", command))


@pytest.mark.parametrize("example", [one for one in EVERY if one.language in ("yaml", "json")], ids=lambda one: one.id)
def test_examples_of_data_are_read(example):
    text = example.text.replace("{…}", "{}")
    assert yaml.safe_load(text) if example.language == "yaml" else json.loads(text)


@pytest.mark.slow
@pytest.mark.parametrize("example", ALONE, ids=lambda one: one.id)
def test_a_command_that_needs_no_server_runs(example, machine):
    check(example, machine)


@needs_namespaces
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", SERVED_PAGES)
def test_the_commands_of_a_page_run_one_after_another(page, separate_machine):
    """Those that need a server, and those that make keys for one; the test above runs the others."""
    for example in RUN:
        if example.page == page and (example not in ALONE or "keys new" in example.text):
            if example not in ALONE and not SERVES.match(example.text) and not separate_machine.serves:
                separate_machine.run(A_SERVER)
            check(example, separate_machine)
