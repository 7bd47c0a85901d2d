"""The storage daemons that are compared, behind one face, and their turns."""
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))

from tests.support.program import BINARY, Qmp  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
TOOLS = ("diptych", "qemu")
# Bytes that one measurement has in images at most, and in one write.
MEMORY = 4 << 30
PIECE = 4 << 20


def touch_memory(folder):
    """Writes a file of MEMORY bytes in `folder`, and removes it.

    The host of a virtual machine may provide memory only when that is touched, which then
    takes longer than what is measured, and take it back when it is not used."""
    piece = b"\xa5" * PIECE
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(MEMORY // PIECE):
            file.write(piece)


def turns(rounds, folder):
    """Names each tool once a round, now the one first and now the other, each time with
    memory that is there."""
    for number in range(rounds):
        for tool in TOOLS[::1 if number % 2 == 0 else -1]:
            touch_memory(folder)
            yield tool


class Daemon:
    """A running storage daemon and its monitor."""

    def __init__(self, process, qmp, nbd):
        self.process = process
        self.qmp = qmp
        self.nbd = nbd

    def cpu_seconds(self):
        """User and system time of all its threads so far, in seconds."""
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = stat.rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def add_raw(self, name, path):
        """Adds an image as the raw node `name`."""
        self.qmp.execute("blockdev-add", driver="raw", node_name=name, discard="unmap",
                         file={"driver": "file", "filename": str(path),
                               **self.file_options})

    def export(self, node):
        """Exports a node, writable, by NBD on a unix socket; returns its URI."""
        self.qmp.execute("nbd-server-start",
                         addr={"type": "unix", "data": {"path": str(self.nbd)}})
        self.qmp.execute("block-export-add", type="nbd", id="e", node_name=node,
                         name="disk", writable=True)
        return f"nbd+unix:///disk?socket={self.nbd}"


def command(tool, socket):
    if tool == "diptych":
        return [BINARY, "storage-daemon", "--qmp", f"unix:{socket}"]
    return ["qemu-storage-daemon", "--chardev",
            f"socket,path={socket},server=on,wait=off,id=c", "--monitor", "chardev=c"]


@contextlib.contextmanager
def daemon(tool, directory):
    """`tool` is `diptych` or `qemu`; its sockets are in `directory`."""
    socket, nbd = directory / "qmp.sock", directory / "nbd.sock"
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(command(tool, socket))
    try:
        running = Daemon(process, Qmp(socket), nbd)
        # The same kernel interface for both.
        running.file_options = {"aio": "io_uring"}
        yield running
    finally:
        process.terminate()
        process.wait()
        nbd.unlink(missing_ok=True)
