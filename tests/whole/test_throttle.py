"""Limits on rates: what they delay, and what they must not delay."""
import time

import pytest

from support.program import QmpError

MIB = 1 << 20
# The first request goes at once; the rest would take days.
STUCK = 1


@pytest.fixture
def daemon(program, tmp_path):
    """A storage daemon with a full source, and an empty target behind a limit of
    its writes; the mirror `j0` from one to the other is stuck."""
    (tmp_path / "source").write_bytes(bytes(range(1, 129)) * (MIB // 128))
    (tmp_path / "target").write_bytes(bytes(MIB))
    process, qmp = program.storage_daemon(
        "--object", f"throttle-group,id=slow,limits.bps-write={STUCK}",
        "--blockdev", f"driver=file,node-name=source,filename={tmp_path}/source",
        "--blockdev", f"driver=file,node-name=below,filename={tmp_path}/target",
        "--blockdev", "driver=throttle,node-name=target,throttle-group=slow,file=below")
    qmp.execute("blockdev-mirror", job_id="j0", device="source", target="target",
                sync="full", buf_size=65536, granularity=65536)
    qmp.status("j0", "running")
    return process, qmp


def set_limits(qmp, **limits):
    value = {name.replace("_", "-"): limit for name, limit in limits.items()}
    qmp.execute("qom-set", path="/objects/slow", property="limits", value=value)


def same(tmp_path):
    return (tmp_path / "source").read_bytes() == (tmp_path / "target").read_bytes()


def test_a_limit_holds_a_mirror_until_it_is_lifted(daemon, tmp_path):
    _, qmp = daemon
    (job,) = qmp.execute("query-jobs")
    assert job["status"] == "running"
    set_limits(qmp, bps_write=0)
    qmp.status("j0", "ready")
    qmp.execute("job-complete", id="j0")
    qmp.status("j0", "null")
    assert same(tmp_path)


def test_a_rate_is_kept(daemon, tmp_path):
    _, qmp = daemon
    began = time.monotonic()
    # What has gone so far does not count any more; a tenth of a second's worth and
    # one request go at once.
    set_limits(qmp, bps_write=MIB)
    qmp.status("j0", "ready")
    assert time.monotonic() - began >= (MIB - 65536 - MIB / 10 - 65536) / MIB
    qmp.execute("job-cancel", id="j0")
    qmp.status("j0", "null")
    assert same(tmp_path)


def test_a_limit_does_not_delay_a_forced_cancel(daemon):
    _, qmp = daemon
    qmp.execute("block-job-cancel", device="j0", force=True)
    qmp.status("j0", "null")
    for node in ("source", "target"):
        qmp.execute("blockdev-del", node_name=node)
    qmp.execute("object-del", id="slow")


@pytest.mark.parametrize("how", ["signal", "quit"])
def test_a_limit_does_not_delay_the_end(daemon, how):
    process, qmp = daemon
    if how == "signal":
        process.popen.terminate()
    else:
        qmp.execute("quit")
    # Given up by the watchdog it would be 1.
    assert process.wait() == 0, process.errors()
    assert "in time" not in process.errors()


def test_members_of_a_group_share_its_limit(daemon):
    _, qmp = daemon
    for name in ("null", "far"):
        qmp.execute("blockdev-add", driver="null-co", node_name=name, size=MIB)
    qmp.execute("blockdev-add", driver="throttle", node_name="other",
                throttle_group="slow", file="far")
    with pytest.raises(QmpError, match="object 'slow' is in use, can not be deleted"):
        qmp.execute("object-del", id="slow")
    qmp.execute("blockdev-mirror", job_id="j1", device="null", target="other", sync="full")
    # A null disk has data where it does not read as zeroes, so it is copied too.
    jobs = {job["id"]: job["status"] for job in qmp.execute("query-jobs")}
    assert jobs == {"j0": "running", "j1": "running"}
    set_limits(qmp, bps_write=1 << 40)
    deadline = time.monotonic() + 60
    while {job["status"] for job in qmp.execute("query-jobs")} != {"ready"}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_iothread_is_made_on_the_command_line_and_deleted(program):
    _, qmp = program.storage_daemon("--object", "iothread,id=io0")
    assert qmp.execute("qom-get", path="io0", property="type") == "iothread"
    qmp.execute("object-del", id="io0")
    with pytest.raises(QmpError, match="object 'io0' not found"):
        qmp.execute("object-del", id="io0")


def test_a_bad_object_on_the_command_line_is_a_usage_mistake(program):
    process = program.start("storage-daemon", "--qmp", "unix:/dev/null/x",
                            "--object", "throttle-group,id=g,limits.nope=1")
    assert process.wait() == 2
    assert "Parameter 'limits.nope' is unexpected" in process.errors()
