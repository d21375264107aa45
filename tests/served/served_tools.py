"""Shared by the tests of the served application: what they ask it, its metrics as numbers, waiting for a condition."""

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, Field

from cluster.client.direct import read_url

MESSAGES = [{"role": "user", "content": "Which experts answered?"}]
GREEDY = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0, "ignore_eos": True}}  # for OpenAI's client


class Compact(BaseModel):
    """Without white space between JSON's signs: a model of random weights likes it."""

    model_config = ConfigDict(json_schema_extra={"x-guidance": {"whitespace_flexible": False}})


class Step(Compact):
    expert: Annotated[int, Field(ge=0, le=63)]
    verdict: Literal["busy", "idle", "gone"]


class Report(Compact):
    """Of a layer: at most four of its experts."""

    layer: Annotated[int, Field(ge=0, le=23)]
    steps: Annotated[list[Step], Field(min_length=1, max_length=4)]


def samples(served: Any) -> list[Any]:
    """All samples that a scrape of /metrics shows now, with their labels."""
    text = read_url(served.status().metrics_addresses[0], timeout_s=10.0)
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def scrape(served: Any) -> dict[str, float]:
    """Sums of all samples by their name, over all labels."""
    sums: dict[str, float] = {}
    for sample in samples(served):
        sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Asks ten times a second; fails the test after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {timeout_s} s"
        time.sleep(0.1)
