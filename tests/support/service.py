"""The cloud's server in a process of its own, which a test may kill and start again."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

from edgecloud_sd.models import pairs


class Service:
    """The server of the pocket cloud as users start it, on a port that a restart does not change."""

    def __init__(self, *options: str) -> None:
        self._options = options
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()
        self.wait_until_ready()

    def start(self) -> None:
        """Start the process without waiting until it listens."""
        command = [sys.executable, "-m", "edgecloud_sd.cloud", "serve", "--until-stdin-closes"]
        command += ["--port", str(self.port), "--model", pairs.PAIRS["pocket"].cloud, *self._options]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_until_ready(self) -> None:
        """Return when the server has printed its URL."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline().decode().strip() == self.url

    def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self._process.kill()
        self._process.communicate()

    def pause(self) -> None:
        """Stop the process until `resume`. The system still takes connections for it."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        self.kill()
        self.start()
