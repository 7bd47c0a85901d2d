"""NBD clients of the whole-program tests: real ones, and raw bytes."""
import json
import socket
import struct
import subprocess
import time

from support.program import PATIENCE

REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC, SIMPLE_MAGIC, CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3
GO, STRUCTURED_REPLY = 7, 8


def tool(*arguments, ok=True, patience=PATIENCE, cwd=None):
    """Runs a client to its end; returns what it printed."""
    result = subprocess.run([*map(str, arguments)], stdin=subprocess.DEVNULL, timeout=patience,
                            capture_output=True, text=True, check=False, cwd=cwd)
    if ok:
        assert result.returncode == 0, (arguments, result.stdout, result.stderr)
    return result.stdout + result.stderr


def info(uri):
    """What nbdinfo says of an export."""
    return json.loads(tool("nbdinfo", "--json", uri))["exports"][0]


class Raw:
    """A client that sends what it is told to, sense or nonsense."""

    def __init__(self, address, export=None, structured=False):
        family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
        self.socket = socket.socket(family)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(address if family == socket.AF_INET else str(address))
        self.cookie = 0
        if export is not None:
            self.greet()
            if structured:
                self.option(STRUCTURED_REPLY, b"")
            name = export.encode()
            self.option(GO, struct.pack(">I", len(name)) + name + bytes(2))

    def take(self, length):
        data = b""
        while len(data) < length:
            more = self.socket.recv(length - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def greet(self, flags=3):
        assert self.take(16) == b"NBDMAGICIHAVEOPT"
        self.take(2)
        self.socket.sendall(struct.pack(">I", flags))

    def option(self, number, data):
        """Sends an option; returns its replies up to the last, as (type, data)."""
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        replies = []
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.take(20))
            replies.append((kind, self.take(length)))
            if kind == 1 or kind & 0x80000000:
                return replies

    def send(self, command, offset=0, length=0, payload=b"", flags=0):
        """Sends a request and waits for nothing; returns its cookie."""
        self.cookie += 1
        self.socket.sendall(REQUEST.pack(REQUEST_MAGIC, flags, command, self.cookie, offset,
                                         length) + payload)
        return self.cookie

    def simple_reply(self):
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert magic == SIMPLE_MAGIC
        return error, cookie

    def ended(self):
        """Whether the server has hung up, after what is still to be read."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self):
        self.socket.close()


def wait_until(what, condition, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {patience} s"
        time.sleep(0.02)
