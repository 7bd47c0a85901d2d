//! Tests of the whole backup: a real graph, real iothreads, storages that hold chosen
//! requests.
//!
//! Lives here: the rig. `behind` has copies that guests do not wait for, `bitmaps` what
//! becomes of a bitmap, `fleecing` what a scratch file changes, `hang` storages that do not
//! answer, `life` starts, ends and failures, `race` what the guest does meanwhile, `runs` short
//! runs between files, `sections` drained sections of others.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::runtime::{self, EventLoop, Iothread, LocalTask};
use block::test_storage::TestStorage;
use block::{
    AlignedBuffer, Backend, DiscardMode, Graph, IoError, IoVec, Node, NodeOptions, Perm,
    Permissions, WriteFlags,
};

use crate::{
    Effects, JobError, JobEvent, JobEventKind, JobKey, JobStatus, Jobs, JobsGuard, MainJobs,
};

use super::{BackupError, BackupSpec, start_backup};

mod behind;
mod bitmaps;
mod fleecing;
mod hang;
mod life;
mod race;
mod runs;
mod sections;

const KIB: u64 = 1024;
const CLUSTER: u64 = 64 * KIB;
const SIZE: u64 = 4 << 20;
/// A hang is a failure.
const LIMIT: Duration = Duration::from_secs(60);

/// A guest's disk, a target, and the jobs.
struct Rig {
    graph: Rc<Graph>,
    jobs: MainJobs,
    source: TestStorage,
    target: TestStorage,
    disk: Arc<Backend>,
    guest: Vec<Iothread>,
    events: Rc<RefCell<Vec<JobEvent>>>,
    /// What the source held when the rig was made.
    instant: Vec<u8>,
    /// What [`Rig::node_users`] said when the rig was made.
    node_users_before: [usize; 2],
}

fn with_rig<F, Fut>(test: F)
where
    F: FnOnce(Rc<Rig>) -> Fut,
    Fut: Future<Output = ()>,
{
    let main = EventLoop::new("main").expect("a main loop");
    main.block_on(async {
        let rig = Rc::new(Rig::new());
        let limit = std::pin::pin!(runtime::sleep(LIMIT));
        let test = std::pin::pin!(test(Rc::clone(&rig)));
        match futures_util::future::select(test, limit).await {
            futures_util::future::Either::Left(_) => {}
            futures_util::future::Either::Right(_) => panic!("the test hangs"),
        }
        let left = rig.jobs.cancel_all(LIMIT).await;
        assert!(left.is_empty(), "jobs are left: {left:?}");
        // Nodes that a test added itself use them as well.
        let let_go = || rig.graph.nodes().len() != 2 || rig.node_users() == rig.node_users_before;
        let let_go = std::pin::pin!(rig.until(let_go));
        let limit = std::pin::pin!(runtime::sleep(LIMIT));
        match futures_util::future::select(let_go, limit).await {
            futures_util::future::Either::Left(_) => {}
            futures_util::future::Either::Right(_) => panic!(
                "nodes have {:?} users, before {:?}",
                rig.node_users(),
                rig.node_users_before
            ),
        }
    });
}

/// What a guest device needs: it reads and writes, and nobody else writes.
fn device() -> Permissions {
    Permissions {
        need: Perm::CONSISTENT_READ | Perm::WRITE,
        share: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
    }
}

impl Rig {
    fn new() -> Self {
        let graph = Graph::new();
        let events: Rc<RefCell<Vec<JobEvent>>> = Rc::default();
        let sink = Rc::clone(&events);
        let jobs = Jobs::new(graph.handle()).attach_main(Rc::clone(&graph), move |event| {
            sink.borrow_mut().push(event);
        });
        let options = NodeOptions {
            discard: DiscardMode::Unmap,
            ..NodeOptions::default()
        };
        let (source, target) = (TestStorage::new(SIZE), TestStorage::new(SIZE));
        // Data that differs from sector to sector, and a hole.
        for sector in (0..SIZE / 512).filter(|sector| !(1024..1536).contains(sector)) {
            source.poke(sector * 512, &[sector.wrapping_mul(167) as u8 | 1; 512]);
        }
        let node = graph.add_node(Some("src"), source.driver(), options);
        let node = node.expect("source");
        graph
            .add_node(Some("dst"), target.driver(), options)
            .expect("target");
        let disk = graph.attach("disk0", &node, device(), None);
        drop(node);
        let guest = (0..4).map(|n| Iothread::spawn(&format!("guest{n}")).expect("iothread"));
        let mut rig = Self {
            instant: source.snapshot(),
            node_users_before: [0; 2],
            jobs,
            source,
            target,
            disk: disk.expect("device"),
            guest: guest.collect(),
            events,
            graph,
        };
        rig.node_users_before = rig.node_users();
        rig
    }

