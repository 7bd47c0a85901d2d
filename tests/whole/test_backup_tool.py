"""A backup tool's commands, given by a QMP library that others wrote, while the
embedded guest writes all the time: full, incremental, fetched by NBD from a snapshot
under the running disk; and each restored to exactly one instant.
"""
import asyncio
import contextlib
import json

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from support import instant
from support.guest import MIB, Guest, same
from support.nbd import tool
from support.program import QmpError

pytestmark = pytest.mark.usefixtures("kvm")

SIZE = 32 * MIB


class Tool:
    """One backup tool at a guest's monitor."""

    def __init__(self, guest):
        self.guest = guest
        self.folder = guest.folder
        self.client = QMPClient("backup tool")
        self.taken = []

    async def execute(self, command, **arguments):
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self.client.execute(command, arguments or None)

    async def refused(self, text, command, **arguments):
        with pytest.raises(ExecuteError, match=text):
            await self.execute(command, **arguments)

    async def disk(self):
        """The guest's disk: where the device is, its node and size."""
        devices = await self.execute("query-block")
        [disk] = [row for row in devices if row["device"] == "disk0"]
        shown = disk["inserted"]
        return disk["qdev"], shown["node-name"], shown["image"]["virtual-size"]

    async def target(self, name, backing=None):
        """A new image, as a node of that name."""
        path = self.folder / f"{name}.qcow2"
        extra = ["-b", backing, "-F", "qcow2"] if backing else []
        tool("qemu-img", "create", "-q", "-f", "qcow2", *extra, path, str(SIZE))
        # A tool that writes an image need not open what is below.
        await self.execute("blockdev-add", driver="qcow2", node_name=name, backing=None,
                           file={"driver": "file", "filename": str(path)})
        return path

    async def backed_up(self, name, *actions, **arguments):
        """Starts a backup to the node `name` in a transaction, waits for its end, and
        takes the node away. Remembers what writes it may show."""
        _, node, _ = await self.disk()
        listener = EventListener(("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED",
                                  "BLOCK_JOB_ERROR"))
        backup = {"type": "blockdev-backup", "data": {
            "job-id": f"backup-{name}", "device": node, "target": name, **arguments}}
        with self.client.listen(listener):
            earliest = self.newest()
            await self.execute("transaction", actions=[*actions, backup])
            self.taken.append((name, earliest, self.newest()))
            event = await asyncio.wait_for(listener.get(), 60)
        assert event["event"] == "BLOCK_JOB_COMPLETED", event
        assert "error" not in event["data"], event
        await self.execute("blockdev-del", node_name=name)

    def newest(self):
        return instant.newest(self.guest.sources[0].read_bytes())


def restored(image):
    """The bytes that an image and those below it show."""
    raw = image.with_suffix(".restored")
    tool("qemu-img", "convert", "-O", "raw", image, raw)
    return raw.read_bytes()


def run(guest, drive):
    """Lets the tool work with the guest's monitor."""
    async def connected():
        backup = Tool(guest)
        await backup.client.connect(str(guest.folder / "tool.qmp"))
        try:
            await drive(backup)
        finally:
            with contextlib.suppress(EOFError):
                await backup.client.disconnect()
        return backup

    return asyncio.run(connected())


