//! Tests of the whole comparison: a real graph, real iothreads, storages that hold
//! chosen requests.
//!
//! Lives here: the rig, and nodes at rest. `used` has nodes that are written meanwhile,
//! `hang` reads that do not end.

use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use block::runtime::{self, EventLoop, Iothread};
use block::test_storage::{HoldAt, Match, TestStorage};
use block::{
    AlignedBuffer, Backend, Graph, IoOp, IoVec, Node, NodeOptions, Perm, Permissions, WriteFlags,
};

use super::{CompareError, CompareSpec, Comparison, start_compare};
use crate::mirror::{MirrorSpec, start_mirror};
use crate::{JobEvent, JobEventKind, JobKey, JobOutcome, JobStatus, Jobs, MainJobs, OnError};

mod hang;
mod since;
mod used;

const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;
/// A hang is a failure.
const LIMIT: Duration = Duration::from_secs(60);

struct Rig {
    graph: Rc<Graph>,
    jobs: MainJobs,
    source: TestStorage,
    target: TestStorage,
    guest: Iothread,
    disk: Arc<Backend>,
    events: Rc<RefCell<Vec<JobEvent>>>,
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    let what = std::pin::pin!(what);
    let limit = std::pin::pin!(runtime::sleep(LIMIT));
    match futures_util::future::select(what, limit).await {
        futures_util::future::Either::Left((done, _)) => done,
        futures_util::future::Either::Right(_) => panic!("the test hangs"),
    }
}

fn with_sizes<F, Fut>(source: u64, target: u64, test: F)
where
    F: FnOnce(Rc<Rig>) -> Fut,
    Fut: Future<Output = ()>,
{
    let main = EventLoop::new("main").expect("a main loop");
    main.block_on(async {
        let rig = Rc::new(Rig::new(source, target));
        within(test(Rc::clone(&rig))).await;
        rig.source.stop_holding();
        rig.target.stop_holding();
        rig.source.release_all();
        rig.target.release_all();
        let left = rig.jobs.cancel_all(LIMIT).await;
        assert!(left.is_empty(), "jobs are left: {left:?}");
    });
}

fn with_rig<F, Fut>(test: F)
where
    F: FnOnce(Rc<Rig>) -> Fut,
    Fut: Future<Output = ()>,
{
    with_sizes(SIZE, SIZE, test);
}

fn filled(len: u64, byte: u8) -> IoVec {
    let len = len as usize;
    let iov = AlignedBuffer::new(len).io_vec(len);
    iov.fill(byte);
    iov
}

fn one(range: Range<u64>) -> Vec<Range<u64>> {
    Vec::from([range])
}

/// Fills both storages with the same data.
fn scribble(rig: &Rig, range: Range<u64>) {
    for sector in range.start / 512..range.end / 512 {
        let byte = sector.wrapping_mul(167) as u8 | 1;
        rig.source.poke(sector * 512, &[byte; 512]);
        rig.target.poke(sector * 512, &[byte; 512]);
    }
}

impl Rig {
    fn new(source_size: u64, target_size: u64) -> Self {
        let graph = Graph::new();
        let events: Rc<RefCell<Vec<JobEvent>>> = Rc::default();
        let sink = Rc::clone(&events);
        let jobs = Jobs::new(graph.handle()).attach_main(Rc::clone(&graph), move |event| {
            sink.borrow_mut().push(event);
        });
        let source = TestStorage::new(source_size);
        let target = TestStorage::new(target_size);
        let options = NodeOptions::default();
        let node = graph
            .add_node(Some("src"), source.driver(), options)
            .expect("source");
        graph
            .add_node(Some("dst"), target.driver(), options)
            .expect("target");
        let device = Permissions {
            need: Perm::CONSISTENT_READ | Perm::WRITE,
            share: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        };
        let disk = graph.attach("disk0", &node, device, None).expect("device");
        Self {
            graph,
            jobs,
            source,
            target,
            guest: Iothread::spawn("guest").expect("iothread"),
            disk,
            events,
        }
    }

    fn node(&self, name: &str) -> Arc<Node> {
        self.graph.find(name).expect("a node of that name")
    }

    fn spec(&self) -> CompareSpec {
        CompareSpec {
            auto_dismiss: false,
            ..CompareSpec::new("c0", self.node("disk0"), self.node("dst"))
        }
    }

    fn start(&self, spec: CompareSpec) -> JobKey {
        start_compare(&self.graph, &self.jobs, spec).expect("the comparison starts")
    }

    /// Runs a comparison to its end, and gives what it found.
    async fn compare(&self) -> Comparison {
        self.start(self.spec());
        self.concluded().await;
        assert_eq!(self.error(), None);
        self.found()
    }

