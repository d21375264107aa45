"""The HTTP front on a fake service, called in this process: no socket, no server."""

import json
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx2
from serving_fakes import EchoBackend, make_service

from cluster.serving.health import HealthState
from cluster.serving.openai.app import make_app
from cluster.serving.openai.served import Served

MODEL = "tiny"


class Front:
    """An application, its service, and a client of it."""

    def __init__(self, tokenizer, backend=None, *, aliases=(), live=None, operations=None, responses=None, **service):
        self.backend = backend or EchoBackend()
        self.service = make_service(tokenizer, self.backend, **service)
        self.health = HealthState()
        self.health.set(True)

        async def metrics():
            return b"moecluster_up 1\n"

        served = Served(
            service=self.service,
            health=self.health,
            metrics=metrics,
            now_s=lambda: 1234.5,
            aliases=aliases,
            live=live,
            operations=operations,
        )
        if responses is not None:
            served = replace(served, responses=responses)
        self.responses = served.responses
        self.app = make_app(served)

    @asynccontextmanager
    async def client(self, peer="192.0.2.7"):
        transport = httpx2.ASGITransport(self.app, client=(peer, 51234))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client

    async def post(self, path, body, **options):
        async with self.client() as client:
            return await client.post(path, json=body, **options)

    async def get(self, path, **options):
        async with self.client() as client:
            return await client.get(path, **options)


def events(response):
    """The JSON objects of a stream; [DONE] stays as it is."""
    texts = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def scope_of(path):
    """An ASGI scope of a POST, for a client that leaves or does not read."""
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "client": ("192.0.2.7", 1), "server": ("server", 80),
    }  # fmt: skip
