"""Another user of this machine finds nothing of a running cluster open: no file, no folder, no socket."""

import os
import stat
from pathlib import Path

import grpc
import pytest
from ray._private.worker import global_worker
from ray.serve.generated import serve_pb2, serve_pb2_grpc
from strangers import reached
from test_listening import family, listening, sockets  # noqa: F401 the fixture

pytestmark = pytest.mark.ray


def bound(pids):
    """The Unix sockets that the processes are bound to; "\\0name" for one without a file."""
    ours = {inode for pid in pids for inode in sockets(pid)}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    paths = {words[7] for words in lines if len(words) > 7 and words[6] in ours}
    return {"\0" + path[1:] if path.startswith("@") else path for path in paths}


def written(pids):
    """The files and shared memory that the processes have open to write."""
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                path, mode = os.readlink(link), link.lstat().st_mode
            except OSError:
                continue  # closed meanwhile
            if mode & stat.S_IWUSR and path.startswith("/") and not path.startswith(("/dev/null", "/dev/pts", "/proc")):
                found.add(path)
    return found


def temporary(paths):
    return {path for path in paths if path.startswith(("/tmp/", "/dev/shm/"))}


def test_no_file_folder_or_socket_of_a_cluster_is_reached(served):
    """For all that its processes have open: the folder of each file with its contents, and each socket."""
    pids = family(os.getpid())[1:]  # the files of this process belong to the tests
    session = global_worker.node.get_session_dir_path()
    files, names = temporary(written(pids)), bound(pids)
    assert any(path.startswith(session) for path in files)
    assert {Path(path).name for path in names if path[0] == "/"} >= {"raylet", "plasma_store", "m.sock"}
    assert [name for name in names if name[0] == "\0"]  # the shards' streams
    folders = {Path(path).parent for path in files} - {Path("/tmp"), Path("/dev/shm")}
    assert reached([session, *folders, *files, *names]) == []


def test_another_user_gets_no_word_from_a_shards_stream(served):
    """Nor can he cost it time: the kernel tells who connects."""
    streams = [name for name in bound(family(os.getpid())) if name.startswith("\0moe-cluster-")]
    assert len(streams) >= 2
    assert reached(streams) == []


def test_nobody_is_told_which_applications_run(served, listening):  # noqa: F811
    """Serve's list, at the front and at each port behind it that speaks gRPC."""
    answered = {}
    for _, address, port in listening:
        if not address.is_loopback or port == served.grpc_port:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = serve_pb2_grpc.RayServeAPIServiceStub(channel)
                try:
                    stub.ListApplications(serve_pb2.ListApplicationsRequest(), timeout=10)
                    answered[port] = "OK"
                except grpc.RpcError as error:
                    answered[port] = error.code().name
    assert answered[served.grpc_port] == "PERMISSION_DENIED"
    assert len(answered) >= 3
    assert set(answered.values()) <= {"PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED"}
