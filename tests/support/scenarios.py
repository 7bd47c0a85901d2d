"""Which recorded scenarios diptych can be asked to replay today.

A scenario waits, by name and with the reason, while it uses a command or a
block driver that is not there yet. The commands are asked of the program, so a
new command brings its scenarios to life by itself.
"""
import json
import pathlib

DRIVERS = {"file", "raw", "null-co", "null-aio", "blkdebug", "copy-before-write", "copy-on-read",
           "nbd", "preallocate", "qcow2", "snapshot-access", "throttle"}

# Scenarios that cannot be judged from their commands and drivers.
WAITING = {
    "backup-compress": "compressed clusters in qcow2",
    "bitmap-persistent": "bitmaps that are kept in the qcow2 image itself",
    "protocol-quit": "bitmaps that are kept in the qcow2 image itself",
    "mirror-drive-mirror": "creating qcow2 images",
}


def _drivers(value):
    if isinstance(value, dict):
        driver = value.get("driver")
        if isinstance(driver, str):
            yield driver
        for inner in value.values():
            yield from _drivers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _drivers(inner)


def _refused_drivers(transcript):
    """Drivers that the recording itself says do not exist."""
    for step in transcript["steps"]:
        error = step.get("reply", {}).get("error", {}).get("desc", "")
        yield from (word.strip("'") for word in error.split() if word.startswith("'"))


def _actions(scenario, transcript):
    """Commands that are carried out as actions of transactions."""
    for step, recorded in zip(scenario["steps"], transcript["steps"]):
        if step.get("execute") != "transaction" or "does not accept value" in str(recorded):
            continue
        actions = step.get("arguments", {}).get("actions")
        for action in actions if isinstance(actions, list) else []:
            if action.get("type") not in (None, "abort"):
                yield action["type"]


def waits_for(path, commands):
    """What a scenario needs that is not there yet, sorted; empty if nothing."""
    path = pathlib.Path(path)
    scenario = json.loads(path.read_text())
    transcript = json.loads((path.parent / "transcripts" / path.name).read_text())
    if scenario["name"] in WAITING:
        return [WAITING[scenario["name"]]]
    unknown = {step.get("execute") for step in transcript["steps"]
               if step.get("reply", {}).get("error", {}).get("class") == "CommandNotFound"}
    needed = {step["execute"] for step in scenario["steps"] if "execute" in step}
    needed |= set(_actions(scenario, transcript))
    for step in scenario["steps"]:
        if step.get("execute") == "query-commands":
            needed |= set(step.get("only", {}).get("name", []))
    missing = needed - unknown - set(commands)
    drivers = set(_drivers(scenario["steps"])) - DRIVERS - set(_refused_drivers(transcript))
    return sorted(missing) + [f"driver {name}" for name in sorted(drivers)]
