"""A stock Debian kernel: boots, mounts ext4, writes; its disk is mirrored."""
import hashlib
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from support.program import BINARY, TOP

HERE = pathlib.Path(__file__).resolve().parent
NESTED = TOP / "tests/nested-kvm"
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def call(*command, **options):
    return subprocess.run([str(word) for word in command], text=True, capture_output=True,
                          env={**os.environ, "PATH": PATH}, check=False, **options)


def with_libraries(program):
    """-f arguments that bring a program and its shared libraries into L1."""
    path = shutil.which(str(program))
    files = ["-f", f"{path}:/test/{os.path.basename(path)}"]
    listed = call("ldd", path)
    for library in re.findall(r"(?:=> )?(/\S+) \(0x", listed.stdout):
        files += ["-f", f"{library}:{library}"]
    return files


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cpus, copy_mode", [(1, "background"), (2, "write-blocking")])
def test_disk_of_a_running_debian_is_mirrored_and_pivoted(guest_cache, tmp_path, cpus, copy_mode):
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    with open(scratch / "source.raw", "wb") as image:
        image.truncate(64 << 20)
    made = call("mkfs.ext4", "-q", "-F", "-E", "root_owner=0:0", scratch / "source.raw")
    assert made.returncode == 0, made.stderr
    guest = tmp_path / "guest.cpio"
    built = call(NESTED / "mkinitramfs.sh", "-k", guest_cache, "-m", "virtio_mmio",
                 "-m", "virtio_blk", HERE / "guest-writes-files.sh", guest)
    assert built.returncode == 0, built.stderr
    files = {}
    for program in (BINARY, "socat"):
        words = with_libraries(program)
        files.update(zip(words[1::2], words[::2]))
    arguments = [word for name, flag in files.items() for word in (flag, name)]
    run = call(NESTED / "run-in-l1.sh", "-k", guest_cache, "-t", 400, "-s", "1G",
               "-S", scratch, "-o", out, *arguments, "-f", guest_cache / "vmlinux",
               "-f", guest, HERE / "mirror-in-l1.sh", cpus, copy_mode)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]

    console = (out / "console").read_text(errors="replace")
    assert f"guest: {cpus} processors" in console
    target = out / "target.raw"
    checked = call("e2fsck", "-fn", target)
    assert checked.returncode == 0, checked.stdout + checked.stderr

    holds = tmp_path / "files"
    holds.mkdir()
    assert call("debugfs", "-R", f"rdump / {holds}", target).returncode == 0
    sums = (holds / "sums").read_text().splitlines()
    assert len(sums) == 60
    for line in sums:
        digest, name = line.split()
        assert hashlib.sha256((holds / name).read_bytes()).hexdigest() == digest, name

    # The guest wrote on after the pivot, and not to the source.
    at_pivot = int(re.search(r"guest: (\d+) files", (out / "at-pivot").read_text())[1])
    assert at_pivot < 60
    old = call("debugfs", "-R", "cat /f59", out / "source.raw")
    assert "File not found" in old.stderr
