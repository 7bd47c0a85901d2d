"""A storage daemon whose disks are backed up, and the client that does it."""
import json
import os
import subprocess

from .program import BINARY, PATIENCE, run
from .sectors import Client, FLUSH, WRITE

MIB = 1024 * 1024
SIZE = 8 * MIB
CHUNK = 65536
DONE, FAILED, USAGE, CANCELLED, LOST = 0, 1, 2, 3, 4


class Server:
    """A storage daemon with the disks `one` and `two`, exported by NBD, and a monitor for
    the client beside the test's own."""

    def __init__(self, program, *arguments, images=None):
        """`images`: which image each disk has; then they also keep persistent bitmaps."""
        self.folder = program.folder
        self.images = images or {"one": "one.img", "two": "two.img"}
        self.backups = self.folder / "backups"
        self.client = self.folder / "client"
        self.other = self.folder / "other"
        self.nbd = self.folder / "nbd"
        words = []
        for name in ("one", "two"):
            path = self.folder / self.images[name]
            if not path.exists():
                path.write_bytes(os.urandom(SIZE // 2))
                os.truncate(path, SIZE)
            kept = f",file.bitmap-file={path}.bitmaps" if images else ""
            words += ["--blockdev",
                      f"driver=raw,node-name={name},file.driver=file,file.filename={path}{kept}"]
        self.process, self.qmp = program.storage_daemon(
            "--qmp", f"unix:{self.client}", "--qmp", f"unix:{self.other}", *arguments, *words)
        self.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.nbd)}})
        for name in ("one", "two"):
            self.qmp.execute("block-export-add", type="nbd", id=name, node_name=name,
                             name=name, writable=True)

    def backup(self, *words, **options):
        return run("job", "backup", *words, "--to", self.backups,
                   "--qmp", f"unix:{self.client}", **options)

    def start(self, *words):
        return subprocess.Popen(
            [BINARY, "job", "backup", *map(str, words), "--to", str(self.backups),
             "--qmp", f"unix:{self.client}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def restore(self, *words):
        return run("restore", self.backups, *words)

    def restored(self, *words):
        """What is restored."""
        target = self.folder / "restored"
        result = self.restore(target, "--force", *words)
        assert result.returncode == DONE, result.stderr
        return target.read_bytes()

    def write(self, disk, offset, data):
        """Writes as a guest does."""
        client = Client(str(self.nbd), disk, PATIENCE)
        client.send(WRITE, offset, len(data), data)
        assert client.reply()[0] == 0
        client.send(FLUSH)
        assert client.reply()[0] == 0
        client.close()

    def image(self, disk):
        """What the disk holds."""
        return (self.folder / self.images[disk]).read_bytes()

    def end(self):
        """Ends the daemon in an orderly way."""
        self.qmp.execute("quit")
        self.process.popen.wait(PATIENCE)

    def manifest(self):
        return json.loads((self.backups / "diptych-backup.json").read_text())

    def entries(self, disk):
        [found] = [row for row in self.manifest()["disks"] if row["name"] == disk]
        return found["entries"]

    def files(self):
        return sorted(path.name for path in self.backups.iterdir())

    def nodes(self):
        rows = self.qmp.execute("query-named-block-nodes")
        return {row["node-name"]: row for row in rows}

    def bitmaps(self, disk):
        return {row["name"]: row for row in self.nodes()[disk].get("dirty-bitmaps", [])}

    def assert_tidy(self):
        """Nothing is left on the server or in the directory but what the manifest says."""
        assert {name for name in self.nodes() if not name.startswith("#")} == {"one", "two"}
        assert self.qmp.execute("query-jobs") == []
        known = {"diptych-backup.json", ".diptych-backup.lock"}
        bitmaps = {"one": set(), "two": set()}
        if (self.backups / "diptych-backup.json").exists():
            for disk in self.manifest()["disks"]:
                for entry in disk["entries"]:
                    known |= {entry["file"]} | ({entry["ranges"]["file"]} if entry["ranges"]
                                                else set())
                    bitmaps[disk["name"]] = {entry["bitmap"]}
        assert set(self.files()) <= known
        assert {name: set(self.bitmaps(name)) for name in bitmaps} == bitmaps
