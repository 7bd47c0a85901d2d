"""Nodes in use that are reopened or resized: what their clients see."""
import json
import subprocess

import pytest

from support.guest import MIB, Guest
from support.nbd import READ, WRITE, Raw
from support.program import QmpError

NULL = {"driver": "null-co", "size": 1 << 20, "read-zeroes": True}


def run(*args, check=True):
    return subprocess.run([str(a) for a in args], check=check, capture_output=True, text=True,
                          timeout=120)


def create(path, size="16M", *options):
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, size)
    return path


class Exports:
    """A daemon with an NBD server."""

    def __init__(self, program, folder):
        self.socket = folder / "nbd.sock"
        self.process, self.qmp = program.storage_daemon()
        self.qmp.execute("nbd-server-start",
                         addr={"type": "unix", "data": {"path": str(self.socket)}})

    def add(self, node, writable=True):
        self.qmp.execute("block-export-add", type="nbd", id=node, node_name=node,
                         writable=writable)

    def delete(self, node):
        self.qmp.execute("block-export-del", id=node, mode="hard")
        self.qmp.event("BLOCK_EXPORT_DELETED", id=node)

    def command(self, node, *commands):
        parts = [part for command in commands for part in ("-c", command)]
        if all(command.startswith("read") for command in commands):
            parts.insert(0, "-r")
        return ["qemu-io", "-f", "raw", *parts, f"nbd+unix:///{node}?socket={self.socket}"]

    def io(self, node, *commands):
        done = run(*self.command(node, *commands))
        assert "failed" not in done.stdout, done.stdout

    def size(self, node):
        uri = f"nbd+unix:///{node}?socket={self.socket}"
        return json.loads(run("qemu-img", "info", "--output=json", uri).stdout)["virtual-size"]

    def refused(self, command, **arguments):
        with pytest.raises(QmpError) as error:
            self.qmp.execute(command, **arguments)
        return error.value.desc


@pytest.fixture
def exports(program, tmp_path):
    return Exports(program, tmp_path)


def qcow2(path, **options):
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node-name": "img", "file": file, **options}


def test_an_image_becomes_writable_and_read_only_again(exports, tmp_path):
    path = create(tmp_path / "a.qcow2")
    qmp = exports.qmp
    qmp.execute("blockdev-add", **qcow2(path, **{"read-only": True}))
    assert "read-only" in exports.refused("block-export-add", type="nbd", id="img",
                                          node_name="img", writable=True)
    qmp.execute("blockdev-reopen", options=[qcow2(path)])
    exports.add("img")
    exports.io("img", "write -P 1 0 1M", "write -P 2 5M 64k")
    assert exports.refused("blockdev-reopen", options=[qcow2(path, **{"read-only": True})]) \
        == "Read-only block node 'img' cannot support read-write users"
    exports.io("img", "write -P 3 6M 64k")
    exports.delete("img")
    qmp.execute("blockdev-reopen", options=[qcow2(path, **{"read-only": True})])
    # What was written is in the file by now, whatever becomes of the process, and the file
    # is open to other readers.
    patterns = ("read -P 1 0 1M", "read -P 2 5M 64k", "read -P 3 6M 64k")
    parts = [part for command in patterns for part in ("-c", command)]
    assert "failed" not in run("qemu-io", "-r", "-f", "qcow2", *parts, path).stdout
    exports.add("img", writable=False)
    exports.io("img", *patterns)
    exports.delete("img")
    # Once more, over what is there.
    qmp.execute("blockdev-reopen", options=[qcow2(path)])
    exports.add("img")
    exports.io("img", "write -P 4 64k 64k")
    qmp.execute("quit")
    assert exports.process.wait() == 0
    run("qemu-img", "check", path)
    parts = ["-c", "read -P 1 0 64k", "-c", "read -P 4 64k 64k", "-c", "read -P 3 6M 64k"]
    assert "failed" not in run("qemu-io", "-r", "-f", "qcow2", *parts, path).stdout


def test_an_unsafe_cache_costs_no_more_than_the_hosts_memory(exports, tmp_path):
    path = create(tmp_path / "a.qcow2")
    exports.qmp.execute("blockdev-add", **qcow2(path, cache={"no-flush": True}))
    exports.add("img")
    exports.io("img", "write -P 1 0 1M", "flush")
    exports.process.end()
    # The kernel gives the locks of a killed process up a little later.
    done = run("qemu-io", "-r", "-U", "-f", "qcow2", "-c", "read -P 1 0 1M", path)
    assert "failed" not in done.stdout, done.stdout


