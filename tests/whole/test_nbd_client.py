"""The nbd driver against servers of other projects: copies in both directions,
servers that are slow, fail, hang, vanish and return."""
import json
import pathlib
import signal
import socket
import subprocess
import time

import pytest

from support.nbd import tool
from support.program import QmpError

MIB = 1024 * 1024
LONG = 3600


class Server:
    """An NBD server of another project, and its end."""

    def __init__(self, folder, *command):
        self.socket = folder / f"{command[0]}.sock"
        self.command = [str(word).replace("{socket}", str(self.socket)) for word in command]
        self.popen = None
        self.start()

    def start(self):
        self.socket.unlink(missing_ok=True)
        self.popen = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while not self.socket.exists():
            assert self.popen.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self):
        self.popen.kill()
        self.popen.wait()

    def signal(self, number):
        self.popen.send_signal(number)

    def address(self):
        return {"type": "unix", "path": str(self.socket)}


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*command):
        servers.append(Server(tmp_path, *command))
        return servers[-1]

    yield start
    for server in servers:
        server.signal(signal.SIGCONT)
        server.kill()


def qemu_nbd(image):
    return ("qemu-nbd", "--persistent", "--shared=0", "--cache=writeback", "--discard=unmap",
            "--format=raw", "--socket={socket}", image)


def nbdkit(*arguments):
    return ("nbdkit", "--foreground", "--unix={socket}", *arguments)


