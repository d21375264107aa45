"""HAProxy's configuration as Serve writes it, as we change it, and as HAProxy itself reads it. Starts no server."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from haproxy_tools import write_config
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions, gRPCOptions

from cluster.runtime.front.haproxy import BINARY, INGRESS_PORTS, PROGRAM, adapted, local_environment, set_environment

NODE_ID_CHARS = 56
# All our changes, so that this test finds new lines of a newer Serve.
CHANGED = (
    r"mode 666|h2\.be\.max-concurrent-streams|log 127\.0\.0\.1:514|bind :|bind \*:|errorfile 50\d|hdr grpc-status 5 |"
    r"if is_list_applications|server fallback .* backup$|timeout connect |"
    r"return .* if routes$|tcp-check expect binary|http-request return status 404 .* not found"  # HTTP
)
SOCKET_PATH_CHARS = 97  # HAProxy's limit


@pytest.fixture
def written(tmp_path):
    """The file that Serve writes before any deployment runs."""
    path = tmp_path / "haproxy.cfg"
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8001),
        grpc_options=gRPCOptions(port=9001, grpc_servicer_functions=["any"]),
        socket_path=str(tmp_path / "a.sock"),
        metrics_socket_path=str(tmp_path / "m.sock"),
        is_head=True,
    )
    HAProxyApi(cfg=config, config_file_path=str(path))._generate_config_file_internal()
    return path


def test_only_the_served_ports_are_open_and_clients_keep_their_address(written):
    before, after = written.read_text(), adapted(written.read_text(), written.parent)
    assert re.findall(r"bind (\S+):\d+", after) == ["127.0.0.1"] * 4
    grpc = after[after.index("frontend grpc_frontend") :]
    assert re.search(r"bind 127\.0\.0\.1:9001 proto h2\n +http-request set-header x-forwarded-for %\[src\]\n", grpc)
    assert set(before.splitlines()) - set(after.splitlines()) == {
        line for line in before.splitlines() if re.search(CHANGED, line)
    }


def test_haproxy_accepts_the_file(written):
    """Serve's variable that names the program must not make it find itself."""
    program = str(Path(sys.executable).parent / PROGRAM)
    done = subprocess.run(
        [program, "-c", "-f", str(written)], env={**os.environ, BINARY: program}, capture_output=True, timeout=30
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_file_of_another_serve_is_refused(written):
    with pytest.raises(ValueError, match="does not know"):
        adapted(written.read_text().replace("listen stats", "listen statistics"), written.parent)


def test_every_socket_path_is_short_enough_below_the_directories_that_are_made_here():
    environment = local_environment(Path("/tmp/moe-test-12345678"))
    sockets = [path for name, path in environment.items() if name.endswith("SOCKET_PATH")]
    assert len(sockets) == 2
    assert max(len(path) + NODE_ID_CHARS + 1 for path in sockets) <= SOCKET_PATH_CHARS


def test_no_port_is_one_that_the_kernel_hands_out():
    """One of Ray's processes may get such a port before HAProxy listens there."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    environment = local_environment(Path("/tmp/moe-test-12345678"))
    ports = [int(value) for name, value in environment.items() if name.endswith("_PORT")]
    assert len(ports) == 8
    assert max(ports) < low


def test_ingresses_of_two_clusters_never_share_a_port():
    """They bind with SO_REUSEPORT: the kernel would give one cluster's connections to the other."""
    name = "RAY_SERVE_DIRECT_INGRESS_{}_{}_PORT"
    taken = []
    try:
        for _ in range(10):
            environment = local_environment(Path("/tmp/moe-test-12345678"))
            for kind in ("HTTP", "GRPC"):
                low, high = (int(environment[name.format(end, kind)]) for end in ("MIN", "MAX"))
                assert high - low == INGRESS_PORTS - 1
                for port in (low, high):
                    other = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                    taken.append(other)
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    other.bind(("127.0.0.1", port))
                    assert sum(sock.getsockname()[1] == port for sock in taken) == 1
    finally:
        for sock in taken:
            sock.close()


def test_what_is_set_outside_stays_and_what_is_set_here_goes(monkeypatch):
    monkeypatch.setenv("MOE_OUTSIDE", "theirs")
    with set_environment({"MOE_OUTSIDE": "ours", "MOE_HERE": "ours"}):
        assert (os.environ["MOE_OUTSIDE"], os.environ["MOE_HERE"]) == ("theirs", "ours")
    assert os.environ["MOE_OUTSIDE"] == "theirs"
    assert "MOE_HERE" not in os.environ


def test_no_line_about_a_call_is_sent_to_whoever_listens(written, tmp_path):
    """Serve's default is the machine's syslog; another place, which the operator names, stays."""
    assert "log 127.0.0.1:514 " in written.read_text()
    assert ":514" not in adapted(written.read_text(), written.parent)
    named = written.read_text().replace("127.0.0.1:514", "10.1.2.3:514")
    assert "    log 10.1.2.3:514 local0 info\n" in adapted(named, written.parent)


def test_only_this_user_administers(written):
    assert re.search(r"stats socket \S+/a\.sock mode 600 level admin", adapted(written.read_text(), written.parent))


def test_a_folder_of_another_user_holds_no_configuration(written):
    """The folder's owner could make HAProxy send all calls to himself."""
    if os.geteuid() == 0:
        os.chown(written.parent, 65534, 65534)
    else:
        written.parent.parent.chmod(0o777)  # anybody's, too
    program = str(Path(sys.executable).parent / PROGRAM)
    done = subprocess.run([program, "-c", "-f", str(written)], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert re.search(r"belongs to another user|replaced by anybody", done.stderr)


def test_haproxys_own_checks_ask_serve_which_refuses_none(tmp_path):
    """These are not calls of our health service, which have bounds; Serve answers them before our handlers."""
    after = adapted(write_config(tmp_path, (9001, 8001, 9002, 9003), [40000]).read_text(), tmp_path)
    [sent] = re.findall(r"tcp-check send-binary ([0-9a-f]+)", after)
    assert b"/ray.serve.RayServeAPIService/Healthz" in bytes.fromhex(sent)
    assert not [line for line in after.splitlines() if "check" in line and "grpc.health" in line]


def test_health_says_no_on_a_node_that_drains_and_on_no_other(tmp_path):
    answer = f"    http-request return status 200 errorfile {tmp_path / 'leaving.http'} if is_health"
    for leaves in (False, True):
        written = write_config(tmp_path, (9001, 8001, 9002, 9003), [40000], http=[30000], leaves=leaves)
        assert (answer in adapted(written.read_text(), tmp_path).splitlines()) == leaves


def test_http_calls_cannot_name_their_own_address_or_change_serves_treatment(tmp_path):
    after = adapted(write_config(tmp_path, (9001, 8001, 9002, 9003), [40000], http=[30000]).read_text(), tmp_path)
    http = after[after.index("frontend http_frontend") : after.index("backend default_backend")]
    assert "http-request set-header x-forwarded-for %[src]" in http
    assert "http-request del-header x-request-timeout-seconds" in http
    backend = after[after.index("\nbackend http-app\n") : after.index("frontend grpc_frontend")]
    assert "retry-on conn-failure empty-response\n" in backend
    assert re.search(r"server ingress0 127\.0\.0\.1:30000 check", backend)
    assert re.search(r"server fallback \S+ check backup disabled", backend)
