"""Tokenizing of small, medium and large inputs: the same result, and none holds up the event loop or a smaller one."""

import asyncio
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tokenizers
from serving_fakes import CHATML, HELLO, EchoBackend, byte_ids, make_service, says, write_tokenizer

from cluster.conversation import ChatMessage, Conversation
from cluster.errors import InvalidRequest, Overloaded, Unavailable
from cluster.serving.text.process import RENDERING, TextProcess
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.serving.text.work import LARGE_CHARS, MEDIUM_CHARS, TextWork
from cluster.types import SamplingParams

SLOW = "{% for i in range(5000) %}{% for j in range(1000) %}{{ '' }}{% endfor %}{% endfor %}"  # slow
TEMPLATE = "{% if messages[0]['role'] == 'tool' %}" + SLOW + "{% endif %}" + CHATML
REFUSING = "{% if messages|length > 700 %}{{ raise_exception('too many for this model') }}{% endif %}" + TEMPLATE
SIZES = [10, MEDIUM_CHARS * 2, LARGE_CHARS * 2]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = TextWork(Tokenizer(write_tokenizer(tmp_path_factory.mktemp("model"), chat_template=REFUSING)), 8)
    yield work
    work.end()


@pytest.fixture(scope="module")
def reference(work):
    """The library's own plain calls."""
    return tokenizers.Tokenizer.from_file(str(work._tokenizer.model_dir / "tokenizer.json"))


def some_text(num_chars):
    pieces = ["hello ", "日本", "é", "🙂", "<|im_start|>", "x", "\n\n", "hell"]
    text = "".join(random.Random(num_chars).choices(pieces, k=num_chars))
    return text[:num_chars]


@pytest.mark.parametrize("num_chars", SIZES)
def test_the_ids_and_the_text_are_those_of_a_plain_call(work, reference, num_chars):
    text = some_text(num_chars)
    ids = asyncio.run(work.encode(text))
    assert ids == reference.encode(text).ids
    assert asyncio.run(work.decode(ids, False)) == reference.decode(ids, skip_special_tokens=False) == text
    assert asyncio.run(work.decode(ids, True)) == reference.decode(ids, skip_special_tokens=True)


def test_an_ingress_of_the_last_version_finds_its_worker_by_the_old_name(work, tmp_path):
    """It runs on while a newer package is installed. Its frames: eight bytes of length, then a pickle."""
    command = [sys.executable, "-m", "cluster.serving.text_worker", str(write_tokenizer(tmp_path))]
    tasks = [pickle.dumps(task) for task in (("text", "hello"), ("chat", [("user", "hello")]))]
    framed = b"".join(struct.pack("<Q", len(task)) + task for task in tasks)
    done = subprocess.run(command, input=framed, capture_output=True, timeout=120)
    outcomes, rest = [], done.stdout
    while rest:
        (size,) = struct.unpack("<Q", rest[:8])
        outcomes.append(pickle.loads(rest[8 : 8 + size]).tolist())
        rest = rest[8 + size :]
    assert outcomes[0] == [HELLO], done.stderr
    assert outcomes[1] == work._tokenizer.encode_chat(says("hello"))


@pytest.mark.parametrize("num_chars", SIZES)
def test_a_conversation_is_rendered_alike_whatever_its_size(work, reference, num_chars):
    text = some_text(num_chars)
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = asyncio.run(work.encode_chat(says(text)))
    assert ids == reference.encode(rendered).ids


