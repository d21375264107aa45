"""The live page's files and `/cluster`, as a browser and a script get them."""

import asyncio
import json
import re
import shutil
import subprocess

import pytest
from http_tools import Front
from serving_fakes import write_tokenizer
from test_live_feed import FakeSource, feed_of

from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.live.feed import Frame
from cluster.serving.openai.page import FILES
from cluster.serving.text.tokenizer import Tokenizer

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no node to run the page's modules")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def keys_in(tmp_path, *names):
    """Their file, and the keys."""
    made = [new_key(name) for name in names]
    (tmp_path / "keys").write_text("\n".join(line for _, line in made))
    return ApiKeys(tmp_path / "keys", lambda: 0.0), [key for key, _ in made]


def events_of(text):
    """(name, value) of each event."""
    return [(name, json.loads(data)) for name, data in re.findall(r"event: (\w+)\ndata: (.*)\n\n", text)]


def test_the_page_and_its_files_are_for_everybody_and_run_nothing_else(tokenizer, tmp_path):
    keys, _ = keys_in(tmp_path, "someone")
    front = Front(tokenizer, keys=keys, live=feed_of(FakeSource()))
    page = asyncio.run(front.get("/"))
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert page.headers["x-content-type-options"] == "nosniff"
    named = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert len(named) >= 4
    for path in {f"/{name}" for name in named} | set(FILES):
        answer = asyncio.run(front.get(path))
        assert answer.status_code == 200, path
        again = asyncio.run(front.get(path, headers={"if-none-match": answer.headers["etag"]}))
        assert (again.status_code, again.content) == (304, b"")
    assert asyncio.run(front.get("/page/none.js")).status_code == 401