def writing_guest(program):
    guest = Guest(program, size=SIZE, workload=instant.WORKLOAD,
                  disk_options=instant.DISK_OPTIONS,
                  options=(*instant.OPTIONS, "--qmp", f"unix:{program.folder}/tool.qmp"))
    guest.wait_working()
    # Every block has been written in its turn.
    guest.wait_writes(2 * SIZE // instant.BLOCK)
    return guest


def test_a_full_backup_and_incrementals_restore_to_one_instant_each(program):
    guest = writing_guest(program)
    images = {}

    async def drive(backup):
        _, node, size = await backup.disk()
        assert size == SIZE
        add = {"type": "block-dirty-bitmap-add", "data": {"node": node, "name": "chain"}}
        images["full"] = await backup.target("full")
        await backup.backed_up("full", add, sync="full")
        below = images["full"]
        for name in ("first", "second"):
            guest.wait_writes(500)
            images[name] = below = await backup.target(name, below)
            await backup.backed_up(name, sync="incremental", bitmap="chain")
        [shown] = [row for row in await backup.execute("query-block")
                   if row["device"] == "disk0"]
        [bitmap] = shown["inserted"]["dirty-bitmaps"]
        assert bitmap["recording"] and not bitmap["busy"], bitmap
        # A cancelled incremental is as if there had been none.
        images["third"] = await backup.target("cancelled", below)
        listener = EventListener("BLOCK_JOB_CANCELLED")
        with backup.client.listen(listener):
            await backup.execute("blockdev-backup", job_id="c", device=node, target="cancelled",
                                 sync="incremental", bitmap="chain", speed=65536)
            guest.wait_writes(500)
            await backup.execute("job-cancel", id="c")
            await asyncio.wait_for(listener.get(), 60)
        await backup.execute("blockdev-del", node_name="cancelled")
        images["third"] = await backup.target("third", below)
        await backup.backed_up("third", sync="incremental", bitmap="chain")
        await backup.execute("block-dirty-bitmap-remove", node=node, name="chain")

    backup = run(guest, drive)
    [disk] = guest.finish()["disks"]
    for name, earliest, latest in backup.taken:
        instant.check(restored(images[name]), disk["lag"], earliest, latest + disk["lag"])
    assert [name for name, _, _ in backup.taken] == ["full", "first", "second", "third"]


def extents(uri, context):
    """The dirty ranges that an export tells."""
    rows = json.loads(tool("nbdinfo", "--json", f"--map={context}", uri))
    assert sum(row["length"] for row in rows) == SIZE
    return [(row["offset"], row["length"]) for row in rows if row["type"] & 1]


class Snapshot:
    """The disk at one instant, under the running guest, as an NBD export."""

    def __init__(self, backup, name, **options):
        self.backup, self.name, self.options = backup, name, options
        self.socket = backup.folder / f"{name}.nbd"
        self.uri = f"nbd+unix:///{name}?socket={self.socket}"

    async def take(self):
        backup, name = self.backup, self.name
        self.qdev, self.node, _ = await backup.disk()
        scratch = backup.folder / f"{name}.scratch"
        with open(scratch, "wb") as image:
            image.truncate(SIZE)
        await backup.execute("blockdev-add", driver="file", node_name=f"{name}-scratch",
                             discard="unmap", filename=str(scratch))
        await backup.execute("blockdev-add", driver="copy-before-write", node_name=f"{name}-cbw",
                             file=self.node, target=f"{name}-scratch", **self.options)
        earliest = backup.newest()
        await backup.execute("qom-set", path=self.qdev, property="drive", value=f"{name}-cbw")
        backup.taken.append((name, earliest, backup.newest()))
        await backup.execute("blockdev-add", driver="snapshot-access", node_name=name,
                             file=f"{name}-cbw")

    async def export(self, bitmap):
        await self.backup.execute("nbd-server-start", addr={
            "type": "unix", "data": {"path": str(self.socket)}})
        await self.backup.execute("block-export-add", type="nbd", id=self.name,
                                  node_name=self.name, name=self.name,
                                  bitmaps=[{"node": self.node, "name": bitmap}])

    async def drop(self):
        execute = self.backup.execute
        await execute("nbd-server-stop")
        while await execute("query-block-exports"):
            await asyncio.sleep(0.01)
        await execute("blockdev-del", node_name=self.name)
        await execute("qom-set", path=self.qdev, property="drive", value=self.node)
        await execute("blockdev-del", node_name=f"{self.name}-cbw")
        await execute("blockdev-del", node_name=f"{self.name}-scratch")


def test_snapshots_fetched_by_nbd_are_of_one_instant_and_the_bitmap_tells_what_to_fetch(program):
    guest = writing_guest(program)
    images = [program.folder / f"fetched{number}" for number in range(3)]

    async def drive(backup):
        _, node, _ = await backup.disk()
        await backup.execute("block-dirty-bitmap-add", node=node, name="before0")
        for number, image in enumerate(images):
            snapshot = Snapshot(backup, f"snap{number}")
            # What is written from now on belongs to the next one. What is written until
            # the instant is in both, which is more than is needed, and never less.
            await backup.execute("block-dirty-bitmap-add", node=node, name=f"before{number + 1}")
            await snapshot.take()
            await backup.execute("block-dirty-bitmap-disable", node=node, name=f"before{number}")
            await snapshot.export(f"before{number}")
            guest.wait_writes(500)
            whole = program.folder / "whole"
            await asyncio.to_thread(tool, "nbdcopy", snapshot.uri, whole)
            dirty = extents(snapshot.uri, f"qemu:dirty-bitmap:before{number}")
            if number:
                # What is dirty, over what was fetched before.
                image.write_bytes(images[number - 1].read_bytes())
                source = whole.read_bytes()
                with open(image, "r+b") as file:
                    for offset, length in dirty:
                        file.seek(offset)
                        file.write(source[offset:offset + length])
                assert same(image, whole)
            else:
                whole.rename(image)
            # Again, by another client: it still shows the same.
            await asyncio.to_thread(
                tool, "qemu-img", "convert", "-f", "raw", "-O", "raw", snapshot.uri, whole)
            assert same(image, whole)
            await snapshot.drop()
            await backup.execute("block-dirty-bitmap-remove", node=node, name=f"before{number}")
        nodes = {row["node-name"] for row in await backup.execute("query-named-block-nodes")}
        assert nodes == {"disk0-raw", "disk0-file", "mailbox-raw", "mailbox-file"}

    backup = run(guest, drive)
    [disk] = guest.finish()["disks"]
    for image, (_, earliest, latest) in zip(images, backup.taken, strict=True):
        instant.check(image.read_bytes(), disk["lag"], earliest, latest + disk["lag"])


def test_a_snapshot_is_the_source_of_an_incremental_backup(program):
    """What qmpbackup does: the guest never waits for the target, only for the scratch."""
    guest = writing_guest(program)
    images = {}

    async def drive(backup):
        _, node, _ = await backup.disk()
        below = None
        for name in ("full", "first", "second"):
            await backup.execute("block-dirty-bitmap-add", node=node, name=f"since-{name}")
            snapshot = Snapshot(backup, f"snap-{name}", on_cbw_error="break-snapshot",
                                cbw_timeout=45)
            await snapshot.take()
            images[name] = await backup.target(name, below)
            arguments = {"sync": "full"}
            actions = []
            if below:
                arguments = {"sync": "bitmap", "bitmap": "what", "bitmap-mode": "never"}
                actions = [
                    {"type": "block-dirty-bitmap-add",
                     "data": {"node": f"snap-{name}", "name": "what", "disabled": True}},
                    {"type": "block-dirty-bitmap-merge",
                     "data": {"node": f"snap-{name}", "target": "what",
                              "bitmaps": [{"node": node, "name": since}]}}]
            actions.append({"type": "blockdev-backup", "data": {
                "job-id": name, "device": f"snap-{name}", "target": name, **arguments}})
            listener = EventListener("BLOCK_JOB_COMPLETED")
            with backup.client.listen(listener):
                await backup.execute("transaction", actions=actions)
                event = await asyncio.wait_for(listener.get(), 60)
            assert "error" not in event["data"], event
            await backup.execute("blockdev-del", node_name=name)
            await backup.execute("nbd-server-start", addr={
                "type": "unix", "data": {"path": str(snapshot.socket)}})
            await snapshot.drop()
            if below:
                await backup.execute("block-dirty-bitmap-remove", node=node, name=since)
            since, below = f"since-{name}", images[name]

    backup = run(guest, drive)
    [disk] = guest.finish()["disks"]
    for name, earliest, latest in backup.taken:
        image = restored(images[name.removeprefix("snap-")])
        instant.check(image, disk["lag"], earliest, latest + disk["lag"])


def test_a_filter_goes_in_and_out_in_one_order_only(program):
    guest = Guest(program, size=SIZE)
    guest.wait_working()

    async def drive(backup):
        path, node, _ = await backup.disk()
        other, small = program.folder / "scratch", program.folder / "small"
        for image, size in ((other, SIZE), (small, SIZE // 2)):
            with open(image, "wb") as file:
                file.truncate(size)
        for name, image in (("scratch", other), ("small", small)):
            await backup.execute("blockdev-add", driver="file", node_name=name,
                                 filename=str(image))
        await backup.execute("blockdev-add", driver="file", node_name="ro", read_only=True,
                             filename=str(other), locking="off")
        drive_of = {"path": path, "property": "drive"}
        for value, text in (("nope", "Cannot find device='' nor node-name='nope'"),
                            ("ro", "read-only"), ("small", "size change")):
            await backup.refused(text, "qom-set", **drive_of, value=value)
        await backup.refused("not found", "qom-set", path="/machine/peripheral/nope",
                             property="drive", value=node)
        await backup.execute("blockdev-add", driver="copy-before-write", node_name="cbw",
                             file=node, target="scratch")
        # Not while the guest writes below the filter.
        snap = {"driver": "snapshot-access", "node_name": "snap", "file": "cbw"}
        await backup.refused("Permission conflict", "blockdev-add", **snap)
        await backup.refused("Permission conflict", "qom-set", **drive_of, value="scratch")
        await backup.execute("qom-set", **drive_of, value="cbw")
        await backup.execute("qom-set", **drive_of, value="cbw")
        assert await backup.execute("qom-get", **drive_of) == "cbw"
        await backup.execute("blockdev-add", **snap)
        guest.wait_writes()
        await backup.refused("in use", "blockdev-del", node_name="cbw")
        # The guest must not write past the filter while the snapshot is there.
        await backup.refused("Permission conflict", "qom-set", **drive_of, value=node)
        await backup.refused("Permission conflict", "qom-set", **drive_of, value="scratch")
        await backup.execute("blockdev-del", node_name="snap")
        await backup.execute("qom-set", **drive_of, value=node)
        await backup.execute("blockdev-del", node_name="cbw")
        guest.wait_writes()
        # In a hundred times, and nothing is lost.
        for _ in range(100):
            await backup.execute("blockdev-add", driver="copy-before-write", node_name="cbw",
                                 file=node, target="scratch")
            await backup.execute("qom-set", **drive_of, value="cbw")
            await backup.execute("qom-set", **drive_of, value=node)
            await backup.execute("blockdev-del", node_name="cbw")
        guest.wait_writes()

    guest.folder.joinpath("tool.qmp").symlink_to(guest.qmp_path)
    guest.qmp.close()
    run(guest, drive)
    guest.finish()


def test_a_disk_is_not_moved_away_from_a_job_that_watches_it(program):
    guest = Guest(program, size=SIZE)
    guest.wait_working()
    guest.mirror(speed=4 * MIB)
    path = "/machine/peripheral/disk0"
    spare = program.folder / "spare"
    with open(spare, "wb") as file:
        file.truncate(SIZE)
    guest.qmp.execute("blockdev-add", driver="file", node_name="spare", filename=str(spare))
    # Its node is below the job's filter, and there it stays.
    guest.qmp.execute("qom-set", path=path, property="drive", value="disk0-raw")
    shown = guest.qmp.execute("qom-get", path=path, property="drive")
    assert shown not in ("disk0-raw", "spare")
    with pytest.raises(QmpError, match="block job"):
        guest.qmp.execute("qom-set", path=path, property="drive", value="spare")
    guest.qmp.execute("block-job-set-speed", device="mirror0", speed=0)
    guest.qmp.event("BLOCK_JOB_READY", device="mirror0")
    guest.qmp.execute("job-complete", id="mirror0")
    guest.qmp.event("BLOCK_JOB_COMPLETED", device="mirror0")
    guest.qmp.status("mirror0", "null")
    assert guest.qmp.execute("qom-get", path=path, property="drive") == "target0"
    guest.wait_writes()
    guest.finish()


def test_a_filter_does_not_come_out_from_under_a_job(program):
    guest = Guest(program, size=SIZE, workload="depth=16 mix=w80,r20 adopt=on")
    guest.wait_working()
    path = "/machine/peripheral/disk0"
    scratch = program.folder / "scratch"
    with open(scratch, "wb") as file:
        file.truncate(SIZE)
    execute = guest.qmp.execute
    execute("blockdev-add", driver="file", node_name="scratch", filename=str(scratch))
    execute("blockdev-add", driver="copy-before-write", node_name="cbw", file="disk0-raw",
            target="scratch")
    execute("qom-set", path=path, property="drive", value="cbw")
    guest.mirror(speed=4 * MIB)
    with pytest.raises(QmpError, match="block job"):
        execute("qom-set", path=path, property="drive", value="disk0-raw")
    execute("qom-set", path=path, property="drive", value="cbw")
    execute("stop")
    execute("system_reset")
    execute("cont")
    execute("job-cancel", id="mirror0")
    guest.qmp.event("BLOCK_JOB_CANCELLED", device="mirror0")
    guest.qmp.status("mirror0", "null")
    execute("qom-set", path=path, property="drive", value="disk0-raw")
    execute("blockdev-del", node_name="cbw")
    execute("blockdev-del", node_name="scratch")
    guest.wait_writes()
    guest.finish()


def test_no_lost_write_is_taken_for_one_instant():
    """The checker finds what it is there for."""
    def image(numbers):
        parts = []
        for block, generation in enumerate(numbers):
            for sector in range(block * 8, block * 8 + 8):
                head = (instant.MAGIC.to_bytes(8, "little") + sector.to_bytes(8, "little")
                        + generation.to_bytes(8, "little"))
                parts.append(head.ljust(512, b"\0"))
        return b"".join(parts)

    blocks = 64
    good = [1000 - (10 - block) % blocks for block in range(blocks)]
    instant.check(image(good), 0, 1000, 1000)
    instant.check(image(good), 5, 900, 2000)
    late = list(good)
    late[8] -= blocks
    instant.check(image(late), 2)
    future = list(good)
    future[30] += blocks
    for numbers, lag, bounds in ((late, 1, ()), (good, 0, (1001, 2000)), (good, 0, (0, 999)),
                                 (future, 5, ()), (good, 40, ()), (good[:20] + good[19:-1], 5, ())):
        with pytest.raises(instant.NotOneInstant):
            instant.check(image(numbers), lag, *bounds)
    torn = bytearray(image(good))
    torn[5 * 4096:5 * 4096 + 512] = bytes(512)
    with pytest.raises(instant.NotOneInstant, match="torn"):
        instant.check(bytes(torn), 5)
