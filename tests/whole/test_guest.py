"""The embedded guest in another VMM: what it says of a disk must not depend on
ours being right."""
import json
import shutil
import subprocess

import pytest

from support.program import PATIENCE, run

QEMU = "qemu-system-x86_64"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    if shutil.which(QEMU) is None:
        pytest.skip(f"no {QEMU}")
    path = tmp_path_factory.mktemp("guest") / "guest.elf"
    assert run("guest", "--write", path).returncode == 0
    return path


def boot(kernel, workload, *images, queues=1):
    """Boots the guest in QEMU's emulator; returns its report."""
    machine = "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,acpi=off"
    command = [
        QEMU, "-M", machine, "-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config",
        "-display", "none", "-no-reboot", "-serial", "stdio",
        "-global", "virtio-mmio.force-legacy=false", "-device", "isa-debug-exit,iobase=0x501",
        "-kernel", str(kernel),
        "-append", f"poweroff=0x501:0 tsc_khz=1000000 {workload}"]
    for number, image in enumerate(images):
        command += [
            "-drive", f"if=none,id=d{number},file={image},format=raw,discard=unmap",
            "-device", f"virtio-blk-device,drive=d{number},num-queues={queues},queue-size=128"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=PATIENCE, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"diptych":1')]
    assert len(lines) == 1, done.stdout + done.stderr
    return json.loads(lines[0])


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.truncate(16 << 20)
    return path


WORKLOADS = {
    "polling": "",
    "interrupts": "wait=irq",
    "without event index": "wait=irq event_idx=off",
    "polling without event index": "event_idx=off",
    "every operation, several queues": "mix=w60,r20,f5,d5,z10 queues=4 size=4k-64k depth=8",
    "sequential, unaligned to pages": "order=sequential size=1536 block=512 mix=w1,r1",
    "filled, at a rate": "fill=all rate=2000",
}


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS.keys())
def test_what_was_written_reads_back(kernel, image, workload):
    report = boot(kernel, f"requests=1000 mix=w3,r1 {workload}", image, queues=4)
    assert "error" not in report, report
    [disk], [phase] = report["disks"], report["phases"]
    assert disk["failed"] == disk["bad"] == 0, disk
    assert disk["sectors"] == 32768
    assert sum(phase.get(kind, 0) for kind in "wrfdz") == 1000
    assert image.stat().st_blocks > 0


def test_two_disks_have_a_record_each(kernel, image, tmp_path):
    other = tmp_path / "other.raw"
    with open(other, "wb") as file:
        file.truncate(8 << 20)
    report = boot(kernel, "requests=500 fill=1M", image, other)
    disks = report["disks"]
    assert sorted(disk["sectors"] for disk in disks) == [16384, 32768]
    assert all(disk["failed"] == disk["bad"] == 0 for disk in disks)


def test_a_write_that_is_not_there_is_noticed(kernel, image):
    before = boot(kernel, "requests=1000 fill=all", image)
    adopted = boot(kernel, "requests=1 mix=r1 adopt=on", image)
    assert adopted["disks"][0]["digest"] == before["disks"][0]["digest"]
    # Another run, that knows nothing of the first: everything is unexpected.
    other = boot(kernel, "requests=1 mix=r1", image)
    assert other["disks"][0]["bad"] >= 4096


def test_a_damaged_sector_is_noticed(kernel, image):
    boot(kernel, "requests=1 fill=all", image)
    with open(image, "r+b") as file:
        file.seek(5 * 4096 + 100)
        file.write(b"!")
    report = boot(kernel, "requests=1 mix=r1 adopt=on", image)
    disk = report["disks"][0]
    assert disk["bad"] >= 1
    assert disk["first"] == {"block": 5, "expected": 0, "damage": "checksum"}


def test_a_wrong_command_line_is_told(kernel, image):
    report = boot(kernel, "depth=none", image)
    assert "depth=none" in report["error"]


def test_a_guest_without_a_disk_says_so(kernel):
    assert "no disk" in boot(kernel, "")["error"]
