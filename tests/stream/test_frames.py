"""Frames byte by byte, written out by hand: processes of two versions exchange them during a rollout."""

import zlib

import pytest
import torch

from cluster.stream.frames import HEADER, NO_TIMEOUT, Header, Kind


def le(number, num_bytes):
    return number.to_bytes(num_bytes, "little")


def request_head(checksum):
    """3 rows of 5 bfloat16 for 2 experts each at layer 7, sent at second 1.5."""
    return b"".join(
        (
            b"moeX", le(2, 2),  # protocol, version
            le(1, 1), le(1, 1),  # REQUEST, bfloat16
            le(2**63 + 9, 8),  # request id
            le(7, 4), le(3, 4), le(5, 4), le(2, 4),  # layer, rows, hidden size, experts a token
            le(2**40 + 1, 8),  # epoch
            le(30_000, 4), le(0, 4),  # timeout in ms, slot
            bytes.fromhex("000000000000f83f"),  # 1.5 in IEEE 754
            le(3 * (2 * 4 + 2 * 4 + 5 * 2), 8),  # ids, weights and rows
            le(checksum, 4),
        )
    )  # fmt: skip


REQUEST = {
    "kind": Kind.REQUEST, "dtype": torch.bfloat16, "request_id": 2**63 + 9, "layer_id": 7, "rows": 3, "hidden_size": 5,
    "topk": 2, "epoch": 2**40 + 1, "timeout_ms": 30_000, "sent_at": 1.5, "payload_bytes": 78,
}  # fmt: skip


def test_a_head_is_these_68_bytes():
    assert HEADER.size == 68
    payload = bytes(range(78))
    packed = Header(**REQUEST).pack(payload[:24], payload[24:48], payload[48:])
    checksum = zlib.crc32(request_head(0) + payload)
    assert packed == request_head(checksum)
    head = Header.unpack(packed)
    assert head == Header(**REQUEST, checksum=checksum)
    head.check(memoryview(payload))


def test_fields_that_are_left_out_are_zero_and_no_timeout():
    """A sign of life: kind 7, then nothing but the timeout's ones."""
    zeros = b"moeX" + le(2, 2) + le(7, 1) + le(0, 1) + bytes(8 + 4 * 4 + 8) + b"\xff" * 4 + bytes(4 + 8 + 8)
    packed = Header(kind=Kind.ALIVE, request_id=0, payload_bytes=0).pack()
    assert packed == zeros + le(zlib.crc32(zeros + bytes(4)), 4)
    assert Header.unpack(packed).timeout_ms == NO_TIMEOUT


@pytest.mark.parametrize(("kind", "code"), [(kind, code) for code, kind in enumerate(Kind, start=1)])
def test_kinds_have_the_numbers_that_older_versions_know(kind, code):
    names = ["REQUEST", "ANSWER", "UNAVAILABLE", "FAILED", "REFUSED", "SHARE", "ALIVE", "TRACE"]
    assert (kind.name, kind.value) == (names[code - 1], code)
    assert Header(kind=kind, request_id=0, payload_bytes=0).pack()[6] == code


@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)])
def test_dtypes_have_the_numbers_that_older_versions_know(dtype, code):
    assert Header(kind=Kind.ANSWER, request_id=0, payload_bytes=0, dtype=dtype).pack()[7] == code


def test_the_checksum_of_a_large_part_is_that_of_its_words_exclusive_or():
    """4100 bytes: 512 words of 8 and 4 bytes more. A part of 4096 bytes at most is summed as it is."""
    large, small = bytes(i * 7 % 251 for i in range(4100)), bytes(4096)
    folded = 0
    for start in range(0, 4096, 8):
        folded ^= int.from_bytes(large[start : start + 8], "little")
    packed = Header(kind=Kind.FAILED, request_id=0, payload_bytes=8196).pack(large, small)
    assert packed[-4:] == le(zlib.crc32(packed[:-4] + bytes(4) + le(folded, 8) + large[4096:] + small), 4)
