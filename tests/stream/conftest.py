import pytest
from stream_tools import HERE, Backend

from cluster.stream.server import StreamServer


@pytest.fixture
def backend():
    return Backend()


@pytest.fixture
def server(backend):
    made = StreamServer(backend, host="127.0.0.1", node=HERE)
    made.start()
    yield made
    backend.gate.set()
    made.close()