def test_many_short_messages_count_as_large_and_a_templates_refusal_comes_back(work):
    chat = [ChatMessage(role="user", content="")] * (LARGE_CHARS // 32)
    with pytest.raises(InvalidRequest, match="too many for this model") as refused:
        asyncio.run(work.encode_chat(Conversation(messages=chat)))
    assert refused.value.field == "chat"
    assert work._large_renderer._process.poll() is None


def test_a_lone_surrogate_is_refused_in_a_large_text_too(work):
    with pytest.raises(InvalidRequest, match="lone surrogate at character 0"):
        asyncio.run(work.encode("\ud800" + "a" * LARGE_CHARS))


@pytest.mark.parametrize("size", [10, MEDIUM_CHARS * 2])
def test_a_slow_template_of_a_large_chat_holds_up_nothing_smaller(work, size):
    async def run():
        asyncio.create_task(work.encode("a" * LARGE_CHARS))  # noqa: RUF006 it starts the process
        slow = asyncio.create_task(work.encode_chat(says("a" * LARGE_CHARS, role="tool")))
        await asyncio.sleep(0)
        for _ in range(20):
            await work.encode("b" * size)
        assert not slow.done()
        await slow

    asyncio.run(run())


def test_tokenizing_a_long_text_lets_this_process_go_on(work):
    """The event loop turns many times meanwhile, in the thread of the medium ones too: the lock is free."""

    async def turns_during(step):
        task, turns = asyncio.ensure_future(step), 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    text = some_text(300_000)
    assert asyncio.run(turns_during(work.encode(text))) > 100
    assert asyncio.run(turns_during(asyncio.to_thread(work._tokenizer.encode, text))) > 100


def test_a_process_that_died_is_replaced_and_its_input_may_come_again(work):
    async def run():
        await work.encode("a" * LARGE_CHARS)
        slow = asyncio.create_task(work.encode_chat(says("a" * LARGE_CHARS, role="tool")))
        await asyncio.sleep(0.05)
        os.kill(work._large_renderer._process.pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="send it again"):
            await slow
        assert await work.encode("a" * LARGE_CHARS) == list(byte_ids("a")) * LARGE_CHARS

    asyncio.run(run())


def test_an_input_that_takes_for_ever_is_given_up_and_the_next_one_is_done(work):
    process = TextProcess(work._tokenizer.model_dir, replace(RENDERING, max_task_s=0.1))
    with pytest.raises(InvalidRequest, match=r"chat takes longer than 0\.1 s to render with the model's chat template"):
        process.do(("chat", says("a", role="tool")))
    process._job = RENDERING
    assert process.do(("chat", says("b"))) == "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    process.end()


def test_a_template_that_loops_is_ended_by_the_processors_time_and_its_process_goes_on(work):
    process = TextProcess(work._tokenizer.model_dir, replace(RENDERING, max_cpu_s=0.1))
    with pytest.raises(InvalidRequest, match=r"chat takes more than 0\.1 s of the processor to render") as refused:
        process.do(("chat", says("a", role="tool")))
    assert refused.value.field == "chat"
    first = process._process
    assert process.do(("chat", says("b"))) == "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert process._process is first
    process.end()


MULTIPLYING = (
    "{% if tools %}{% set many = namespace(text=messages[0].content) %}"
    "{% for i in range(tools[0].doublings) %}{% set many.text = many.text + many.text %}{% endfor %}"
    "{{ many.text }}{% endif %}" + CHATML
)


def test_a_template_that_makes_gigabytes_or_never_ends_harms_no_other_request(tmp_path):
    """2 ** 40 characters. The limit of memory refuses them, the process goes on, and it goes on after a loop too."""
    endless = (
        "{% if documents %}{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    work = TextWork(Tokenizer(write_tokenizer(tmp_path, chat_template=endless + MULTIPLYING)), 8)
    work._renderer._job = replace(RENDERING, max_cpu_s=500.0)
    turns = [ChatMessage(role="user", content="a")]
    huge = Conversation(messages=turns, tools=[{"doublings": 40}])
    looping = Conversation(messages=turns, documents=[{"text": "a"}])

    async def run():
        expected = await work.encode_chat(says("a"))
        with pytest.raises(InvalidRequest, match="chat takes more than 512 MiB to render"):
            await work.encode_chat(huge)
        assert work._renderer._process.poll() is None
        with pytest.raises(InvalidRequest, match="over 8000000 characters when rendered"):
            await work.encode_chat(Conversation(messages=turns, tools=[{"doublings": 24}]))
        slow = asyncio.create_task(work.encode_chat(looping))
        await asyncio.sleep(0)
        assert await work.encode("a") == list(byte_ids("a"))
        large = await work.encode_chat(says("a" * LARGE_CHARS))  # in a process of its own
        assert len(large) == LARGE_CHARS + len(expected) - 1
        assert not slow.done()
        os.kill(work._renderer._process.pid, signal.SIGKILL)  # as its deadline would
        with pytest.raises(Unavailable, match="send it again"):
            await slow
        assert await work.encode_chat(says("a")) == expected

    asyncio.run(run())
    work.end()


def test_large_tools_make_a_conversation_large(tmp_path):
    template = "{{ tools | map(attribute='name') | join(',') }}"
    work = TextWork(Tokenizer(write_tokenizer(tmp_path, chat_template=template)), 8)
    tools = [{"name": f"f{i}", "parameters": {"type": "object", "properties": {}}} for i in range(400)]
    ids = asyncio.run(work.encode_chat(Conversation(messages=[{"role": "user", "content": "a"}], tools=tools)))
    assert work._tokenizer.decode(ids) == ",".join(f"f{i}" for i in range(400))
    assert work._renderer._process is None
    assert work._large_renderer._process is not None
    work.end()


def test_the_process_ends_with_its_parent_however_that_ends(work):
    program = (
        "import sys; from pathlib import Path; from cluster.serving.text.work import TextProcess;"
        "process = TextProcess(Path(sys.argv[1])); process.do(('text', 'a'));"
        "print(process._process.pid, flush=True); process.do(('chat', [('tool', 'a')] * 600))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(work._tokenizer.model_dir)], stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline, "the process stays"
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_requests_whose_inputs_find_no_room_to_wait_are_refused_before_anything_is_done(tmp_path):
    backend = EchoBackend()
    service = make_service(Tokenizer(write_tokenizer(tmp_path)), backend, max_waiting_inputs=0)

    async def run():
        first = asyncio.create_task(service.tokenize(Prompt(text="a" * MEDIUM_CHARS)))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="wait already"):
            await service.generate(Prompt(text="a" * MEDIUM_CHARS), SamplingParams())
        with pytest.raises(Overloaded, match="wait already"):
            await service.detokenize([1] * MEDIUM_CHARS)
        assert await service.tokenize(Prompt(text="ab")) == list(byte_ids("ab"))
        await first

    asyncio.run(run())
    assert backend.requests == []
    assert service.admission.num_running == 0
