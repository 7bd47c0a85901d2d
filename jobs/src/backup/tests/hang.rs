//! Storages that hang: the job ends, the guest goes on, and nothing is lost track of.

use block::test_storage::{HoldAt, Match};
use block::{CbwPolicy, IoOp, OnCbwError};

use crate::backup::BackupSync;
use crate::test_layers::Layers;

use super::*;

impl Rig {
    /// Whether no job is attached to a node.
    fn is_free(&self, name: &str) -> bool {
        let backends = self.graph.backends();
        let jobs = backends.iter().filter(|it| it.name.is_empty());
        jobs.filter(|it| it.node == name).count() == 0
    }

    /// The job has ended, and only the nodes that hang are in use, until they answer.
    async fn assert_left_behind(&self, held: &TestStorage) {
        assert!(held.held() > 0, "nobody waited for it");
        self.until(|| self.disk.root().name() == "src").await;
        self.write(SIZE - 4096, 4096, 7).await;
        held.release_all();
        held.stop_holding();
        self.until(|| self.is_free("src") && self.is_free("dst"))
            .await;
        self.assert_no_traces();
    }
}

#[test]
fn a_forced_cancel_waits_for_no_storage_that_hangs() {
    for (of_target, op) in [
        (true, IoOp::Write),
        (true, IoOp::Flush),
        (false, IoOp::Read),
        (false, IoOp::BlockStatus),
    ] {
        with_rig(|rig| async move {
            let held = match of_target {
                true => rig.target.clone(),
                false => rig.source.clone(),
            };
            held.hold(Match::op(op));
            let key = rig.start(rig.spec()).await;
            held.wait_held(1).await;
            rig.act(|jobs| jobs.cancel(key, true));
            rig.wait_for(JobStatus::Null).await;
            assert!(!rig.is_free(if of_target { "dst" } else { "src" }));
            rig.assert_left_behind(&held).await;
        });
    }
}

#[test]
fn a_cancel_is_seen_while_a_pause_waits_for_a_storage_that_hangs() {
    with_rig(|rig| async move {
        rig.target.hold(Match::op(IoOp::Write));
        let key = rig.start(rig.spec()).await;
        rig.target.wait_held(1).await;
        rig.act(|jobs| jobs.pause(key));
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        rig.assert_left_behind(&rig.target).await;
    });
}

#[test]
fn a_cancel_is_seen_while_the_layers_are_looked_through() {
    with_rig(|rig| async move {
        let upper = TestStorage::new(SIZE);
        let layers = Layers::new(&upper, rig.node("src"));
        let top = rig
            .graph
            .add_node(Some("top"), Box::new(layers), NodeOptions::default());
        let spec = BackupSpec {
            source: top.expect("a layered node"),
            sync: BackupSync::Top,
            ..rig.spec()
        };
        upper.hold(Match::op(IoOp::BlockStatus));
        let key = rig.start(spec).await;
        upper.wait_held(1).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        assert!(upper.held() > 0, "nobody waited for it");
        assert!(!rig.is_free("top"));
        upper.release_all();
        rig.until(|| rig.is_free("top")).await;
    });
}

#[test]
fn a_failure_is_told_though_another_request_hangs() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.perf.max_chunk = CLUSTER as i64;
        let write =
            |cluster: u64| Match::op(IoOp::Write).range(cluster * CLUSTER..(cluster + 1) * CLUSTER);
        rig.target.hold(write(0));
        rig.target.fail(write(1), libc::EIO);
        rig.start(spec).await;
        let error = rig.end().await.expect("it fails");
        assert_eq!(error, "Input/output error");
        assert_eq!(rig.errors(), 1);
        rig.assert_left_behind(&rig.target).await;
    });
}

#[test]
fn a_snapshot_that_breaks_ends_the_job_though_the_target_hangs() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.policy = CbwPolicy {
            on_error: OnCbwError::BreakSnapshot,
            timeout: Some(Duration::from_millis(10)),
        };
        rig.target.hold(Match::op(IoOp::Write));
        let key = rig.start(spec).await;
        rig.target.wait_held(1).await;
        // The body waits for what is in flight, to be parked.
        rig.act(|jobs| jobs.pause(key));
        rig.write(SIZE - 8192, 4096, 7).await;
        let error = rig.end().await.expect("it fails");
        assert!(error.starts_with("The snapshot is broken"), "{error}");
        rig.assert_left_behind(&rig.target).await;
    });
}

#[test]
fn nobody_writes_the_source_before_a_discard_that_was_left_behind_has_ended() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.discard_source = true;
        spec.sync = BackupSync::Full;
        rig.graph.detach(&rig.disk);
        rig.source.hold(Match::op(IoOp::Discard));
        let key = rig.start(spec).await;
        rig.source.wait_held(1).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        let writer = || {
            let src = rig.node("src");
            rig.graph
                .attach("writer", &src, device(), None)
                .map(|writer| rig.graph.detach(&writer))
        };
        assert!(writer().is_err(), "the discard would take its data away");
        rig.source.release_all();
        rig.source.stop_holding();
        rig.until(|| rig.is_free("src") && rig.is_free("dst")).await;
        rig.until(|| writer().is_ok()).await;
        rig.graph
            .add_node(
                None,
                TestStorage::new(SIZE).driver(),
                NodeOptions::default(),
            )
            .expect("a node");
    });
}

#[test]
fn what_is_left_behind_does_not_discard_the_source() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.discard_source = true;
        spec.sync = BackupSync::Full;
        // Nothing is discarded under who uses the source.
        rig.graph.detach(&rig.disk);
        rig.target.hold_at(Match::op(IoOp::Write), HoldAt::End);
        let key = rig.start(spec).await;
        rig.target.wait_held(1).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        rig.target.release_all();
        rig.until(|| rig.is_free("dst")).await;
        let ended = rig.source.ended();
        assert!(ended.iter().all(|it| it.op != IoOp::Discard));
        // The disk is gone: the rig is not to look who uses the nodes.
        rig.graph
            .add_node(
                None,
                TestStorage::new(SIZE).driver(),
                NodeOptions::default(),
            )
            .expect("a node");
    });
}
