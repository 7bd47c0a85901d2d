"""Backups under fire: whatever is written meanwhile, held up or failing, the target of
a backup that succeeds shows exactly one instant.

DIPTYCH_BACKUP_ROUNDS says how many backups there are (12) and DIPTYCH_COUNTER_ROUNDS
how many pairs of two disks (10); DIPTYCH_SOAK_SEED repeats what was chosen.
"""
import collections
import contextlib
import os
import pathlib
import random
import shutil
import struct
import tempfile
import threading
import time

import pytest

from support import instant
from support.guest import MIB, Guest
from support.nbd import WRITE, Raw, wait_until
from support.program import Program, QmpError
from support.sectors import FLUSH, SECTOR, Client, Record, Writer

ROUNDS = int(os.environ.get("DIPTYCH_BACKUP_ROUNDS", "12"))
PAIRS = int(os.environ.get("DIPTYCH_COUNTER_ROUNDS", "10"))
SEED = int(os.environ.get("DIPTYCH_SOAK_SEED") or time.time_ns() % 10**6)
PATIENCE = 90
QUEUES = 4
SECTORS = 4 * MIB // SECTOR
# Sectors of one queue, then those of the next: two share each cluster of 64 KiB.
STRIP = 64
# Writes here fail, for as long as the disk is there.
BAD_SECTOR = 5000


