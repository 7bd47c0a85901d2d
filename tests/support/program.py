"""Starts the diptych binary and talks to its monitor."""
import json
import os
import pathlib
import socket
import subprocess
import time

from .interface import Interface

TOP = pathlib.Path(__file__).resolve().parent.parent.parent
BINARY = os.environ.get("DIPTYCH_BIN", str(TOP / "target/release/diptych"))
PATIENCE = 60


class QmpError(Exception):
    """An error reply."""

    def __init__(self, error):
        super().__init__(f"{error['class']}: {error['desc']}")
        self.klass = error["class"]
        self.desc = error["desc"]


class Qmp:
    """One negotiated monitor connection. Keeps every event it saw."""

    def __init__(self, path, patience=PATIENCE):
        deadline = time.monotonic() + patience
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                self.socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.socket.settimeout(patience)
        self.patience = patience
        self.buffer = b""
        self.events = []
        self.interface = None
        self.greeting = self._message()
        self.execute("qmp_capabilities")

    def _message(self):
        while b"\n" not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError("the monitor closed the connection")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def execute(self, command, **arguments):
        """Runs a command; returns what it returned, or raises QmpError."""
        request = {"execute": command}
        if arguments:
            request["arguments"] = {
                name.replace("_", "-"): value for name, value in arguments.items()}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._message()
            if "event" in message:
                self._keep(message)
            elif "error" in message:
                raise QmpError(message["error"])
            else:
                if self.interface:
                    self.interface.check_reply(command, message["return"])
                return message["return"]

    def check_against_interface(self):
        """From now on, replies and events have to be what the program says they are."""
        self.interface = Interface(self.execute("query-qmp-schema"))

    def _keep(self, event):
        if self.interface:
            self.interface.check_event(event)
        self.events.append(event)

    def event(self, name, patience=None, **data):
        """Waits for an event with at least this data; takes it and those before."""
        patience = patience or self.patience
        deadline = time.monotonic() + patience
        while True:
            for index, event in enumerate(self.events):
                if event["event"] == name and all(
                        event.get("data", {}).get(key) == value for key, value in data.items()):
                    del self.events[:index + 1]
                    return event
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no {name} {data} in {patience} s; saw {self.events}")
            self.socket.settimeout(left)
            try:
                message = self._message()
            except TimeoutError:
                raise TimeoutError(f"no {name} {data} in {patience} s; saw {self.events}") from None
            finally:
                self.socket.settimeout(self.patience)
            self._keep(message)

    def next_event(self):
        """Waits for the next event, whatever it is; takes it."""
        if not self.events:
            self.events.append(self._message())
        return self.events.pop(0)

    def status(self, job, status, patience=None):
        """Waits until a job says it has this status."""
        return self.event("JOB_STATUS_CHANGE", patience, id=job, status=status)

    def close(self):
        self.socket.close()


class Process:
    """One running diptych."""

    def __init__(self, folder, number, arguments, **options):
        self.arguments = [BINARY, *map(str, arguments)]
        self.error_path = folder / f"stderr.{number}"
        with open(self.error_path, "wb") as error:
            self.popen = subprocess.Popen(
                self.arguments, stdin=subprocess.DEVNULL, stderr=error,
                stdout=options.get("stdout", subprocess.DEVNULL))

    def errors(self):
        return self.error_path.read_text(errors="replace")

    def wait(self, patience=PATIENCE):
        return self.popen.wait(patience)

    def alive(self):
        return self.popen.poll() is None

    def end(self):
        if self.alive():
            self.popen.kill()
        self.popen.wait()


class Program:
    """Starts processes in one test's folder."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        self.connections = []

    def start(self, *arguments, **options):
        process = Process(self.folder, len(self.processes), arguments, **options)
        self.processes.append(process)
        return process

    def connect(self, path, patience=PATIENCE):
        connection = Qmp(path, patience)
        connection.check_against_interface()
        self.connections.append(connection)
        return connection

    def storage_daemon(self, *arguments):
        """A storage daemon and a connection to it."""
        path = self.folder / f"qmp.{len(self.processes)}"
        process = self.start("storage-daemon", "--qmp", f"unix:{path}", *arguments)
        return process, self.connect(path)

    def end_all(self):
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.end()


def run(*arguments, patience=PATIENCE, **options):
    """Runs diptych to its end; returns the completed process, with its text."""
    return subprocess.run([BINARY, *map(str, arguments)], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=patience, check=False, **options)
