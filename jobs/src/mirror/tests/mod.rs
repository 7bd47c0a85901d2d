//! Tests of the whole mirror: a real graph, real iothreads, storages that hold
//! chosen requests.
//!
//! Lives here: the rig. `begin` has what is copied at first, `first_instant` writes around
//! the beginning, `life` starts, ends and refusals, `race` the staged races, `progress`
//! mirrors that do not get on, `failure` failing storages, `hang` storages that hang, `ends`
//! ends and sections beside requests that hang, `regressions` what others got wrong,
//! `replaces` mirrors of filters, `stress` the random runs.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::runtime::{self, EventLoop, Iothread, LocalTask};
use block::test_storage::TestStorage;
use block::{
    AlignedBuffer, Backend, DiscardMode, Graph, IoError, IoVec, Node, NodeOptions, Perm,
    Permissions, WriteFlags, ZeroFlags,
};

use crate::{JobEvent, JobEventKind, JobKey, JobStatus, Jobs, MainJobs};

use super::{MirrorError, MirrorSpec, start_mirror};

mod begin;
mod ends;
mod failure;
mod first_instant;
mod hang;
mod life;
mod progress;
mod race;
mod regressions;
mod replaces;
mod stress;

const KIB: u64 = 1024;
const CHUNK: u64 = 64 * KIB;
/// Size of the disks unless a test says otherwise.
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
}

/// Runs `test` on a main loop of its own, with disks of `size` bytes.
fn with_rig_of<F, Fut>(size: u64, test: F)
where
    F: FnOnce(Rc<Rig>) -> Fut,
    Fut: Future<Output = ()>,
{
    let main = EventLoop::new("main").expect("a main loop");
    main.block_on(async {
        let rig = Rc::new(Rig::new(size));
        within(test(Rc::clone(&rig))).await;
        let left = rig.jobs.cancel_all(LIMIT).await;
        assert!(left.is_empty(), "jobs are left: {left:?}");
    });
}

fn with_rig<F, Fut>(test: F)
where
    F: FnOnce(Rc<Rig>) -> Fut,
    Fut: Future<Output = ()>,
{
    with_rig_of(SIZE, test);
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    let what = std::pin::pin!(what);
    let limit = std::pin::pin!(runtime::sleep(LIMIT));
    match futures_util::future::select(what, limit).await {
        futures_util::future::Either::Left((done, _)) => done,
        futures_util::future::Either::Right(_) => panic!("the test hangs"),
    }
}

/// What a guest device needs: it reads and writes, and nobody else writes.
fn device() -> Permissions {
    Permissions {
        need: Perm::CONSISTENT_READ | Perm::WRITE,
        share: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
    }
}

impl Rig {
    fn new(size: u64) -> Self {
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
        let source = TestStorage::new(size);
        let target = TestStorage::new(size);
        let node = graph
            .add_node(Some("src"), source.driver(), options)
            .expect("source");
        graph
            .add_node(Some("dst"), target.driver(), options)
            .expect("target");
        let disk = graph
            .attach("disk0", &node, device(), None)
            .expect("device");
        let guest = (0..4)
            .map(|n| Iothread::spawn(&format!("guest{n}")).expect("iothread"))
            .collect();
        Self {
            graph,
            jobs,
            source,
            target,
            disk,
            guest,
            events,
        }
    }

    fn node(&self, name: &str) -> Arc<Node> {
        self.graph.find_node(name).expect("a node of that name")
    }

    fn spec(&self) -> MirrorSpec {
        MirrorSpec {
            // Sections in which a test holds something last.
            section_limit: LIMIT,
            ..self.hasty_spec()
        }
    }

    /// With sections as short as they are by default.
    fn hasty_spec(&self) -> MirrorSpec {
        MirrorSpec::new("j0", self.node("src"), self.node("dst"))
    }

    async fn start(&self, spec: MirrorSpec) -> JobKey {
        self.try_start(spec).await.expect("the mirror starts")
    }

    async fn try_start(&self, spec: MirrorSpec) -> Result<JobKey, MirrorError> {
        start_mirror(&self.graph, &self.jobs, spec).await
    }

    /// Starts a mirror and waits until it is ready.
    async fn ready(&self, spec: MirrorSpec) -> JobKey {
        let key = self.start(spec).await;
        self.wait_for(JobStatus::Ready).await;
        key
    }

