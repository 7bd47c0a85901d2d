#!/usr/bin/env python3
"""The embedded guest under `diptych run` beside the same guest under QEMU.

    tests/bench/guest.py [MODE]... [--rounds N] [--directory DIR]

The guest writes 4 KiB at random at depth 32 to a disk of 1 GiB that is full of
data, as fast as it can, while the disk is mirrored (background,
write-blocking) or backed up in full (backup; fleecing: from a snapshot that
copy-before-write keeps); QEMU's machine is microvm. Shows the guest's rate and
longest stall with no job, while the job copies, and when a mirror is ready.
The rounds alternate between the two, and the median is shown. Prints Markdown.
"""
import argparse
import collections
import contextlib
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from peers import TOOLS, turns

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from support.guest import MAILBOX_BYTES, Guest  # noqa: E402
from support.program import BINARY, Qmp, run  # noqa: E402

SIZE = 1 << 30
WORKLOAD = "mailbox=0 mailbox_ms=5 depth=32 fill=all verify=off"
CALM = 3
# How long a mirror may take to become ready, or a backup to end, in seconds.
GIVE_UP = 15
MODES = ("background", "write-blocking", "backup", "fleecing")


class Machine(Guest):
    """The guest under one of the two, on two images in `folder`."""

    def __init__(self, tool, folder, mode):  # pylint: disable=super-init-not-called
        self.folder = folder
        self.kernel = folder / "guest.elf"
        assert run("guest", "--write", self.kernel).returncode == 0
        self.mailbox, self.serial = folder / "mailbox", folder / "serial"
        self.mailbox.write_bytes(bytes(MAILBOX_BYTES))
        self.serial.unlink(missing_ok=True)
        self.order()
        self.source, target = folder / "source.raw", folder / "target.raw"
        for path in (self.source, target):
            path.unlink(missing_ok=True)
            with open(path, "wb") as image:
                image.truncate(SIZE)
        self.targets, self.scratch = [target], folder / "scratch.raw"
        self.qmp_path = folder / "qmp.sock"
        self.qmp_path.unlink(missing_ok=True)
        # QEMU 7.2 does not survive a change of the node of a device on an iothread.
        thread = "" if mode == "fleecing" else ",iothread=io0"
        command = self.diptych() if tool == "diptych" else self.qemu(thread)
        self.popen = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.qmp = Qmp(self.qmp_path)

    def diptych(self):
        return [BINARY, "run", "--kernel", self.kernel, "--memory", "128M",
                "--serial", f"file:{self.serial}", "--qmp", f"unix:{self.qmp_path}",
                "--disk", f"path={self.mailbox},id=mailbox",
                "--disk", f"path={self.source},id=disk0,iothread=io0", "--iothread", "id=io0",
                "--cmdline", WORKLOAD]

    def qemu(self, thread):
        command = [
            "qemu-system-x86_64", "-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,acpi=off",
            "-accel", "kvm", "-m", "128", "-nodefaults", "-no-user-config", "-display", "none",
            "-no-reboot", "-serial", f"file:{self.serial}",
            "-qmp", f"unix:{self.qmp_path},server=on,wait=off",
            "-global", "virtio-mmio.force-legacy=false",
            "-device", "isa-debug-exit,iobase=0x501", "-object", "iothread,id=io0",
            "-kernel", str(self.kernel), "-append", f"poweroff=0x501:0 {WORKLOAD}"]
        for name, path, options in (("mailbox", self.mailbox, ""),
                                    ("disk0", self.source, thread)):
            command += [
                "-drive", f"if=none,id={name},file={path},format=raw,discard=unmap,aio=io_uring",
                "-device", f"virtio-blk-device,id={name},drive={name},queue-size=256{options}"]
        return command

    def backup(self, fleecing):
        """Adds the target and starts the backup 'mirror0'."""
        self.add_target()
        source = "disk0"
        if fleecing:
            with open(self.scratch, "wb") as image:
                image.truncate(SIZE)
            [disk] = [row for row in self.qmp.execute("query-block") if row["device"] == "disk0"]
            self.qmp.execute("blockdev-add", driver="file", node_name="scratch",
                             filename=str(self.scratch), discard="unmap")
            self.qmp.execute("blockdev-add", driver="copy-before-write", node_name="cbw",
                             file=disk["inserted"]["node-name"], target="scratch")
            self.qmp.execute("qom-set", path="/machine/peripheral/disk0", property="drive",
                             value="cbw")
            source = "snap"
            self.qmp.execute("blockdev-add", driver="snapshot-access", node_name=source,
                             file="cbw")
        self.qmp.execute("blockdev-backup", job_id="mirror0", device=source, target="target0",
                         sync="full")

    def alive(self):
        return self.popen.poll() is None

    def wait(self, what, condition, patience=60):
        deadline = time.monotonic() + patience
        while not condition():
            assert self.alive(), f"{what}: the machine ended"
            assert time.monotonic() < deadline, f"{what}: not in {patience} s"
            time.sleep(0.02)

    def finish(self):
        """Lets the guest end; returns its report."""
        self.order(phase=3, finish=True)
        self.popen.wait(120)
        lines = [line for line in self.serial.read_text().splitlines()
                 if line.startswith('{"diptych":1')]
        report = json.loads(lines[-1])
        assert "error" not in report, report
        return report

    def end(self):
        with contextlib.suppress(OSError):
            self.popen.kill()
        self.popen.wait()


