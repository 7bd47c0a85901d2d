//! Fleecing: what guests are about to change is saved in a scratch file, and the job copies
//! from there.

use block::test_storage::{HoldAt, Match};
use block::{
    BlockdevOptions, BlockdevRef, CbwPolicy, CopyBeforeWriteOptions, DriverOptions, IoOp,
    NewBitmap, OnCbwError, SnapshotAccessOptions,
};

use crate::OnError;
use crate::backup::{BackupSync, BitmapMode, FleecingInfo, prepare_backup};

use super::*;

/// A rig with a scratch storage, as the node `scratch`.
struct Fleecing {
    rig: Rc<Rig>,
    scratch: TestStorage,
}

impl std::ops::Deref for Fleecing {
    type Target = Rig;

    fn deref(&self) -> &Rig {
        &self.rig
    }
}

impl Fleecing {
    fn new(rig: Rc<Rig>) -> Self {
        let scratch = TestStorage::new(SIZE);
        let options = NodeOptions {
            discard: DiscardMode::Unmap,
            ..NodeOptions::default()
        };
        rig.graph
            .add_node(Some("scratch"), scratch.driver(), options)
            .expect("scratch");
        Self { rig, scratch }
    }

    fn spec(&self) -> BackupSpec {
        BackupSpec {
            scratch: Some(self.node("scratch")),
            policy: CbwPolicy {
                on_error: OnCbwError::BreakSnapshot,
                timeout: None,
            },
            ..self.rig.spec()
        }
    }

    fn info(&self) -> FleecingInfo {
        let jobs = self.jobs.query();
        let info = jobs.first().and_then(|job| job.fleecing);
        info.expect("a job that fleeces")
    }

    async fn assert_gone(&self) {
        self.until(|| self.graph.nodes().len() == 3).await;
        assert_eq!(self.disk.root().name(), "src");
        for name in ["src", "dst", "scratch"] {
            let node = self.node(name);
            self.graph
                .check_not_blocked(&node)
                .expect("nobody holds it");
        }
        assert!(!self.disk.is_drained());
    }

    fn assert_target_is_instant(&self) {
        let target = self.target.snapshot();
        let at = self.instant.iter().zip(&target).position(|(a, b)| a != b);
        assert_eq!(at, None, "the target differs from the instant");
    }
}

fn with_fleecing<F, Fut>(test: F)
where
    F: FnOnce(Rc<Fleecing>) -> Fut,
    Fut: Future<Output = ()>,
{
    with_rig(|rig| test(Rc::new(Fleecing::new(rig))));
}

#[test]
fn a_guest_waits_for_the_scratch_file_and_never_for_the_target() {
    with_fleecing(|rig| async move {
        rig.target.hold(Match::any());
        let mut spec = rig.spec();
        spec.auto_dismiss = false;
        let key = rig.start(spec).await;
        rig.target.wait_held(1).await;
        for (offset, byte) in [(0, 7), (SIZE - CLUSTER, 8), (CLUSTER + 512, 9)] {
            rig.write(offset, 4096, byte).await;
            assert_eq!(rig.source.peek(offset, 1), [byte]);
        }
        let info = rig.info();
        assert!(info.scratch_bytes >= 3 * 4096, "{info:?}");
        assert!(info.stalls.count >= 3, "{info:?}");
        assert!(info.stalls.longest <= info.stalls.total, "{info:?}");
        rig.target.release_all();
        rig.wait_for(JobStatus::Concluded).await;
        let info = rig.info();
        assert_eq!(info.scratch_bytes, 0);
        assert!(info.most_scratch_bytes >= 3 * 4096, "{info:?}");
        rig.act(|jobs| jobs.dismiss(key));
        assert_eq!(rig.end().await, None);
        rig.assert_target_is_instant();
        rig.assert_gone().await;
        // Nothing that was saved is left.
        assert!(rig.scratch.snapshot().iter().all(|byte| *byte == 0));
    });
}

#[test]
fn a_small_write_saves_no_more_than_it_must() {
    with_fleecing(|rig| async move {
        rig.target.hold(Match::any());
        let mut spec = rig.spec();
        // The clusters of the target are another matter.
        spec.perf.min_cluster_size = 1 << 20;
        let key = rig.start(spec).await;
        rig.target.wait_held(1).await;
        rig.write(SIZE - 4096, 512, 7).await;
        assert_eq!(rig.info().scratch_bytes, 4096);
        rig.act(|jobs| jobs.cancel(key, true));
        rig.target.release_all();
        rig.wait_for(JobStatus::Null).await;
        rig.assert_gone().await;
    });
}