def test_a_throttled_node_changes_its_group_under_a_request_that_waits(exports):
    qmp = exports.qmp
    for group, limits in (("slow", {"iops-total": 1}), ("fast", {})):
        qmp.execute("object-add", qom_type="throttle-group", id=group, limits=limits)
    qmp.execute("blockdev-add", node_name="disk", **NULL)

    def throttle(group):
        return {"driver": "throttle", "node-name": "thr", "throttle-group": group, "file": "disk"}

    qmp.execute("blockdev-add", **throttle("slow"))
    exports.add("thr")
    # At one a second they would take minutes. The client is to say at once what it has done.
    commands = [f"write {n * 4}k 4k" for n in range(200)]
    with subprocess.Popen(["stdbuf", "-oL", *exports.command("thr", *commands)],
                          stdout=subprocess.PIPE, bufsize=0) as client:
        assert client.stdout.read(5) == b"wrote"
        qmp.execute("blockdev-reopen", options=[throttle("fast")])
        rest, _ = client.communicate(timeout=60)
    assert rest.count(b"wrote") == 199 and client.returncode == 0, rest
    qmp.execute("object-del", id="slow")
    assert exports.refused("object-del", id="fast") == "object 'fast' is in use, can not be deleted"
    assert exports.refused("blockdev-reopen", options=[throttle("slow")]) \
        == "Throttle group 'slow' does not exist"
    exports.io("thr", "write 0 4k")


def test_an_nbd_node_changes_its_rights_and_nothing_else(exports, program, tmp_path):
    (tmp_path / "server").mkdir()
    server = Exports(program, tmp_path / "server")
    server.qmp.execute("blockdev-add", node_name="disk", **NULL)
    server.add("disk")

    def nbd(**options):
        address = {"type": "unix", "path": str(server.socket)}
        return {"driver": "nbd", "node-name": "img", "server": address, "export": "disk", **options}

    qmp = exports.qmp
    qmp.execute("blockdev-add", **nbd())
    for option, value in (("export", "other"), ("reconnect-delay", 5)):
        assert exports.refused("blockdev-reopen", options=[nbd(**{option: value})]) \
            == f"Cannot change the option '{option}'"
    exports.add("img")
    exports.io("img", "write 0 64k")
    assert exports.refused("blockdev-reopen", options=[nbd(**{"read-only": True})]) \
        == "Read-only block node 'img' cannot support read-write users"
    exports.delete("img")
    qmp.execute("blockdev-reopen", options=[nbd(**{"read-only": True})])
    exports.refused("block-export-add", type="nbd", id="img", node_name="img", writable=True)
    qmp.execute("blockdev-reopen", options=[nbd()])
    exports.add("img")
    exports.io("img", "write 0 64k", "read 0 64k")


def test_an_export_keeps_its_size_and_the_next_one_has_the_new(exports, tmp_path):
    image = tmp_path / "a.img"
    image.write_bytes(bytes(1 << 20))
    exports.qmp.execute("blockdev-add", driver="file", node_name="img", filename=str(image))
    exports.add("img")
    assert exports.refused("block_resize", node_name="img", size=2 << 20).startswith(
        "Permission conflict on node 'img': permissions 'resize' are both required by")
    assert exports.size("img") == image.stat().st_size == 1 << 20
    exports.delete("img")
    exports.qmp.execute("block_resize", node_name="img", size=2 << 20)
    exports.add("img")
    assert exports.size("img") == image.stat().st_size == 2 << 20
    exports.io("img", "write -P 1 1M 1M", "read -P 1 1M 1M")


