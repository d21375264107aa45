"""The live page as its tests use it: what a visitor does there, and the cluster behind it."""

import json
import os
import urllib.request
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
QUESTION = "What happens when a shard dies?"


class Cluster:
    def __init__(self, url, key, serving):
        self.url, self.key, self.serving = url, key, serving

    def get(self, path):
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return json.load(answer)

    def shard(self, shard_id):
        return next(shard for shard in self.get("/cluster")["cluster"]["shards"] if shard["id"] == shard_id)


def lit(page):
    """Cells that have lit up so far."""
    return int(page.locator("#heat").get_attribute("data-lit") or 0)


def ask(page, text=QUESTION):
    """Returns the answer once it is whole."""
    before = page.locator(".turn.assistant").count()
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()
    page.locator(".turn.assistant:not([aria-busy])").nth(before).wait_for()
    return page.locator(".turn.assistant .text").last.text_content()


def give_key(page, key):
    page.get_by_role("button", name="Key", exact=True).click()
    page.locator("#key-input").fill(key)
    page.get_by_role("button", name="Use").click()


def picture(page, name):
    if os.environ.get("PAGE_PICTURES"):
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=PICTURES / f"{name}.png")


def shard_card(page, shard_id):
    return page.locator(".part.shard").filter(has=page.get_by_role("heading", name=f"Shard {shard_id}", exact=True))


def cielab_lightness(*rgb):
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in rgb]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16
