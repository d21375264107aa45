"""A batch over workers of Ray Data: the answers are those of one process, and a second run adds none."""

import json

import pytest

from cluster import cli

pytest.importorskip("pyarrow", reason="moe-cluster[data] is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]


def test_workers_of_ray_data_give_the_answers_of_one_process(ray_cluster, demo_checkpoint, tmp_path):
    """Two workers on the Ray that this process is connected to. One line is bad, one is refused."""
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions"}
        | {"body": {"prompt": f"number {i}", "max_tokens": 6, "temperature": 0}}
        for i in range(40)
    ]
    lines[7]["body"]["max_tokens"] = 10**6
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{\n"
    (tmp_path / "in").write_text(text)
    offline = ["--model", str(demo_checkpoint), "--dtype", "float32", "--kv-cache-bytes", "8MiB", "--concurrency", "4"]
    found = {}
    for name, options in (("one", []), ("spread", ["--ray-data", "--workers", "2"])):
        command = ["batch", str(tmp_path / "in"), str(tmp_path / name), *offline, *options]
        assert cli.main(command) == 1
        whole = (tmp_path / name).read_bytes()
        assert cli.main(command) == 1
        assert (tmp_path / name).read_bytes() == whole
        answers = [json.loads(line) for line in whole.splitlines()]
        assert len(answers) == 41
        found[name] = {one["id"]: (one["custom_id"], one["error"], texts(one)) for one in answers}
    assert found["spread"] == found["one"]


def texts(answer):
    """All of an answer that does not change from run to run."""
    response = answer["response"]
    if response is None:
        return None
    return response["status_code"], [choice["text"] for choice in response["body"].get("choices", ())]
