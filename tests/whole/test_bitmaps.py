"""Dirty bitmaps and transactions, with clients that write meanwhile."""
import json
import struct
import threading

import pytest

from support.nbd import READ, WRITE, Raw, tool, wait_until
from support.program import QmpError

MIB = 1 << 20
SIZE = 4 * MIB
SECTORS = SIZE // 512
BLOCK_STATUS, SET_META_CONTEXT = 7, 10


class Disks:
    """A storage daemon with writable exports of some disks."""

    def __init__(self, program, *names):
        self.folder = program.folder
        _, self.qmp = program.storage_daemon()
        self.path = self.folder / "nbd.sock"
        self.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.path)}})
        for name in names:
            image = self.folder / f"{name}.img"
            image.write_bytes(bytes(SIZE))
            self.qmp.execute("blockdev-add", driver="raw", node_name=name,
                             file={"driver": "file", "filename": str(image)})
            self.qmp.execute("block-export-add", type="nbd", id=name, node_name=name, writable=True)

    def bitmap(self, verb, node, name, **options):
        self.qmp.execute(f"block-dirty-bitmap-{verb}", node=node, name=name, **options)

    def act(self, *actions, **properties):
        actions = [{"type": kind if kind == "abort" else f"block-dirty-bitmap-{kind}", "data": data}
                   for kind, data in actions]
        self.qmp.execute("transaction", actions=actions, **properties)

    def bitmaps(self, node):
        nodes = self.qmp.execute("query-named-block-nodes")
        shown = next(row for row in nodes if row["node-name"] == node)
        return {row.get("name"): row for row in shown.get("dirty-bitmaps", [])}

    def client(self, name):
        return Raw(self.path, name)

    def dirty(self, node, name):
        """The numbers of the dirty sectors, asked for by NBD."""
        export = "look"
        self.qmp.execute("block-export-add", type="nbd", id=export, node_name=node, name=export,
                         writable=True, bitmaps=[name])
        uri = f"nbd+unix:///{export}?socket={self.path}"
        extents = json.loads(tool("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri))
        self.qmp.execute("block-export-del", id=export, mode="hard")
        self.qmp.event("BLOCK_EXPORT_DELETED", id=export)
        assert sum(row["length"] for row in extents) == SIZE
        return {sector for row in extents if row["type"] == 1
                for sector in range(row["offset"] // 512, (row["offset"] + row["length"]) // 512)}


def write(client, sector, count=1):
    client.send(WRITE, sector * 512, count * 512, b"x" * (count * 512))
    error, _ = client.simple_reply()
    assert error == 0


class Writer(threading.Thread):
    """Writes sector after sector, each on one disk and then on the next."""

    def __init__(self, clients):
        super().__init__(daemon=True)
        self.clients, self.written, self.stop = clients, 0, False

    def run(self):
        while not self.stop and self.written < SECTORS:
            for client in self.clients:
                write(client, self.written)
            self.written += 1

    def goes_on(self, count=20):
        target = min(self.written + count, SECTORS)
        wait_until("the writer goes on", lambda: self.written >= target)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop = True
        self.join()


def test_nbdinfo_sees_what_was_written(program):
    disks = Disks(program, "a")
    disks.bitmap("add", "a", "fine", granularity=512)
    disks.bitmap("add", "a", "coarse", granularity=4096)
    client = disks.client("a")
    for sector in (0, 9, 10, SECTORS - 1):
        write(client, sector)
    assert disks.dirty("a", "fine") == {0, 9, 10, SECTORS - 1}
    assert disks.dirty("a", "coarse") == {*range(16), *range(SECTORS - 8, SECTORS)}


def test_a_client_sees_a_bitmap_change_while_it_is_exported(program):
    disks = Disks(program, "a")
    disks.bitmap("add", "a", "b", granularity=512)
    disks.qmp.execute("block-export-add", type="nbd", id="e", node_name="a", name="e",
                      writable=True, bitmaps=["b"])
    client = Raw(disks.path, None)
    client.greet()
    client.option(8, b"")
    query = b"qemu:dirty-bitmap:b"
    replies = client.option(SET_META_CONTEXT, struct.pack(">I1sII", 1, b"e", 1, len(query)) + query)
    assert replies == [(4, struct.pack(">I", 2) + query), (1, b"")]
    client.option(7, struct.pack(">I1sH", 1, b"e", 0))

    def extents():
        client.send(BLOCK_STATUS, 100, 4000)
        _, _, kind, _, length = struct.unpack(">IHHQI", client.take(20))
        data = client.take(length)
        assert kind == 5 and data[:4] == struct.pack(">I", 2)
        return [struct.unpack_from(">II", data, at) for at in range(4, length, 8)]

    assert extents() == [(4000, 0)]
    client.send(WRITE, 1024, 512, bytes(512))
    client.take(16)
    assert extents() == [(924, 0), (512, 1), (2564, 0)]
    # Gone with its export, also for one who is still there.
    disks.qmp.execute("block-export-del", id="e", mode="hard")
    disks.qmp.event("BLOCK_EXPORT_DELETED", id="e")
    assert client.ended()
    disks.bitmap("remove", "a", "b")


def test_a_client_in_the_handshake_does_not_keep_a_bitmap_busy(program):
    disks = Disks(program, "a")
    disks.bitmap("add", "a", "b")
    disks.qmp.execute("block-export-add", type="nbd", id="e", node_name="a", name="e",
                      writable=True, bitmaps=["b"])
    client = Raw(disks.path, None)
    client.greet()
    client.option(8, b"")
    query = b"qemu:dirty-bitmap:b"
    client.option(SET_META_CONTEXT, struct.pack(">I1sII", 1, b"e", 1, len(query)) + query)
    disks.qmp.execute("block-export-del", id="e")
    disks.qmp.event("BLOCK_EXPORT_DELETED", id="e")
    disks.bitmap("remove", "a", "b")
    assert client.option(7, struct.pack(">I1sH", 1, b"e", 0))[0][0] & 0x80000000


def test_disks_of_a_transaction_are_at_one_instant(program):
    disks = Disks(program, "a", "b")
    rounds = 20
    with Writer([disks.client("a"), disks.client("b")]) as writer:
        for number in range(rounds):
            new = [("add", {"node": node, "name": f"{number}", "granularity": 512})
                   for node in "ab"]
            old = [("disable", {"node": node, "name": f"{number - 1}"})
                   for node in "ab" if number]
            disks.act(*new, *old)
            writer.goes_on(5)
    for number in range(rounds):
        first, second = (disks.dirty(node, str(number)) for node in "ab")
        # What one has, and the other not, was on its way at an end of the round.
        assert len(first ^ second) <= 2
        only = first ^ second
        assert only <= {min(second), max(first)}
        assert second == set(range(min(second), max(second) + 1))


def test_a_transaction_that_fails_has_changed_nothing_and_missed_nothing(program):
    disks = Disks(program, "a", "b")
    disks.bitmap("add", "a", "on", granularity=512)
    disks.bitmap("add", "a", "off", granularity=512, disabled=True)
    disks.bitmap("add", "b", "other", granularity=4096)
    actions = [
        ("clear", {"node": "a", "name": "on"}),
        ("disable", {"node": "a", "name": "on"}),
        ("enable", {"node": "a", "name": "off"}),
        ("add", {"node": "a", "name": "new"}),
        ("merge", {"node": "a", "target": "new", "bitmaps": ["on", {"node": "b", "name": "other"}]}),
        ("remove", {"node": "a", "name": "on"}),
        ("clear", {"node": "b", "name": "other"}),
    ]
    with Writer([disks.client("a"), disks.client("b")]) as writer:
        for _ in range(30):
            with pytest.raises(QmpError, match="aborted using Abort action"):
                disks.act(*actions, ("abort", {}))
            writer.goes_on(5)
    shown = disks.bitmaps("a")
    assert sorted(shown) == ["off", "on"]
    assert shown["on"]["recording"] and not shown["on"]["busy"]
    assert not shown["off"]["recording"] and shown["off"]["count"] == 0
    written = set(range(writer.written))
    assert disks.dirty("a", "on") >= written
    assert disks.dirty("b", "other") >= written
    assert len(disks.dirty("a", "on") - written) <= 1


def test_grouped_actions_that_are_no_jobs_are_refused_before_anything_is_done(program):
    disks = Disks(program, "a")
    made = disks.folder / "made.img"
    backup = {"type": "drive-backup", "data": {"job-id": "j", "device": "a", "sync": "full",
                                               "format": "raw", "target": str(made)}}
    clear = {"type": "block-dirty-bitmap-clear", "data": {"node": "a", "name": "none"}}
    abort = {"type": "abort", "data": {}}
    grouped = {"completion-mode": "grouped"}
    for actions, text in [
        ([backup, clear], "'block-dirty-bitmap-clear' does not support Transaction property"),
        ([clear, abort], "'block-dirty-bitmap-clear' does not support Transaction property"),
        ([abort, clear], "aborted using Abort action"),
    ]:
        with pytest.raises(QmpError, match=text):
            disks.qmp.execute("transaction", actions=actions, properties=grouped)
    assert not made.exists()
    assert disks.qmp.execute("query-jobs") == []
    assert not [event for event in disks.qmp.events if event["event"].startswith("JOB")]


def test_a_bitmap_below_an_image_follows_its_file(program):
    disks = Disks(program)
    image = disks.folder / "q.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "8M")
    disks.qmp.execute("blockdev-add", driver="qcow2", node_name="q",
                      file={"driver": "file", "node-name": "file", "filename": str(image)})
    disks.bitmap("add", "file", "b", granularity=512)
    disks.qmp.execute("block-export-add", type="nbd", id="q", node_name="q", writable=True)
    client = disks.client("q")
    before = image.stat().st_size
    write(client, 8000, 128)
    client.send(READ, 8000 * 512, 512)
    assert client.simple_reply()[0] == 0 and client.take(512) == b"x" * 512
    assert image.stat().st_size > before
    assert disks.bitmaps("file")["b"]["count"] >= 128 * 512


def test_odd_bitmaps_and_transactions_are_refused_or_done(program):
    disks = Disks(program, "a")
    for arguments, text in [
        ({"granularity": 2 ** 32 - 1}, "power of 2"),
        ({"granularity": -512}, "uint32_t"),
        ({"granularity": 1.5}, "uint64"),
        ({"disabled": "on"}, "boolean"),
        ({"node": "x" * 100000}, "Cannot find device"),
        ({"name": "x" * 100000}, "Bitmap name too long"),
        ({"name": ""}, "Bitmap name cannot be empty"),
    ]:
        with pytest.raises(QmpError, match=text):
            disks.qmp.execute("block-dirty-bitmap-add", **{"node": "a", "name": "b", **arguments})
    disks.bitmap("add", "a", " odd: \u00e9,", granularity=1 << 31)
    assert disks.dirty("a", " odd: \u00e9,") == set()
    disks.bitmap("remove", "a", " odd: \u00e9,")
    with pytest.raises(QmpError, match="2000 actions is too long"):
        disks.act(*[("abort", {})] * 2000)
    disks.act(*[("add", {"node": "a", "name": str(number)}) for number in range(1000)])
    with pytest.raises(QmpError, match="already exists: 7"):
        disks.act(*[("clear", {"node": "a", "name": str(number)}) for number in range(900)],
                  ("add", {"node": "a", "name": "7"}))
    disks.act(*[("remove", {"node": "a", "name": str(number)}) for number in range(1000)])
    assert disks.bitmaps("a") == {}
    disks.qmp.execute("block-dirty-bitmap-add", node="a", name="b")
    disks.qmp.execute("block-dirty-bitmap-merge", node="a", target="b", bitmaps=["b"] * 1000)