@pytest.fixture
def fast_program():
    """As `program`, in memory: what waits here waits because a test says so."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="diptych.", dir="/dev/shm"))
    programs = Program(folder)
    yield programs
    programs.end_all()
    shutil.rmtree(folder, ignore_errors=True)


class Queue(Writer):
    """One of several writers of a disk, each of its own strips."""

    depths = (32,)
    number = 0

    def _place(self):
        strip = self.random.randrange(self.number, SECTORS // STRIP, QUEUES)
        count = self.random.choice((1, 1, 2, 7, 8, 8, 16, STRIP))
        first = self.random.randrange(STRIP - count + 1)
        if self.random.random() < 0.5:
            first -= first % 8
        return strip * STRIP + first, count


class Fire:
    """A disk under four writers, and backups of it."""

    def __init__(self, program, seed):
        self.random = random.Random(seed)
        self.folder = program.folder
        self.wrong = []
        self.tally = collections.Counter()
        process, self.qmp = program.storage_daemon(
            "--object", "iothread,id=a", "--object", "iothread,id=b",
            "--object", "throttle-group,id=slow,limits.bps-total=6291456")
        self.process = process
        image = self.folder / "disk.img"
        with open(image, "wb") as file:
            file.truncate(SECTORS * SECTOR)
        # Some writes are slow, so that they are under way when a backup begins.
        rules = [{"event": "none", "iotype": "write", "errno": 0,
                  "sector": self.random.randrange(SECTORS),
                  "delay-ns": self.random.randrange(1, 20) * 10**6} for _ in range(20)]
        rules.append({"event": "none", "iotype": "write", "sector": BAD_SECTOR, "errno": 5})
        self.qmp.execute("blockdev-add", driver="raw", node_name="disk", discard="unmap", file={
            "driver": "blkdebug", "inject-error": rules,
            "image": {"driver": "file", "filename": str(image), "discard": "unmap"}})
        self.record = Record(1, SECTORS)
        self.path = self.folder / "nbd.sock"
        self.qmp.execute("nbd-server-start", addr={
            "type": "unix", "data": {"path": str(self.path)}})
        # Two exports, on an iothread each, as of a disk with queues on both.
        for thread in "ab":
            self.qmp.execute("block-export-add", type="nbd", id=f"disk-{thread}",
                             node_name="disk", name=thread, writable=True, iothread=thread)
        self.writers = []
        for number in range(QUEUES):
            writer = Queue(self.record, random.Random(f"{seed} {number}"), self.path,
                           "ab"[number % 2], self.wrong.append, PATIENCE)
            writer.number = number
            self.writers.append(writer)
        # What the target showed after the last backup that succeeded.
        self.base = None

    def __enter__(self):
        for writer in self.writers:
            writer.start()
        return self

    def __exit__(self, *_):
        for writer in self.writers:
            writer.stop()

    def written(self):
        return sum(writer.acked for writer in self.writers)

    def wait_writes(self, count):
        until = self.written() + count
        wait_until("writes", lambda: self.wrong or self.written() >= until, PATIENCE)

    def target(self, kind, base):
        """Makes the target of a round, over what the last one left there if wanted."""
        chance = self.random
        image = self.folder / "target.img"
        with open(image, "wb") as file:
            if base is not None:
                file.write(base)
            file.truncate(SECTORS * SECTOR)
        options = {"driver": "file", "filename": str(image), "discard": "unmap"}

        def delays(longest, count):
            return [{"event": "none", "iotype": "write", "sector": chance.randrange(SECTORS),
                     "errno": 0, "delay-ns": chance.randrange(10**6, longest)}
                    for _ in range(count)]

        if kind == "slow":
            options = {"driver": "throttle", "throttle-group": "slow", "file": options}
        elif kind in ("held", "failing", "breaking", "timeout"):
            rules = delays(60 * 10**6, 30)
            if kind == "timeout":
                rules = delays(2 * 10**9, 30)
            if kind in ("failing", "breaking"):
                rules += [{"event": "none", "iotype": chance.choice(("write", "write-zeroes")),
                           "sector": chance.randrange(SECTORS), "once": True,
                           "errno": chance.choice((5, 28))} for _ in range(10)]
            options = {"driver": "blkdebug", "inject-error": rules, "image": options}
        self.qmp.execute("blockdev-add", driver="raw", node_name="target", discard="unmap",
                         file=options)
        return image

    def gone(self, node):
        """Deletes a node, unless a job uses it."""
        try:
            self.qmp.execute("blockdev-del", node_name=node)
        except QmpError as error:
            assert "in use by block job" in error.desc, error
            return False
        return True

    def backup(self, kind):
        """One backup; whether it succeeded."""
        incremental = self.base is not None and self.random.random() < 0.6
        image = self.target(kind, self.base if incremental else None)
        arguments = {"job-id": "j", "device": "disk", "target": "target", "auto-dismiss": False}
        actions = []
        if incremental:
            arguments |= {"sync": "incremental", "bitmap": "b"}
        else:
            arguments["sync"] = "full"
            with contextlib.suppress(QmpError):
                self.qmp.execute("block-dirty-bitmap-remove", node="disk", name="b")
            actions.append({"type": "block-dirty-bitmap-add", "data": {
                "node": "disk", "name": "b", "granularity": self.random.choice((512, 65536))}})
        if kind == "failing":
            arguments |= {"on-target-error": "stop", "on-cbw-error": "break-guest-write"}
        elif kind == "breaking":
            arguments |= {"on-target-error": self.random.choice(("stop", "report")),
                          "on-cbw-error": "break-snapshot"}
        elif kind == "timeout":
            arguments |= {"on-cbw-error": self.random.choice(("break-snapshot",
                                                              "break-guest-write")),
                          "cbw-timeout": 1}
        if self.random.random() < 0.3:
            arguments["x-perf"] = {"max-workers": self.random.choice((1, 3, 64)),
                                   "max-chunk": self.random.choice((0, 65536, MIB))}
        actions.append({"type": "blockdev-backup", "data": arguments})
        earliest = time.monotonic()
        self.qmp.execute("transaction", actions=actions)
        latest = time.monotonic()
        began = self.written()
        while True:
            event = self.qmp.next_event()
            if event["event"] == "BLOCK_JOB_ERROR" and event["data"]["action"] == "stop":
                self.tally["stopped"] += 1
                self.qmp.execute("job-resume", id="j")
            elif event["data"].get("status") == "concluded":
                break
        self.tally["writes meanwhile"] += self.written() - began
        [job] = self.qmp.execute("query-jobs")
        self.qmp.execute("job-dismiss", id="j")
        # A copy that nobody waited for outlives its job, and uses the target until it ends.
        wait_until("the target is free", lambda: self.gone("target"), PATIENCE)
        what = f"{kind} {arguments['sync']}"
        if "error" in job:
            self.tally[f"{what}: failed"] += 1
            assert kind in ("failing", "breaking", "timeout"), job
            if not incremental:
                self.base = None
            return False
        self.tally[what] += 1
        self.base = image.read_bytes()
        wrong = self.record.is_of_one_instant(self.base, earliest, latest)
        assert wrong is None, f"{what}, {arguments}: {wrong}"
        self.record.forget(earliest)
        return True


@pytest.mark.timeout(120 + 30 * ROUNDS)
def test_backups_under_fire_show_one_instant_each(fast_program):
    print(f"seed {SEED}")
    fire = Fire(fast_program, SEED)
    kinds = ["plain", "slow", "held", "failing", "breaking"]
    with fire:
        fire.wait_writes(500)
        for number in range(ROUNDS):
            kind = "timeout" if number % 12 == 11 else kinds[number % len(kinds)]
            fire.backup(kind)
            assert not fire.wrong, fire.wrong
            assert fire.process.alive(), fire.process.errors()
        # And one in the end over what the last one left.
        while not fire.backup("plain"):
            pass
    assert not fire.wrong, fire.wrong
    print(dict(fire.tally))
    # Nothing was shown if nothing was written meanwhile.
    assert fire.tally["writes meanwhile"] > 20 * ROUNDS, fire.tally
    client = Client(fire.path, "a", PATIENCE)
    now = time.monotonic()
    disk = client.read_all(SECTORS * SECTOR)
    client.close()
    assert fire.record.fits(0, disk, now, time.monotonic()) is None


class Counter(threading.Thread):
    """Writes a number to one disk, flushes, writes it to the other, flushes; and so on
    with the next one."""

    def __init__(self, path, first, second, offset):
        super().__init__(daemon=True)
        self.clients = [Raw(path, first), Raw(path, second)]
        self.offset, self.number, self.ending, self.wrong = offset, 0, False, None

    def run(self):
        try:
            while not self.ending:
                self.number += 1
                for client in self.clients:
                    # Rubbish around it, so that there is more to copy than a sector.
                    data = struct.pack("<Q", self.number).ljust(4096, b"\x5a")
                    client.send(WRITE, self.offset, len(data), data)
                    assert client.simple_reply()[0] == 0
                    client.send(FLUSH)
                    assert client.simple_reply()[0] == 0
        except Exception as error:  # pylint: disable=broad-except
            self.wrong = error


COUNTERS = 3
COUNTED = 2 * MIB


@pytest.mark.timeout(120 + 10 * PAIRS)
def test_a_pair_of_backups_shows_two_disks_at_the_same_instant(fast_program):
    """The first disk's number is that of the second, or one more: in every pair."""
    folder = fast_program.folder
    _, qmp = fast_program.storage_daemon(
        "--object", "iothread,id=a", "--object", "iothread,id=b",
        "--object", "throttle-group,id=slow,limits.bps-total=8388608")
    path = folder / "nbd.sock"
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    for disk in "ab":
        with open(folder / disk, "wb") as file:
            file.truncate(COUNTED)
        qmp.execute("blockdev-add", driver="raw", node_name=disk,
                    file={"driver": "file", "filename": str(folder / disk)})
        qmp.execute("block-export-add", type="nbd", id=disk, node_name=disk, writable=True,
                    iothread=disk)
    counters = [Counter(path, "a", "b", number * 200 * 1024) for number in range(COUNTERS)]
    for counter in counters:
        counter.start()
    seen = set()
    images = {}
    for number in range(PAIRS):
        incremental = number % 3 != 0
        actions = []
        for disk in "ab":
            target = {"driver": "file", "filename": str(folder / f"{disk}.target")}
            with open(folder / f"{disk}.target", "wb") as file:
                file.write(images[disk] if incremental else b"")
                file.truncate(COUNTED)
            if number % 2:
                target = {"driver": "throttle", "throttle-group": "slow", "file": target}
            qmp.execute("blockdev-add", driver="raw", node_name=f"{disk}-target", file=target)
            backup = {"job-id": disk, "device": disk, "target": f"{disk}-target", "sync": "full"}
            if incremental:
                backup |= {"sync": "incremental", "bitmap": "b"}
            elif number:
                actions.append({"type": "block-dirty-bitmap-clear",
                                "data": {"node": disk, "name": "b"}})
            else:
                actions.append({"type": "block-dirty-bitmap-add",
                                "data": {"node": disk, "name": "b"}})
            actions.append({"type": "blockdev-backup", "data": backup})
        # Each pair of counters goes on all the time.
        before = [counter.number for counter in counters]
        wait_until("counters go on", lambda: all(
            counter.wrong or counter.number > was
            for counter, was in zip(counters, before, strict=True)), PATIENCE)
        qmp.execute("transaction", actions=actions)
        ended = set()
        while len(ended) < 2:
            event = qmp.event("BLOCK_JOB_COMPLETED", PATIENCE)
            assert "error" not in event["data"], event
            ended.add(event["data"]["device"])
        while qmp.execute("query-jobs"):
            time.sleep(0.01)
        for disk in "ab":
            qmp.execute("blockdev-del", node_name=f"{disk}-target")
            images[disk] = (folder / f"{disk}.target").read_bytes()
        for counter in counters:
            assert counter.wrong is None, counter.wrong
            [first], [second] = (struct.unpack_from("<Q", images[disk], counter.offset)
                                 for disk in "ab")
            assert second <= first <= second + 1, f"pair {number}: {first} and {second}"
            assert first or not number
            seen.add(first - second)
    for counter in counters:
        counter.ending = True
        counter.join(PATIENCE)
    print(f"{PAIRS} pairs, differences {seen}, numbers {[c.number for c in counters]}")


