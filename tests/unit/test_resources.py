"""A machine's resources under control groups, in trees of files like those of real ones."""

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cluster
from cluster.config.resources import available_cpus, available_memory
from cluster.llm import LLM
from cluster.runtime.workers import computing

MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    8000 kB\n"
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(root, **files):
    """A process in /pod/box; `box__cpu_max` is the file cpu.max of that group."""
    folders = {"top": "sys/fs/cgroup", "pod": "sys/fs/cgroup/pod", "box": "sys/fs/cgroup/pod/box"}
    made = {"proc/self/cgroup": "0::/pod/box\n", "proc/self/mountinfo": V2_MOUNT}
    for name, text in files.items():
        group, _, file = name.partition("__")
        made[f"{folders[group]}/{file.replace('_', '.', 1)}"] = text
    return tree(root, made)


@pytest.mark.parametrize(
    ("quotas", "cpus"),
    [
        ({}, 8),
        ({"box__cpu_max": "max 100000"}, 8),
        ({"box__cpu_max": "100000 100000"}, 1),
        ({"box__cpu_max": "150000 100000"}, 2),  # rounded up
        ({"box__cpu_max": "1000 100000"}, 1),  # at least one
        ({"box__cpu_max": "900000 100000"}, 8),  # more than there are
        ({"box__cpu_max": "50000 20000"}, 3),  # a period of its own
        ({"box__cpu_max": "400000 100000", "pod__cpu_max": "200000 100000"}, 2),  # the group above has less
        ({"box__cpu_max": "max 100000", "top__cpu_max": "300000 100000"}, 3),
        ({"box__cpu_max": "nonsense"}, 8),
        ({"box__cpu_max": ""}, 8),
        ({"box__cpu_max": "100000 0"}, 8),
    ],
)
def test_the_smallest_quota_of_version_2_counts(tmp_path, quotas, cpus):
    assert available_cpus(v2(tmp_path, **quotas)) == cpus


@pytest.mark.parametrize(("quota", "above", "cpus"), [("-1", "-1", 8), ("250000", "-1", 3), ("-1", "100000", 1)])
def test_quotas_of_version_1_count(tmp_path, quota, above, cpus):
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n5:cpu,cpuacct:/pod/box\n0::/\n",
        "proc/self/mountinfo": "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n" + V2_MOUNT,
    }
    for group, value in (("pod/box", quota), ("pod", above)):
        files[f"sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_quota_us"] = value
        files[f"sys/fs/cgroup/cpu,cpuacct/{group}/cpu.cfs_period_us"] = "100000"
    assert available_cpus(tree(tmp_path, files)) == cpus


@pytest.mark.parametrize(
    ("name", "top"), [("/docker/abc", "/docker/abc"), ("/", "/"), ("/docker/abc", "/"), ("/../other", "/docker/abc")]
)
def test_a_containers_own_group_is_found_however_it_is_named(tmp_path, name, top):
    """As the host names it with that group mounted, in a namespace of its own, and where the mount is the group and
    the names are not the host's."""
    inside = name.lstrip("/") if top == "/" else "."
    files = {
        "proc/self/cgroup": f"4:cpu:{name}\n3:memory:{name}\n",
        "proc/self/mountinfo": (
            f"32 31 0:29 {top} /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n"
            f"33 31 0:30 {top} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
        ),
        f"sys/fs/cgroup/cpu/{inside}/cpu.cfs_quota_us": "200000",
        f"sys/fs/cgroup/cpu/{inside}/cpu.cfs_period_us": "100000",
        f"sys/fs/cgroup/memory/{inside}/memory.limit_in_bytes": str(5 * MIB),
        f"sys/fs/cgroup/memory/{inside}/memory.usage_in_bytes": str(2 * MIB),
    }
    root = tree(tmp_path, files)
    assert available_cpus(root) == 2
    assert available_memory(root) == 3 * MIB


def test_fewer_cpus_by_affinity_than_by_quota(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert available_cpus(v2(tmp_path, box__cpu_max="400000 100000")) == 1


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({}, 8000 * 1024),
        ({"box__memory_max": "max", "box__memory_current": str(MIB)}, 8000 * 1024),
        ({"box__memory_max": str(4 * MIB), "box__memory_current": str(MIB)}, 3 * MIB),
        ({"box__memory_max": str(100 * MIB), "box__memory_current": str(MIB)}, 8000 * 1024),
        ({"pod__memory_max": str(2 * MIB), "pod__memory_current": str(MIB)}, MIB),
        ({"box__memory_max": str(MIB), "box__memory_current": str(2 * MIB)}, 0),
        (
            {
                "box__memory_max": str(4 * MIB), "box__memory_current": str(4 * MIB),
                "box__memory_stat": f"anon {MIB}\ninactive_file {3 * MIB}\n",
            },
            3 * MIB,
        ),
    ],
)  # fmt: skip
def test_the_least_room_of_all_groups_counts(tmp_path, files, room):
    assert available_memory(v2(tmp_path, **files)) == room


def test_without_anything_to_read_nothing_is_limited(tmp_path):
    assert available_cpus(tmp_path) == 8
    assert available_memory(tmp_path) is None


@pytest.fixture
def four_threads_and_a_quota_of_three(tmp_path, monkeypatch):
    """torch has a thread for each CPU that it saw; this process's own control group allows three."""
    root = v2(tmp_path, box__cpu_max="300000 100000")
    monkeypatch.setattr(available_cpus, "__defaults__", (root,))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads_and_a_quota_of_three")
def test_an_llm_gives_torch_no_more_threads_than_the_quota(demo_checkpoint):
    with LLM(demo_checkpoint, device="cpu", skip_tokenizer=True, kv_cache_bytes=1 << 20):
        assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("four_threads_and_a_quota_of_three")
@pytest.mark.parametrize(("asked", "threads"), [(4, 3), (2, 2)])
def test_an_actor_gives_torch_no_more_threads_than_the_quota(monkeypatch, asked, threads):
    monkeypatch.setattr(computing, "ray", SimpleNamespace(get_gpu_ids=list))
    computing.prepare_to_compute(asked)
    assert torch.get_num_threads() == threads


def test_nobody_counts_cpus_past_the_quota():
    """Every count of CPUs in the package goes through `available_cpus`."""
    package = Path(cluster.__file__).parent
    counters = {"sched_getaffinity", "cpu_count", "process_cpu_count"}
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in counters
    }
    assert found == {"config/resources.py"}
