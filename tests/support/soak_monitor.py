"""A monitor of the soak: commands, with a judgement of each refusal, and events."""
import collections
import contextlib
import json
import socket
import threading
import time

from support.program import QmpError

# No command, request or job may take longer, on a machine however loaded.
PATIENCE = 90
CLASSES = {"GenericError", "DeviceNotActive"}


class Stopped(Exception):
    """The soak is at its end."""


class Monitor:
    """A monitor whose events are read as they come. Commands of one at a time."""

    def __init__(self, soak, name, path, listen=None):
        self.soak, self.name, self.listen = soak, name, listen
        self.socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + PATIENCE
        while self.socket.connect_ex(str(path)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no monitor at {path}")
            time.sleep(0.02)
        self.events, self.replies = [], collections.deque()
        self.came = threading.Condition()
        self.closed = False
        self.busy = threading.Lock()
        self.thread = threading.Thread(target=self._read, name=f"reader {name}", daemon=True)
        self.thread.start()
        self.execute("qmp_capabilities")

    def _read(self):
        try:
            with self.socket.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if "event" in message:
                        self.events.append(line)
                        if self.listen:
                            self.listen(message)
                    elif "QMP" not in message:
                        with self.came:
                            self.replies.append(message)
                            self.came.notify_all()
        except (OSError, ValueError) as error:
            self.soak.note(self.name, f"reading ended: {error}")
        with self.came:
            self.closed = True
            self.came.notify_all()

    def execute(self, command, **arguments):
        """Runs a command; returns what it returned, or raises QmpError."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()
                     if value is not None}
        with self.busy:
            began = time.monotonic()
            number = self.soak.note(self.name, f"{command} {json.dumps(arguments)}")
            self.socket.sendall(json.dumps(
                {"execute": command, "arguments": arguments}).encode() + b"\n")
            with self.came:
                if not self.came.wait_for(lambda: self.replies or self.closed, PATIENCE):
                    self.soak.complain(f"{self.name}: {command} {arguments}: "
                                       f"no reply in {PATIENCE} s")
                    raise Stopped
                if not self.replies:
                    self.soak.complain(f"{self.name}: {command} {arguments}: connection ended")
                    raise Stopped
                message = self.replies.popleft()
            took = time.monotonic() - began
            self.soak.slowest = max(self.soak.slowest, (took, f"{command} {arguments}"))
        self.soak.commands += 1
        if "error" in message:
            error = message["error"]
            self.soak.refused += 1
            self.soak.note(self.name, f"#{number}: {error['class']}: {error['desc']}")
            legal = error["class"] in CLASSES and (
                error["class"] == "GenericError" or command.startswith("block-job-"))
            if not legal or not error["desc"]:
                self.soak.complain(f"{self.name}: {command} {arguments}: {error}")
            raise QmpError(error)
        return message["return"]

    def tries(self, command, **arguments):
        """The same, for what may be refused: None then."""
        try:
            return self.execute(command, **arguments)
        except QmpError:
            return None

    def close(self):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(PATIENCE)
        self.socket.close()
