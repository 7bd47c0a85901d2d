"""qcow2 images, shared with QEMU's own tools: what one writes the other reads."""
import json
import os
import random
import struct
import subprocess
import time

import pytest

from support.program import QmpError

MIB = 1 << 20


def run(*args):
    return subprocess.run([str(a) for a in args], check=True, capture_output=True,
                          text=True, timeout=120).stdout


def create(path, size, *options, backing=None, backing_format="qcow2"):
    chain = ["-b", backing, "-F", backing_format] if backing else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, *chain, path, size)
    return path


def qemu_io(path, *commands, options=()):
    args = [part for command in commands for part in ("-c", command)]
    output = run("qemu-io", *options, *args, path)
    assert "failed" not in output, output


def check(path):
    """No errors; leaks are told."""
    result = subprocess.run(["qemu-img", "check", "--output=json", str(path)],
                            capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode in (0, 3), result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report.get("corruptions", 0) == 0 and report["check-errors"] == 0, report
    return report.get("leaks", 0)


def wait_unlocked(path):
    """The kernel ends what a killed process has in flight, and gives up its locks, a
    little after the process is gone."""
    deadline = time.monotonic() + 20
    while subprocess.run(["qemu-img", "info", str(path)], capture_output=True, text=True,
                         timeout=120, check=False).returncode:
        assert time.monotonic() < deadline, f"{path} is still locked"
        time.sleep(0.05)


def same(first, second):
    run("qemu-img", "compare", first, second)


def add(qmp, name, path, **options):
    qmp.execute("blockdev-add", driver="qcow2", node_name=name,
                file={"driver": "file", "filename": str(path)}, **options)


def mirror(qmp, source, target, job="m0", **options):
    qmp.execute("blockdev-mirror", job_id=job, device=source, target=target,
                **{"sync": "full", **options})
    qmp.event("BLOCK_JOB_READY", device=job)
    qmp.execute("job-complete", id=job)
    end = qmp.event("BLOCK_JOB_COMPLETED", device=job)
    assert "error" not in end["data"], end
    qmp.status(job, "null")


def end(process, qmp):
    qmp.execute("quit")
    assert process.wait() == 0


PATTERNS = {
    "data": ["write -P 1 0 3M", "write -P 2 5M 64k"],
    "unaligned": ["write -P 1 512 1k", "write -P 2 65024 1k", "write -P 3 1000k 130k",
                  "write -P 4 16776704 512"],
    "zeroes": ["write -P 1 0 4M", "write -z 1M 1M", "write -z -u 2M 512k", "write -z 100k 3k"],
    "discarded": ["write -P 1 0 4M", "discard 1M 1M"],
    "compressed": ["write -c -P 7 0 64k", "write -c -P 8 64k 64k", "write -P 9 96k 4k"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_qemu_writes_is_read(program, tmp_path, pattern):
    source = create(tmp_path / "src.qcow2", "16M")
    qemu_io(source, *PATTERNS[pattern], options=("-d", "unmap", "-f", "qcow2"))
    target = create(tmp_path / "dst.qcow2", "16M")
    process, qmp = program.storage_daemon()
    add(qmp, "src", source, read_only=True)
    add(qmp, "dst", target, discard="unmap")
    mirror(qmp, "src", "dst")
    end(process, qmp)
    assert check(target) == 0
    same(source, target)


@pytest.mark.parametrize("options", [
    ("-o", "cluster_size=512"), ("-o", "cluster_size=2M"), ("-o", "refcount_bits=1"),
    ("-o", "refcount_bits=64,cluster_size=4k"), ("-o", "compat=0.10"),
    ("-o", "preallocation=metadata"), ("-o", "preallocation=falloc"),
    ("-o", "lazy_refcounts=on"),
], ids=lambda options: options[1])
def test_images_of_all_kinds_are_written(program, tmp_path, options):
    source = tmp_path / "src.img"
    run("qemu-img", "create", "-q", "-f", "raw", source, "9M")
    qemu_io(source, "write -P 1 0 2M", "write -P 2 3000k 2k", "write -P 3 5M 1M",
            options=("-f", "raw"))
    target = create(tmp_path / "dst.qcow2", "9M", *options)
    process, qmp = program.storage_daemon()
    qmp.execute("blockdev-add", driver="raw", node_name="src",
                file={"driver": "file", "filename": str(source)})
    add(qmp, "dst", target)
    mirror(qmp, "src", "dst")
    end(process, qmp)
    assert check(target) == 0
    same(source, target)
    # QEMU goes on where we ended.
    qemu_io(target, "write -P 8 1M 1M", options=("-f", "qcow2"))
    assert check(target) == 0


def chain(tmp_path, formats=("qcow2", "qcow2", "qcow2")):
    paths = []
    for index, image_format in enumerate(formats):
        path = tmp_path / f"layer{index}.{image_format}"
        if image_format == "raw":
            run("qemu-img", "create", "-q", "-f", "raw", path, "8M")
        else:
            create(path, f"{8 + index}M", backing=paths[-1].name if paths else None,
                   backing_format=formats[index - 1])
        qemu_io(path, f"write -P {index + 1} {index}M {2 * MIB}",
                f"write -P {index + 10} {5 * MIB + index * 1000 * 512} 512",
                options=("-f", image_format))
        paths.append(path)
    return paths


@pytest.mark.parametrize("formats", [("qcow2",) * 3, ("raw", "qcow2", "qcow2")], ids="-".join)
def test_a_chain_that_headers_name(program, tmp_path, formats):
    layers = chain(tmp_path, formats)
    target = create(tmp_path / "dst.qcow2", "10M")
    process, qmp = program.storage_daemon()
    add(qmp, "top", layers[-1])
    nodes = qmp.execute("query-named-block-nodes")
    assert len(nodes) == 6
    add(qmp, "dst", target)
    mirror(qmp, "top", "dst")
    qmp.execute("blockdev-del", node_name="top")
    assert len(qmp.execute("query-named-block-nodes")) == 2
    end(process, qmp)
    same(layers[-1], target)
    for image in (layers[-1], target):
        assert check(image) == 0


def test_a_chain_of_named_nodes(program, tmp_path):
    layers = chain(tmp_path)
    target = create(tmp_path / "dst.qcow2", "10M")
    process, qmp = program.storage_daemon()
    add(qmp, "base", layers[0], read_only=True, backing=None)
    add(qmp, "mid", layers[1], read_only=True, backing="base")
    add(qmp, "top", layers[2], backing="mid")
    with pytest.raises(QmpError, match="node is used as backing hd of 'mid'"):
        qmp.execute("blockdev-del", node_name="base")
    add(qmp, "dst", target)
    mirror(qmp, "top", "dst")
    end(process, qmp)
    same(layers[-1], target)


def test_writes_to_an_overlay_copy_the_rest_of_each_cluster(program, tmp_path):
    base = create(tmp_path / "base.qcow2", "4M")
    qemu_io(base, "write -P 5 0 4M")
    image = create(tmp_path / "top.qcow2", "4M", backing=base.name)
    source = tmp_path / "src.img"
    run("qemu-img", "convert", "-O", "raw", base, source)
    qemu_io(source, "write -P 6 1000k 3k", "write -P 7 2M 65k", options=("-f", "raw"))
    process, qmp = program.storage_daemon()
    qmp.execute("blockdev-add", driver="file", node_name="src", filename=str(source))
    add(qmp, "top", image)
    mirror(qmp, "src", "top")
    end(process, qmp)
    assert check(image) == 0
    same(source, image)
    assert check(base) == 0


def test_backing_files_elsewhere_are_not_followed(program, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    secret = create(outside / "secret.qcow2", "1M")
    (inside / "link.qcow2").symlink_to(secret)
    os.mkfifo(inside / "fifo")
    names = {
        str(secret): "outside of the image's directory",
        "../out/secret.qcow2": "outside of the image's directory",
        "link.qcow2": "outside of the image's directory",
        "/etc/passwd": "outside of the image's directory",
        "fifo": "not a regular file",
        "nbd://localhost/x": "only files are opened by such a name",
        'json:{"driver":"null-co"}': "only files are opened by such a name",
        "missing.qcow2": "No such file or directory",
    }
    process, qmp = program.storage_daemon()
    for name, reason in names.items():
        image = inside / "image.qcow2"
        run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", image,
            "1M")
        with pytest.raises(QmpError, match=reason) as error:
            add(qmp, "n", image)
        assert error.value.desc.startswith("Could not open backing file: ")
        # Given explicitly, it may be anything.
        add(qmp, "n", image, backing=None)
        qmp.execute("blockdev-del", node_name="n")
    add(qmp, "n", image, backing={"driver": "qcow2", "file": {
        "driver": "file", "filename": str(secret)}})
    end(process, qmp)

    process, qmp = program.storage_daemon("--backing-directory", outside)
    run("qemu-img", "rebase", "-u", "-b", secret, "-F", "qcow2", image)
    add(qmp, "n", image)
    end(process, qmp)


def test_images_that_name_each_other_are_refused(program, tmp_path):
    for this, other in (("a", "b"), ("b", "a")):
        run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", other, "-F", "qcow2",
            tmp_path / this, "1M")
    process, qmp = program.storage_daemon()
    for read_only in (False, True):
        with pytest.raises(QmpError, match="Could not open backing file"):
            add(qmp, "n", tmp_path / "a", read_only=read_only)
    assert qmp.execute("query-named-block-nodes") == []
    end(process, qmp)


def test_an_image_in_use_is_locked_against_qemu_and_by_it(program, tmp_path):
    image = create(tmp_path / "a.qcow2", "1M")
    process, qmp = program.storage_daemon()
    add(qmp, "n", image)
    busy = subprocess.run(["qemu-io", "-c", "write 0 64k", str(image)], capture_output=True,
                          text=True, check=False)
    assert "Failed to get" in busy.stderr and "lock" in busy.stderr
    assert subprocess.run(["qemu-img", "info", str(image)], capture_output=True,
                          check=False).returncode != 0
    qmp.execute("blockdev-del", node_name="n")
    # Readers share it.
    add(qmp, "n", image, read_only=True)
    run("qemu-img", "info", image)
    add(qmp, "m", image, read_only=True)
    qmp.execute("blockdev-del", node_name="n")
    qmp.execute("blockdev-del", node_name="m")

    with subprocess.Popen(["qemu-io", str(image)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        other.stdin.write(b"write 0 64k\n")
        other.stdin.flush()
        while b"wrote" not in other.stdout.readline():
            pass
        for read_only in (False, True):
            with pytest.raises(QmpError, match="Failed to get .*lock"):
                add(qmp, "n", image, read_only=read_only)
        # The same by a node that is there already.
        qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(image))
        with pytest.raises(QmpError, match="Failed to get .*lock"):
            qmp.execute("blockdev-add", driver="qcow2", node_name="n", file="f")
        other.stdin.close()
        assert other.wait(timeout=30) == 0
    qmp.execute("blockdev-add", driver="qcow2", node_name="n", file="f")
    with pytest.raises(QmpError, match="Permission conflict on node 'f'.*'file' child"):
        qmp.execute("blockdev-add", driver="qcow2", node_name="n2", file="f")
    end(process, qmp)
    assert check(image) == 0


def test_images_with_what_is_not_supported_are_left_as_they_are(program, tmp_path):
    cases = {
        "zstd": (["-o", "compression_type=zstd"], "Compression types"),
        "extended": (["-o", "extended_l2=on"], "Extended L2 entries"),
        "raw-data": (["-o", f"data_file={tmp_path}/raw.data,data_file_raw=on"], "data_file_raw"),
        "luks": (["--object", "secret,id=s,data=abc", "-o",
                  "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"],
                 "Encrypted images"),
    }
    images = {name: create(tmp_path / name, "1M", *options)
              for name, (options, _) in cases.items()}
    bitmaps = create(tmp_path / "bitmaps", "1M")
    run("qemu-img", "bitmap", "--add", bitmaps, "b0")
    cases["bitmaps"], images["bitmaps"] = (None, "persistent bitmaps"), bitmaps
    for name, bit, reason in (("dirty", 1, "marked dirty"), ("corrupt", 2, "Image is corrupt")):
        images[name] = create(tmp_path / name, "1M")
        with images[name].open("r+b") as file:
            file.seek(72)
            file.write(struct.pack(">Q", bit))
        cases[name] = (None, reason)
    process, qmp = program.storage_daemon()
    for name, (_, reason) in cases.items():
        before = images[name].read_bytes()
        with pytest.raises(QmpError, match=reason):
            add(qmp, "n", images[name])
        assert images[name].read_bytes() == before, name
    # What is said of encryption is compared with the header first.
    no_encryption = "No encryption in image header, but options specified format 'aes'"
    said = [("luks", {"format": "aes"}, "Header reported 'luks' encryption format but options "
                                        "specify 'aes'"),
            ("luks", {"format": "luks", "key-secret": "s"}, "No secret with id 's'"),
            ("luks", {"format": "luks"}, "Encrypted images"),
            ("bitmaps", {"format": "aes", "key-secret": "s"}, no_encryption)]
    for name, encrypt, reason in said:
        with pytest.raises(QmpError, match=reason):
            add(qmp, "n", images[name], encrypt=encrypt, read_only=True)
    for name in ("bitmaps", "dirty", "corrupt"):
        before = images[name].read_bytes()
        add(qmp, "n", images[name], read_only=True)
        qmp.execute("blockdev-del", node_name="n")
        assert images[name].read_bytes() == before, name
    end(process, qmp)
    assert json.loads(run("qemu-img", "info", "--output=json", bitmaps))[
        "format-specific"]["data"]["bitmaps"][0]["name"] == "b0"


def test_data_in_a_file_of_its_own(program, tmp_path):
    data = tmp_path / "data"
    image = create(tmp_path / "a.qcow2", "4M", "-o", f"data_file={data}")
    source = create(tmp_path / "src.qcow2", "4M")
    qemu_io(source, "write -P 1 0 1M", "write -P 2 3M 3k")
    process, qmp = program.storage_daemon()
    with pytest.raises(QmpError, match="'data-file' is required"):
        add(qmp, "n", image)
    add(qmp, "src", source)
    add(qmp, "n", image, data_file={"driver": "file", "filename": str(data)})
    mirror(qmp, "src", "n")
    end(process, qmp)
    assert check(image) == 0
    same(source, image)


def test_internal_snapshots_survive_writes(program, tmp_path):
    image = create(tmp_path / "a.qcow2", "4M")
    qemu_io(image, "write -P 1 0 2M", "write -P 2 3M 64k")
    run("qemu-img", "snapshot", "-c", "before", image)
    source = create(tmp_path / "src.qcow2", "4M")
    qemu_io(source, "write -P 9 1M 2M", "write -P 8 100k 1k")
    process, qmp = program.storage_daemon()
    add(qmp, "src", source)
    add(qmp, "n", image, discard="unmap")
    mirror(qmp, "src", "n")
    end(process, qmp)
    assert check(image) == 0
    same(source, image)
    run("qemu-img", "snapshot", "-a", "before", image)
    qemu_io(image, "read -P 1 0 2M", "read -P 0 2M 1M", "read -P 2 3M 64k")
    assert check(image) == 0


@pytest.mark.parametrize("round_", range(6))
def test_a_killed_process_leaves_a_consistent_image(program, tmp_path, round_):
    chance = random.Random(round_)
    source = tmp_path / "src.img"
    with source.open("wb") as file:
        file.truncate(64 * MIB)
        for _ in range(400):
            file.seek(chance.randrange(64 * 256) * 4096)
            file.write(bytes([chance.randrange(1, 256)]) * chance.choice([4096, 65536, 200 << 10]))
        file.truncate(64 * MIB)
    base = create(tmp_path / "base.qcow2", "64M")
    qemu_io(base, "write -P 77 0 64M")
    target = create(tmp_path / "dst.qcow2", "64M", "-o",
                    f"cluster_size={chance.choice(['4k', '64k'])}", backing=base.name)
    process, qmp = program.storage_daemon()
    qmp.execute("blockdev-add", driver="file", node_name="src", filename=str(source))
    add(qmp, "dst", target, discard="unmap", backing=None)
    qmp.execute("blockdev-mirror", job_id="m0", device="src", target="dst", sync="full")
    time.sleep(chance.random() * 0.4)
    process.popen.kill()
    process.wait()
    wait_unlocked(target)
    check(target)
    # It is of use again.
    process, qmp = program.storage_daemon()
    qmp.execute("blockdev-add", driver="file", node_name="src", filename=str(source))
    add(qmp, "dst", target, discard="unmap", backing=None)
    mirror(qmp, "src", "dst")
    end(process, qmp)
    check(target)
    run("qemu-img", "rebase", "-u", "-b", "", target)
    same(source, target)


def test_hostile_images_are_refused_or_fail_and_nothing_else(program, tmp_path):
    good = create(tmp_path / "good.qcow2", "1M")
    qemu_io(good, "write -P 1 0 128k")
    content = good.read_bytes()
    l1 = struct.unpack(">Q", content[40:48])[0]
    l2 = struct.unpack(">Q", content[l1:l1 + 8])[0] & 0x00fffffffffffe00

    def image(name, *patches, length=None):
        data = bytearray(content[:length])
        for offset, patch in patches:
            data[offset:offset + len(patch)] = patch
        path = tmp_path / name
        path.write_bytes(data)
        return path

    word, number = struct.Struct(">I").pack, struct.Struct(">Q").pack
    refused = [
        image("empty", length=0), image("short", length=100), image("cut", length=600),
        image("magic", (0, b"QFI\0")), image("version", (4, word(9))),
        image("clusters", (20, word(40))), image("l1-huge", (36, word(0xffffffff))),
        image("l1-far", (40, number(1 << 40))), image("l1-odd", (40, number(1234))),
        image("refcounts-huge", (56, word(0xffffffff))), image("refcounts-far", (48, number(1 << 50))),
        image("size", (24, number((1 << 64) - 1))), image("order", (96, word(77))),
        image("extension", (0x70, word(0x12345678)), (0x74, word(0xfffffff0))),
        image("names", (0x70, word(0x6803f857)), (0x74, word(1))),
        image("backing", (8, number((1 << 64) - 256)), (16, word(100))),
    ]
    process, qmp = program.storage_daemon()
    add(qmp, "good", good)
    for path in refused:
        for read_only in (False, True):
            with pytest.raises(QmpError):
                add(qmp, "bad", path, read_only=read_only)
    broken = [
        image("entry-reserved", (l2, b"\x3f" + b"\xff" * 7)),
        image("entry-far", (l2, number((1 << 63) | (1 << 55)))),
        image("entry-compressed", (l2, b"\x7f" + b"\xff" * 7)),
        image("table-far", (l1, number((1 << 63) | (1 << 50)))),
        image("table-is-header", (l1, number(1 << 63 | 0x10000))),
        image("table-odd", (l1, number((1 << 63) | 0x200))),
        image("refblock-far", (0x10000, number(1 << 50))),
        image("refblock-odd", (0x10000, number(0x20200))),
        image("no-refblock", (0x10000, number(0))),
        image("nothing-counted", (0x20000, bytes(64))),
    ]
    for index, path in enumerate(broken):
        try:
            add(qmp, "bad", path)
        except QmpError:
            continue
        target = create(tmp_path / f"copy{index}", "1M")
        add(qmp, "copy", target)
        for source, copy in (("bad", "copy"), ("good", "bad")):
            qmp.execute("blockdev-mirror", job_id="m0", device=source, target=copy, sync="full")
            while True:
                jobs = [j["status"] for j in qmp.execute("query-jobs") if j["id"] == "m0"]
                if jobs == ["ready"]:
                    qmp.execute("block-job-cancel", device="m0")
                if jobs in ([], ["ready"]):
                    qmp.status("m0", "null")
                    break
                time.sleep(0.01)
        qmp.execute("blockdev-del", node_name="bad")
        qmp.execute("blockdev-del", node_name="copy")
    qmp.execute("blockdev-del", node_name="good")
    end(process, qmp)
    assert check(good) == 0
