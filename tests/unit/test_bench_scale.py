"""`bench scale`: which sizes it measures, and in which state it leaves a cluster. The cluster is a fake."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from cluster.bench.planning import scale
from cluster.bench.planning.served import Bench
from cluster.cli import main
from cluster.errors import Unavailable


class FakeBench:
    """Each request takes a second, divided by the replicas. sizes: all that it was given.  refused: of each load."""

    def __init__(self, dense=False, fails_at=None, refused=0):
        self.cluster = SimpleNamespace(status=lambda: SimpleNamespace(dense=dense))
        self.size = (2, 0 if dense else 3)
        self.sizes, self.loads, self._fails_at, self._refused = [], [], fails_at, refused

    def scale(self, replicas, shards):
        self.size = (replicas, shards)
        self.sizes.append(self.size)

    def load(self, setting):
        if self.size == self._fails_at:
            raise Unavailable("the server is away")
        self.loads.append(setting)
        traffic = SimpleNamespace(
            requests=setting.num_requests,
            failed=0,
            refused=self._refused,
            tokens_per_s=5.0,
            first_token_ms=(7.0, 8.0, 9.0),
            per_token_ms=(2.0, 3.0, 4.0),
        )
        return traffic, setting.num_requests / self.size[0]


@pytest.fixture
def bench(monkeypatch):
    def install(**options):
        fake = FakeBench(**options)

        @contextmanager
        def running(args):
            yield fake

        monkeypatch.setattr(scale, "_running", running)
        return fake

    return install


def run(path, *options):
    return main(["bench", "scale", "--address", "x:1", "--json", str(path), "--concurrency", "4", *options])


def test_it_measures_all_sizes_and_puts_the_cluster_back(bench, tmp_path, capsys):
    fake, path = bench(), tmp_path / "found.json"
    assert run(path, "--attention-replicas", "1,2", "--shards", "1,4", "--seconds", "20") == 0
    assert fake.sizes == [(1, 1), (2, 1), (1, 4), (2, 4), (2, 3)]
    assert [load.num_requests for load in fake.loads] == [4, 20, 4, 40, 4, 20, 4, 40], (
        "a trial, then as many as take 20 s"
    )
    assert len({load.seed for load in fake.loads}) == len(fake.loads), "else prompts are in the cache"
    found = json.loads(path.read_text())
    assert [(one["replicas"], one["shards"], one["requests_s"]) for one in found] == [
        (1, 1, 1.0), (2, 1, 2.0), (1, 4, 1.0), (2, 4, 2.0)
    ]  # fmt: skip
    assert (found[0]["tokens_s"], found[0]["first_token_ms"], found[0]["per_token_ms"]) == (5.0, 7.0, 2.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.count("█") for line in lines[2:]] == [12, 24, 12, 24]


def test_a_cluster_that_fails_gets_its_processes_back(bench, tmp_path, capsys):
    fake = bench(fails_at=(2, 1))
    assert run(tmp_path / "found.json", "--attention-replicas", "1,2", "--shards", "1") == 1
    assert fake.sizes == [(1, 1), (2, 1), (2, 3)]
    assert "the server is away" in capsys.readouterr().err


def test_a_refused_request_is_not_served():
    """Of eight in 4 s."""
    bench, trial = (
        FakeBench(refused=1),
        scale.Setting(replicas=1, shards=1, prompt_tokens=1, output_tokens=1, num_requests=4, concurrency=1),
    )
    assert scale.measured(bench, trial, 4.0, None).requests_s == pytest.approx(7 / 4)


def test_a_replica_that_does_not_run_yet_is_not_left_behind(monkeypatch):
    """The number that runs is still the old one when the bench is interrupted."""
    asked = []
    cluster = SimpleNamespace(
        status=lambda: SimpleNamespace(dense=False, target_shards=1), attention_replicas=lambda: 1,
        parts=lambda: [SimpleNamespace(role="replica")], scale_attention=asked.append,
    )  # fmt: skip
    bench = Bench(cluster, lambda: None, root=None)
    with pytest.raises(KeyboardInterrupt), scale.as_it_was(bench, lambda _: None):
        cluster.scale_attention(2)
        raise KeyboardInterrupt
    assert asked == [2, 1]


def test_a_dense_model_has_no_shards(bench, tmp_path):
    fake = bench(dense=True)
    assert run(tmp_path / "found.json", "--attention-replicas", "1,3") == 0
    assert fake.sizes == [(1, 0), (3, 0), (2, 0)]


def test_the_planners_answers_stand_beside():
    bench, trial = FakeBench(), scale.Setting(replicas=1, shards=1, prompt_tokens=1, output_tokens=1, num_requests=2)
    found = scale.measured(bench, trial, 5.0, lambda setting: float(setting.num_requests))
    rows = scale.rows_of([found])
    assert found.predicted_requests_s == 10.0
    assert rows[0][3] == "the planner's"
    assert rows[1][3] == "10 (5.00)"


@pytest.mark.parametrize(("share", "drawn"), [(1.0, "█" * 24), (0.5, "█" * 12), (1 / 48, "▌"), (0.0, "")])
def test_bars_are_as_long_as_their_share(share, drawn):
    assert scale.bar(share) == drawn


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--shards", "0,2"], "--shards has 0"),
        (["--attention-replicas", "5000"], "--attention-replicas has 5000, at most 1024"),
        (["--concurrency", "0"], "--concurrency has 0"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--address", "x:1", "--calibration", "y"], "MODEL and --calibration are of a cluster that is started here"),
        (["--ray-address", "x:1"], "give its --address, too"),
        (["--address", "nowhere"], "no Ray answers at 127.0.0.1:1"),
    ],
)
def test_the_impossible_is_refused_before_anything_starts(monkeypatch, capsys, options, named):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(["bench", "scale", *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert named in line
