"""Names that nobody can have, models that nobody gives, disks that are full: one line each, with what to do."""

import errno
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import EXPERTS, FIRST, NAME, Hub, Repository, commit_of

from cluster.checkpoint.hub.name import HubName, parse_name
from cluster.checkpoint.model_files import hub_name, located, model_directory, open_files, pinned
from cluster.checkpoint.names import expert_shapes
from cluster.checkpoint.opening import open_checkpoint
from cluster.errors import CheckpointError

pytest_plugins = ["hub_fixtures"]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen1.5-MoE-A2.7B-Chat", HubName("Qwen/Qwen1.5-MoE-A2.7B-Chat")),
        ("a/b@main", HubName("a/b", "main")),
        ("a/b@v1.0", HubName("a/b", "v1.0")),
        ("a/b@refs/pr/4", HubName("a/b", "refs/pr/4")),
        ("a_1/b_", HubName("a_1/b_")),
        (f"a/b@{'0' * 40}", HubName("a/b", "0" * 40)),
    ],
)
def test_a_name_is_an_owner_and_a_name_and_perhaps_a_revision(text: str, name: HubName) -> None:
    assert parse_name(text) == name
    assert str(name) == text
    assert name.is_commit == text.endswith("0" * 40)


@pytest.mark.parametrize("text", ["", "model", "/a/b", "/a/b@main", "./a", "../a", "~/a", "a/b/c", "a@b/c/d", "C:\\a"])
def test_other_texts_are_paths(text: str) -> None:
    assert parse_name(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a/b@", "after the @ a branch"),
        ("a/", "letters, digits"),
        ("a/b c", "letters, digits"),
        ("a/..", "letters, digits"),
        ("a/b..c", "must not have -- or .."),
        ("a/b--c", "must not have -- or .."),
        ("a/b.git", "nor .git"),
        ("-a/b", "letters, digits"),
        ("a/b\n", "letters, digits"),
        ("a/b\x1b[2J", "letters, digits"),
        ("ä/b", "letters, digits"),
        ("a/b?c", "letters, digits"),
        ("a/b%2e", "letters, digits"),
        ("a/b@../../c", "letters, digits"),
        ("a/b@c/../d", "letters, digits"),
        ("a/b@c d", "letters, digits"),
        ("a/b@c@d", "letters, digits"),
        ("a/b@/", "letters, digits"),
        ("a/" + "b" * 95, "97 characters, 96 are allowed"),
        ("a/b@" + "c" * 201, "201 characters, 200 are allowed"),
        ("a/b@c/", "letters, digits"),
    ],
)
def test_a_name_that_no_model_can_have_is_refused_in_one_line(text: str, reason: str) -> None:
    assert reason in refusal(lambda: parse_name(text))
    assert refusal(lambda: located(text)).isprintable()


def test_a_directory_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("a/b") == "a/b"
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert located("a/b") == str(tmp_path / "a" / "b")
    assert hub_name("a/b") is None


def test_a_path_to_nothing_gets_the_hint_that_a_name_would_do(tmp_path: Path) -> None:
    message = refusal(lambda: open_checkpoint(tmp_path / "nothing"))
    assert message.startswith(f"{tmp_path / 'nothing'} is not a directory: give the one that holds the checkpoint's")
    assert "or a model's name on the hub: OWNER/NAME" in message


def test_a_gated_model_says_where_to_ask_and_how_to_say_who_asks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].gated, hub.repositories[NAME].token = True, "hf_right"
    assert "is gated: accept its terms" in refusal(lambda: model_directory(NAME))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert f"accept its terms at {hub.address}/{NAME}" in refusal(lambda: model_directory(NAME))
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    reader = open_checkpoint(NAME)
    reader.fetch(expert_shapes(reader.config, 0, 0))
    assert all("authorization" not in call.headers for call in hub.calls if call.path.startswith("/storage"))


