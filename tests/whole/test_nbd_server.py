"""The NBD server against clients of other projects, unmodified, and hostile ones."""
import concurrent.futures
import os
import shutil
import socket
import struct

import pytest

from support.nbd import FLUSH, GO, READ, WRITE, Raw, info, tool, wait_until
from support.program import QmpError

MIB = 1 << 20
SIZE = 16 * MIB


class Server:
    """A storage daemon that serves the export 'disk', by unix socket or TCP."""

    def __init__(self, program, tcp=False, **server):
        self.folder = program.folder
        self.image = self.folder / "disk.img"
        with open(self.image, "wb") as image:
            image.write(os.urandom(MIB))
            image.truncate(SIZE)
        self.process, self.qmp = program.storage_daemon()
        self.qmp.execute("blockdev-add", driver="raw", node_name="disk", discard="unmap",
                         file={"driver": "file", "filename": str(self.image)})
        self.path = self.folder / "nbd.sock"
        if tcp:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                self.address = probe.getsockname()
            addr = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(self.address[1])}}
        else:
            self.address = self.path
            addr = {"type": "unix", "data": {"path": str(self.path)}}
        self.tcp = tcp
        self.addr = addr
        self.qmp.execute("nbd-server-start", addr=addr, **server)

    def export(self, name="disk", node="disk", **options):
        options.setdefault("writable", True)
        self.qmp.execute("block-export-add", type="nbd", id=name, node_name=node, name=name,
                         **options)
        return self

    def uri(self, name="disk"):
        if self.tcp:
            return f"nbd://127.0.0.1:{self.address[1]}/{name}"
        return f"nbd+unix:///{name}?socket={self.path}"

    def raw(self, export=None, **options):
        return Raw(self.address, export, **options)

    def works(self):
        """Whether a well-behaved client is served."""
        client = self.raw("disk")
        cookie = client.send(READ, 0, 512)
        assert client.simple_reply() == (0, cookie)
        assert client.take(512) == self.image.read_bytes()[:512]
        client.close()
        return True


@pytest.fixture(params=["unix", "tcp"])
def served(request, program):
    return Server(program, tcp=request.param == "tcp").export()


@pytest.fixture
def server(program):
    return Server(program).export()


def test_nbdinfo_sees_what_qemu_would_show(server):
    server.export("ro", writable=False, allocation_depth=True, description="words")
    disk = info(server.uri())
    assert disk["export-size"] == SIZE
    assert disk["contexts"] == ["base:allocation"]
    can = {name for name, value in disk.items() if value is True}
    assert can == {"can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua",
                   "can_multi_conn", "can_trim", "can_zero"}
    sizes = [disk[f"block_size_{name}"] for name in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 * MIB]
    read_only = info(server.uri("ro"))
    assert read_only["description"] == "words"
    assert read_only["contexts"] == ["base:allocation", "qemu:allocation-depth"]
    assert read_only["is_read_only"] and not read_only["can_zero"]


def test_one_connection_is_no_multi_conn(program):
    server = Server(program, max_connections=1).export()
    assert info(server.uri())["can_multi_conn"] is False


def test_qemu_img(served):
    uri = served.uri()
    assert f"({SIZE} bytes)" in tool("qemu-img", "info", uri)
    assert '"start": 0, "length": 1048576' in tool("qemu-img", "map", "--output=json", uri)
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, served.image)
    copy = served.folder / "copy.img"
    tool("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy)
    assert copy.read_bytes() == served.image.read_bytes()
    with open(copy, "r+b") as image:
        image.seek(5 * MIB)
        image.write(os.urandom(3 * MIB))
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", copy, uri)
    assert copy.read_bytes() == served.image.read_bytes()


def test_qemu_io(served):
    out = tool("qemu-io", "-f", "raw", "-c", "write -P 1 1M 64k", "-c", "write -f -P 2 100 1000",
               "-c", "write -z 1088k 64k", "-c", "discard 2M 1M", "-c", "flush",
               "-c", "read -P 1 1M 64k", "-c", "read -P 2 100 1000", "-c", "read -P 0 1088k 64k",
               served.uri())
    assert "failed" not in out and "error" not in out, out
    data = served.image.read_bytes()
    assert data[100:1100] == b"\2" * 1000
    assert data[MIB:MIB + 65536] == b"\1" * 65536
    assert not any(data[MIB + 65536:2 * MIB])


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy(served, connections):
    copy = served.folder / "copy.img"
    tool("nbdcopy", "--connections", connections, served.uri(), copy)
    assert copy.read_bytes() == served.image.read_bytes()
    data = os.urandom(SIZE)
    copy.write_bytes(data)
    tool("nbdcopy", "--connections", connections, "--flush", copy, served.uri())
    assert served.image.read_bytes() == data


def test_nbdinfo_map(server):
    with open(server.image, "r+b") as image:
        image.seek(8 * MIB)
        image.write(b"x" * MIB)
    lines = tool("nbdinfo", "--map", server.uri()).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["0", str(MIB), "0"], [str(MIB), str(7 * MIB), "3"], [str(8 * MIB), str(MIB), "0"],
        [str(9 * MIB), str(SIZE - 9 * MIB), "3"]]