#[test]
fn the_target_holds_one_instant_whatever_four_threads_write() {
    for seed in 0..8u64 {
        with_fleecing(|rig| async move {
            let mut random = seed * 2 + 1;
            let mut next = move |bound: u64| {
                random = random
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (random >> 33) % bound
            };
            rig.start(rig.spec()).await;
            let mut writes = std::collections::VecDeque::new();
            for n in 0..400 {
                let len = 512 << next(5);
                let offset = next((SIZE - len) / 512) * 512;
                let thread = next(4) as usize;
                writes.push_back(rig.begin_write_on(thread, offset, len, n as u8));
                if writes.len() >= 16
                    && let Some(write) = writes.pop_front()
                {
                    write.await.expect("a guest write succeeds");
                }
            }
            for write in writes {
                write.await.expect("a guest write succeeds");
            }
            assert_eq!(rig.end().await, None);
            rig.assert_target_is_instant();
            rig.assert_gone().await;
            assert!(rig.scratch.snapshot().iter().all(|byte| *byte == 0));
        });
    }
}

#[test]
fn a_copy_that_ends_when_nobody_needs_it_any_more_does_not_stay() {
    with_fleecing(|rig| async move {
        // The body has what it reads of the first cluster; the guest's request is held on
        // its way to the scratch file meanwhile.
        rig.target
            .hold_at(Match::op(IoOp::Write).range(0..4096), HoldAt::Start);
        rig.start(rig.spec()).await;
        rig.target.wait_held(1).await;
        rig.scratch.hold(Match::op(IoOp::Write));
        let write = rig.begin_write(0, 4096, 7);
        rig.scratch.wait_held(1).await;
        rig.target.release_all();
        // The job ends without it: it waits for nothing but the graph.
        rig.until(|| rig.info_is_empty()).await;
        rig.scratch.release_all();
        write.await.expect("the write");
        assert_eq!(rig.end().await, None);
        rig.assert_target_is_instant();
        rig.assert_gone().await;
        rig.until(|| rig.scratch.snapshot().iter().all(|byte| *byte == 0))
            .await;
    });
}

impl Fleecing {
    fn info_is_empty(&self) -> bool {
        let jobs = self.jobs.query();
        let Some(job) = jobs.first() else { return true };
        job.current_progress == job.total_progress
    }
}

#[test]
fn what_cannot_be_saved_ends_the_job_and_not_the_guest() {
    for hangs in [false, true] {
        with_fleecing(|rig| async move {
            let mut spec = rig.spec();
            spec.policy.timeout = Some(Duration::from_millis(10));
            // Whatever the policy: it would fail for ever.
            spec.on_source_error = OnError::Ignore;
            spec.speed = 1;
            if hangs {
                rig.scratch.hold(Match::op(IoOp::Write));
            } else {
                rig.scratch.fail(Match::op(IoOp::Write), libc::ENOSPC);
            }
            rig.start(spec).await;
            rig.write(SIZE - 4096, 4096, 7).await;
            assert_eq!(rig.source.peek(SIZE - 4096, 1), [7]);
            rig.scratch.release_all();
            let error = rig.end().await.expect("it fails");
            assert!(error.starts_with("The snapshot is broken"), "{error}");
            rig.assert_gone().await;
        });
    }
}

#[test]
fn a_cancelled_or_failed_one_leaves_nothing_behind() {
    with_fleecing(|rig| async move {
        rig.target.hold(Match::op(IoOp::Write));
        let key = rig.start(rig.spec()).await;
        rig.target.wait_held(1).await;
        rig.write(SIZE - 4096, 4096, 7).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.target.release_all();
        rig.wait_for(JobStatus::Null).await;
        rig.assert_gone().await;
    });
    with_fleecing(|rig| async move {
        rig.target.fail(Match::op(IoOp::Write), libc::EIO);
        rig.start(rig.spec()).await;
        assert!(rig.end().await.is_some());
        rig.assert_gone().await;
        rig.write(0, 4096, 7).await;
    });
}

