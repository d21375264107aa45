"""Finds what another user of this machine reaches: tries as such a user where this process may, else by the modes."""

import json
import subprocess
import sys

NOBODY = 65534

SCRIPT = """
import json, os, socket, stat, sys

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    may = os.access
else:
    def may(path, bit):
        folders = path.split("/")[1:-1]
        above = ["/" + "/".join(folders[: n + 1]) for n in range(len(folders))]
        return all(os.stat(folder).st_mode & os.X_OK for folder in above) and bool(os.lstat(path).st_mode & bit)

def answers(path):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.settimeout(5)
            try:
                sock.connect(path)
                if not path.startswith(chr(0)) or sock.recv(1):
                    return True
            except OSError:
                pass
    return False

def look(path):
    if path.startswith(chr(0)):
        return [f"connected to {path[1:]}"] if answers(path) else []
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return []
    found = [f"{word} {path}" for word, bit in (("read", os.R_OK), ("wrote", os.W_OK)) if may(path, bit)]
    if stat.S_ISSOCK(mode):
        return [f"connected to {path}"] if found and answers(path) else []
    if stat.S_ISLNK(mode):
        return []
    if stat.S_ISDIR(mode) and may(path, os.R_OK):
        for name in os.listdir(path):
            found += look(os.path.join(path, name))
    return found

print(json.dumps([found for path in json.load(sys.stdin) for found in look(path)]))
"""


def reached(paths):
    """The files, folders with all below, and Unix sockets ("\\0name" has no file) that another user could read, write
    or connect to."""
    done = subprocess.run(
        [sys.executable, "-c", f"NOBODY = {NOBODY}\n{SCRIPT}"],
        input=json.dumps([str(path) for path in paths]),
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
