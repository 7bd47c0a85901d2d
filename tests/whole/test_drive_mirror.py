"""Mirrors between real images: chains of qcow2, files that drive-mirror makes, NBD
exports; each proved with qemu-img. And mirrors that do not get on."""
import pytest

from support.nbd import tool
from support.program import QmpError

MIB = 1024 * 1024
SIZE = 4 * MIB


def image(path, image_format="raw", backing=None, size=SIZE, writes=()):
    base = ("-b", backing, "-F", "qcow2") if backing else ()
    tool("qemu-img", "create", "-q", "-f", image_format, *base, path, size)
    for byte, offset, length in writes:
        tool("qemu-io", "-f", image_format, "-c", f"write -P {byte} {offset} {length}", path)
    return path


def same(first, first_format, second, second_format):
    tool("qemu-img", "compare", "-f", first_format, "-F", second_format, first, second)


def add(qmp, name, image_format, path):
    qmp.execute("blockdev-add", driver=image_format, node_name=name,
                file={"driver": "file", "filename": str(path)})


def serve(qmp, folder, node):
    path = folder / "nbd.sock"
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    qmp.execute("block-export-add", type="nbd", id="e0", name="e0", writable=True,
                node_name=node)
    return f"nbd+unix:///e0?socket={path}"


def write(target, byte, offset, length, image_format="raw"):
    tool("qemu-io", "-f", image_format, "-c", f"write -P {byte} {offset} {length}", target)


def ends_well(qmp, job):
    end = qmp.event("BLOCK_JOB_COMPLETED", device=job)
    assert "error" not in end["data"], end
    qmp.status(job, "null")


@pytest.mark.parametrize("copy_mode", ["background", "write-blocking", "auto"])
@pytest.mark.parametrize("sync", ["top", "full"])
def test_an_overlay_is_mirrored_under_a_writer(program, tmp_path, copy_mode, sync):
    base = image(tmp_path / "base.qcow2", "qcow2", writes=[(9, 0, 2 * MIB)])
    source = image(tmp_path / "ov.qcow2", "qcow2", base, writes=[(7, 65536, 65536)])
    target = image(tmp_path / "copy.qcow2", "qcow2", base if sync == "top" else None)
    daemon, qmp = program.storage_daemon()
    add(qmp, "src", "qcow2", source)
    uri = serve(qmp, tmp_path, "src")
    qmp.execute("drive-mirror", job_id="j0", device="src", target=str(target),
                mode="existing", format="qcow2", sync=sync, node_name="tgt",
                copy_mode=copy_mode)
    write(uri, 1, 3 * MIB + 512, 4096)
    qmp.status("j0", "ready")
    write(uri, 2, 1024, 512)
    qmp.execute("job-complete", id="j0")
    ends_well(qmp, "j0")
    before = source.read_bytes()
    write(uri, 3, 2 * MIB, 65536)
    qmp.execute("block-export-del", id="e0", mode="hard")
    qmp.event("BLOCK_EXPORT_DELETED", id="e0")
    nodes = [node["node-name"] for node in qmp.execute("query-named-block-nodes", flat=True)]
    assert "tgt" not in nodes, "it goes with its last user"
    qmp.execute("quit")
    daemon.wait()
    assert source.read_bytes() == before, "the source changed after the pivot"
    write(source, 3, 2 * MIB, 65536, "qcow2")
    same(source, "qcow2", target, "qcow2")
    tool("qemu-img", "check", "-q", "-f", "qcow2", target)


def test_a_raw_file_is_made_and_the_writer_goes_on_on_it(program, tmp_path):
    source = image(tmp_path / "src.img", writes=[(5, MIB, 65536)])
    target = tmp_path / "new.img"
    target.write_bytes(b"old" * MIB * 2)
    daemon, qmp = program.storage_daemon()
    add(qmp, "src", "raw", source)
    uri = serve(qmp, tmp_path, "src")
    qmp.execute("drive-mirror", job_id="j0", device="src", target=str(target), sync="full")
    qmp.status("j0", "ready")
    qmp.execute("job-complete", id="j0")
    ends_well(qmp, "j0")
    write(uri, 6, 0, 4096)
    assert target.read_bytes()[:1] == b"\x06"
    qmp.execute("quit")
    daemon.wait()
    write(source, 6, 0, 4096)
    same(source, "raw", target, "raw")


def test_an_export_is_a_target(program, tmp_path):
    source = image(tmp_path / "src.img", writes=[(5, MIB, 65536)])
    target = image(tmp_path / "dst.img")
    server, there = program.storage_daemon()
    add(there, "dst", "raw", target)
    serve(there, tmp_path, "dst")
    daemon, qmp = program.storage_daemon()
    add(qmp, "src", "raw", source)
    qmp.execute("drive-mirror", job_id="j0", device="src", mode="existing", format="raw",
                target=f"nbd:unix:{tmp_path}/nbd.sock:exportname=e0", sync="full")
    qmp.status("j0", "ready")
    qmp.execute("block-job-cancel", device="j0")
    ends_well(qmp, "j0")
    for end, process in ((qmp, daemon), (there, server)):
        end.execute("quit")
        process.wait()
    same(source, "raw", target, "raw")