def test_a_guest_sees_the_new_size_of_its_disk(kvm, program):
    guest = Guest(program, size=32 * MIB, workload="depth=16 mix=w80,r20 adopt=on")
    guest.wait_working()
    guest.qmp.execute("block_resize", device="disk0", size=64 * MIB)
    assert guest.sources[0].stat().st_size == 64 * MIB
    # It goes on with what it knows, and reads the size when it begins.
    guest.wait_writes()
    guest.forget_status()
    guest.qmp.execute("system_reset")
    guest.qmp.event("RESET")
    guest.wait_working()
    assert [disk["sectors"] for disk in guest.finish()["disks"]] == [64 * MIB // 512]


def test_options_are_repeated_as_they_were_given(program, tmp_path):
    path = tmp_path / "disk.img"
    run("qemu-img", "create", "-q", "-f", "raw", path, "1M")
    _, qmp = program.storage_daemon("--blockdev", "driver=null-co,node-name=word,size=1M")

    def refusal(**options):
        with pytest.raises(QmpError) as error:
            qmp.execute("blockdev-reopen", options=[options])
        return error.value.desc

    disk = {"driver": "file", "node-name": "disk", "filename": str(path)}
    qmp.execute("blockdev-add", **disk, locking="auto", aio="threads")
    assert refusal(**disk) == "Option 'aio' cannot be reset to its default value"
    same = {**disk, "locking": "auto", "aio": "threads"}
    assert refusal(**same | {"locking": "off"}) == "Cannot change the option 'locking'"
    assert refusal(**same, **{"aio-max-batch": 1}) == "Cannot change the option 'aio-max-batch'"
    qmp.execute("blockdev-reopen", options=[same | {"read-only": True, "drop-cache": False}])
    assert refusal(**same) == "Option 'drop-cache' cannot be reset to its default value"

    rule = {"event": "read_aio"}
    debug = {"driver": "blkdebug", "node-name": "debug", "image": "word"}
    qmp.execute("blockdev-add", **debug, align=512)
    assert refusal(**debug) == "Option 'align' cannot be reset to its default value"
    assert refusal(**debug, align=512, **{"inject-error": [rule]}) == \
        "Cannot change the option 'inject-error.0.event'"
    qmp.execute("blockdev-reopen", options=[debug | {"align": 512}])

    # What a rule was made for stays: whatever else is there, or is not.
    for other in ("disk", "nothing"):
        assert refusal(**debug | {"align": 512, "image": other}) == \
            "Cannot change the option 'image'"

    # Who cannot be reopened says so before a child is looked for.
    filter_ = {"driver": "copy-on-read", "node-name": "filter"}
    qmp.execute("blockdev-add", **filter_,
                file={"driver": "raw", "node-name": "inner", "file": "word"})
    for child in ("inner", "nothing", {"driver": "null-co", "node-name": "inner"}):
        assert refusal(**filter_, file=child) == \
            "Block format 'copy-on-read' used by node 'filter' does not support reopening files"

    # A command line writes numbers otherwise.
    word = {"driver": "null-co", "node-name": "word"}
    qmp.execute("blockdev-reopen", options=[word | {"size": MIB}])
    qmp.execute("blockdev-reopen", options=[word | {"size": MIB}])
    assert refusal(**word, size=2 * MIB) == "Cannot change the option 'size'"

    image = {"driver": "qcow2", "node-name": "image",
             "file": {"driver": "file", "filename": str(create(tmp_path / "i.qcow2"))}}
    qmp.execute("blockdev-add", **image)
    for options in ({"pass-discard-request": True}, {"lazy-refcounts": True}, {}):
        qmp.execute("blockdev-reopen", options=[image | options])
    assert refusal(**image, **{"l2-cache-entry-size": 1000}) == \
        "L2 cache entry size must be a power of two between 512 and the cluster size (65536)"


def test_a_reopen_of_a_backups_target_holds_the_guest_no_longer_than_it_waits_for_copies(
        program, tmp_path):
    """One write to the target takes long: a guest's write waits for that copy, and the reopen
    does. It gives up, without any change, and the guest's other requests go on."""
    daemon = Exports(program, tmp_path)
    (tmp_path / "disk").write_bytes(b"d" * MIB)
    daemon.qmp.execute("blockdev-add", driver="file", node_name="disk",
                       filename=str(tmp_path / "disk"))
    slow = {"event": "none", "iotype": "write", "errno": 0, "once": True, "delay-ns": 60 * 10**9}
    target = {"driver": "raw", "node-name": "target", "file": {
        "driver": "blkdebug", "inject-error": [slow], "image": {
            "driver": "null-co", "size": MIB}}}
    daemon.qmp.execute("blockdev-add", **{k.replace("-", "_"): v for k, v in target.items()})
    daemon.add("disk")
    daemon.qmp.execute("blockdev-backup", job_id="b", device="disk", target="target",
                       sync="none", cbw_timeout=1, on_cbw_error="break-guest-write")
    client = Raw(daemon.socket, "disk")
    client.send(WRITE, 0, 4096, bytes(4096))
    assert client.simple_reply()[0] != 0
    # It has been given up; its copy is still under way.
    text = daemon.refused("blockdev-reopen", options=[{**target, "detect-zeroes": "on"}])
    assert "whose writes are saved there first are held no longer" in text, text
    client.send(READ, 8192, 512)
    assert client.simple_reply()[0] == 0
    rows = daemon.qmp.execute("query-named-block-nodes")
    assert next(row for row in rows if row["node-name"] == "target")["detect_zeroes"] == "off"
