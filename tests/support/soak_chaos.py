"""Monitors of the soak that send verbs at random."""

MIB = 1 << 20


class Chaos:
    """A person at a monitor who cannot make up their mind."""

    def __init__(self, soak, qmp, chance):
        self.soak, self.qmp, self.chance = soak, qmp, chance

    def run(self):
        verbs = ([self.verb] * 10 + [self.look] * 4 + [self.junk] * 4 + [self.export] * 3
                 + [self.bitmaps] * 2 + [self.limits] + [self.nonsense])
        while not self.soak.ending.wait(self.chance.random() ** 3 * 0.3):
            self.chance.choice(verbs)()

    def job(self):
        names = list(self.soak.events.listed()) * 3
        return self.chance.choice((*names, "job0", "job1m", "junk0", "nobody"))

    def verb(self):
        chance, qmp, job = self.chance, self.qmp, self.job()
        what = chance.choice(
            ["pause", "resume", "resume", "speed", "change", "finalize", "dismiss"] * 5
            + ["complete"] * 2 + ["soft", "force", "block-force"])
        if what in ("pause", "resume"):
            if chance.random() < 0.5:
                qmp.tries(f"job-{what}", id=job)
            else:
                qmp.tries(f"block-job-{what}", device=job)
        elif what in ("finalize", "dismiss"):
            qmp.tries(f"{chance.choice(('job', 'block-job'))}-{what}", id=job)
        elif what == "speed":
            qmp.tries("block-job-set-speed", device=job, speed=chance.choice(
                (0, 0, -1, 1, 65536, MIB, 16 * MIB, (1 << 63) - 1)))
        elif what == "change":
            qmp.tries("block-job-change", id=job, type=chance.choice(("mirror", "mirror", "commit")),
                      copy_mode=chance.choice(("background", "write-blocking", "write-blocking")))
        elif what == "complete":
            if chance.random() < 0.5:
                self.soak.decided(qmp, job, what, "job-complete", id=job)
            else:
                self.soak.decided(qmp, job, what, "block-job-complete", device=job)
        elif what == "soft":
            self.soak.decided(qmp, job, "cancel", "block-job-cancel", device=job)
        elif what == "force":
            qmp.tries("job-cancel", id=job)
        else:
            qmp.tries("block-job-cancel", device=job, force=True)

    def look(self):
        what = self.chance.choice(("query-jobs", "query-block-jobs", "query-block-exports",
                                   "query-named-block-nodes", "query-block", "query-version"))
        rows = self.qmp.execute(what)
        for row in rows if what in ("query-jobs", "query-block-jobs") else ():
            if row.get("current-progress", 0) > row.get("total-progress", 0) or (
                    row.get("offset", 0) > row.get("len", 0)):
                self.soak.complain(f"{what}: done more than all: {row}")

    def junk(self):
        """Nodes and jobs whose data nobody cares for."""
        chance, qmp = self.chance, self.qmp
        one, other = (f"junk-{chance.randrange(4)}" for _ in range(2))
        what = chance.random()
        if what < 0.4:
            qmp.tries("blockdev-add", driver="null-co", node_name=one, size=chance.choice(
                (0, MIB, MIB, MIB + 512)), latency_ns=chance.choice((0, 10**5, 10**7)),
                read_zeroes=chance.choice((True, False)))
        elif what < 0.65:
            qmp.tries("blockdev-del", node_name=one)
        elif what < 0.7:
            qmp.tries("blockdev-backup", device=one, target=other, job_id="junk2",
                      sync=chance.choice(("full", "none", "incremental", "bitmap")),
                      bitmap=chance.choice((None, "junk-a", "junk-b")),
                      bitmap_mode=chance.choice((None, "on-success", "always", "never")))
        elif what < 0.95:
            manual = chance.random() < 0.4
            qmp.tries("blockdev-mirror", device=one, target=other,
                      job_id=f"junk{chance.randrange(2)}{'m' if manual else ''}",
                      auto_finalize=not manual, auto_dismiss=chance.random() < 0.7,
                      sync=chance.choice(("full", "top", "none")),
                      speed=chance.choice((0, 65536, MIB)),
                      copy_mode=chance.choice(("background", "write-blocking")),
                      filter_node_name=chance.choice((None, "junk-filter")))
        else:
            qmp.tries("blockdev-reopen", options=[{
                "driver": "null-co", "node-name": one, "size": MIB,
                "read-only": chance.choice((True, False))}])

    def node(self):
        nodes = [node["node-name"] for node in self.qmp.execute("query-named-block-nodes")]
        return self.chance.choice((*nodes, "nowhere"))

    def export(self):
        chance, name = self.chance, f"x{self.chance.randrange(4)}"
        if chance.random() < 0.5:
            self.qmp.tries("block-export-add", type="nbd", id=name, name=name,
                           node_name=self.node(), writable=chance.random() < 0.2)
        else:
            self.qmp.tries("block-export-del", id=name,
                           mode=chance.choice((None, "safe", "hard")))

    def bitmaps(self):
        """Bitmaps of nodes whose data nobody cares for; and a look at those of the others."""
        chance, qmp = self.chance, self.qmp
        node, name = f"junk-{chance.randrange(4)}", f"junk-{chance.choice('ab')}"
        verb = chance.choice(("add", "add", "remove", "clear", "enable", "disable", "merge"))
        if chance.random() < 0.2:
            node = self.node()
            verb = "enable"
        data = {"node": node, "name": name}
        if verb == "merge":
            data = {"node": node, "target": name, "bitmaps": ["junk-a", "junk-b"]}
        if verb == "add":
            data["granularity"] = chance.choice((512, 65536, 1 << 31))
        if chance.random() < 0.5:
            qmp.tries(f"block-dirty-bitmap-{verb}", **data)
        else:
            qmp.tries("transaction", actions=[
                {"type": f"block-dirty-bitmap-{verb}", "data": data},
                {"type": "abort", "data": {}}][:chance.choice((1, 2))])

    def limits(self):
        self.qmp.tries("qom-set", path=f"/objects/{self.chance.choice(('fast', 'slow'))}",
                       property="limits", value={"bps-total": self.chance.choice(
                           (0, 2 * MIB, 16 * MIB)), "iops-total": self.chance.choice((0, 0, 500))})

    def nonsense(self):
        """What is refused at any time."""
        chance, qmp = self.chance, self.qmp
        what = chance.randrange(5)
        if what == 0:
            verb = chance.choice(("object-add", "object-del"))
            qmp.tries(verb, id="junk", qom_type="throttle-group" if verb[7] == "a" else None)
        elif what == 1:
            node = self.node()
            qmp.tries("blockdev-mirror", device=node, target=node, sync="full", job_id="same")
        elif what == 2:
            qmp.tries("blockdev-add", driver="raw", node_name="lane0", file="nowhere")
            qmp.tries("blockdev-add", driver="null-co", node_name="no name")
        elif what == 3:
            qmp.tries("block-export-add", type="nbd", id="lane0", node_name=self.node())
        else:
            qmp.tries("blockdev-mirror", device=self.node(), target="nowhere", sync="full",
                      job_id=self.job())
