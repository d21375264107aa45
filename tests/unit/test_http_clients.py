"""Errors and names of calls as OpenAI's and Anthropic's own clients meet them, in this process, without a socket."""

import asyncio
from contextlib import asynccontextmanager

import anthropic
import httpx2
import openai
import pytest
from http_tools import MODEL, Front
from serving_fakes import write_tokenizer

from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.text.tokenizer import Tokenizer

HELLO = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@asynccontextmanager
async def clients(front, key="any"):
    """OpenAI's and Anthropic's."""
    transport = httpx2.ASGITransport(front.app, client=("192.0.2.7", 51234))
    async with httpx2.AsyncClient(transport=transport) as http:
        given = {"api_key": key, "http_client": http, "max_retries": 0}
        yield (
            openai.AsyncOpenAI(base_url="http://server/v1", **given),
            anthropic.AsyncAnthropic(base_url="http://server", **given),
        )


async def refusals(front, key="any", **fields):
    """The errors that both clients raise for one call."""
    async with clients(front, key) as (of_openai, of_anthropic):
        found = []
        for kind, call in (
            (openai.APIStatusError, of_openai.chat.completions.create),
            (anthropic.APIStatusError, of_anthropic.messages.create),
        ):
            with pytest.raises(kind) as refused:
                await call(**{**HELLO, **fields})
            found.append(refused.value)
        return found


def test_a_wrong_key(tokenizer, tmp_path):
    key, line = new_key("alice")
    (tmp_path / "keys").write_text(line + "\n")
    front = Front(tokenizer, keys=ApiKeys(tmp_path / "keys", lambda: 0.0))

    async def run():
        first, second = await refusals(front, "wrong")
        assert isinstance(first, openai.AuthenticationError)
        assert isinstance(second, anthropic.AuthenticationError)
        assert first.code == "invalid_api_key"
        async with clients(front, key) as (of_openai, of_anthropic):
            await of_openai.chat.completions.create(**HELLO)
            await of_anthropic.messages.create(**HELLO)

    asyncio.run(run())


def test_a_full_server(tokenizer):
    first, second = asyncio.run(refusals(Front(tokenizer, room=0)))
    assert isinstance(first, openai.RateLimitError)
    assert isinstance(second, anthropic.RateLimitError)
    for refused in (first, second):
        assert int(refused.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": "gpt-5"}, "NotFoundError"),
        ({"extra_body": {"temperature": -1}}, "BadRequestError"),
        ({"extra_body": {"frobnicate": 1}}, "BadRequestError"),
        ({"messages": [{"role": "user", "content": "hi" * 6000}]}, "APIStatusError"),
    ],
)  # fmt: skip
def test_a_call_that_can_never_succeed(tokenizer, fields, name):
    for refused, client in zip(asyncio.run(refusals(Front(tokenizer), **fields)), (openai, anthropic), strict=True):
        assert isinstance(refused, getattr(client, name))


def test_a_call_has_its_clients_name_or_a_new_one(tokenizer):
    """A name that a log would not take is replaced."""

    async def run():
        front = Front(tokenizer)
        async with clients(front) as (of_openai, of_anthropic):
            for given in ("mine-7", "a b", "x" * 97, ""):
                headers = {"x-request-id": given}
                answer = await of_openai.chat.completions.create(**HELLO, extra_headers=headers)
                message = await of_anthropic.messages.create(**HELLO, extra_headers=headers)
                name = answer.id.removeprefix("chatcmpl-")
                assert (name == given) == (given == "mine-7")
                assert message.id == f"msg_{message._request_id}"
                assert (message._request_id == given) == (given == "mine-7")

    asyncio.run(run())