def test_a_missing_or_private_model_says_both(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["tiny/private"] = Repository({"config.json": b"{}"}, commit_of("p"), token="hf_right")
    for name in ("tiny/nothing", "tiny/private", f"tiny/nothing@{FIRST}"):
        message = refusal(lambda name=name: model_directory(name))
        assert f"{hub.address} has no such model" in message
        assert "HF_TOKEN" in message
        assert "no such directory here" in message
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert (model_directory("tiny/private") / "config.json").read_text() == "{}"


def test_a_missing_revision_is_named(hub: Hub) -> None:
    assert "no such branch, tag or commit" in refusal(lambda: pinned(f"{NAME}@nothing"))
    assert "no such branch, tag or commit" in refusal(lambda: model_directory(f"{NAME}@{'0' * 40}"))


def test_a_repository_without_a_config_or_with_a_file_missing(hub: Hub) -> None:
    repository = hub.repositories[NAME]
    hub.repositories["tiny/other"] = Repository({"README.md": b""}, commit_of("o"))
    assert "lists no config.json in it" in refusal(lambda: model_directory("tiny/other"))
    del repository.files[EXPERTS[1]]
    assert f"index.json names {EXPERTS[1]} which is not there" in refusal(lambda: open_checkpoint(NAME))


def test_a_file_that_vanishes_from_the_hub_is_named(hub: Hub) -> None:
    reader = open_checkpoint(NAME)
    del hub.repositories[NAME].files[EXPERTS[1]]
    assert f"{EXPERTS[1]} is not in it" in refusal(lambda: reader.fetch(expert_shapes(reader.config, 0, 40)))


@pytest.mark.parametrize(
    ("status", "words"),
    [(429, "too many requests"), (403, "refuses this token or caller"), (500, "answers with 500"), (418, "with 418")],
)
def test_other_refusals_name_the_status(hub: Hub, monkeypatch: pytest.MonkeyPatch, status: int, words: str) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the library waits before it asks again
    hub.status = status
    assert words in refusal(lambda: pinned(NAME))
    assert words in refusal(lambda: model_directory(f"{NAME}@{FIRST}"))


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://[bad", "nonsense", "http://", ""])
def test_an_unreachable_hub_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    for model in (NAME, f"{NAME}@{FIRST}"):
        assert "HF_ENDPOINT" in refusal(lambda model=model: open_files(model))


def test_an_endpoint_that_is_no_hub_is_found_out(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for body in (b"<html>", b"{}", b"[]", b'{"id": "a/b", "sha": "../../../etc"}', b"null"):
        hub.body = body
        assert "HF_ENDPOINT" in refusal(lambda: pinned(NAME))
        assert "HF_ENDPOINT" in refusal(lambda: model_directory(f"{NAME}@{FIRST}"))


@pytest.mark.parametrize("path", ["../../../outside.json", "/outside.json", "..", "a/../../outside.json", ""])
def test_no_file_name_of_the_hub_leaves_the_cache(hub: Hub, tmp_path: Path, path: str) -> None:
    repository = hub.repositories[NAME]
    repository.files[path] = b"{}"
    repository.files[f"additional_chat_templates/{path}.jinja"] = b"{}"
    model_directory(NAME)
    before = repository.files["model.safetensors.index.json"]
    repository.files["model.safetensors.index.json"] = re.sub(rb"model-experts-1.safetensors", path.encode(), before)
    repository.commit = commit_of("second")
    assert "weight_map gives" in refusal(lambda: open_checkpoint(NAME)) or path == ".."
    found = [file for file in tmp_path.rglob("*") if "outside" in file.name]
    assert not found


def test_a_full_disk_is_told_before_and_during_a_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint(NAME)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000}))
    for check in (reader.check_room, lambda: reader.fetch(expert_shapes(reader.config, 0, 0))):
        message = refusal(check)
        assert "GB are to be downloaded" in message
        assert "set HF_HOME" in message


def test_a_disk_that_fills_up_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = open_checkpoint(NAME)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cluster.checkpoint.hub.snapshot.hf_hub_download", full)
    assert "has no room for model-experts-0" in refusal(lambda: reader.fetch(expert_shapes(reader.config, 0, 0)))


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the cache's folder should be")
    assert "set HF_HOME to a folder that this user may write" in refusal(lambda: open_files(NAME))
