"""What a guest's disk can be: an image in a format, a node of the command line."""
import pytest

from support.guest import MIB, Guest
from support.nbd import tool
from support.program import run


def test_a_guest_runs_on_a_qcow2_image_and_its_disk_can_be_moved(program, kvm):
    image = program.folder / "image.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    guest = Guest(program, disks=0, options=["--disk", f"path={image},format=qcow2,id=disk0"])
    guest.wait_working()
    nodes = {node["node-name"]: node["drv"]
             for node in guest.qmp.execute("query-named-block-nodes", flat=True)}
    assert nodes["disk0-qcow2"] == "qcow2" and nodes["disk0-file"] == "file"
    target = program.folder / "target.img"
    with open(target, "wb") as file:
        file.truncate(64 * MIB)
    guest.targets.append(target)
    guest.mirror()
    guest.qmp.event("BLOCK_JOB_READY", device="mirror0")
    guest.wait_writes()
    guest.qmp.execute("job-complete", id="mirror0")
    guest.qmp.event("BLOCK_JOB_COMPLETED", device="mirror0")
    guest.wait_writes()
    guest.finish()
    tool("qemu-img", "check", "-q", "-f", "qcow2", image)


def test_a_guest_runs_on_nodes_of_the_command_line(program, kvm):
    image = program.folder / "image.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    guest = Guest(program, disks=0, options=[
        "--object", "throttle-group,id=limits,x-bps-total=1073741824",
        "--blockdev", f"driver=qcow2,node-name=image,file.driver=file,file.filename={image}",
        "--blockdev", "driver=throttle,node-name=limited,throttle-group=limits,file=image",
        "--disk", "node=limited,id=disk0"])
    guest.wait_working()
    assert guest.qmp.execute("qom-get", path="/objects/limits", property="limits")["bps-total"] \
        == 1073741824
    disk, = (row for row in guest.qmp.execute("query-block") if row["device"] == "disk0")
    assert disk["inserted"]["node-name"] == "limited"
    guest.finish()
    tool("qemu-img", "check", "-q", "-f", "qcow2", image)


def test_a_persistent_bitmap_of_a_plain_disk_needs_no_option(program, kvm):
    guest = Guest(program)
    guest.wait_working()
    guest.qmp.execute("block-dirty-bitmap-add", node="disk0", name="marks", persistent=True)
    guest.wait_writes()
    guest.finish()
    image = guest.sources[0]
    assert image.with_name(image.name + ".bitmaps").exists()
    path = program.folder / "again.qmp"
    program.start("run", "--kernel", guest.kernel, "--paused", "--serial", "null",
                  "--qmp", f"unix:{path}", "--disk", f"path={image},id=disk0")
    qmp = program.connect(path)
    nodes = qmp.execute("query-named-block-nodes", flat=True)
    marks, = (bitmap for node in nodes for bitmap in node.get("dirty-bitmaps", []))
    assert marks["name"] == "marks" and marks["persistent"] and marks["recording"]
    assert not marks.get("inconsistent") and marks["count"] > 0


@pytest.mark.parametrize(("options", "status", "part"), [
    (["--disk", "node=nowhere"], 1, "Cannot open disk 'disk0' (node 'nowhere')"),
    (["--blockdev", "driver=null-co,node-name=n,read-only=on,size=1M", "--disk", "node=n"],
     1, "read-only"),
    (["--blockdev", "driver=null-co,node-name=n,size=1M", "--disk", "node=n,direct=on"],
     2, "leave out direct"),
    (["--blockdev", "driver=null-co"], 2, "node-name"),
    (["--blockdev", "driver=file,node-name=n,filename=/nowhere"], 1, "Cannot add node 'n'"),
    (["--object", "throttle-group,id=n,x-iops-total=-1"], 1, "Cannot make object 'n'"),
    (["--disk", "id=d"], 2, "either an image or a node"),
])
def test_a_disk_that_cannot_be_says_so(program, options, status, part):
    kernel = program.folder / "guest.elf"
    assert run("guest", "--write", kernel).returncode == 0
    ended = run("run", "--kernel", kernel, "--serial", "null", *options)
    assert ended.returncode == status and part in ended.stderr, ended.stderr


def test_a_qcow2_image_taken_as_raw_is_told(program, kvm):
    image = program.folder / "image.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    guest = Guest(program, disks=0, options=["--disk", f"path={image},id=disk0", "--paused"])
    assert "give format=qcow2" in guest.process.errors()
