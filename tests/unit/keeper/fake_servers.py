"""Small real servers in the place of queen and hive: console scripts that misbehave on demand."""

from __future__ import annotations

import sys
from pathlib import Path

_SCRIPT = """#!{python}
import http.server, json, os, pathlib, signal, socket, sys, time

program = os.path.basename(sys.argv[0])
home = pathlib.Path(os.environ["RBEE_HOME"])
named = home / ("mode-" + program)  # for lives to come
mode = named.read_text() if named.exists() else os.environ.get("FAKE_" + program.replace("-", "_").upper(), "")
story = open(home / "story", "a", buffering=1)

def told_to_stop(number, frame):
    story.write(program + " stops\\n")
    if mode != "deaf":
        os._exit(0)

signal.signal(signal.SIGTERM, told_to_stop)
print(program, "says hello", flush=True)
if mode == "fails":
    print("the reason", file=sys.stderr, flush=True)
    sys.exit(3)
if mode.isdecimal():
    sys.exit(int(mode))
while mode == "held" and not (home / "go").exists():
    time.sleep(0.01)
sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--listen-fd") + 1]))
host, port = sock.getsockname()
url = "http://%s:%d" % (host, port)
story.write(program + " queen_url=" + os.environ.get("RBEE_QUEEN_URL", "-") + "\\n")
hive = {{"hive_id": "hive-1", "state": "live", "url": "", "version": "", "devices": [], "models": [],
        "workers": [], "last_heartbeat_s": 0.0,
        "machine": dict(hostname="", cpus=1, memory_bytes=1, memory_free_bytes=1, disk_free_bytes=1)}}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print('{{"v":1,"kind":"narration","actor":"hive","action":"hive_dies","message":"Alas."}}')
            print("the last word", flush=True)
            os._exit(9)
        if self.path == "/kill":
            os.kill(os.getpid(), signal.SIGKILL)
        body = json.dumps({{"data": [hive], "next": None}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass

server = http.server.ThreadingHTTPServer((host, port), Handler, bind_and_activate=False)
server.daemon_threads = True
server.socket.close()
server.socket = sock
ready = home / "run" / (program + ".json")
ready.write_text(json.dumps({{"url": url, "pid": os.getpid(), "boot_id": "b"}}))
server.serve_forever()
"""


def install_fakes(directory: Path) -> Path:
    """Write the scripts beside a Python that is none, and return that Python's path for `sys.executable`."""
    directory.mkdir()
    for program in ("queen-rbee", "rbee-hive"):
        script = directory / program
        script.write_text(_SCRIPT.format(python=sys.executable))
        script.chmod(0o755)
    return directory / "python"