def image(folder, name, size, fill=None):
    """An image of `size` bytes: every fourth MiB a hole, the others not alike."""
    path = pathlib.Path(folder) / name
    with open(path, "wb") as file:
        file.truncate(size)
        for offset in range(0, size, MIB) if fill is not None else ():
            if offset // MIB % 4 != 3:
                file.seek(offset)
                word = (offset + fill).to_bytes(8, "big")
                file.write(word * (min(MIB, size - offset) // 8))
    return path


def add_nbd(qmp, name, server, **options):
    qmp.execute("blockdev-add", driver="nbd", node_name=name, server=server.address(), **options)


def add_file(qmp, name, path):
    qmp.execute("blockdev-add", driver="raw", node_name=name,
                file={"driver": "file", "filename": str(path)})


def mirror(qmp, source, target, **options):
    qmp.execute("blockdev-mirror", job_id="j0", device=source, target=target, sync="full",
                **options)


def complete(qmp):
    qmp.event("BLOCK_JOB_READY", device="j0")
    qmp.execute("job-complete", id="j0")
    end = qmp.event("BLOCK_JOB_COMPLETED", device="j0")
    assert "error" not in end["data"], end
    qmp.status("j0", "null")


def assert_same(one, other):
    subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", one, other], check=True,
                   timeout=60)


def copied_some(qmp):
    """Waits until the job has done some of its work, and not all."""
    while True:
        job = qmp.execute("query-jobs")[0]
        if 0 < job["current-progress"] < job["total-progress"]:
            return
        time.sleep(0.005)


def test_a_mirror_to_qemu_nbd_copies_data_and_holes(program, serve, tmp_path):
    source, target = image(tmp_path, "src", 16 * MIB, 1), image(tmp_path, "dst", 16 * MIB)
    server = serve(*qemu_nbd(target))
    _, qmp = program.storage_daemon()
    add_file(qmp, "src", source)
    add_nbd(qmp, "dst", server, discard="unmap")
    mirror(qmp, "src", "dst")
    complete(qmp)
    qmp.execute("blockdev-del", node_name="dst")
    assert_same(source, target)
    assert target.stat().st_blocks * 512 < 13 * MIB


def test_a_mirror_from_qemu_nbd_copies_data_and_holes(program, serve, tmp_path):
    source, target = image(tmp_path, "src", 16 * MIB, 2), image(tmp_path, "dst", 16 * MIB)
    server = serve(*qemu_nbd(source))
    _, qmp = program.storage_daemon()
    add_nbd(qmp, "src", server, read_only=True)
    add_file(qmp, "dst", target)
    mirror(qmp, "src", "dst")
    complete(qmp)
    assert_same(source, target)
    assert target.stat().st_blocks * 512 < 13 * MIB


@pytest.mark.parametrize("filters", [
    pytest.param((), id="plain"),
    pytest.param(("--no-sr",), id="simple-replies"),
    pytest.param(("--filter=delay", "rdelay=5ms", "wdelay=5ms"), id="delay"),
    pytest.param(("--filter=noextents",), id="no-block-status"),
    pytest.param(("--filter=nozero",), id="no-write-zeroes"),
    pytest.param(("--filter=blocksize-policy", "blocksize-minimum=4096",
                  "blocksize-preferred=16384", "blocksize-maximum=64K",
                  "blocksize-error-policy=error"), id="large-blocks"),
    pytest.param(("--filter=cache",), id="cache"),
])
def test_a_mirror_between_two_nbdkits(program, serve, tmp_path, filters):
    source, target = image(tmp_path, "src", 8 * MIB, 3), image(tmp_path, "dst", 8 * MIB)
    flags = [word for word in filters if word.startswith("--")]
    parameters = [word for word in filters if not word.startswith("--")]
    _, qmp = program.storage_daemon()
    folders = [tmp_path / "a", tmp_path / "b"]
    for name, path, folder in zip(["src", "dst"], [source, target], folders):
        folder.mkdir()
        server = Server(folder, *nbdkit(*flags, "file", path, *parameters))
        program.processes.append(Ended(server))
        add_nbd(qmp, name, server)
    mirror(qmp, "src", "dst")
    complete(qmp)
    for name in ["src", "dst"]:
        qmp.execute("blockdev-del", node_name=name)
    assert_same(source, target)


class Ended:
    """A server that ends with the test's programs."""

    def __init__(self, server):
        self.server = server

    def end(self):
        self.server.kill()


def test_a_mirror_to_another_diptych_copies_data_and_holes(program, tmp_path):
    source, target = image(tmp_path, "src", 16 * MIB, 11), image(tmp_path, "dst", 16 * MIB)
    path = tmp_path / "nbd.sock"
    _, server = program.storage_daemon()
    add_file(server, "disk", target)
    server.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    server.execute("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
    _, qmp = program.storage_daemon()
    add_file(qmp, "src", source)
    qmp.execute("blockdev-add", driver="nbd", node_name="dst", export="disk", discard="unmap",
                server={"type": "unix", "path": str(path)})
    mirror(qmp, "src", "dst")
    complete(qmp)
    # And back, by its block status.
    back = image(tmp_path, "back", 16 * MIB)
    add_file(qmp, "back", back)
    mirror(qmp, "dst", "back")
    complete(qmp)
    for name in ["dst", "back"]:
        qmp.execute("blockdev-del", node_name=name)
    server.execute("block-export-del", id="e")
    server.event("BLOCK_EXPORT_DELETED", id="e")
    assert_same(source, target)
    assert_same(source, back)
    assert back.stat().st_blocks * 512 < 13 * MIB


def test_errors_of_the_server_are_the_jobs(program, serve, tmp_path):
    source = image(tmp_path, "src", 4 * MIB, 4)
    server = serve(*nbdkit("--filter=error", "memory", "4M", "error=ENOSPC",
                           "error-pwrite-rate=100%"))
    _, qmp = program.storage_daemon()
    add_file(qmp, "src", source)
    add_nbd(qmp, "dst", server)
    mirror(qmp, "src", "dst")
    end = qmp.event("BLOCK_JOB_COMPLETED", device="j0")
    assert end["data"]["error"] == "No space left on device"


def test_a_mirror_survives_the_servers_death_and_return(program, serve, tmp_path):
    source, target = image(tmp_path, "src", 64 * MIB, 5), image(tmp_path, "dst", 64 * MIB)
    server = serve(*qemu_nbd(target))
    _, qmp = program.storage_daemon()
    add_file(qmp, "src", source)
    add_nbd(qmp, "dst", server, reconnect_delay=LONG)
    mirror(qmp, "src", "dst", speed=32 * MIB)
    for _ in range(2):
        copied_some(qmp)
        server.kill()
        assert qmp.execute("query-jobs")[0]["status"] == "running"
        server.start()
    qmp.execute("block-job-set-speed", device="j0", speed=0)
    complete(qmp)
    qmp.execute("blockdev-del", node_name="dst")
    assert_same(source, target)


def test_without_a_delay_the_servers_death_is_the_jobs(program, serve, tmp_path):
    source, target = image(tmp_path, "src", 64 * MIB, 6), image(tmp_path, "dst", 64 * MIB)
    server = serve(*qemu_nbd(target))
    process, qmp = program.storage_daemon()
    add_file(qmp, "src", source)
    add_nbd(qmp, "dst", server)
    mirror(qmp, "src", "dst", speed=16 * MIB)
    copied_some(qmp)
    server.kill()
    end = qmp.event("BLOCK_JOB_COMPLETED", device="j0")
    assert end["data"]["error"] == "Input/output error"
    qmp.status("j0", "null")
    assert "Lost the connection to the NBD server" in process.errors()
    # The node finds the server again by itself.
    server.start()
    while True:
        mirror(qmp, "src", "dst")
        if "error" not in ready_or_end(qmp)["data"]:
            break
        qmp.status("j0", "null")
        time.sleep(0.05)
    qmp.execute("job-complete", id="j0")
    qmp.event("BLOCK_JOB_COMPLETED", device="j0")
    qmp.status("j0", "null")
    qmp.execute("blockdev-del", node_name="dst")
    assert_same(source, target)


def ready_or_end(qmp):
    while True:
        for event in qmp.events:
            if event["event"] in ("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"):
                qmp.events.remove(event)
                return event
        qmp.events.append(qmp._message())


@pytest.mark.parametrize("gone", [signal.SIGKILL, signal.SIGSTOP])
def test_a_cancel_does_not_wait_for_a_server_that_has_gone(program, serve, tmp_path, gone):
    source, target = image(tmp_path, "src", 64 * MIB, 7), image(tmp_path, "dst", 64 * MIB)
    server = serve(*qemu_nbd(target))
    _, qmp = program.storage_daemon()
    add_file(qmp, "src", source)
    add_nbd(qmp, "dst", server, reconnect_delay=LONG)
    mirror(qmp, "src", "dst", speed=16 * MIB)
    copied_some(qmp)
    server.signal(gone)
    stalled(qmp)
    qmp.execute("job-cancel", id="j0")
    qmp.event("BLOCK_JOB_CANCELLED", device="j0")
    qmp.status("j0", "null")
    qmp.execute("blockdev-del", node_name="dst")


def stalled(qmp):
    """Waits until the job does nothing more: what it has sent is not answered."""
    before, seen = None, 0
    while seen < 5:
        now = qmp.execute("query-jobs")[0]["current-progress"]
        before, seen = now, seen + 1 if now == before else 0
        time.sleep(0.1)


@pytest.mark.parametrize("gone", [signal.SIGKILL, signal.SIGSTOP])
def test_the_end_does_not_wait_for_a_server_that_has_gone(program, serve, tmp_path, gone):
    source, target = image(tmp_path, "src", 64 * MIB, 8), image(tmp_path, "dst", 64 * MIB)
    server = serve(*qemu_nbd(target))
    process, qmp = program.storage_daemon()
    add_file(qmp, "src", source)
    add_nbd(qmp, "dst", server, reconnect_delay=LONG)
    mirror(qmp, "src", "dst", speed=16 * MIB)
    copied_some(qmp)
    server.signal(gone)
    stalled(qmp)
    qmp.execute("quit")
    # Orderly: what was not flushed was nobody's any more.
    assert process.wait(30) == 0, process.errors()


def test_a_server_that_never_speaks_holds_nobody_else(program, tmp_path):
    path = tmp_path / "silent.sock"
    second = tmp_path / "second"
    _, qmp = program.storage_daemon("--qmp", f"unix:{second}")
    other = program.connect(second)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        qmp.socket.sendall(
            b'{"execute": "blockdev-add", "arguments": {"driver": "nbd", "node-name": "n",'
            b' "server": {"type": "unix", "path": "%s"}}}\n' % str(path).encode())
        connection, _ = listener.accept()
        with connection:
            assert other.execute("query-named-block-nodes") == []
    reply = qmp._message()
    assert reply["error"]["desc"].startswith("Failed to read initial magic")


def test_the_command_line_takes_an_nbd_node(program, serve, tmp_path):
    target = image(tmp_path, "dst", 4 * MIB, 9)
    server = serve(*nbdkit("file", target, "--exportname=x"))
    _, qmp = program.storage_daemon(
        "--blockdev", f"driver=nbd,node-name=n,server.type=unix,server.path={server.socket},"
        "export=a b,reconnect-delay=5,open-timeout=5")
    [node] = qmp.execute("query-named-block-nodes")
    assert node["file"] == f"nbd+unix:///a b?socket={server.socket}"
    assert node["image"]["virtual-size"] == 4 * MIB


def test_a_tcp_server_is_reached_by_name(program, serve, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    target = image(tmp_path, "dst", 4 * MIB, 10)
    popen = subprocess.Popen(["nbdkit", "--foreground", f"--port={port}", "--ipaddr=127.0.0.1",
                              "file", target])
    try:
        _, qmp = program.storage_daemon()
        qmp.execute("blockdev-add", driver="nbd", node_name="n", open_timeout=30,
                    server={"type": "inet", "host": "localhost", "port": port})
        [node] = qmp.execute("query-named-block-nodes")
        assert node["file"] == f"nbd://localhost:{port}"
    finally:
        popen.kill()
        popen.wait()


def test_a_dirty_bitmap_shows_in_the_place_of_holes(program):
    """What is dirty is no data, and everything else is, as with QEMU's client."""
    disk = program.folder / "disk"
    disk.write_bytes(bytes(MIB))
    _, far = program.storage_daemon()
    far.execute("blockdev-add", driver="file", node_name="f", filename=str(disk))
    far.execute("block-dirty-bitmap-add", node="f", name="b0")
    far.execute("nbd-server-start",
                addr={"type": "unix", "data": {"path": str(program.folder / "far")}})
    far.execute("block-export-add", type="nbd", id="e", node_name="f", name="e", writable=True,
                bitmaps=["b0"])
    tool("qemu-io", "-f", "raw", "-c", "write 65536 65536",
         f"nbd+unix:///e?socket={program.folder}/far")
    _, near = program.storage_daemon()
    near.execute("nbd-server-start",
                 addr={"type": "unix", "data": {"path": str(program.folder / "near")}})
    options = {"driver": "nbd", "node-name": "n", "export": "e", "read-only": True,
               "server": {"type": "unix", "path": str(program.folder / "far")},
               "x-dirty-bitmap": "qemu:dirty-bitmap:b0"}
    near.execute("blockdev-add", **{name.replace("-", "_"): value
                                    for name, value in options.items()})
    near.execute("block-export-add", type="nbd", id="n", node_name="n", name="n")
    rows = json.loads(tool("nbdinfo", "--json", "--map=base:allocation",
                           f"nbd+unix:///n?socket={program.folder}/near"))
    assert [(row["length"], row["type"]) for row in rows] == [
        (65536, 0), (65536, 1), (MIB - 131072, 0)]
    del options["x-dirty-bitmap"]
    with pytest.raises(QmpError, match="'x-dirty-bitmap' cannot be reset to its default"):
        near.execute("blockdev-reopen", options=[options])
    options["x-dirty-bitmap"] = "qemu:dirty-bitmap:other"
    with pytest.raises(QmpError, match="Cannot change the option 'x-dirty-bitmap'"):
        near.execute("blockdev-reopen", options=[options])


def test_refusals_name_what_is_wrong(program, serve, tmp_path):
    server = serve("qemu-nbd", "--persistent", "--format=raw", "--export-name=there",
                   "--socket={socket}", image(tmp_path, "dst", MIB))
    _, qmp = program.storage_daemon()
    with pytest.raises(QmpError, match="Requested export not available"):
        add_nbd(qmp, "n", server, export="elsewhere")
    with pytest.raises(QmpError, match="No TLS credentials with id 't'"):
        add_nbd(qmp, "n", server, export="there", tls_creds="t")
    for context in ("qemu:dirty-bitmap:b", "b", "", "x" * 4096):
        with pytest.raises(QmpError, match="Requested x-dirty-bitmap '.*' not found"):
            add_nbd(qmp, "n", server, export="there", x_dirty_bitmap=context)
    with pytest.raises(QmpError, match="x-dirty-bitmap query too long to send to server"):
        add_nbd(qmp, "n", server, export="there", x_dirty_bitmap="x" * 4097)
    server.kill()
    with pytest.raises(QmpError, match="Failed to connect to '.*': Connection refused"):
        add_nbd(qmp, "n", server, export="there")
    assert qmp.execute("query-named-block-nodes") == []