@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_verifies_what_it_wrote(server):
    job = server.folder / "job.fio"
    job.write_text(f"[job]\nioengine=nbd\nuri={server.uri()}\nrw=randwrite\nbs=4k\niodepth=32\n"
                   f"size={SIZE}\nverify=crc32c\ndo_verify=1\nrandseed=1\n")
    out = tool("fio", job, ok=False, cwd=server.folder)
    if "engine nbd not loadable" in out:
        pytest.skip("fio has no nbd engine")
    assert "err= 0" in out, out


def test_parts_of_sectors_of_many_clients_do_not_overwrite_each_other(server):
    """Each client writes its own bytes of the same sectors, all at once."""
    clients, rounds, base = 8, 40, 4 * MIB

    def write(number):
        client = server.raw("disk")
        for _ in range(rounds):
            for part in range(8):
                offset = base + part * 400 + number * 50
                client.send(WRITE, offset, 50, bytes([number + 1]) * 50)
        for _ in range(rounds * 8):
            assert client.simple_reply()[0] == 0
        client.close()

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(write, range(clients)))
    data = server.image.read_bytes()[base:base + 3200]
    assert data == b"".join(bytes([number + 1]) * 50 for number in range(clients)) * 8


def test_a_client_that_dies_midway_hurts_nobody(served):
    for cut in (10, 28, 28 + 100, 28 + 4096 + 7):
        client = served.raw("disk")
        message = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 2 * MIB, 4096) + b"y" * 4096
        client.socket.sendall((message * 2)[:cut])
        client.close()
    assert served.works()
    # Nobody is left who would keep the export.
    wait_until("the clients have gone", lambda: deleted(served.qmp, "disk"))


def deleted(qmp, export):
    try:
        qmp.execute("block-export-del", id=export)
    except QmpError as error:
        assert error.desc == f"export '{export}' still in use"
        return False
    return True


def test_nonsense_is_refused_or_cut_off(server):
    for flags in (4, 0xFFFFFFFF):
        client = server.raw()
        client.greet(flags)
        assert client.ended()
    client = server.raw()
    client.greet()
    client.socket.sendall(b"IHAVEOPT" + struct.pack(">II", GO, 0xFFFFFFFF))
    assert client.ended()
    client = server.raw()
    client.greet()
    assert client.option(99, bytes(100000))[0][0] == 0x80000009
    assert client.option(GO, b"\xff\xff\xff\xff")[0][0] == 0x80000003
    assert client.option(GO, struct.pack(">I", 4) + b"nope" + bytes(2))[0][0] == 0x80000006
    client.close()
    client = server.raw("disk")
    client.socket.sendall(b"rubbish" * 100)
    assert client.ended()
    client = server.raw("disk")
    client.send(WRITE, 0, 0xFFFFFFFF)
    assert client.ended()
    client = server.raw("disk")
    for command, offset, length, error in [(READ, SIZE, 1, 22), (READ, 2 ** 64 - 1, 1, 22),
                                           (READ, 0, 2 ** 32 - 1, 22), (WRITE, SIZE, 1, 28),
                                           (99, 0, 0, 22), (FLUSH, 0, 0, 0)]:
        cookie = client.send(command, offset, length, bytes(length) if command == WRITE else b"")
        assert client.simple_reply() == (error, cookie)
    client.close()
    assert server.works()


def test_a_client_that_never_reads_stops_only_itself(server):
    client = server.raw("disk")
    client.socket.settimeout(3)
    sent = 0
    with pytest.raises(TimeoutError):
        while True:
            client.send(READ, 0, MIB)
            sent += 1
    # What it was not sent waits in its own socket, not in the server's memory.
    status = open(f"/proc/{server.process.popen.pid}/status").read()
    resident = int(status.split("VmRSS:")[1].split()[0])
    assert resident < 200_000, f"{resident} KiB after {sent} requests of 1 MiB"
    assert server.works()
    server.qmp.execute("block-export-del", id="disk", mode="hard")
    server.qmp.event("BLOCK_EXPORT_DELETED", id="disk")


def test_stalled_handshakes_do_not_stop_the_stop(server):
    silent = server.raw()
    halfway = server.raw()
    halfway.greet()
    halfway.socket.sendall(b"IHAVE")
    server.qmp.execute("nbd-server-stop")
    assert silent.ended() and halfway.ended()
    assert not server.path.exists()
    server.qmp.execute("nbd-server-start", addr=server.addr)
    server.export()
    assert server.works()


def test_a_stalled_handshake_is_cut_off_in_time(server):
    assert server.raw().ended()
    assert server.works()


