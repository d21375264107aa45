"""The live page's files: plain HTML, CSS, ES modules and a picture, all of them in this folder. Sends nothing."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFile:
    """etag: changes with the content."""

    content: bytes
    media_type: str
    etag: str


def page_files() -> Mapping[str, PageFile]:
    """By the path of each: "/" is the page itself, "/page/NAME" each other one."""
    files = {}
    for path in sorted(Path(__file__).parent.iterdir()):
        if (media_type := _MEDIA_TYPES.get(path.suffix)) is not None:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            name = "/" if path.name == "index.html" else f"/page/{path.name}"
            files[name] = PageFile(content=content, media_type=media_type, etag=etag)
    return files
