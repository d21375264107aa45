"""A small store of Xet's kind: each file is one xorb of chunks that are not compressed. Knows no HTTP.

Source: https://huggingface.co/docs/xet, "CAS API", "Xorb format".
"""

from typing import Any

CHUNK_BYTES = 1 << 16


def xorb_of(content: bytes) -> bytes:
    """A file's chunks, each behind its header: version, stored size, compression (none), size."""
    return b"".join(_header(len(chunk)) + chunk for chunk in chunks_of(content))


def chunks_of(content: bytes) -> list[bytes]:
    return [content[begin : begin + CHUNK_BYTES] for begin in range(0, len(content), CHUNK_BYTES)]


def _header(num_bytes: int) -> bytes:
    size = num_bytes.to_bytes(3, "little")
    return b"\0" + size + b"\0" + size


def reconstruction(name: str, content: bytes, url: str) -> dict[str, Any]:
    """How a file is put together: its xorb's chunks from the first to the last. name: the xorb's hash."""
    chunks = {"start": 0, "end": len(chunks_of(content))}
    fetch = {"range": chunks, "url": url, "url_range": {"start": 0, "end": len(xorb_of(content)) - 1}}
    term = {"hash": name, "unpacked_length": len(content), "range": chunks}
    return {"offset_into_first_range": 0, "terms": [term], "fetch_info": {name: [fetch]}}
