"""How diptych run ends: with storage that hangs, and with a guest that powers off
just when a monitor stops it."""
import time

import pytest

from support.guest import Guest, MIB
from support.program import PATIENCE, QmpError, run


FOR_EVER_NS = 3600 * 10**9


@pytest.fixture
def hung_job(kvm, program, tmp_path):
    """A run with a mirror whose writes to the target do not end."""
    kernel, source = tmp_path / "guest.elf", tmp_path / "source"
    assert run("guest", "--write", kernel).returncode == 0
    source.write_bytes(bytes(range(1, 129)) * (MIB // 128))
    process = program.start(
        "run", "--paused", "--kernel", kernel, "--memory", "64M", "--serial", "null",
        "--disk", f"path={source},id=disk0", "--qmp", f"unix:{tmp_path}/qmp")
    qmp = program.connect(tmp_path / "qmp")
    qmp.execute("blockdev-add", driver="null-co", node_name="far", size=MIB,
                latency_ns=FOR_EVER_NS)
    qmp.execute("blockdev-mirror", job_id="j0", device="disk0", target="far", sync="full")
    return process


def test_storage_that_hangs_is_given_up_and_said(hung_job):
    hung_job.popen.terminate()
    assert hung_job.wait() == 1, hung_job.errors()
    # The job ends, and leaves its requests behind; the node cannot be flushed.
    assert "did not end in time" in hung_job.errors()


def test_a_second_signal_does_not_wait_for_storage_that_hangs(hung_job):
    deadline = time.monotonic() + PATIENCE
    # The first ones count as one.
    while hung_job.alive():
        assert time.monotonic() < deadline
        hung_job.popen.terminate()
        time.sleep(0.02)
    assert hung_job.wait() == 1, hung_job.errors()
    assert "as asked again" in hung_job.errors()


def test_a_power_off_that_meets_a_stop_ends_the_run_after_cont(kvm, program):
    for turn in range(30):
        guest = Guest(program, size=MIB)
        guest.wait_working()
        guest.order(phase=7, finish=True)
        try:
            # Until it has powered off, whatever it was doing at each stop.
            while guest.process.alive():
                guest.qmp.execute("stop")
                guest.qmp.execute("cont")
        except (QmpError, EOFError, OSError):
            pass  # It was ending.
        assert guest.process.wait() == 0, f"turn {turn}: {guest.process.errors()}"
        guest.qmp.close()