@pytest.mark.usefixtures("kvm")
@pytest.mark.timeout(300)
def test_backups_of_a_guest_with_four_queues_on_two_iothreads_show_one_instant_each(fast_program):
    size = 32 * MIB
    guest = Guest(fast_program, size=size, workload=instant.WORKLOAD,
                  disk_options=instant.DISK_OPTIONS,
                  options=instant.OPTIONS)
    guest.qmp.execute("object-add", qom_type="throttle-group", id="slow",
                      limits={"bps-total": 32 * MIB})
    guest.wait_working()
    guest.wait_writes(2 * size // instant.BLOCK)
    chance = random.Random(SEED)
    delayed = [{"event": "none", "iotype": "write", "errno": 0,
                "sector": chance.randrange(size // SECTOR),
                "delay-ns": chance.randrange(1, 50) * 10**6} for _ in range(40)]
    qmp = guest.qmp
    taken = []
    image = None
    for name, sync, over in (("slow", "full", {"driver": "throttle", "throttle-group": "slow"}),
                             ("slow2", "incremental", {"driver": "throttle",
                                                       "throttle-group": "slow"}),
                             ("held", "incremental", {"driver": "blkdebug",
                                                      "inject-error": delayed}),
                             ("held2", "full", {"driver": "blkdebug", "inject-error": delayed})):
        path = fast_program.folder / f"{name}.img"
        if sync == "incremental":
            shutil.copyfile(image, path)
        else:
            with open(path, "wb") as file:
                file.truncate(size)
        image = path
        child = "image" if over["driver"] == "blkdebug" else "file"
        qmp.execute("blockdev-add", driver="raw", node_name=name, file={
            **over, child: {"driver": "file", "filename": str(path)}})
        actions = []
        arguments = {"job-id": name, "device": "disk0", "target": name, "sync": sync}
        if sync == "incremental":
            arguments["bitmap"] = "b"
        elif not taken:
            actions.append({"type": "block-dirty-bitmap-add",
                            "data": {"node": "disk0", "name": "b"}})
        actions.append({"type": "blockdev-backup", "data": arguments})
        earliest = instant.newest(guest.sources[0].read_bytes())
        qmp.execute("transaction", actions=actions)
        latest = instant.newest(guest.sources[0].read_bytes())
        event = qmp.event("BLOCK_JOB_COMPLETED", PATIENCE, device=name)
        assert "error" not in event["data"], event
        qmp.status(name, "null")
        qmp.execute("blockdev-del", node_name=name)
        taken.append((path, earliest, latest))
        guest.wait_writes(500)
    report = guest.finish()
    [disk] = report["disks"]
    assert disk["queues"] == 4 and disk["depth"] == 4 * 32, disk
    for path, earliest, latest in taken:
        instant.check(path.read_bytes(), disk["lag"], earliest, latest + disk["lag"])
