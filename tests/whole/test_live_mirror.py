"""A guest on KVM writes and verifies its disk through every phase of a mirror.

The guest keeps a record of what it wrote and verifies all of it at its end, so
`Guest.finish` proves that no acknowledged write is missing from the image that
it runs on by then.
"""
import subprocess

import pytest

from support.guest import Guest, same

pytestmark = pytest.mark.usefixtures("kvm")

SLOW = 4 * 1024 * 1024


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_pivot(program, copy_mode):
    guest = Guest(program)
    guest.wait_working()
    guest.mirror(copy_mode=copy_mode)
    guest.qmp.event("BLOCK_JOB_READY", device="mirror0")
    guest.wait_writes()
    guest.qmp.execute("job-complete", id="mirror0")
    end = guest.qmp.event("BLOCK_JOB_COMPLETED", device="mirror0")
    assert "error" not in end["data"], end
    guest.qmp.status("mirror0", "null")
    source = guest.sources[0].read_bytes()
    guest.wait_writes()
    guest.finish()
    assert guest.sources[0].read_bytes() == source, "the source changed after the pivot"


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_soft_cancel_when_ready_leaves_a_copy_of_one_instant(program, copy_mode):
    guest = Guest(program)
    guest.wait_working()
    guest.mirror(copy_mode=copy_mode)
    guest.qmp.event("BLOCK_JOB_READY", device="mirror0")
    guest.wait_writes()
    # A stopped guest holds its disk at one instant, so that the two can be compared.
    guest.qmp.execute("stop")
    guest.qmp.execute("block-job-cancel", device="mirror0")
    end = guest.qmp.event("BLOCK_JOB_COMPLETED", device="mirror0")
    assert "error" not in end["data"], end
    guest.qmp.status("mirror0", "null")
    assert same(guest.sources[0], guest.targets[0])
    copy = guest.targets[0].read_bytes()
    guest.qmp.execute("cont")
    guest.wait_writes()
    guest.finish()
    assert guest.targets[0].read_bytes() == copy, "the copy changed after the job's end"


def test_forced_cancel_while_copying_leaves_the_guest_on_its_source(program):
    guest = Guest(program)
    guest.wait_working()
    guest.mirror(speed=SLOW)
    guest.qmp.status("mirror0", "running")
    guest.wait_writes()
    guest.qmp.execute("job-cancel", id="mirror0")
    guest.qmp.event("BLOCK_JOB_CANCELLED", device="mirror0")
    guest.qmp.status("mirror0", "null")
    guest.qmp.execute("blockdev-del", node_name="target0")
    guest.wait_writes()
    guest.finish()


def stop_and_cont(guest):
    guest.qmp.execute("stop")
    assert guest.qmp.execute("query-status")["status"] == "paused"
    stopped = guest.writes()
    qmp = guest.qmp
    qmp.execute("query-block")
    assert guest.writes() == stopped
    qmp.execute("cont")
    assert qmp.execute("query-status")["running"] is True
    guest.wait_writes()


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_stop_and_cont_in_each_phase(program, copy_mode):
    guest = Guest(program, workload="depth=16 mix=w80,r20 fill=all wait=irq")
    guest.wait_working()
    stop_and_cont(guest)
    guest.mirror(speed=SLOW, copy_mode=copy_mode)
    guest.qmp.status("mirror0", "running")
    stop_and_cont(guest)
    guest.qmp.execute("block-job-set-speed", device="mirror0", speed=0)
    guest.qmp.event("BLOCK_JOB_READY", device="mirror0")
    stop_and_cont(guest)
    # A stopped guest does not keep its mirror from completing.
    guest.qmp.execute("stop")
    guest.qmp.execute("job-complete", id="mirror0")
    guest.qmp.event("BLOCK_JOB_COMPLETED", device="mirror0")
    assert same(guest.sources[0], guest.targets[0])
    guest.qmp.execute("cont")
    stop_and_cont(guest)
    guest.finish()


def reset(guest):
    guest.forget_status()
    guest.qmp.execute("system_reset")
    guest.qmp.event("RESET")
    guest.wait_working()


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_reset_in_each_phase(program, copy_mode):
    """A reset guest takes over what it finds and verifies it at the end."""
    guest = Guest(program, workload="depth=16 mix=w80,r20 adopt=on")
    guest.wait_working()
    guest.mirror(speed=SLOW, copy_mode=copy_mode)
    guest.qmp.status("mirror0", "running")
    reset(guest)
    guest.qmp.execute("block-job-set-speed", device="mirror0", speed=0)
    guest.qmp.event("BLOCK_JOB_READY", device="mirror0")
    reset(guest)
    guest.qmp.execute("job-complete", id="mirror0")
    guest.qmp.event("BLOCK_JOB_COMPLETED", device="mirror0")
    reset(guest)
    guest.finish()


def test_two_disks_mirrored_at_once(program):
    guest = Guest(program, disks=2)
    guest.wait_working()
    watcher = guest.qmp
    for number in (0, 1):
        guest.mirror(number)
    ready = set()
    while len(ready) < 2:
        ready.add(watcher.event("BLOCK_JOB_READY")["data"]["device"])
    for number in (0, 1):
        watcher.execute("job-complete", id=f"mirror{number}")
    ended = set()
    while len(ended) < 2:
        event = watcher.event("BLOCK_JOB_COMPLETED")
        assert "error" not in event["data"], event
        ended.add(event["data"]["device"])
    guest.wait_writes()
    guest.finish()


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking"])
def test_four_queues_on_two_iothreads(program, copy_mode):
    guest = Guest(program, disk_options=",queues=4,iothread=a+b",
                  options=("--iothread", "id=a", "--iothread", "id=b"),
                  workload="queues=4 depth=8 mix=w80,r16,f2,d1,z1 fill=all")
    assert {row["id"] for row in guest.qmp.execute("query-iothreads")} >= {"a", "b"}
    guest.wait_working()
    guest.mirror(copy_mode=copy_mode)
    guest.qmp.event("BLOCK_JOB_READY", device="mirror0")
    guest.wait_writes()
    guest.qmp.execute("job-complete", id="mirror0")
    guest.qmp.event("BLOCK_JOB_COMPLETED", device="mirror0")
    guest.wait_writes()
    report = guest.finish()
    assert report["disks"][0]["queues"] == 4


def test_disk_full_at_copy_leaves_the_guest_alive(program, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", full],
                      capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        guest = Guest(program)
        guest.targets[0] = full / "target.img"
        with open(guest.targets[0], "wb") as target:
            target.truncate(guest.sources[0].stat().st_size)
        guest.wait_working()
        guest.mirror()
        end = guest.qmp.event("BLOCK_JOB_COMPLETED", device="mirror0")
        assert "No space left" in end["data"]["error"], end
        guest.qmp.status("mirror0", "null")
        guest.wait_writes()
        guest.finish()
    finally:
        subprocess.run(["umount", full], check=False)


def test_every_monitor_sees_the_job(program):
    second = program.folder / "second.qmp"
    guest = Guest(program, options=("--qmp", f"unix:{second}"))
    other = program.connect(second)
    guest.wait_working()
    guest.mirror()
    for monitor in (guest.qmp, other):
        monitor.event("BLOCK_JOB_READY", device="mirror0")
    assert other.execute("query-jobs")[0]["id"] == "mirror0"
    other.execute("job-complete", id="mirror0")
    for monitor in (guest.qmp, other):
        monitor.event("BLOCK_JOB_COMPLETED", device="mirror0")
    guest.finish()
