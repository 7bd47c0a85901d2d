"""What queries tell of images: names, headers, bitmaps of jobs."""
import subprocess


def create(path, *arguments, size="1M"):
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments, path, size], check=True)


def nodes(qmp):
    return {node["node-name"]: node for node in
            qmp.execute("query-named-block-nodes", flat=True)}


def add_file(qmp, name, path):
    qmp.execute("blockdev-add", driver="file", node_name=name, filename=str(path))


def test_an_image_is_told_of_as_its_header_says(program, tmp_path):
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    create(base, "-o", "compat=0.10")
    create(top, "-b", "base.qcow2", "-F", "qcow2", "-o", "refcount_bits=64,lazy_refcounts=on")
    _, qmp = program.storage_daemon()
    add_file(qmp, "f", top)
    qmp.execute("blockdev-add", driver="qcow2", node_name="top", file="f")
    found = nodes(qmp)
    image = found["top"]["image"]
    assert image["backing-filename"] == "base.qcow2"
    assert image["full-backing-filename"] == str(base)
    assert image["backing-filename-format"] == "qcow2"
    assert image["format-specific"] == {"type": "qcow2", "data": {
        "compat": "1.1", "compression-type": "zlib", "refcount-bits": 64,
        "lazy-refcounts": True, "corrupt": False, "extended-l2": False}}
    assert found["top"]["file"] == str(top)
    assert found["top"]["backing_file"] == str(base)
    [below] = [node for node in found.values() if node["file"] == str(base)
               and node["drv"] == "qcow2"]
    assert below["image"]["format-specific"]["data"] == {
        "compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}
    # The backing image was opened after the image that it is for.
    order = [node["drv"] + " " + node["file"].rsplit("/", 1)[-1] for node in
             qmp.execute("query-named-block-nodes", flat=True)]
    assert order == ["qcow2 base.qcow2", "file base.qcow2", "qcow2 top.qcow2", "file top.qcow2"]


def test_an_image_over_another_backing_image_is_named_by_its_options(program, tmp_path):
    base, top, other = (tmp_path / name for name in ("base.qcow2", "top.qcow2", "other.img"))
    create(base)
    create(top, "-b", str(base), "-F", "qcow2")
    other.write_bytes(bytes(1 << 20))
    _, qmp = program.storage_daemon()
    for name, path in (("tf", top), ("bf", base), ("of", other)):
        add_file(qmp, name, path)
    qmp.execute("blockdev-add", driver="qcow2", node_name="base", file="bf", read_only=True)

    def named(backing):
        qmp.execute("blockdev-add", driver="qcow2", node_name="t", file="tf", backing=backing)
        name = nodes(qmp)["t"]["file"]
        qmp.execute("blockdev-del", node_name="t")
        return name

    of_top = f'{{"driver": "file", "filename": "{top}"}}'
    assert named("base") == str(top)
    assert named("of") == (
        f'json:{{"backing": {{"driver": "file", "filename": "{other}"}}, '
        f'"driver": "qcow2", "file": {of_top}}}')
    assert named(None) == f'json:{{"backing": null, "driver": "qcow2", "file": {of_top}}}'


def test_what_a_mirror_records_is_shown_at_its_source(program, tmp_path):
    _, qmp = program.storage_daemon()
    for name in ("source", "target"):
        qmp.execute("blockdev-add", driver="null-co", node_name=name, size=1 << 20,
                    read_zeroes=True)
    qmp.execute("blockdev-mirror", job_id="j", device="source", target="target", sync="full",
                granularity=65536)
    qmp.status("j", "ready")
    [bitmap] = nodes(qmp)["source"]["dirty-bitmaps"]
    assert bitmap == {"recording": True, "busy": False, "persistent": False,
                      "granularity": 65536, "count": 0}
    assert "dirty-bitmaps" not in nodes(qmp)["target"]
    qmp.execute("job-cancel", id="j")
    qmp.status("j", "null")
    assert "dirty-bitmaps" not in nodes(qmp)["source"]
