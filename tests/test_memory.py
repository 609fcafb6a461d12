"""Free memory: of the machine, of the control groups around this process, and of its own limits."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from aldrift_hf.models import memory
from aldrift_hf.models.memory import free_host_memory, free_memory

MIB = 2**20
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "35 31 0:32 {start} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
)
V2 = "31 23 0:28 {start} /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 64 GiB free, and a function that writes its files: `group -> {file: content}`."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * 1024 * MIB))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def write(own: str, mountinfo: str, groups: dict[str, dict[str, object]], start: str = "/") -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(own)
        (tmp_path / "proc/self/mountinfo").write_text(mountinfo.format(start=start) + "\n")
        for name, files in groups.items():
            folder = tmp_path / "sys/fs/cgroup" / name
            folder.mkdir(parents=True, exist_ok=True)
            for file, content in files.items():
                (folder / file).write_text(f"{content}\n")
        return tmp_path

    return write


def v2(limit: object, used: int, dropped: int = 0, high: object = "max") -> dict[str, object]:
    """In MiB."""
    limit, high = (value if value == "max" else value * MIB for value in (limit, high))
    stat = f"anon 1\ninactive_file {dropped * MIB}\nactive_file 77"
    return {"memory.max": limit, "memory.high": high, "memory.current": used * MIB, "memory.stat": stat}


def v1(limit: object, used: int, dropped: int = 0) -> dict[str, object]:
    stat = f"cache 1\ninactive_file 0\ntotal_inactive_file {dropped * MIB}"
    return {"memory.limit_in_bytes": limit * MIB, "memory.usage_in_bytes": used * MIB, "memory.stat": stat}


UNLIMITED = 9223372036854771712 // MIB


@pytest.mark.parametrize(
    ("groups", "left"),
    [
        ({"": {}, "a": v2(1000, 300), "a/b": v2("max", 100)}, 700),
        ({"": {}, "a": v2(1000, 300), "a/b": v2(500, 100)}, 400),
        ({"": {}, "a": v2(1000, 900), "a/b": v2(500, 100)}, 100),
        ({"": {}, "a": v2("max", 900), "a/b": v2(500, 450, dropped=150)}, 200),
        ({"": {}, "a": v2("max", 900), "a/b": v2(500, 100, high=300)}, 200),
        ({"": {}, "a": v2("max", 900), "a/b": v2(500, 600)}, 0),
        ({"": {}, "a": v2("max", 900), "a/b": v2("max", 600)}, 64 * 1024),
        ({"": {}, "a": {}, "a/b": {}}, 64 * 1024),
        ({"": {}, "a": v2("max", 900), "a/b": v2(500, 100) | {"memory.stat": "what is this"}}, 64 * 1024),
    ],
    ids=["parent", "own", "parent is fuller", "files dropped", "high", "over", "none", "no controller", "odd"],
)
def test_version_2_of_the_groups_each_holds(machine, groups, left):
    assert free_host_memory(machine("0::/a/b\n", V2, groups)) == left * MIB


@pytest.mark.parametrize(
    ("groups", "left"),
    [
        ({"memory": v1(UNLIMITED, 9), "memory/a": v1(2048, 48), "memory/a/b": v1(UNLIMITED, 48)}, 2000),
        ({"memory": v1(UNLIMITED, 9), "memory/a": v1(2048, 48), "memory/a/b": v1(100, 48, dropped=8)}, 60),
        ({"memory": v1(UNLIMITED, 9), "memory/a": v1(UNLIMITED, 48), "memory/a/b": v1(UNLIMITED, 48)}, 64 * 1024),
    ],
)
def test_version_1(machine, groups, left):
    own = "9:name=systemd:/x\n4:cpu,memory:/a/b\n2:cpuacct:/\n0::/\n"
    assert free_host_memory(machine(own, V1, groups)) == left * MIB


@pytest.mark.parametrize(
    ("own", "start"),
    [("0::/docker/abc\n", "/docker/abc"), ("0::/\n", "/"), ("0::/docker/abc\n", "/"), ("0::/../abc\n", "/")],
    ids=["as outside", "namespace", "as outside, in a namespace", "elsewhere"],
)
def test_in_a_container_that_sees_its_own_group_alone(machine, own, start):
    assert free_host_memory(machine(own, V2, {"": v2(512, 500, dropped=100)}, start)) == 112 * MIB


def test_where_there_are_no_groups(machine, tmp_path):
    assert free_host_memory(tmp_path) == 64 * 1024 * MIB


def test_processes_share_what_they_have_together(machine, monkeypatch):
    root = machine("0::/a\n", V2, {"": {}, "a": v2(1000, 200)})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_host_memory(root) == 200 * MIB
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(memory, "PartialState", lambda: SimpleNamespace(num_processes=2))
    assert free_host_memory(root) == 400 * MIB
    limit = {psutil.RLIMIT_AS: 700 * MIB, psutil.RLIMIT_DATA: psutil.RLIM_INFINITY}
    used = SimpleNamespace(vms=500 * MIB, data=0)
    process = SimpleNamespace(rlimit=lambda resource: (limit[resource], 0), memory_info=lambda: used)
    monkeypatch.setattr(psutil, "Process", lambda: process)
    assert free_host_memory(root) == 200 * MIB, "a limit of each process is not divided"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="no such limits on this system")
@pytest.mark.parametrize("flag", ["-v", "-d"])
def test_limits_of_a_shell_are_known_and_hold(flag):
    program = """
import torch
from aldrift_hf.models.memory import free_host_memory
free = free_host_memory()
assert free < 6 * 2**30, free
torch.empty(int(0.9 * free), dtype=torch.uint8)
try:
    torch.empty(int(1.1 * free), dtype=torch.uint8)
except RuntimeError as error:
    print("refused:", "can't allocate memory" in str(error))
"""
    command = f'ulimit {flag} 6291456; exec "$0" -c "$1"'
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, program], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "refused: True\n", done.stderr


def test_a_device_says_what_is_free_and_what_it_keeps_for_reuse(monkeypatch):
    device = SimpleNamespace(
        mem_get_info=lambda device: (100, 1000), memory_reserved=lambda device: 50, memory_allocated=lambda device: 20
    )
    monkeypatch.setattr(torch, "get_device_module", lambda name: device)
    assert free_memory(torch.device("cuda")) == 130


def test_a_device_that_does_not_say_what_is_free_has_the_hosts(monkeypatch):
    """As Apple's, whose memory is the host's, and drivers without the query."""

    class NoQuery:
        def mem_get_info(self, device):
            raise RuntimeError("The device doesn't support querying available free memory")

    monkeypatch.setattr(memory, "free_host_memory", lambda: 42)
    for module in (SimpleNamespace(), NoQuery()):
        monkeypatch.setattr(torch, "get_device_module", lambda device, module=module: module)
        assert free_memory(torch.device("mps")) == 42
