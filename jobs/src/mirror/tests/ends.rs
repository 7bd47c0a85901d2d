//! Ends of mirrors whose own requests hang: they come all the same, and what hangs is the
//! job's until it has ended. And sections of others, which the mirror keeps out of.

use block::IoOp;
use block::test_storage::Match;

use crate::{CopyMode, JobStatus, OnError};

use super::*;

impl Rig {
    fn is_in_use(&self, name: &str) -> bool {
        self.graph.check_not_blocked(&self.node(name)).is_err()
    }

    /// Lets what hangs end: then nobody uses the nodes any more.
    async fn let_it_end(&self) {
        self.target.release_all();
        self.source.release_all();
        self.until(|| !self.is_in_use("src") && !self.is_in_use("dst"))
            .await;
        assert_eq!(self.source.in_flight() + self.target.in_flight(), 0);
        self.assert_on_source();
    }

    /// A section of somebody else on a node, as soon as it is granted.
    fn section(self: &Rc<Self>, name: &str) -> LocalTask<block::Drained> {
        let (graph, node) = (Rc::clone(&self.graph), self.node(name));
        runtime::spawn_local(async move { graph.drain(&node, &[]).await.expect("a section") })
    }

    /// What would be begun by mistake is begun soon.
    async fn wait_a_little(&self) {
        for _ in 0..60 {
            runtime::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[test]
fn a_forced_cancel_ends_a_mirror_whose_requests_hang_and_the_node_stays_in_use() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        for op in [IoOp::Write, IoOp::Flush] {
            with_rig(|rig| async move {
                scribble(&rig.source);
                let mut spec = rig.spec();
                spec.copy_mode = mode;
                rig.target.hold(Match::op(op));
                let key = rig.start(spec).await;
                rig.target.wait_held(1).await;
                rig.act(|jobs| jobs.cancel(key, true));
                rig.wait_for(JobStatus::Null).await;
                assert!(rig.was_cancelled() && rig.target.held() > 0);
                rig.until(|| rig.disk.root().name() == "src").await;
                assert!(rig.is_in_use("dst"), "it may still be written");
                // The source is free: it can be mirrored to somewhere else.
                rig.until(|| !rig.is_in_use("src")).await;
                let other = TestStorage::new(SIZE);
                let node =
                    rig.graph
                        .add_node(Some("other"), other.driver(), NodeOptions::default());
                rig.events.borrow_mut().clear();
                let spec = MirrorSpec::new("j0", rig.node("src"), node.expect("a node"));
                let key = rig.ready(spec).await;
                rig.act(|jobs| jobs.cancel(key, false));
                rig.wait_for(JobStatus::Null).await;
                assert!(rig.source.snapshot() == other.snapshot());
                assert!(rig.target.held() > 0 && rig.is_in_use("dst"));
                let deleted = rig.graph.blockdev_del("other").await;
                deleted.expect("nobody uses it");
                rig.let_it_end().await;
            });
        }
    }
}

#[test]
fn a_forced_cancel_does_not_wait_for_a_source_that_hangs() {
    for op in [IoOp::Read, IoOp::BlockStatus] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            rig.source.hold(Match::op(op));
            let key = rig.start(rig.spec()).await;
            rig.source.wait_held(1).await;
            rig.act(|jobs| jobs.cancel(key, true));
            rig.wait_for(JobStatus::Null).await;
            assert!(rig.was_cancelled() && rig.source.held() > 0);
            assert!(rig.is_in_use("src"), "it is still being read");
            rig.target.forget_ended();
            rig.let_it_end().await;
            let written = rig.target.ended().len();
            assert_eq!(written, 0, "what was left behind begins nothing more");
        });
    }
}

#[test]
fn a_forced_cancel_ends_a_pause_or_a_section_that_waits_for_requests_that_hang() {
    for by_section in [false, true] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            rig.target.hold(Match::op(IoOp::Write));
            let key = rig.start(rig.spec()).await;
            rig.target.wait_held(1).await;
            let section = by_section.then(|| rig.section("dst"));
            if !by_section {
                rig.act(|jobs| jobs.pause(key));
            }
            rig.until(|| rig.jobs.query()[0].paused).await;
            assert!(!rig.statuses().contains(&JobStatus::Paused));
            rig.act(|jobs| jobs.cancel(key, true));
            rig.wait_for(JobStatus::Null).await;
            assert!(rig.was_cancelled() && rig.target.held() > 0);
            if let Some(section) = section {
                assert!(!section.is_finished(), "requests are on their way");
                rig.target.release_all();
                drop(section.await);
            }
            rig.let_it_end().await;
        });
    }
}