    fn act(
        &self,
        decide: impl FnOnce(&mut crate::JobsGuard<'_>) -> Result<crate::Effects, crate::JobError>,
    ) {
        self.jobs.act(decide).expect("the verb is accepted");
    }

    /// Waits until `job` j0 has been in this status.
    async fn wait_for(&self, status: JobStatus) {
        self.until(|| self.statuses().contains(&status)).await;
    }

    async fn until(&self, test: impl Fn() -> bool) {
        while !test() {
            runtime::sleep(Duration::from_millis(1)).await;
        }
    }

    fn statuses(&self) -> Vec<JobStatus> {
        self.events
            .borrow()
            .iter()
            .filter_map(|event| match event.kind {
                JobEventKind::StatusChange(status) => Some(status),
                _ => None,
            })
            .collect()
    }

    /// Error text of the end event, if it has come.
    fn completed(&self) -> Option<Option<String>> {
        self.events
            .borrow()
            .iter()
            .find_map(|event| match &event.kind {
                JobEventKind::Completed { error, .. } => Some(error.clone()),
                _ => None,
            })
    }

    fn was_cancelled(&self) -> bool {
        self.events
            .borrow()
            .iter()
            .any(|event| matches!(event.kind, JobEventKind::Cancelled(_)))
    }

    /// Completes the job, and waits until it is gone.
    async fn pivot(&self, key: JobKey) {
        self.act(|jobs| jobs.complete(key));
        self.wait_for(JobStatus::Null).await;
        assert_eq!(self.completed(), Some(None));
    }

    /// A guest request, begun on guest iothread `thread`.
    fn guest<F, Fut>(&self, thread: usize, request: F) -> LocalTask<Result<(), IoError>>
    where
        F: FnOnce(Arc<Backend>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), IoError>> + 'static,
    {
        let (disk, handle) = (Arc::clone(&self.disk), self.guest[thread].handle().clone());
        runtime::spawn_local(async move {
            handle
                .call(move || request(disk))
                .await
                .expect("the iothread lives")
        })
    }

    fn begin_write(&self, offset: u64, len: u64, byte: u8) -> LocalTask<Result<(), IoError>> {
        self.guest(0, move |disk| async move {
            disk.write(offset, filled(len, byte), WriteFlags::default())
                .await
        })
    }

    async fn write(&self, offset: u64, len: u64, byte: u8) {
        self.begin_write(offset, len, byte)
            .await
            .expect("a guest write succeeds");
    }

    async fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) {
        let flags = ZeroFlags {
            may_unmap,
            ..ZeroFlags::default()
        };
        self.guest(1, move |disk| async move {
            disk.write_zeroes(offset, len, flags).await
        })
        .await
        .expect("a guest zero write succeeds");
    }

    /// The guest is on the source, without a filter, and no job holds a node.
    fn assert_on_source(&self) {
        assert_eq!(self.disk.root().name(), "src");
        self.assert_no_traces();
    }

    /// The guest is on the target, without a filter, and no job holds a node.
    fn assert_on_target(&self) {
        assert_eq!(self.disk.root().name(), "dst");
        self.assert_no_traces();
    }

    fn assert_no_traces(&self) {
        let names: Vec<_> = self.graph.nodes().into_iter().map(|n| n.name).collect();
        assert_eq!(names.len(), 2, "nodes are left: {names:?}");
        for name in ["src", "dst"] {
            self.graph
                .check_not_blocked(&self.node(name))
                .expect("no job holds the node");
        }
        assert!(!self.disk.is_drained());
    }

    fn assert_equal(&self) {
        let (source, target) = (self.source.snapshot(), self.target.snapshot());
        if source == target {
            return;
        }
        let at = source.iter().zip(&target).position(|(a, b)| a != b);
        panic!("source and target differ at byte {at:?}");
    }
}

fn filled(len: u64, byte: u8) -> IoVec {
    let len = usize::try_from(len).expect("a small request");
    let iov = AlignedBuffer::new(len).io_vec(len);
    iov.fill(byte);
    iov
}

/// Fills a storage with data that differs from chunk to chunk.
fn scribble(storage: &TestStorage) {
    for sector in 0..storage.size() / 512 {
        let byte = sector.wrapping_mul(167) as u8 | 1;
        storage.poke(sector * 512, &[byte; 512]);
    }
}
