"""What `query-job-history` tells who missed the events."""
import errno

SIZE = 8 << 20


def test_the_ends_of_jobs_are_kept_with_what_failed(program):
    _, qmp = program.storage_daemon()
    assert qmp.execute("query-job-history") == []
    null = {"driver": "null-co", "size": SIZE, "read-zeroes": True}
    qmp.execute("blockdev-add", node_name="source", **null)
    qmp.execute("blockdev-add", node_name="good", **null)
    qmp.execute("blockdev-add", driver="blkdebug", node_name="bad",
                image={"driver": "null-co", "size": SIZE, "node-name": "below"},
                inject_error=[{"event": "none", "iotype": "write-zeroes", "errno": errno.ENOSPC},
                              {"event": "none", "iotype": "write", "errno": errno.ENOSPC}])
    qmp.execute("blockdev-mirror", job_id="m0", device="source", target="good", sync="full")
    qmp.event("BLOCK_JOB_READY")
    qmp.execute("job-cancel", id="m0")
    qmp.event("BLOCK_JOB_CANCELLED")
    qmp.execute("blockdev-mirror", job_id="m1", device="source", target="bad", sync="full")
    qmp.event("BLOCK_JOB_COMPLETED")
    first, second = qmp.execute("query-job-history")
    assert (first["id"], first["type"], first["result"]) == ("m0", "mirror", "cancelled")
    assert "error" not in first
    assert first["created"]["seconds"] <= first["ended"]["seconds"]
    assert (second["id"], second["result"], second["errno"]) == ("m1", "failed", errno.ENOSPC)
    # blkdebug lets the image below fail.
    assert (second["operation"], second["node-name"]) == ("write", "below")
    assert second["offset"] == 0 and second["length"] > 0
    assert second["error"] == "No space left on device"