#[test]
fn a_failed_mirror_tells_its_error_though_its_other_requests_hang() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target
            .fail(Match::op(IoOp::Write).range(0..CHUNK), libc::EIO);
        rig.target.hold(Match::op(IoOp::Write));
        rig.start(rig.spec()).await;
        // Several requests are on their way before the first fails.
        rig.target.wait_held(2).await;
        assert!(rig.target.release_at(0));
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.target.held() > 0);
        let error = rig.completed().flatten().expect("it fails");
        assert!(error.contains("Input/output error"), "{error}");
        rig.write(SIZE - CHUNK, 4096, 7).await;
        rig.let_it_end().await;
    });
}

#[test]
fn a_mirror_that_stops_for_an_error_parks_when_the_rest_has_ended_and_can_be_cancelled_before() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target
            .fail(Match::op(IoOp::Write).range(0..CHUNK), libc::ENOSPC);
        rig.target.hold(Match::op(IoOp::Write));
        let mut spec = rig.spec();
        spec.on_target_error = OnError::Stop;
        let key = rig.start(spec).await;
        // Several requests are on their way before the first fails.
        rig.target.wait_held(2).await;
        assert!(rig.target.release_at(0));
        rig.until(|| rig.jobs.query()[0].paused).await;
        rig.target.wait_held(1).await;
        assert!(!rig.statuses().contains(&JobStatus::Paused));
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.was_cancelled());
        rig.let_it_end().await;
    });
}

#[test]
fn a_deadline_ends_a_mirror_whose_requests_hang() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target.hold(Match::op(IoOp::Write));
        rig.start(MirrorSpec {
            deadline: Some(Duration::from_millis(50)),
            ..rig.spec()
        })
        .await;
        rig.wait_for(JobStatus::Null).await;
        let error = rig.completed().flatten().expect("it fails");
        assert!(error.contains("bytes are left"), "{error}");
        assert!(rig.target.held() > 0);
        rig.let_it_end().await;
    });
}

/// A mirror with 1 MiB to be copied at its end.
async fn with_much_to_copy(rig: &Rig, auto_finalize: bool) -> JobKey {
    scribble(&rig.source);
    let mut spec = rig.spec();
    spec.auto_finalize = auto_finalize;
    rig.ready(spec).await
}

#[test]
fn a_late_pivot_begins_nothing_in_a_section_of_somebody_else_and_outlasts_it() {
    for name in ["src", "dst"] {
        with_rig(|rig| async move {
            let key = with_much_to_copy(&rig, false).await;
            rig.act(|jobs| jobs.complete(key));
            rig.wait_for(JobStatus::Pending).await;
            rig.write(0, 1024 * KIB, 7).await;
            let section = rig.section(name).await;
            rig.target.forget_ended();
            rig.act(|jobs| jobs.finalize(key));
            rig.wait_a_little().await;
            assert!(rig.target.ended().is_empty(), "in a section on {name}");
            assert_eq!(rig.target.in_flight(), 0);
            drop(section);
            rig.wait_for(JobStatus::Null).await;
            assert_eq!(rig.completed(), Some(None));
            rig.assert_on_target();
            rig.assert_equal();
        });
    }
}

#[test]
fn a_section_of_somebody_else_is_granted_in_the_midst_of_a_mirrors_own() {
    for late in [false, true] {
        with_rig(|rig| async move {
            let key = with_much_to_copy(&rig, !late).await;
            if late {
                rig.act(|jobs| jobs.complete(key));
                rig.wait_for(JobStatus::Pending).await;
            }
            if !late {
                // So that what is written is copied in the section, and not before.
                rig.act(|jobs| jobs.pause(key));
                rig.wait_for(JobStatus::Standby).await;
            }
            rig.target.hold(Match::op(IoOp::Write));
            rig.write(0, 4096, 7).await;
            rig.write(CHUNK, 4096, 8).await;
            rig.act(|jobs| match late {
                false => jobs.complete(key),
                true => jobs.finalize(key),
            });
            if !late {
                rig.act(|jobs| jobs.resume(key));
            }
            rig.target.wait_held(1).await;
            let section = rig.section("dst");
            while rig.target.sections() == 0 {
                runtime::yield_now().await;
            }
            rig.target.release_all();
            let section = section.await;
            assert_eq!(rig.target.in_flight(), 0);
            rig.target.forget_ended();
            rig.wait_a_little().await;
            assert!(rig.target.ended().is_empty(), "nothing goes on in it");
            drop(section);
            rig.wait_for(JobStatus::Null).await;
            assert_eq!(rig.completed(), Some(None));
            rig.assert_on_target();
            rig.assert_equal();
        });
    }
}

#[test]
fn write_blocking_writes_leave_a_drained_target_to_the_copier() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        let key = rig.ready(spec).await;
        let synced = || rig.jobs.query()[0].actively_synced == Some(true);
        rig.until(synced).await;
        let section = rig.section("dst").await;
        rig.target.forget_ended();
        rig.write(0, 4096, 7).await;
        rig.write_zeroes(CHUNK, CHUNK, true).await;
        assert!(rig.target.ended().is_empty());
        assert!(!synced());
        drop(section);
        rig.until(synced).await;
        rig.assert_equal();
        rig.pivot(key).await;
    });
}