    /// How many references there are to each of the two nodes.
    fn node_users(&self) -> [usize; 2] {
        ["src", "dst"].map(|name| Arc::strong_count(&self.node(name)))
    }

    fn node(&self, name: &str) -> Arc<Node> {
        self.graph.find_node(name).expect("a node of that name")
    }

    fn spec(&self) -> BackupSpec {
        BackupSpec::new("j0", self.node("src"), self.node("dst"))
    }

    async fn start(&self, spec: BackupSpec) -> JobKey {
        self.try_start(spec).await.expect("the backup starts")
    }

    async fn try_start(&self, spec: BackupSpec) -> Result<JobKey, BackupError> {
        start_backup(&self.graph, &self.jobs, spec).await
    }

    fn act(&self, decide: impl FnOnce(&mut JobsGuard<'_>) -> Result<Effects, JobError>) {
        self.jobs.act(decide).expect("the verb is accepted");
    }

    /// Waits until job j0 has been in this status.
    async fn wait_for(&self, status: JobStatus) {
        self.until(|| self.statuses().contains(&status)).await;
    }

    async fn until(&self, test: impl Fn() -> bool) {
        while !test() {
            runtime::sleep(Duration::from_millis(1)).await;
        }
    }

    fn statuses(&self) -> Vec<JobStatus> {
        let events = self.events.borrow();
        let statuses = events.iter().filter_map(|event| match event.kind {
            JobEventKind::StatusChange(status) => Some(status),
            _ => None,
        });
        statuses.collect()
    }

    /// Waits for the end, and gives the error of the end event: `None` after a success.
    async fn end(&self) -> Option<String> {
        self.wait_for(JobStatus::Null).await;
        let events = self.events.borrow();
        let end = events.iter().find_map(|event| match &event.kind {
            JobEventKind::Completed { error, .. } => Some(error.clone()),
            _ => None,
        });
        end.expect("an end that is no cancel")
    }

    /// How many requests of the job were told to have failed.
    fn errors(&self) -> usize {
        let events = self.events.borrow();
        let is_error = |event: &&JobEvent| matches!(event.kind, JobEventKind::Error { .. });
        events.iter().filter(is_error).count()
    }

    /// A guest write, begun on guest iothread `thread`.
    fn begin_write_on(
        &self,
        thread: usize,
        offset: u64,
        len: u64,
        byte: u8,
    ) -> LocalTask<Result<(), IoError>> {
        let (disk, handle) = (Arc::clone(&self.disk), self.guest[thread].handle().clone());
        runtime::spawn_local(async move {
            let write = move || async move {
                disk.write(offset, filled(len, byte), WriteFlags::default())
                    .await
            };
            handle.call(write).await.expect("the iothread lives")
        })
    }

    fn begin_write(&self, offset: u64, len: u64, byte: u8) -> LocalTask<Result<(), IoError>> {
        self.begin_write_on(0, offset, len, byte)
    }

    async fn write(&self, offset: u64, len: u64, byte: u8) {
        let written = self.begin_write(offset, len, byte).await;
        written.expect("a guest write succeeds");
    }

    /// The target holds the instant of the start, and the job has left nothing behind.
    fn assert_instant(&self) {
        let target = self.target.snapshot();
        let at = self.instant.iter().zip(&target).position(|(a, b)| a != b);
        assert_eq!(at, None, "the target differs from the instant");
        self.assert_no_traces();
    }

    fn assert_no_traces(&self) {
        let names: Vec<_> = self.graph.nodes().into_iter().map(|n| n.name).collect();
        assert_eq!(names.len(), 2, "nodes are left: {names:?}");
        assert_eq!(self.disk.root().name(), "src");
        for name in ["src", "dst"] {
            let node = self.node(name);
            self.graph
                .check_not_blocked(&node)
                .expect("no job holds it");
        }
        assert!(!self.disk.is_drained());
    }
}

fn filled(len: u64, byte: u8) -> IoVec {
    let len = usize::try_from(len).expect("a small request");
    let iov = AlignedBuffer::new(len).io_vec(len);
    iov.fill(byte);
    iov
}