    async fn concluded(&self) {
        self.until(|| self.status() == Some(JobStatus::Concluded))
            .await;
        let blocked = self.graph.check_not_blocked(&self.node("src"));
        let reason = blocked.err().map(|error| error.to_string());
        assert!(
            !reason.is_some_and(|reason| reason.contains("compare")),
            "the job holds the source"
        );
        assert!(!self.disk.is_drained());
    }

    fn status(&self) -> Option<JobStatus> {
        let jobs = self.jobs.query();
        let job = jobs.iter().find(|job| job.id.as_str() == "c0");
        job.map(|job| job.status)
    }

    fn error(&self) -> Option<String> {
        let jobs = self.jobs.query();
        let job = jobs.iter().find(|job| job.id.as_str() == "c0")?;
        job.error.clone()
    }

    fn found(&self) -> Comparison {
        let jobs = self.jobs.query();
        let job = jobs.iter().find(|job| job.id.as_str() == "c0");
        job.and_then(|job| job.comparison.clone())
            .expect("a comparison that is listed")
    }

    async fn until(&self, test: impl Fn() -> bool) {
        while !test() {
            runtime::sleep(Duration::from_millis(1)).await;
        }
    }

    fn begin_write(&self, offset: u64, len: u64, byte: u8) -> runtime::LocalTask<()> {
        let (disk, handle) = (Arc::clone(&self.disk), self.guest.handle().clone());
        runtime::spawn_local(async move {
            handle
                .call(move || async move {
                    disk.write(offset, filled(len, byte), WriteFlags::default())
                        .await
                })
                .await
                .expect("the iothread lives")
                .expect("a guest write succeeds");
        })
    }

    /// Starts a mirror, and waits until it is ready.
    async fn mirror(&self) -> JobKey {
        let spec = MirrorSpec::new("m0", self.node("src"), self.node("dst"));
        let key = start_mirror(&self.graph, &self.jobs, spec)
            .await
            .expect("the mirror starts");
        self.until(|| {
            let events = self.events.borrow();
            events.iter().any(|event| {
                event.id.as_str() == "m0"
                    && event.kind == JobEventKind::StatusChange(JobStatus::Ready)
            })
        })
        .await;
        key
    }

    fn source_was_read_at(&self, offset: u64) -> bool {
        let ended = self.source.ended();
        let mut reads = ended.iter().filter(|it| it.op == IoOp::Read);
        reads.any(|it| it.offset <= offset && offset < it.offset + it.len)
    }

    fn target_reads_at(&self, offset: u64) -> usize {
        let ended = self.target.ended();
        let reads = ended
            .iter()
            .filter(|it| it.op == IoOp::Read && it.offset <= offset && offset < it.offset + it.len);
        reads.count()
    }
}

#[test]
fn equal_nodes_have_no_differences_however_they_are_allocated() {
    with_rig(|rig| async move {
        scribble(&rig, 0..MIB);
        // Zeroes as data on one side, a hole on the other.
        rig.target.poke(2 * MIB, &vec![0; MIB as usize]);
        let found = rig.compare().await;
        assert_eq!((found.differences, found.undecided_bytes), (0, 0));
        assert!(found.is_complete && found.first.is_none());
        let read = |op| rig.source.ended().iter().filter(|it| it.op == op).count();
        assert!(read(IoOp::Read) > 0);
        let past = rig.source.ended();
        let past = past.iter().filter(|it| it.op == IoOp::Read);
        assert!(past.clone().all(|it| it.offset < MIB), "holes are not read");
    });
}

#[test]
fn differences_are_told_to_the_sector_and_neighbours_are_one() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target.poke(0, &[0]);
        // Across two requests.
        rig.target.poke(512 * KIB - 1024, &vec![0; 2048]);
        // Across two batches would need a larger disk; the last sector.
        rig.source.poke(SIZE - 1, &[0]);
        let found = rig.compare().await;
        assert_eq!((found.differences, found.first), (3, Some(0)));
        assert_eq!(
            found.ranges,
            [0..512, 512 * KIB - 1024..512 * KIB + 1024, SIZE - 512..SIZE]
        );
        assert_eq!(found.differing_bytes, 512 + 2048 + 512);
        let history = rig.jobs.history();
        let last = history.last().expect("a job has ended");
        assert_eq!(last.outcome, JobOutcome::Completed);
        assert_eq!(last.comparison.as_ref(), Some(&found));
    });
}

#[test]
fn nodes_that_differ_everywhere_differ_in_one_range() {
    with_sizes(48 * MIB, 48 * MIB, |rig| async move {
        rig.source.poke(0, &vec![1; 48 * MIB as usize]);
        let found = rig.compare().await;
        assert_eq!(found.ranges, one(0..48 * MIB));
        assert_eq!(found.differing_bytes, 48 * MIB);
    });
}