#[test]
fn one_that_was_prepared_can_be_taken_back() {
    with_fleecing(|rig| async move {
        let drained = rig.graph.drain(&rig.node("src"), &[]).await.unwrap();
        let prepared = prepare_backup(&rig.graph, &rig.jobs, rig.spec(), &drained).unwrap();
        assert_eq!(rig.graph.nodes().len(), 5);
        prepared.take_back(&drained);
        drop(drained);
        rig.write(0, 4096, 7).await;
        rig.wait_for(JobStatus::Null).await;
        rig.assert_gone().await;
    });
}

#[test]
fn a_bitmap_says_what_is_saved_and_is_given_back_after_a_failure() {
    with_fleecing(|rig| async move {
        let new = NewBitmap {
            name: "b",
            granularity: Some(CLUSTER as u32),
            enabled: true,
            persistent: false,
        };
        rig.node("src").add_bitmap(&new).expect("a bitmap");
        rig.write(CLUSTER, 4096, 7).await;
        let before = rig.source.snapshot();
        let spec = || BackupSpec {
            sync: BackupSync::Incremental,
            bitmap: Some("b".to_owned()),
            bitmap_mode: Some(BitmapMode::OnSuccess),
            ..rig.spec()
        };
        let bits = || {
            rig.node("src")
                .named_bitmap("b")
                .expect("b")
                .bits()
                .count_bytes()
        };
        rig.target.fail_once(Match::op(IoOp::Write), libc::EIO);
        rig.start(spec()).await;
        // Not part of the backup, so nothing is saved of it.
        rig.write(8 * CLUSTER, 4096, 9).await;
        assert!(rig.scratch.ended().iter().all(|it| it.op != IoOp::Write));
        assert!(rig.end().await.is_some());
        assert_eq!(
            bits(),
            2 * CLUSTER,
            "what it had, and what was written since"
        );
        rig.assert_gone().await;

        rig.events.borrow_mut().clear();
        rig.start(spec()).await;
        assert_eq!(rig.end().await, None);
        assert_eq!(bits(), 0);
        let range = CLUSTER as usize..2 * CLUSTER as usize;
        assert_eq!(rig.target.snapshot()[range.clone()], before[range]);
        rig.assert_gone().await;
    });
}

#[test]
fn what_fleecing_does_not_go_with_is_refused() {
    with_fleecing(|rig| async move {
        let mut spec = rig.spec();
        spec.sync = BackupSync::None;
        let error = rig.try_start(spec).await.unwrap_err().to_string();
        assert!(error.starts_with("Fleecing does not go with sync mode 'none'"));
        let mut spec = rig.spec();
        spec.discard_source = true;
        let error = rig.try_start(spec).await.unwrap_err().to_string();
        assert_eq!(error, "Fleecing does not go with 'discard-source'");
        rig.assert_gone().await;
    });
}

/// Fleecing as users build it: a second job that reads the snapshot of a filter.
#[test]
fn a_snapshot_of_somebody_elses_that_is_broken_is_not_read_again_and_again() {
    with_fleecing(|rig| async move {
        let policy = CbwPolicy {
            on_error: OnCbwError::BreakSnapshot,
            timeout: None,
        };
        let add = |name: &str, driver| {
            let options = BlockdevOptions {
                node_name: Some(name.to_owned()),
                ..BlockdevOptions::new(driver)
            };
            let graph = Rc::clone(&rig.graph);
            async move { graph.blockdev_add(options).await.expect("a node") }
        };
        let named = |name: &str| BlockdevRef::Name(name.to_owned());
        rig.graph.detach(&rig.disk);
        let filter = CopyBeforeWriteOptions {
            file: named("src"),
            target: named("scratch"),
            bitmap: None,
            policy,
        };
        let filter = add("cbw", DriverOptions::CopyBeforeWrite(filter)).await;
        let access = SnapshotAccessOptions { file: named("cbw") };
        let access = add("access", DriverOptions::SnapshotAccess(access)).await;
        let disk = rig.graph.attach("disk1", &filter, device(), None).unwrap();
        rig.target.hold(Match::op(IoOp::Write));
        let spec = BackupSpec {
            source: access,
            on_source_error: OnError::Ignore,
            ..rig.rig.spec()
        };
        rig.start(spec).await;
        rig.target.wait_held(1).await;
        rig.scratch.fail(Match::any(), libc::EIO);
        let write = disk.write(SIZE - 4096, filled(4096, 7), WriteFlags::default());
        write.await.expect("the guest goes on");
        rig.target.release_all();
        assert!(rig.end().await.is_some());
        assert_eq!(rig.errors(), 1, "it is asked once, and not retried");
        rig.graph.detach(&disk);
    });
}
