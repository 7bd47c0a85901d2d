"""Persistent bitmaps: restarts, kills at any moment, other people's hands on the files.

`PERSISTENT_BITMAP_KILLS` says how often the daemon is killed under its writers.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time

import pytest

from support.nbd import WRITE, Raw, tool, wait_until
from support.program import QmpError

MIB = 1 << 20
SIZE = 64 * MIB
GRAIN = 65536
KILLS = int(os.environ.get("PERSISTENT_BITMAP_KILLS", "12"))


class Disk:
    """A raw image with a bitmap file, in daemons that come and go."""

    def __init__(self, program, name="disk"):
        self.program, self.folder = program, program.folder
        self.image = self.folder / f"{name}.img"
        self.file = self.folder / f"{name}.img.bitmaps"
        with open(self.image, "wb") as image:
            image.truncate(SIZE)
        self.options = {"driver": "raw", "node-name": name, "file": {
            "driver": "file", "filename": str(self.image), "bitmap-file": str(self.file)}}
        self.name = name

    def start(self, export=True, **options):
        self.process, self.qmp = self.program.storage_daemon()
        self.add(**options)
        if export:
            self.export()

    def export(self):
        self.path = self.folder / "nbd.sock"
        self.path.unlink(missing_ok=True)
        self.qmp.execute("nbd-server-start",
                         addr={"type": "unix", "data": {"path": str(self.path)}})
        self.qmp.execute("block-export-add", type="nbd", id="e", node_name=self.name, name="e",
                         writable=True)

    def add(self, **options):
        options = {**self.options, **options}
        self.qmp.execute("blockdev-add", **{k.replace("-", "_"): v for k, v in options.items()})

    def kill(self):
        self.process.popen.send_signal(signal.SIGKILL)
        self.process.wait()

    def quit(self):
        self.qmp.execute("quit")
        self.process.wait()

    def bitmap(self, verb, name, **options):
        self.qmp.execute(f"block-dirty-bitmap-{verb}", node=self.name, name=name, **options)

    def bitmaps(self, node=None):
        nodes = self.qmp.execute("query-named-block-nodes")
        shown = next(row for row in nodes if row["node-name"] == (node or self.name))
        return {row["name"]: row for row in shown.get("dirty-bitmaps", []) if "name" in row}

    def write(self, grain, count=1):
        client = Raw(self.path, "e")
        client.send(WRITE, grain * GRAIN, count * GRAIN, os.urandom(count * GRAIN))
        error, _ = client.simple_reply()
        assert error == 0

    def dirty(self, name):
        """The numbers of the dirty granules, asked for by NBD."""
        self.qmp.execute("block-export-add", type="nbd", id="look", node_name=self.name,
                         name="look", writable=True, bitmaps=[name])
        uri = f"nbd+unix:///look?socket={self.path}"
        extents = json.loads(tool("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri))
        self.qmp.execute("block-export-del", id="look", mode="hard")
        self.qmp.event("BLOCK_EXPORT_DELETED", id="look")
        return {grain for row in extents if row["type"] == 1
                for grain in range(row["offset"] // GRAIN,
                                   -(-(row["offset"] + row["length"]) // GRAIN))}


def test_bits_come_back_after_an_orderly_end_and_the_file_goes_with_the_last_bitmap(program):
    disk = Disk(program)
    disk.start()
    disk.bitmap("add", "keep", persistent=True)
    disk.bitmap("add", "off", persistent=True, disabled=True, granularity=4096)
    disk.bitmap("add", "gone")
    disk.write(7, 2)
    disk.quit()
    disk.start()
    found = disk.bitmaps()
    assert set(found) == {"keep", "off"}
    assert found["keep"]["count"] == 2 * GRAIN and found["keep"]["recording"]
    assert found["off"]["count"] == 0 and not found["off"]["recording"]
    assert found["off"]["granularity"] == 4096 and found["off"]["persistent"]
    disk.bitmap("clear", "keep")
    disk.bitmap("enable", "off")
    disk.write(9)
    disk.quit()
    disk.start()
    assert disk.bitmaps()["keep"]["count"] == GRAIN
    assert disk.bitmaps()["off"]["count"] == GRAIN
    disk.bitmap("remove", "keep")
    disk.bitmap("remove", "off")
    assert not disk.file.exists()
    disk.write(1)


def test_a_kill_leaves_bitmaps_with_what_was_written(program):
    disk = Disk(program)
    disk.start()
    disk.bitmap("add", "b", persistent=True)
    disk.write(3)
    disk.kill()
    disk.start()
    found = disk.bitmaps()["b"]
    assert "inconsistent" not in found and found["recording"]
    # The whole region.
    assert found["count"] == MIB
    disk.bitmap("clear", "b")
    disk.kill()
    disk.start()
    assert disk.bitmaps()["b"]["count"] == 0


@pytest.mark.parametrize("change", ["touch", "write", "copy", "grow"])
def test_what_others_did_to_the_image_makes_bitmaps_inconsistent(program, change):
    disk = Disk(program)
    disk.start()
    disk.bitmap("add", "b", persistent=True)
    disk.write(3)
    disk.quit()
    if change == "touch":
        os.utime(disk.image)
    elif change == "write":
        with open(disk.image, "r+b") as image:
            image.write(b"x")
    elif change == "copy":
        shutil.copy2(disk.image, disk.folder / "copy")
        os.rename(disk.folder / "copy", disk.image)
    else:
        os.truncate(disk.image, 2 * SIZE)
    disk.start()
    found = disk.bitmaps()["b"]
    assert found["inconsistent"] and not found["recording"]
    assert "are inconsistent" in disk.process.errors()
    with pytest.raises(QmpError, match="inconsistent"):
        disk.bitmap("clear", "b")
    disk.write(5)
    disk.quit()
    disk.start()
    assert disk.bitmaps()["b"]["inconsistent"]
    disk.bitmap("remove", "b")
    disk.bitmap("add", "b", persistent=True)
    assert "inconsistent" not in disk.bitmaps()["b"]


def test_a_bitmap_is_as_good_as_any_beside_one_that_is_inconsistent(program):
    disk = Disk(program)
    disk.start()
    disk.bitmap("add", "b", persistent=True)
    disk.write(3)
    disk.quit()
    os.utime(disk.image)
    disk.start(export=False)
    # Seen by the first write.
    disk.bitmap("add", "new", persistent=True)
    os.utime(disk.image)
    disk.export()
    disk.write(5)
    disk.kill()
    disk.start()
    found = disk.bitmaps()
    assert found["b"]["inconsistent"]
    assert "inconsistent" not in found["new"] and found["new"]["count"] == MIB
    # Given up while it is open, and not when it was loaded.
    disk.quit()
    disk.start()
    os.utime(disk.image)
    disk.write(7)
    assert disk.bitmaps()["new"]["inconsistent"]
    disk.bitmap("add", "newer", persistent=True)
    disk.write(20)
    disk.kill()
    disk.start()
    found = disk.bitmaps()
    assert found["new"]["inconsistent"]
    assert "inconsistent" not in found["newer"] and found["newer"]["count"] == MIB


def test_a_read_only_node_shows_its_bitmaps_and_a_reopen_lets_them_record(program):
    disk = Disk(program)
    disk.start()
    disk.bitmap("add", "b", persistent=True)
    disk.write(3)
    disk.kill()
    content = disk.file.read_bytes()
    disk.start(export=False, **{"read-only": True})
    assert disk.bitmaps()["b"]["count"] == MIB
    for verb in ("clear", "remove"):
        with pytest.raises(QmpError, match="readonly"):
            disk.bitmap(verb, "b")
    assert disk.file.read_bytes() == content
    disk.qmp.execute("blockdev-reopen", options=[{**disk.options, "read-only": False}])
    disk.bitmap("clear", "b")
    disk.qmp.execute("blockdev-reopen", options=[{**disk.options, "read-only": True}])
    disk.kill()
    disk.start()
    assert disk.bitmaps()["b"]["count"] == 0


def test_an_image_whose_bitmap_file_is_in_use_is_not_opened_for_writing(program):
    disk = Disk(program)
    disk.start(export=False)
    disk.bitmap("add", "b", persistent=True)
    first = disk.process, disk.qmp
    with pytest.raises(QmpError, match="is in use by another process"):
        disk.start(export=False)
    first[1].execute("quit")
    first[0].wait()
    disk.add()
    assert "b" in disk.bitmaps()


def test_without_a_place_or_after_an_abort_nothing_is_made(program):
    disk = Disk(program)
    place = disk.options["file"].pop("bitmap-file")
    disk.start(export=False)
    with pytest.raises(QmpError, match="Can't store persistent bitmaps to disk: Operation not supported"):
        disk.bitmap("add", "b", persistent=True)
    disk.qmp.execute("blockdev-del", node_name="disk")
    disk.options["file"]["bitmap-file"] = place
    disk.add()
    data = {"node": "disk", "name": "b", "persistent": True}
    with pytest.raises(QmpError, match="Abort action"):
        disk.qmp.execute("transaction", actions=[
            {"type": "block-dirty-bitmap-add", "data": data}, {"type": "abort", "data": {}}])
    with pytest.raises(QmpError, match="power of 2"):
        disk.bitmap("add", "b", persistent=True, granularity=700)
    assert not disk.file.exists() and disk.bitmaps() == {}
    disk.options["file"]["bitmap-file"] = "/nonexistent/b"
    disk.qmp.execute("blockdev-del", node_name="disk")
    disk.add()
    with pytest.raises(QmpError, match="Could not open bitmap file '/nonexistent/b': No such file"):
        disk.bitmap("add", "b", persistent=True)


def mounted(folder, *options):
    """Mounts a file system there for a test."""
    folder.mkdir()
    made = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no right to mount a file system: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small(tmp_path):
    """A file system of 1 MiB."""
    yield from mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "none")


@pytest.fixture
def old(tmp_path):
    """A file system that knows no time of birth, and of others whole seconds only."""
    image = tmp_path / "ext4"
    image.touch()
    os.truncate(image, 3 * SIZE)
    make = ["/usr/sbin/mkfs.ext4", "-q", "-I", "128", str(image)]
    subprocess.run(make, check=True, capture_output=True)
    yield from mounted(tmp_path / "old", "-o", "loop", str(image))


@pytest.mark.parametrize("folder", ["tmp_path", "old"])
def test_an_image_or_bitmap_file_put_back_after_a_crash_is_another_one(program, request, folder):
    """Also where nothing but the number of an inode tells files apart at first sight."""
    program.folder = request.getfixturevalue(folder)
    disk = Disk(program)
    disk.start()
    disk.bitmap("add", "b", persistent=True)
    disk.write(3)
    disk.kill()
    backups = {path: disk.folder / f"{path.name}.backup" for path in (disk.image, disk.file)}
    for path, backup in backups.items():
        shutil.copy2(path, backup)
    disk.start()
    assert "inconsistent" not in disk.bitmaps()["b"] and disk.bitmaps()["b"]["count"] == MIB
    for path in (disk.file, disk.image):
        disk.write(20)
        disk.kill()
        # Freed, so that the copy gets its number.
        path.unlink()
        shutil.copy2(backups[path], path)
        disk.start()
        assert disk.bitmaps()["b"]["inconsistent"]
        disk.bitmap("remove", "b")
        disk.bitmap("add", "b", persistent=True)
    disk.write(3)
    disk.quit()
    # Within the second, if there are no parts of it.
    with open(disk.image, "r+b") as image:
        image.write(b"x")
    disk.start()
    assert disk.bitmaps()["b"]["inconsistent"]
    disk.kill()


def test_a_disk_does_not_grow_where_the_bitmap_file_cannot(program, small):
    disk = Disk(program)
    disk.file = small / "b"
    disk.options["file"]["bitmap-file"] = str(disk.file)
    disk.start(export=False)
    disk.bitmap("add", "b", persistent=True, granularity=512)
    with pytest.raises(QmpError, match="there is no room for them in their file: No space left"):
        disk.qmp.execute("block_resize", node_name="disk", size=100 << 30)
    assert disk.image.stat().st_size == SIZE
    # As little as there is room for.
    disk.qmp.execute("block_resize", node_name="disk", size=SIZE + MIB)
    with pytest.raises(QmpError, match="there is no room for them in their file: No space left"):
        for number in range(100):
            disk.bitmap("add", f"more{number}", persistent=True, granularity=512)
    disk.export()
    disk.write(5)
    disk.quit()
    disk.start()
    found = disk.bitmaps()["b"]
    assert found["count"] == GRAIN and "inconsistent" not in found


def test_bitmaps_go_on_with_a_mirror_and_stay_with_the_old_image(program):
    disk = Disk(program)
    disk.start()
    target = disk.folder / "target.img"
    target.write_bytes(b"")
    os.truncate(target, SIZE)
    new = {"driver": "raw", "node-name": "new", "file": {
        "driver": "file", "filename": str(target), "bitmap-file": f"{target}.bitmaps"}}
    disk.qmp.execute("blockdev-add", **{k.replace("-", "_"): v for k, v in new.items()})
    disk.bitmap("add", "b", persistent=True)
    disk.bitmap("add", "plain")
    disk.write(3)
    disk.qmp.execute("blockdev-mirror", device="disk", target="new", sync="full", job_id="m")
    disk.qmp.event("BLOCK_JOB_READY")
    disk.write(20)
    disk.qmp.execute("block-job-complete", device="m")
    disk.qmp.event("BLOCK_JOB_COMPLETED")
    wait_until("the job has gone", lambda: not disk.qmp.execute("query-jobs"))
    disk.write(40)
    assert disk.bitmaps("new")["b"]["count"] == 3 * GRAIN
    assert disk.bitmaps("disk")["b"]["count"] == 2 * GRAIN
    assert set(disk.bitmaps("new")) == {"b"}
    disk.kill()
    disk.start(export=False)
    disk.qmp.execute("blockdev-add", **{k.replace("-", "_"): v for k, v in new.items()})
    # Regions of a MiB, in the second image also that of the last write.
    assert disk.bitmaps("disk")["b"]["count"] >= 2 * GRAIN
    assert disk.bitmaps("new")["b"]["count"] >= 3 * GRAIN
    assert "inconsistent" not in disk.bitmaps("new")["b"]


class Killed(threading.Thread):
    """Writes until the daemon is gone; knows which granules may have been written."""

    def __init__(self, disk, seed):
        super().__init__(daemon=True)
        self.client = Raw(disk.path, "e")
        self.random = random.Random(seed)
        self.acknowledged = 0

    def run(self):
        try:
            while True:
                offset = self.random.randrange(SIZE // 512) * 512
                self.client.send(WRITE, offset, 512, self.random.randbytes(512))
                error, _ = self.client.simple_reply()
                if error == 0:
                    self.acknowledged += 1
        except (OSError, EOFError):
            pass


def granules(path):
    with open(path, "rb") as image:
        return [image.read(GRAIN) for _ in range(SIZE // GRAIN)]


def resize_until_killed(disk, chosen):
    killer = threading.Timer(chosen.uniform(0.02, 0.3), disk.kill)
    killer.start()
    try:
        while True:
            disk.qmp.execute("block_resize", node_name="disk",
                             size=SIZE + chosen.randrange(2) * MIB)
    except (OSError, EOFError):
        pass
    killer.join()


def change(disk, chosen):
    """Does something to bitmaps, or to the disk."""
    act = chosen.choice(["add", "remove", "merge", "clear", "toggle", "none"])
    names = [name for name in disk.bitmaps() if name != "b"]
    if act == "add" and len(names) < 4:
        disk.bitmap("add", f"x{chosen.random()}", persistent=True,
                    granularity=chosen.choice([512, 4096, GRAIN]))
    elif act == "remove" and names:
        disk.bitmap("remove", chosen.choice(names))
    elif act == "merge" and names:
        disk.qmp.execute("block-dirty-bitmap-merge", node="disk", target=chosen.choice(names),
                         bitmaps=["b"])
    elif act == "clear" and names:
        disk.bitmap("clear", chosen.choice(names))
    elif act == "toggle" and names:
        disk.bitmap(chosen.choice(["enable", "disable"]), chosen.choice(names))


class Backup:
    """Keeps a copy of the disk up to date by incremental backups of what is dirty."""

    def __init__(self, disk):
        self.disk, self.number = disk, 0
        self.target = disk.folder / "backup.img"

    def run(self, base):
        """Makes `base` what the disk is at some moment of this call."""
        self.number += 1
        self.target.write_bytes(b"".join(base))
        qmp, job = self.disk.qmp, f"backup{self.number}"
        qmp.execute("blockdev-add", driver="raw", node_name=job,
                    file={"driver": "file", "filename": str(self.target)})
        qmp.execute("blockdev-backup", job_id=job, device="disk", target=job,
                    sync="incremental", bitmap="b")
        ended = qmp.event("BLOCK_JOB_COMPLETED", device=job)["data"]
        assert "error" not in ended, ended
        qmp.execute("blockdev-del", node_name=job)


def differing(one, other):
    return {index for index, (a, b) in enumerate(zip(one, other)) if a != b}


def test_kills_at_any_moment_lose_no_write(program):
    """What differs from the last backup of the disk is dirty, whenever it was killed: writing,
    changing bitmaps, resizing, or at the end of a backup."""
    disk = Disk(program)
    disk.start()
    disk.bitmap("add", "b", persistent=True)
    chosen = random.Random(1)
    base = granules(disk.image)
    backup = Backup(disk)
    acknowledged = inconsistent = backups = 0
    for kill in range(KILLS):
        writers = [Killed(disk, kill * 10 + number) for number in range(3)]
        for writer in writers:
            writer.start()
        killer = threading.Timer(chosen.choice([0.3, 3]) * chosen.random(), disk.kill)
        killer.start()
        maybe = None
        try:
            while True:
                time.sleep(chosen.uniform(0, 0.1))
                if chosen.random() < 0.3:
                    backup.target.write_bytes(b"")
                    maybe = backup
                    backup.run(base)
                    base, maybe = granules(backup.target), None
                    backups += 1
                else:
                    change(disk, chosen)
        except (OSError, EOFError):
            pass
        killer.join()
        for writer in writers:
            writer.join()
            acknowledged += writer.acknowledged
        disk.start(export=False)
        if chosen.random() < 0.3:
            resize_until_killed(disk, chosen)
            disk.start(export=False)
            disk.qmp.execute("block_resize", node_name="disk", size=SIZE)
        disk.export()
        inconsistent += sum("inconsistent" in row for row in disk.bitmaps().values())
        now = granules(disk.image)
        dirty = disk.dirty("b")
        missed = differing(base, now) - dirty
        if missed and maybe:
            # It had ended well, and nobody had been told yet.
            base = granules(backup.target)
            missed = differing(base, now) - dirty
        assert not missed, (kill, sorted(missed))
    assert acknowledged > 20 * KILLS
    assert inconsistent == 0
    print(f"{KILLS} kills, {acknowledged} writes, {backups} backups")


class Chain:
    """A full backup of a disk and the incremental ones after it, each of what a bitmap has
    that lasts; and what is restored of them."""

    def __init__(self, disk):
        self.disk = disk
        self.restored = bytearray(SIZE)
        self.number = 0

    def backup(self, sync):
        """One more. Afterwards what is restored is the disk, as nobody writes it."""
        disk, self.number = self.disk, self.number + 1
        target = disk.folder / f"backup{self.number}.qcow2"
        tool("qemu-img", "create", "-q", "-f", "qcow2", str(target), str(SIZE))
        qmp, job = disk.qmp, f"backup{self.number}"
        qmp.execute("blockdev-add", driver="qcow2", node_name=job,
                    file={"driver": "file", "filename": str(target)})
        backup = {"job-id": job, "device": disk.name, "target": job, "sync": sync}
        if sync == "full":
            # The bitmap begins at the instant of the backup.
            qmp.execute("transaction", actions=[
                {"type": "block-dirty-bitmap-clear", "data": {"node": disk.name, "name": "b"}},
                {"type": "blockdev-backup", "data": backup}])
        else:
            qmp.execute("blockdev-backup", bitmap="b",
                        **{key.replace("-", "_"): value for key, value in backup.items()})
        ended = qmp.event("BLOCK_JOB_COMPLETED", device=job)["data"]
        assert "error" not in ended, ended
        qmp.execute("blockdev-del", node_name=job)
        rows = json.loads(tool("qemu-img", "map", "--output=json", "-f", "qcow2", str(target)))
        raw = target.with_suffix(".raw")
        tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(target), str(raw))
        content = raw.read_bytes()
        held = 0
        for row in rows:
            if row.get("present", row["data"]):
                start, end = row["start"], row["start"] + row["length"]
                self.restored[start:end] = content[start:end]
                held += row["length"]
        raw.unlink()
        assert bytes(self.restored) == disk.image.read_bytes()
        return held


def end(disk, how):
    if how == "kill":
        disk.kill()
    else:
        disk.quit()


def pivot(disk):
    """Moves the disk to another image, and the bitmap with it."""
    old = disk.name
    target = disk.folder / "moved.img"
    target.write_bytes(b"")
    os.truncate(target, SIZE)
    options = {"driver": "raw", "node-name": "moved", "file": {
        "driver": "file", "filename": str(target), "bitmap-file": f"{target}.bitmaps"}}
    disk.qmp.execute("blockdev-add", **{k.replace("-", "_"): v for k, v in options.items()})
    disk.qmp.execute("blockdev-mirror", device=old, target="moved", sync="full", job_id="m")
    disk.qmp.event("BLOCK_JOB_READY")
    disk.write(30)
    disk.qmp.execute("block-job-complete", device="m")
    assert "error" not in disk.qmp.event("BLOCK_JOB_COMPLETED", device="m")["data"]
    wait_until("the job has gone", lambda: not disk.qmp.execute("query-jobs"))
    disk.options, disk.name = options, "moved"
    disk.image, disk.file = target, disk.folder / "moved.img.bitmaps"


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("how", ["quit", "kill"])
def test_incremental_backups_go_on_after_a_restart(program, how, moves):
    disk = Disk(program)
    with open(disk.image, "r+b") as image:
        image.write(os.urandom(8 * MIB))
    disk.start()
    disk.bitmap("add", "b", persistent=True)
    chain = Chain(disk)
    chain.backup("full")
    for life in range(4):
        disk.write(3 + life)
        disk.write(200 + 7 * life, 2)
        if moves and life == 1:
            pivot(disk)
            disk.write(60)
        if life == 2:
            # What was written after a backup counts, also that of the same life.
            chain.backup("incremental")
            disk.write(1000)
        end(disk, how)
        disk.start()
        found = disk.bitmaps()["b"]
        assert found["recording"] and "inconsistent" not in found
        disk.write(500 + life)
        held = chain.backup("incremental")
        assert held < SIZE / 2, "it is incremental"
        if how == "quit" and not moves:
            # Nothing else than was written: 2 and 1 granules before it ended, 1 after that.
            assert held == {2: 2}.get(life, 4) * GRAIN
    end(disk, "quit")


def test_what_was_discarded_makes_no_backup_larger(program):
    """A guest's discards count as writes; what is a hole then is one in the backup."""
    disk = Disk(program)
    disk.options["discard"] = "unmap"
    disk.options["file"]["discard"] = "unmap"
    with open(disk.image, "r+b") as image:
        image.write(os.urandom(SIZE))
    disk.start()
    disk.bitmap("add", "b", persistent=True)
    chain = Chain(disk)
    chain.backup("full")
    tool("qemu-io", "-d", "unmap", "-f", "raw", "-c", f"discard 0 {SIZE // 2}",
         f"nbd+unix:///e?socket={disk.path}")
    disk.write(1000)
    assert disk.bitmaps()["b"]["count"] == SIZE // 2 + GRAIN
    chain.backup("incremental")
    made = disk.folder / "backup2.qcow2"
    assert made.stat().st_blocks * 512 < MIB
    disk.quit()