def measure(tool, folder, mode):
    """Returns {phase: (writes/s, longest stall in ms, seconds)}."""
    machine = Machine(tool, folder, mode)
    begins = []

    def begin(phase):
        begins.append(time.monotonic())
        machine.order(phase=phase)

    try:
        machine.wait_working()
        time.sleep(CALM)
        begin(1)
        is_mirror = mode in ("background", "write-blocking")
        if is_mirror:
            machine.mirror(copy_mode=mode)
        else:
            machine.backup(mode == "fleecing")
        copied = True
        try:
            end = machine.qmp.event("BLOCK_JOB_READY" if is_mirror else "BLOCK_JOB_COMPLETED",
                                    GIVE_UP)
            assert "error" not in end["data"], end
        except TimeoutError:
            copied = False
        begin(2)
        time.sleep(CALM if is_mirror else 0.1)
        begin(3)
        time.sleep(0.1)
        if is_mirror or not copied:
            machine.qmp.execute("job-cancel", id="mirror0")
            machine.qmp.event("BLOCK_JOB_CANCELLED", 60)
        report = machine.finish()
    finally:
        machine.end()
    # The guest's clock runs at another pace where KVM is software.
    guest_seconds = sum(counts["us"] for counts in report["phases"][1:3]) / 1e6
    pace = guest_seconds / (begins[2] - begins[0])
    phases = {}
    for name, counts in zip(("no job", "copying", "ready"), report["phases"]):
        if name == "ready" and not (is_mirror and copied):
            continue
        seconds = counts["us"] / 1e6 / pace
        phases[name] = (counts["w"] / seconds, counts["stall"] / 1e3 / pace,
                        seconds if copied or name == "no job" else None)
    return phases


def attempt(tool, folder, mode, tries=4):
    """As `measure`, again if the machine ends in the midst of it."""
    while True:
        try:
            return measure(tool, folder, mode)
        except (EOFError, ConnectionError) as error:
            tries -= 1
            if tries == 0:
                raise
            print(f"{tool}, {mode}: the machine ended ({error})", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="*", choices=[*MODES, []], metavar="MODE",
                        help=f"{', '.join(MODES)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=pathlib.Path, default="/dev/shm")
    args = parser.parse_args()
    if shutil.which("qemu-system-x86_64") is None:
        parser.error("QEMU is not installed: apt-get install qemu-system-x86")
    print("| mode | phase | diptych | QEMU | longest stall diptych | longest stall QEMU |")
    print("|---|---|---|---|---|---|")
    for mode in args.modes or MODES:
        results = {tool: collections.defaultdict(list) for tool in TOOLS}
        for tool in turns(args.rounds, args.directory):
            with tempfile.TemporaryDirectory(dir=args.directory) as folder:
                for name, numbers in attempt(tool, pathlib.Path(folder), mode).items():
                    results[tool][name].append(numbers)
        for name in ("no job", "copying", "ready"):
            if name == "ready" and mode in ("backup", "fleecing"):
                continue
            cells = [cell(name, results[tool], args.rounds) for tool in TOOLS]
            print(f"| {mode} | {name} | {cells[0][0]} | {cells[1][0]} "
                  f"| {cells[0][1]} | {cells[1][1]} |", flush=True)


def cell(name, phases, rounds):
    """Rate and stall as text."""
    runs = phases[name]
    if not runs:
        return ["never ready", ""]
    rate, stall = (statistics.median(run[column] for run in runs) for column in range(2))
    base = statistics.median(run[0] for run in phases["no job"])
    text = f"{rate / 1e3:.1f}k/s"
    if name != "no job":
        text += f" ({rate / base:.0%})"
    if name == "copying":
        took = [run[2] for run in runs]
        text += f", more than {GIVE_UP} s" if None in took else f", {statistics.median(took):.1f} s"
    if len(runs) < rounds:
        text += f" ({len(runs)} of {rounds} runs)"
    return [text, f"{stall:.1f} ms"]


if __name__ == "__main__":
    main()
