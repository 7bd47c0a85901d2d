"""The embedded guest under diptych run, with its mailbox and its report.

The mailbox and the command line are described in resources/guest/README.md.
"""
import json
import struct
import time

from support.program import PATIENCE, run

MIB = 1024 * 1024
MAILBOX_BYTES = 4096
ORDER_MAGIC = b"diporder"
STATUS_MAGIC = b"dipstat1"
MASK = (1 << 64) - 1


def _checksum(magic, fields):
    total = int.from_bytes(magic, "little")
    for field in fields:
        total = (total ^ field) * 0x9E3779B97F4A7C15 & MASK
        total = (total << 29 | total >> 35) & MASK
    return total


class Guest:
    """One guest with disks 'disk0', 'disk1', … that it writes all the time."""

    def __init__(self, program, disks=1, size=64 * MIB, disk_options="", options=(),
                 workload="depth=16 mix=w80,r16,f2,d1,z1 fill=all"):
        folder = program.folder
        self.folder = folder
        self.program = program
        self.kernel = folder / "guest.elf"
        written = run("guest", "--write", self.kernel)
        assert written.returncode == 0, written.stderr
        self.mailbox = folder / "mailbox"
        self.mailbox.write_bytes(bytes(MAILBOX_BYTES))
        self.order()
        self.serial = folder / "serial"
        self.qmp_path = folder / "guest.qmp"
        arguments = ["run", "--kernel", self.kernel, "--memory", "128M",
                     "--serial", f"file:{self.serial}", "--qmp", f"unix:{self.qmp_path}",
                     "--disk", f"path={self.mailbox},id=mailbox"]
        self.sources, self.targets = [], []
        for number in range(disks):
            source = folder / f"source{number}.img"
            target = folder / f"target{number}.img"
            for path in (source, target):
                with open(path, "wb") as image:
                    image.truncate(size)
            self.sources.append(source)
            self.targets.append(target)
            arguments += ["--disk", f"path={source},id=disk{number}{disk_options}"]
        arguments += ["--cmdline", f"mailbox=0 {workload}", *options]
        self.process = program.start(*arguments)
        self.qmp = program.connect(self.qmp_path)

    def order(self, phase=0, finish=False):
        """Tells the guest the phase, or to stop, verify and report."""
        fields = [phase, int(finish), 0, 0, 0]
        sector = struct.pack("<8s6Q", ORDER_MAGIC, *fields, _checksum(ORDER_MAGIC, fields))
        with open(self.mailbox, "r+b") as mailbox:
            mailbox.write(sector.ljust(512, b"\0"))

    def status(self):
        """(phase, writes, bytes, errors, filled), or None if it said nothing yet."""
        with open(self.mailbox, "rb") as mailbox:
            mailbox.seek(512)
            magic, *fields, checksum = struct.unpack("<8s6Q", mailbox.read(56))
        if magic != STATUS_MAGIC or checksum != _checksum(magic, fields):
            return None
        return fields

    def writes(self):
        return (self.status() or [0, 0])[1]

    def wait(self, what, condition, patience=PATIENCE):
        deadline = time.monotonic() + patience
        while not condition():
            assert self.process.alive(), f"{what}: diptych ended: {self.process.errors()}"
            assert time.monotonic() < deadline, f"{what}: not in {patience} s; {self.status()}"
            time.sleep(0.02)

    def wait_working(self):
        """Until the disks are filled and the guest has begun its work."""
        self.wait("fill", lambda: (self.status() or [0] * 5)[4] != 0)
        self.wait_writes()

    def wait_writes(self, count=200):
        """Until the guest has made so many more writes."""
        begun = self.writes()
        self.wait("writes", lambda: self.writes() >= begun + count)

    def forget_status(self):
        """Takes the guest's last status away, to see a new one."""
        with open(self.mailbox, "r+b") as mailbox:
            mailbox.seek(512)
            mailbox.write(bytes(512))

    def add_target(self, number=0):
        self.qmp.execute("blockdev-add", driver="raw", node_name=f"target{number}",
                         discard="unmap", file={"driver": "file", "discard": "unmap",
                                                "filename": str(self.targets[number])})

    def mirror(self, number=0, **arguments):
        """Adds the target and starts the mirror 'mirrorN'."""
        self.add_target(number)
        self.qmp.execute("blockdev-mirror", job_id=f"mirror{number}", device=f"disk{number}",
                         target=f"target{number}", sync="full", **arguments)

    def finish(self):
        """Lets the guest stop, verify everything, report and power off."""
        self.order(phase=7, finish=True)
        assert self.process.wait(120) == 0, self.process.errors()
        lines = [line for line in self.serial.read_text().splitlines()
                 if line.startswith('{"diptych":1')]
        report = json.loads(lines[-1])
        assert "error" not in report, report
        for disk in report["disks"]:
            assert disk["failed"] == 0 and disk["bad"] == 0, report
        return report


def same(first, second):
    """Whether two files hold the same bytes."""
    with open(first, "rb") as one, open(second, "rb") as other:
        while True:
            a, b = one.read(MIB), other.read(MIB)
            if a != b:
                return False
            if not a:
                return True
