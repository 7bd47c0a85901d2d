"""What the documents say of the tree that a program can check."""
import re

from support.program import TOP

CRATES = ("block", "jobs", "devices", "vmm")


def test_the_tests_that_the_page_on_locks_names_exist():
    sources = "".join(path.read_text() for crate in CRATES
                      for path in (TOP / crate / "src").rglob("*.rs"))
    page = (TOP / "docs/locking.md").read_text()
    named = {name for name in re.findall(r"`([a-z0-9_]+)`", page) if name.count("_") >= 4}
    assert len(named) > 50
    assert sorted(name for name in named if f"fn {name}(" not in sources) == []
