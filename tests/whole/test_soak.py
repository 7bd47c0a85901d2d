"""Random use of the storage daemon, under faults, with everything checked.

DIPTYCH_SOAK_SECONDS says for how long (60), DIPTYCH_SOAK_SEED repeats what each
thread did. For hours: tests/soak --hours 8.
"""
import os
import pathlib
import shutil
import tempfile
import time

import pytest

from support.legal import Events
from support.sectors import SECTOR, ZEROES, Record, sector_of
from support.soak import Soak

SECONDS = float(os.environ.get("DIPTYCH_SOAK_SECONDS", "60"))
SEED = int(os.environ.get("DIPTYCH_SOAK_SEED") or time.time_ns() % 10**6)


@pytest.mark.timeout(SECONDS + 600)
def test_random_use_under_faults_loses_and_leaks_nothing():
    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak.", dir="/dev/shm"))
    try:
        soak = Soak(folder, SEED, SECONDS)
        wrong = soak.run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(soak.summary())
    assert not wrong, wrong
    # Nothing was checked if nothing happened.
    assert soak.tally["mirrors"] and soak.tally["writes"] and soak.events.by_end.get("completed")


def test_the_checker_of_images_finds_what_is_lost_torn_or_of_two_instants():
    record = Record(5, 3)
    writes = [record.begin(sector, 1, zero=False) for sector in (0, 1, 2, 0)]
    for write, (began, ended) in zip(writes, ((1, 2), (3, 4), (5, 6), (7, 8)), strict=True):
        write.began, write.ended, write.state = began, ended, "done"
    one, two, three, four = (sector_of(5, sector, write.generation)
                             for sector, write in zip((0, 1, 2, 0), writes, strict=True))
    assert record.is_of_one_instant(four + two + three, 9, 9) is None
    assert "sector 0" in record.is_of_one_instant(one + two + three, 9, 9)
    assert record.is_of_one_instant(one + two + ZEROES, 0, 9) is None
    assert "no instant" in record.is_of_one_instant(one + ZEROES + three, 0, 9)
    assert "torn" in record.is_of_one_instant(four[:100] + bytes(412) + two + three, 9, 9)
    assert "sector 2" in record.is_of_one_instant(four + two + two, 9, 9)
    assert record.fits(2, ZEROES, 0, 5) is None and record.fits(2, ZEROES, 7, 9)
    # A write that failed may have taken effect, or do so later; it hides nothing.
    lost = record.begin(1, 1, zero=False)
    record.end(lost, "lost")
    now = lost.ended
    late = sector_of(5, 1, lost.generation)
    assert record.is_of_one_instant(four + late + three, now, now) is None
    assert record.is_of_one_instant(four + two + three, now, now) is None
    record.forget(now)
    assert record.unsure() == {1} and "sector 0" in record.fits(0, one, now, now)
    assert len(late) == SECTOR


PATHS = [
    (["created", "running", "ready", "READY", "waiting", "pending", "COMPLETED", "concluded",
      "null"], None),
    (["created", "null", "created"], None),
    (["created", "running", "concluded"], "running -> concluded"),
    (["created", "running", "ready", "READY", "READY"], "READY number 2"),
    (["created", "running", "ready", "waiting"], "without BLOCK_JOB_READY"),
    (["created", "running", "aborting", "concluded"], "concluded with end event None"),
    (["created", "running", "aborting", "CANCELLED", "CANCELLED"], "after"),
    (["created", "running", "aborting", "COMPLETED"], "in aborting"),
    (["created", "null", "CANCELLED"], "not there"),
    (["created", "null", "running"], "None -> running"),
]


@pytest.mark.parametrize("path, wrong", PATHS)
def test_the_checker_of_events_knows_what_is_legal(path, wrong):
    complaints = []
    events = Events(lambda _: False, complaints.append)
    for step in path:
        if step.isupper():
            events.take({"event": f"BLOCK_JOB_{step}", "data": {
                "device": "j", "type": "mirror", "len": 1, "offset": 1, "speed": 0}})
        else:
            events.take({"event": "JOB_STATUS_CHANGE", "data": {"id": "j", "status": step}})
    assert (not complaints) if wrong is None else any(wrong in text for text in complaints)
