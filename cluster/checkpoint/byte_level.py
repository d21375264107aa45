"""How a byte-level vocabulary writes bytes as characters."""

from collections.abc import Mapping


def byte_of_char() -> Mapping[str, int]:
    """The byte of each character. Source: GPT-2's bytes_to_unicode."""
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
