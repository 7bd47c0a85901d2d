"""A QMP library that others wrote drives a mirror from start to finish."""
import asyncio
import contextlib
import os

from qemu.qmp import ExecuteError, QMPClient

MIB = 1024 * 1024


def test_qemu_qmp_drives_a_mirror(program):
    source, target = program.folder / "source.img", program.folder / "target.img"
    source.write_bytes(os.urandom(3 * MIB) + bytes(5 * MIB))
    target.write_bytes(bytes(8 * MIB))
    path = program.folder / "monitor"
    process = program.start("storage-daemon", "--qmp", f"unix:{path}")
    program.connect(path).close()

    async def drive():
        client = QMPClient("test")
        seen = []
        ready, ended = asyncio.Event(), asyncio.Event()

        async def collect(listener):
            async for event in listener:
                if event["event"] == "JOB_STATUS_CHANGE":
                    seen.append(event["data"]["status"])
                elif event["event"] == "BLOCK_JOB_READY":
                    ready.set()
                elif event["event"] == "BLOCK_JOB_COMPLETED":
                    assert "error" not in event["data"]
                if seen and seen[-1] == "null":
                    ended.set()

        await client.connect(str(path))
        with client.listener() as listener:
            task = asyncio.create_task(collect(listener))
            for name, image in (("src", source), ("dst", target)):
                await client.execute("blockdev-add", {
                    "driver": "raw", "node-name": name,
                    "file": {"driver": "file", "filename": str(image)}})
            await client.execute("blockdev-mirror", {
                "job-id": "m", "device": "src", "target": "dst", "sync": "full"})
            await asyncio.wait_for(ready.wait(), 30)
            try:
                await client.execute("blockdev-del", {"node-name": "src"})
                raise AssertionError("a node under a job was deleted")
            except ExecuteError as error:
                assert error.error_class == "GenericError"
            await client.execute("job-complete", {"id": "m"})
            await asyncio.wait_for(ended.wait(), 30)
            task.cancel()
        assert await client.execute("query-jobs") == []
        await client.execute("quit")
        # The library tells of the end of the connection, asked for or not.
        with contextlib.suppress(EOFError):
            await client.disconnect()
        return seen

    assert asyncio.run(drive()) == [
        "created", "running", "ready", "waiting", "pending", "concluded", "null"]
    assert process.wait() == 0, process.errors()
    assert source.read_bytes() == target.read_bytes()