def test_connections_beyond_the_limit_wait(program):
    server = Server(program, max_connections=2).export()
    first, second = server.raw("disk"), server.raw("disk")
    third = server.raw()
    third.socket.settimeout(1)
    with pytest.raises(TimeoutError):
        third.take(1)
    third.socket.settimeout(60)
    first.close()
    third.greet()
    second.close()
    third.close()


def test_deleting_an_export_asks_for_force_while_it_is_used(server):
    client = server.raw("disk")
    for command, name in (("block-export-del", "id"), ("nbd-server-remove", "name")):
        with pytest.raises(QmpError, match="export 'disk' still in use"):
            server.qmp.execute(command, **{name: "disk"})
    with pytest.raises(QmpError, match="Node 'disk' is busy|Node disk is in use"):
        server.qmp.execute("blockdev-del", node_name="disk")
    server.qmp.execute("block-export-del", id="disk", mode="hard")
    server.qmp.event("BLOCK_EXPORT_DELETED", id="disk")
    assert client.ended()
    server.qmp.execute("blockdev-del", node_name="disk")


def test_an_export_made_after_the_mirror_began_is_mirrored(program):
    server = Server(program)
    target = server.folder / "target.img"
    with open(target, "wb") as image:
        image.truncate(SIZE)
    server.qmp.execute("blockdev-add", driver="raw", node_name="target",
                       file={"driver": "file", "filename": str(target)})
    server.qmp.execute("blockdev-mirror", job_id="job", device="disk", target="target",
                       sync="full")
    server.export()
    server.qmp.status("job", "ready")
    tool("qemu-io", "-f", "raw", "-c", "write -P 7 3M 1M", "-c", "flush", server.uri())
    server.qmp.execute("block-job-cancel", device="job")
    server.qmp.event("BLOCK_JOB_COMPLETED", device="job")
    server.qmp.execute("nbd-server-stop")
    assert target.read_bytes() == server.image.read_bytes()
    assert target.read_bytes()[3 * MIB:4 * MIB] == b"\7" * MIB


def test_clients_write_through_a_pivot(program):
    server = Server(program).export()
    target = server.folder / "target.img"
    with open(target, "wb") as image:
        image.truncate(SIZE)
    server.qmp.execute("blockdev-add", driver="raw", node_name="target",
                       file={"driver": "file", "filename": str(target)})
    data = os.urandom(SIZE)
    source = server.folder / "new.img"
    source.write_bytes(data)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        server.qmp.execute("blockdev-mirror", job_id="job", device="disk", target="target",
                           sync="full", speed=16 * MIB)
        copy = pool.submit(tool, "nbdcopy", "--connections", 2, "--flush", source, server.uri())
        server.qmp.execute("block-job-set-speed", device="job", speed=0)
        server.qmp.status("job", "ready")
        server.qmp.execute("job-complete", id="job")
        server.qmp.event("BLOCK_JOB_COMPLETED", device="job")
        copy.result()
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri(), source)
    server.qmp.execute("nbd-server-stop")
    assert target.read_bytes() == data


def test_an_iothread_serves_its_export_and_cannot_be_deleted(server):
    server.qmp.execute("object-add", qom_type="iothread", id="thread")
    server.export("other", iothread="thread", writable=False)
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri("other"), server.image)
    with pytest.raises(QmpError, match="in use"):
        server.qmp.execute("object-del", id="thread")
    server.qmp.execute("block-export-del", id="other", mode="hard")
    server.qmp.event("BLOCK_EXPORT_DELETED", id="other")
    wait_until("the thread is free", lambda: not in_use(server.qmp, "thread"))


def in_use(qmp, thread):
    try:
        qmp.execute("object-del", id=thread)
    except QmpError:
        return True
    return False


def test_what_is_wrong_with_an_address_is_told_before_credentials(program):
    _, qmp = program.storage_daemon()

    def start(path):
        with pytest.raises(QmpError) as error:
            qmp.execute("nbd-server-start", tls_creds="none",
                        addr={"type": "unix", "data": {"path": str(path)}})
        return str(error.value)

    assert "Failed to bind socket" in start("/nonexistent/socket")
    path = program.folder / "nbd"
    assert "No TLS credentials with id 'none'" in start(path)
    assert not path.exists()
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    assert "already running" in start("/nonexistent/socket")


def test_exports_on_the_command_line(program):
    image = program.folder / "a.img"
    image.write_bytes(os.urandom(MIB))
    path = program.folder / "cli.sock"
    process, qmp = program.storage_daemon(
        "--blockdev", f"driver=file,node-name=a,filename={image}",
        "--nbd-server", f"addr.type=unix,addr.path={path}", "--export", "nbd,id=e,node-name=a")
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", f"nbd+unix:///a?socket={path}", image)
    client = Raw(path, "a")
    process.popen.terminate()
    assert process.wait() == 0
    assert client.ended()
    assert not path.exists()
    qmp.close()
