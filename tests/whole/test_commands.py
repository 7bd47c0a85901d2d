"""The commands that are promised in docs/qmp.md are there, and no others."""
import re

from support.guest import Guest
from support.program import TOP

GUEST_ONLY = {"stop", "cont", "system_reset", "query-status", "query-name", "query-iothreads"}


def documented():
    """Names in the first column of the command tables of docs/qmp.md."""
    names = set()
    for line in (TOP / "docs/qmp.md").read_text().splitlines():
        cell = re.match(r"\| ((?:`[a-z0-9_-]+`(?:, )?)+) \|", line)
        if cell:
            names |= set(re.findall(r"`([a-z0-9_-]+)`", cell[1]))
    return names


def test_storage_daemon(program):
    _, qmp = program.storage_daemon()
    have = {row["name"] for row in qmp.execute("query-commands")}
    assert "blockdev-mirror" in have
    assert have <= documented(), have - documented()


def test_guest(program, kvm):
    guest = Guest(program)
    have = {row["name"] for row in guest.qmp.execute("query-commands")}
    assert GUEST_ONLY <= have
    assert have <= documented(), have - documented()
    devices = {row["device"]: row for row in guest.qmp.execute("query-block")}
    assert devices["disk0"]["inserted"]["file"] == str(guest.sources[0])
    guest.qmp.execute("quit")
    assert guest.process.wait() == 0
