"""A machine for the documents' commands: with the files that they name, and with the usual ports free.

It has a network namespace of its own with nothing but loopback, so a server has ports 9000, 8000 and 9464 whatever runs
beside the tests; and in a namespace of mounts an empty folder of servers, so a command finds the server of the page.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from documents import Example, json_lines
from tls_files import Authority

from cluster.checkpoint.made.demo import write_demo_checkpoint
from cluster.footprint.folders import root

MOE = ("MODEL_DIR", "MODEL", "my-finetune", "Qwen/Qwen1.5-MoE-A2.7B-Chat", "models/Qwen1.5-MoE-A2.7B-Chat")
DENSE = ("Qwen2-0.5B", "Qwen/Qwen1.5-0.5B-Chat", "Qwen/Qwen2-7B-Instruct", "models/Qwen2-7B-Instruct")
WRITTEN = ("OUT", "out.jsonl")  # a command that names one finds none
# In the documents' words -> in the test's. A checkpoint's name is a folder with a small random one of its family: a
# folder goes before a name of the hub. A key is the one that the command before has made. 60 faults take minutes, and
# each process that is added is rolled after that.
INSTEAD = {
    '"/models/': '"models/',
    " /models/": " models/",
    "HOST:9000": "127.0.0.1:9000",
    "--requests 300 --faults 60": "--requests 30 --faults 3",
    "scale --expert-shards 4": "scale --expert-shards 3",
    "scale --attention-replicas 3": "scale --attention-replicas 1",
}
READY_S, COMMAND_S = 240, 280
SERVES = re.compile(r"moe-cluster serve\b")


class Machine:
    def __init__(self, folder: Path) -> None:
        self.folder, self._server, self._holder = folder, None, None
        self._serves = self._key = ""
        for names, family in ((MOE, "qwen2_moe"), (DENSE, "qwen2")):
            write_demo_checkpoint(folder / "written" / family, model_type=family)
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).symlink_to(folder / "written" / family)
        (folder / "wiki.txt").write_text("The experts of a layer are small networks. " * 40)
        (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in json_lines("docs/http.md")))
        (folder / "home").mkdir()
        (folder / "home" / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
        authority = Authority(folder, "docs")
        pair = authority.issue("server", server=True)
        for path, name in ((authority.cert, "ca.crt"), (pair.cert, "server.crt"), (pair.key, "server.key")):
            shutil.copy(path, folder / name)
        binaries = [str(Path(sys.executable).parent), *filter(None, [os.path.dirname(os.environ.get("BUF", ""))])]
        self._environment = {**os.environ, "PATH": ":".join([*binaries, os.environ["PATH"]])}
        self._environment |= {"HOME": str(folder / "home"), "NO_COLOR": "1"}
        self._environment.pop("RAY_ADDRESS", None)
        self.path = self._environment["PATH"]

    def run(self, example: Example) -> str:
        """Runs a command or a program in Python and returns its output, which is checked for an end without a fault."""
        text = example.text
        for written, instead in INSTEAD.items():
            text = text.replace(written, instead)
        text = text.replace("moe-…", self._key)
        for name in WRITTEN:
            if re.search(rf"\b{re.escape(name)}\b", text):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (self.folder / name).unlink(missing_ok=True)
        if example.language == "python":
            (self.folder / "example.py").write_text(text)
            text = f"{sys.executable} example.py"
        elif SERVES.search(text):
            return self._serve(text)
        done = subprocess.run(
            self._inside("bash", "-c", text),
            cwd=self.folder,
            env=self._environment | {"KEY": self._key},
            input="Hello\n",
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        assert done.returncode == 0, f"{example.id}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, f"{example.id}: {done.stderr}"
        for key in re.findall(r"moe-[\w-]{43}", done.stderr):
            self._key = key
        return done.stdout

    def separate(self) -> None:
        """Begins the namespaces, which the commands from now on run in."""
        servers = self.folder / "servers"
        servers.mkdir()
        enter = f"ip link set lo up && mount --bind {servers} {root()} && echo ready && exec sleep infinity"
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", enter], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout.readline() == "ready\n"

    @property
    def serves(self) -> bool:
        return self._server is not None

    def _inside(self, *command: str) -> list[str]:
        if self._holder is None:
            return list(command)
        return ["nsenter", f"--target={self._holder.pid}", "--net", "--mount", f"--wdns={self.folder}", *command]

    def _serve(self, text: str) -> str:
        """Starts a server in place of another one, and waits until it is ready."""
        if text == self._serves:
            return ""
        self.end_server()
        out = self.folder / "server.out"
        with open(out, "w") as file:
            self._server = subprocess.Popen(
                self._inside("bash", "-c", f"exec {text}"), cwd=self.folder, env=self._environment, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + READY_S
        while "Ctrl-C drains" not in out.read_text():
            if self._server.poll() is not None:
                self._server = None  # the next page begins without it
                raise AssertionError(out.read_text())
            assert time.monotonic() < deadline, f"{text}: not ready in {READY_S} s: {out.read_text()}"
            time.sleep(0.1)
        self._serves = text
        return out.read_text()

    def end_server(self) -> None:
        """By Ctrl-C; it ends well."""
        self._serves = ""
        if self._server is not None:
            server, self._server = self._server, None
            os.killpg(server.pid, signal.SIGINT)
            assert server.wait(90) == 0, (self.folder / "server.out").read_text()

    def close(self) -> None:
        try:
            self.end_server()
        finally:
            if self._holder is not None:
                self._holder.kill()
                self._holder.wait()
