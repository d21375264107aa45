"""Folders and files for one user alone, as another one finds them."""

import os
import tempfile
from pathlib import Path

import pytest
from strangers import NOBODY, reached

from cluster.errors import SetupError
from cluster.private import private_files, private_folder


@pytest.fixture
def open_folder():
    """Where everybody may look and write, as in /tmp."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o1777)
        yield Path(folder)


def test_what_others_reach_is_found(open_folder):
    """The way to look that the tests below and those of a served cluster trust."""
    (open_folder / "a").mkdir()
    (open_folder / "a" / "secret").write_text("x")
    (open_folder / "a" / "secret").chmod(0o604)
    (open_folder / "a").chmod(0o705)
    found = reached([open_folder / "a"])
    assert found == [f"read {open_folder}/a", f"read {open_folder}/a/secret"]


def test_a_private_folder_is_made_for_its_user_alone(open_folder):
    made = private_folder(open_folder / "above" / "ours")
    (made / "secret").write_text("x")
    (made / "secret").chmod(0o666)
    assert made.stat().st_mode & 0o777 == 0o700
    assert reached([made, made / "secret"]) == []


def test_one_that_was_open_is_closed(open_folder):
    (open_folder / "ours").mkdir(mode=0o777)
    (open_folder / "ours").chmod(0o777)
    private_folder(open_folder / "ours")
    assert reached([open_folder / "ours"]) == []


def theirs(path, monkeypatch):
    path.mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: NOBODY)


def test_a_folder_that_another_user_made_first_is_refused(open_folder, monkeypatch):
    theirs(open_folder / "ours", monkeypatch)
    with pytest.raises(SetupError, match="ours belongs to another user"):
        private_folder(open_folder / "ours")


def test_a_folder_below_another_users_is_refused(open_folder, monkeypatch):
    theirs(open_folder / "theirs", monkeypatch)
    with pytest.raises(SetupError, match="theirs belongs to another user"):
        private_folder(open_folder / "theirs" / "ours")


def test_a_link_is_judged_by_where_it_leads(open_folder, monkeypatch):
    theirs(open_folder / "theirs", monkeypatch)
    (open_folder / "ours").symlink_to(open_folder / "theirs")
    with pytest.raises(SetupError, match="theirs belongs to another user"):
        private_folder(open_folder / "ours")


def test_a_folder_that_anybody_could_replace_is_refused(open_folder):
    open_folder.chmod(0o777)
    with pytest.raises(SetupError, match="could be replaced by anybody"):
        private_folder(open_folder / "ours")


def test_what_is_made_meanwhile_is_for_this_user_alone_and_then_as_before(open_folder):
    with private_files():
        (open_folder / "file").write_text("x")
        (open_folder / "folder").mkdir()
    (open_folder / "later").write_text("x")
    assert reached([open_folder / "file", open_folder / "folder"]) == []
    assert reached([open_folder / "later"]) == [f"read {open_folder}/later"]