@pytest.mark.parametrize("path", sorted(FILES))
def test_no_file_has_a_script_in_it_or_an_address_of_elsewhere(path):
    text = FILES[path].content.decode()
    assert not re.findall(
        r"<script(?![^>]* src=)|<style| style=| on[a-z]+=",
        text if FILES[path].media_type.startswith("text/html") else "",
    )
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert set(re.findall(r"https?://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_every_import_names_a_file_that_there_is():
    for path, file in FILES.items():
        for name in re.findall(r'from "\./([^"]+)"', file.content.decode()):
            assert f"/page/{name}" in FILES, (path, name)


STORAGE = """
import { keep, kept } from "./storage.mjs";
const held = new Map();
const localStorage = {
  getItem: (name) => held.get(name) ?? null,
  setItem: (name, value) => held.set(name, value),
  removeItem: (name) => held.delete(name),
};
const found = [];
globalThis.window = { localStorage };
keep("localStorage", "a", "1");
found.push(kept("localStorage", "a"));
keep("localStorage", "a", null);
found.push(kept("localStorage", "a"));
globalThis.window = { get localStorage() { throw new Error("SecurityError"); } };
keep("localStorage", "a", "1");
keep("localStorage", "a", null);
found.push(kept("localStorage", "a"));
console.log(JSON.stringify(found));
"""
AGAIN = """
import { Live } from "./live.mjs";
globalThis.document = { hidden: false, addEventListener() {} };
const waits = [], states = [];
globalThis.setTimeout = (work, wait) => {
  if (waits.push(wait) < 9) queueMicrotask(work);
  else console.log(JSON.stringify({ waits, states }));
};
let number = 0;
async function* events() {
  number += 1;
  if (number === 7) yield { event: "beat", data: "{}" };
  else throw new Error("gone");
}
new Live({ events }, { state: (state) => states.push(state.message ?? state), beat() {} }).restart();
"""


GOES_ON = """
import { goingOn } from "./going_on.mjs";
import { Refused } from "./api.mjs";
const piece = (id, finish_reason = null) => ({
  data: JSON.stringify({ choices: [{ token_ids: [id], finish_reason }] }),
});
const done = { data: "[DONE]" };
const failure = (code) => ({ data: JSON.stringify({ error: { message: "a shard is gone", code } }) });
async function answer(parts, signal = { aborted: false }) {
  const asked = [], slept = [], pauses = [], ids = [];
  let now = 0;
  async function* ask(received) {
    asked.push([...received]);
    for (const part of parts.shift() ?? [new TypeError("Failed to fetch")]) {
      if (part instanceof Error) throw part;
      yield part;
    }
  }
  const sleep = (ms) => { slept.push(ms); now += ms; };
  try {
    const options = { signal, now: () => now, sleep, onPause: (paused) => pauses.push(paused) };
    for await (const event of goingOn(ask, options)) ids.push(...event.choices[0].token_ids);
  } catch (error) {
    return { ids, asked: asked.length, failed: error.message, now };
  }
  return { ids, asked, slept, pauses };
}
const away = new Refused(503, "no ingress"), full = new Refused(429, "full"), reset = new TypeError("network error");
console.log(JSON.stringify([
  await answer([[piece(7), reset], [away], [full], [piece(8)], [piece(9, "stop"), done]]),
  await answer([[reset], [piece(7, "stop")]]),
  await answer([[piece(7), new Refused(400, "no such field")]]),
  await answer([[piece(7)]]),
  await answer([]),
  await answer([[full]]),
  await answer([[piece(7), failure("service_unavailable")], [piece(8, "stop"), done]]),
  await answer([[piece(7), failure(null)], [piece(8, "stop"), done]]),
]));
"""


def in_node(folder, script):
    """Runs a script with the modules of the page beside it; returns its line of JSON."""
    for path, file in FILES.items():
        if path.endswith(".js"):
            text = file.content.decode().replace('.js";', '.mjs";')
            (folder / path.split("/")[-1].replace(".js", ".mjs")).write_text(text)
    (folder / "script.mjs").write_text(script)
    command = ["node", "script.mjs"]
    return json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)


@needs_node
def test_a_browser_that_keeps_nothing_is_no_fault(tmp_path):
    assert in_node(tmp_path, STORAGE) == ["1", None, None]


@needs_node
def test_the_page_comes_again_later_each_time_until_a_stream_has_begun(tmp_path):
    found = in_node(tmp_path, AGAIN)
    assert found["waits"] == [500, 1000, 2000, 4000, 8000, 8000, 500, 500, 1000]
    assert found["states"] == [*["gone"] * 6, "live", *["gone"] * 2]


@needs_node
def test_an_answer_in_the_page_goes_on_behind_what_has_come(tmp_path):
    goes_on, ended, refused, lost, nobody, full, away, failed = in_node(tmp_path, GOES_ON)
    assert goes_on["ids"] == [7, 8, 9]
    assert goes_on["asked"] == [[], [7], [7], [7], [7, 8]]
    assert goes_on["slept"] == [100, 200, 400, 100]
    assert goes_on["pauses"] == [True, True, True, False, True, False]
    assert (ended["ids"], ended["asked"]) == ([7], [[], []])  # its end came, [DONE] did not
    assert (refused["failed"], refused["asked"]) == ("no such field", 1)
    assert (lost["ids"], lost["failed"]) == ([7], "Failed to fetch")
    assert 118_000 <= lost["now"] <= 120_000
    assert (nobody["failed"], nobody["now"] <= 5_000) == ("Failed to fetch", True)
    assert (full["failed"], full["asked"]) == ("full", 1)
    assert (away["ids"], away["asked"]) == ([7, 8], [[], [7]])
    assert (failed["ids"], failed["failed"], failed["asked"]) == ([7], "a shard is gone", 1)


def test_a_snapshot_and_a_stream_of_the_cluster(tokenizer, monkeypatch):
    front = Front(tokenizer, live=feed_of(FakeSource()))
    snapshot = asyncio.run(front.get("/cluster")).json()
    assert (snapshot["cluster"]["state"], snapshot["placement"]["num_experts"]) == ("serving", 4)
    monkeypatch.setattr("cluster.serving.openai.live.MAX_WATCH_S", 0.5)
    stream = asyncio.run(front.get("/cluster/live"))
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = events_of(stream.text)
    assert [name for name, _ in events[:4]] == ["cluster", "placement", "beat", "beat"]
    assert {name for name, _ in events[3:]} == {"beat"}  # the rest has not changed
    assert events[3][1]["tokens"] == [[0, 1, 0, 0], [0, 0, 0, 0]]


def test_an_event_of_the_cluster_is_one_line_to_every_client(tokenizer):
    """A fault's words may have what some clients take for a line's end."""

    class Feed:
        async def frames(self):
            yield Frame(number=1, cluster='{"a":"\u2028"}', placement="null", beat="{}")

    front = Front(tokenizer, live=Feed())
    front.service.admission.drain()
    assert asyncio.run(front.get("/cluster/live")).text.split("\n\n")[0] == 'event: cluster\ndata: {"a":"\\u2028"}'


def test_a_stream_ends_when_the_server_does(tokenizer):
    front = Front(tokenizer, live=feed_of(FakeSource()))
    front.service.admission.drain()
    assert len(events_of(asyncio.run(front.get("/cluster/live")).text)) == 3


def test_a_cluster_without_word_is_a_readable_error(tokenizer, monkeypatch):
    monkeypatch.setattr("cluster.serving.live.feed.FRAME_S", 0.05)
    for path in ("/cluster", "/cluster/live"):
        answer = asyncio.run(Front(tokenizer, live=feed_of(FakeSource(failures=10**9))).get(path))
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")


def test_the_cluster_asks_for_a_key_where_calls_need_one(tokenizer, tmp_path):
    keys, [key] = keys_in(tmp_path, "someone")
    front = Front(tokenizer, keys=keys, live=feed_of(FakeSource()))
    for path in ("/cluster", "/cluster/live"):
        assert asyncio.run(front.get(path)).status_code == 401
    answer = asyncio.run(front.get("/cluster", headers={"authorization": f"Bearer {key}"}))
    assert answer.status_code == 200