@pytest.mark.parametrize("mode", ["existing", "absolute-paths"])
@pytest.mark.parametrize("path", ["src.img", "link.img", "dir/../src.img"])
def test_a_source_is_never_its_own_target(program, tmp_path, mode, path):
    source = image(tmp_path / "src.img", writes=[(5, MIB, 65536)])
    (tmp_path / "link.img").symlink_to(source)
    (tmp_path / "dir").mkdir()
    before = source.read_bytes()
    _, qmp = program.storage_daemon()
    add(qmp, "src", "raw", source)
    with pytest.raises(QmpError):
        qmp.execute("drive-mirror", job_id="j0", device="src", target=str(tmp_path / path),
                    mode=mode, format="raw", sync="full")
    assert source.read_bytes() == before
    assert qmp.execute("query-jobs") == []


@pytest.mark.parametrize("arguments", [
    {"target": ""}, {"target": "x" * 10000}, {"target": "nbd:"}, {"target": "nbd:unix:"},
    {"target": "nbd:::"}, {"target": "json:{}"}, {"target": "nbd+unix:///?socket="},
    {"target": "/dev/null"}, {"target": "/dev/zero", "mode": "existing"}, {"target": "/"},
    {"target": "/dev/null", "mode": "existing", "format": "qcow2"},
    {"target": "x\u0000y"}, {"deadline": -1}, {"deadline": "soon"}, {"deadline": 1 << 40},
    {"copy-mode": "always"}, {"node-name": "#"}, {"node-name": "n" * 40},
    {"replaces": "src"}, {"format": "\u0000"}, {"granularity": 3}, {"buf-size": -1},
])
def test_bad_input_is_refused_and_leaves_nothing(program, tmp_path, arguments):
    source = image(tmp_path / "src.img")
    _, qmp = program.storage_daemon()
    add(qmp, "src", "raw", source)
    before = qmp.execute("query-named-block-nodes", flat=True)
    wanted = {"job-id": "j0", "device": "src", "sync": "full", "format": "raw",
              "target": str(tmp_path / "dst.img")}
    with pytest.raises(QmpError):
        qmp.execute("drive-mirror", **{**wanted, **arguments})
    assert qmp.execute("query-jobs") == []
    assert qmp.execute("query-named-block-nodes", flat=True) == before


def test_a_deadline_ends_in_an_error_that_says_what_was_missing(program, tmp_path):
    source = image(tmp_path / "src.img", writes=[(5, 0, SIZE)])
    _, qmp = program.storage_daemon()
    add(qmp, "src", "raw", source)
    qmp.execute("drive-mirror", job_id="j0", device="src", target=str(tmp_path / "dst.img"),
                sync="full", speed=1, deadline=1)
    qmp.event("BLOCK_JOB_NOT_CONVERGING", device="j0")
    end = qmp.event("BLOCK_JOB_COMPLETED", device="j0")
    assert end["data"]["error"].startswith("The mirror was not ready within 1 s: ")


def test_a_mirror_that_may_switch_shows_its_copy_mode(program, tmp_path):
    source = image(tmp_path / "src.img")
    _, qmp = program.storage_daemon()
    add(qmp, "src", "raw", source)
    qmp.execute("drive-mirror", job_id="j0", device="src", target=str(tmp_path / "dst.img"),
                sync="full", copy_mode="auto")
    qmp.status("j0", "ready")
    [job] = qmp.execute("query-block-jobs")
    assert job["copy-mode"] == "background"
    qmp.execute("block-job-change", id="j0", type="mirror", copy_mode="write-blocking")
    [job] = qmp.execute("query-block-jobs")
    assert job["copy-mode"] == "write-blocking"


def read_only(qmp):
    nodes = qmp.execute("query-named-block-nodes")
    return {node["node-name"]: node["ro"] for node in nodes}


@pytest.mark.parametrize("exported", [False, True])
def test_the_target_of_a_read_only_source_is_read_only_after_the_pivot(
        program, tmp_path, exported):
    image(tmp_path / "src.img", writes=[(7, 0, 65536)])
    image(tmp_path / "dst.img")
    daemon, qmp = program.storage_daemon()
    qmp.execute("blockdev-add", driver="raw", node_name="src", read_only=True,
                file={"driver": "file", "filename": str(tmp_path / "src.img")})
    add(qmp, "dst", "raw", tmp_path / "dst.img")
    if exported:
        path = tmp_path / "nbd.sock"
        qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        qmp.execute("block-export-add", type="nbd", id="e0", node_name="src")
    qmp.execute("blockdev-mirror", job_id="j0", device="src", target="dst", sync="full")
    qmp.status("j0", "ready")
    assert not read_only(qmp)["dst"]
    qmp.execute("job-complete", id="j0")
    ends_well(qmp, "j0")
    assert all(read_only(qmp).values()), "the target and the file below it, too"
    if exported:
        uri = f"nbd+unix:///src?socket={tmp_path}/nbd.sock"
        tool("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 0 65536", uri)
    same(tmp_path / "src.img", "raw", tmp_path / "dst.img", "raw")
    # It can be written again when somebody says so.
    qmp.execute("blockdev-reopen", options=[
        {"driver": "raw", "node-name": "dst", "read-only": False,
         "file": {"driver": "file", "filename": str(tmp_path / "dst.img")}}])
    assert not read_only(qmp)["dst"]


def test_a_target_that_is_read_only_is_refused(program, tmp_path):
    image(tmp_path / "src.img")
    image(tmp_path / "dst.img")
    daemon, qmp = program.storage_daemon()
    add(qmp, "src", "raw", tmp_path / "src.img")
    qmp.execute("blockdev-add", driver="raw", node_name="dst", read_only=True,
                auto_read_only=True,
                file={"driver": "file", "filename": str(tmp_path / "dst.img")})
    with pytest.raises(QmpError, match="Block node is read-only"):
        qmp.execute("blockdev-mirror", job_id="j0", device="src", target="dst", sync="full")