#[test]
fn what_a_smaller_node_lacks_counts_as_zeroes() {
    with_sizes(MIB, 2 * MIB + 512, |rig| async move {
        scribble(&rig, 0..MIB);
        rig.target.poke(MIB, &vec![0; 65536]);
        assert_eq!(rig.compare().await.differences, 0);
    });
    with_sizes(2 * MIB + 512, MIB, |rig| async move {
        scribble(&rig, 0..MIB);
        rig.source.poke(2 * MIB + 511, &[1]);
        let found = rig.compare().await;
        assert_eq!(found.ranges, one(2 * MIB..2 * MIB + 512));
    });
}

#[test]
fn empty_nodes_are_equal() {
    with_sizes(0, 0, |rig| async move {
        assert!(rig.compare().await.is_complete);
    });
}

#[test]
fn a_failed_read_ends_the_job_unless_the_policy_says_otherwise() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target
            .fail(Match::op(IoOp::Read).range(MIB..MIB + 512), libc::EIO);
        rig.start(rig.spec());
        rig.concluded().await;
        assert_eq!(rig.error().as_deref(), Some("Input/output error"));
        let history = rig.jobs.history();
        let JobOutcome::Failed(failure) = &history.last().expect("an end").outcome else {
            panic!("it has failed");
        };
        let request = failure.request.as_ref().expect("a request failed");
        assert_eq!(failure.errno, libc::EIO);
        assert!(request.offset <= MIB && MIB < request.offset + request.len);
        assert!(!rig.found().is_complete);
    });
}

#[test]
fn a_read_error_that_is_ignored_leaves_its_range_undecided() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target.poke(3 * MIB, &[0]);
        rig.source
            .fail(Match::op(IoOp::Read).range(MIB..MIB + 512), libc::EIO);
        rig.start(CompareSpec {
            on_source_error: OnError::Ignore,
            ..rig.spec()
        });
        rig.concluded().await;
        let found = rig.found();
        assert!(found.is_complete && found.undecided_bytes > 0);
        assert_eq!(found.ranges, one(3 * MIB..3 * MIB + 512));
        let error = rig.error().expect("nobody is to take them for compared");
        assert!(error.contains("could not be compared"), "{error}");
    });
}

#[test]
fn a_read_error_that_stops_the_job_is_read_again_when_it_is_resumed() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.source
            .fail(Match::op(IoOp::Read).range(MIB..MIB + 512), libc::EIO);
        let key = rig.start(CompareSpec {
            on_source_error: OnError::Stop,
            ..rig.spec()
        });
        rig.until(|| rig.status() == Some(JobStatus::Paused)).await;
        rig.source.stop_failing();
        rig.jobs.act(|jobs| jobs.resume(key)).expect("it is paused");
        rig.concluded().await;
        assert_eq!(rig.error(), None);
        assert_eq!(rig.found().differences, 0);
    });
}

#[test]
fn a_paused_comparison_reads_nothing_and_goes_on_where_it_was() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target.hold(Match::op(IoOp::Read));
        let key = rig.start(rig.spec());
        rig.until(|| rig.target.held() > 0).await;
        rig.jobs.act(|jobs| jobs.pause(key)).expect("pause");
        rig.target.stop_holding();
        rig.target.release_all();
        rig.until(|| rig.status() == Some(JobStatus::Paused)).await;
        assert_eq!(rig.source.in_flight() + rig.target.in_flight(), 0);
        rig.target.poke(SIZE - 512, &[0]);
        rig.jobs.act(|jobs| jobs.resume(key)).expect("resume");
        rig.concluded().await;
        assert_eq!(rig.found().differences, 1);
    });
}

#[test]
fn a_refused_comparison_leaves_nothing_behind() {
    with_rig(|rig| async move {
        let refused = |spec| start_compare(&rig.graph, &rig.jobs, spec).expect_err("refused");
        let spec = CompareSpec {
            target: rig.node("src"),
            ..rig.spec()
        };
        assert!(matches!(refused(spec), CompareError::SameNode(_)));
        let spec = CompareSpec {
            max_differences: u32::MAX,
            ..rig.spec()
        };
        assert!(matches!(refused(spec), CompareError::MaxDifferences));
        let spec = CompareSpec {
            speed: -1,
            ..rig.spec()
        };
        assert!(matches!(refused(spec), CompareError::Job(_)));
        let spec = CompareSpec {
            job_id: String::new(),
            ..rig.spec()
        };
        assert!(matches!(refused(spec), CompareError::Job(_)));

        scribble(&rig, 0..SIZE);
        rig.target.poke(0, &[0]);
        rig.target.hold(Match::op(IoOp::Write));
        let spec = MirrorSpec::new("m0", rig.node("src"), rig.node("dst"));
        let mirror = start_mirror(&rig.graph, &rig.jobs, spec).await;
        mirror.expect("the mirror starts");
        assert!(matches!(refused(rig.spec()), CompareError::NotReady(..)));
        rig.target.stop_holding();
        rig.target.release_all();
        assert_eq!(rig.jobs.query().len(), 1);
    });
}
