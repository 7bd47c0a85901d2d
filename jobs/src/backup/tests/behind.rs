//! What guests' requests do not wait for: copies that are on their way to the target.

use block::test_storage::Match;
use block::{GraphError, IoOp};

use crate::backup::{BackupSpec, BackupSync};
use crate::{ErrorAction, OnError};

use super::*;

const CHUNK: u64 = 4 * KIB;
/// Where the tests write: behind what shows that the target can be relied on.
const PLACE: u64 = 60 * CLUSTER;
/// Longest that a section waits which cannot be had.
const SHORTLY: Duration = Duration::from_millis(50);

fn place() -> Match {
    Match::op(IoOp::Write).range(PLACE..PLACE + CHUNK)
}

impl Rig {
    /// A backup that has not got to [`PLACE`] yet, to a target that has taken enough copies.
    async fn start_and_prove(&self, spec: BackupSpec) -> JobKey {
        let key = self.start(BackupSpec { speed: 1, ..spec }).await;
        for cluster in 20..60 {
            self.write(cluster * CLUSTER, CHUNK, 7).await;
        }
        key
    }

    fn go_on(&self, key: JobKey) {
        self.act(|jobs| jobs.set_speed(key, 0));
    }

    async fn assert_write_waits_for_nothing(&self) {
        self.write(PLACE, CHUNK, 9).await;
        assert_eq!(self.source.peek(PLACE, 1), [9]);
    }
}

#[test]
fn the_job_ends_when_what_is_in_memory_is_saved() {
    with_rig(|rig| async move {
        let key = rig.start_and_prove(rig.spec()).await;
        rig.target.hold(place());
        rig.assert_write_waits_for_nothing().await;
        rig.target.wait_held(1).await;
        rig.go_on(key);
        let copied = |byte: u64| rig.target.peek(byte, 1) == rig.instant[byte as usize..][..1];
        rig.until(|| copied(SIZE - 1) && copied(PLACE + CHUNK))
            .await;
        assert!(!rig.statuses().contains(&JobStatus::Waiting));
        rig.target.stop_holding();
        rig.target.release_all();
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}

#[test]
fn what_cannot_be_saved_is_a_failure_of_the_target() {
    with_rig(|rig| async move {
        let key = rig.start_and_prove(rig.spec()).await;
        rig.target.fail(place(), libc::EIO);
        rig.assert_write_waits_for_nothing().await;
        rig.go_on(key);
        assert_eq!(rig.end().await.as_deref(), Some("Input/output error"));
        assert_eq!(rig.errors(), 1);
        // The guest has felt nothing of it.
        rig.write(PLACE + CHUNK, CHUNK, 9).await;
        rig.assert_no_traces();
    });
}

#[test]
fn a_job_that_stops_for_what_cannot_be_saved_has_it_when_it_goes_on() {
    with_rig(|rig| async move {
        let spec = BackupSpec {
            on_target_error: OnError::Stop,
            ..rig.spec()
        };
        let key = rig.start_and_prove(spec).await;
        rig.target.fail(place(), libc::ENOSPC);
        rig.assert_write_waits_for_nothing().await;
        rig.go_on(key);
        rig.wait_for(JobStatus::Paused).await;
        let is_stop = |event: &JobEvent| {
            let action = ErrorAction::Stop;
            matches!(event.kind, JobEventKind::Error { action: told, .. } if told == action)
        };
        assert!(rig.events.borrow().iter().any(is_stop));
        rig.target.stop_failing();
        rig.act(|jobs| jobs.resume(key));
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}

#[test]
fn a_job_that_only_saves_keeps_what_it_could_not() {
    with_rig(|rig| async move {
        let spec = BackupSpec {
            sync: BackupSync::None,
            ..rig.spec()
        };
        let key = rig.start_and_prove(spec).await;
        rig.target.fail(place(), libc::EIO);
        rig.assert_write_waits_for_nothing().await;
        let failures = || {
            let ended = rig.target.ended();
            ended.iter().filter(|it| it.offset == PLACE).count()
        };
        rig.until(|| failures() > 2).await;
        rig.target.stop_failing();
        let saved = &rig.instant[PLACE as usize..][..CHUNK as usize];
        rig.until(|| rig.target.peek(PLACE, CHUNK as usize) == saved)
            .await;
        assert_eq!(rig.errors(), 0);
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        rig.assert_no_traces();
    });
}

#[test]
fn a_forced_cancel_waits_for_nothing_that_is_on_its_way() {
    with_rig(|rig| async move {
        let key = rig.start_and_prove(rig.spec()).await;
        rig.target.hold(place());
        rig.assert_write_waits_for_nothing().await;
        rig.target.wait_held(1).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        assert_eq!(rig.target.held(), 1);
        rig.until(|| rig.disk.root().name() == "src").await;
        rig.target.release_all();
        let in_use = || rig.graph.check_not_blocked(&rig.node("dst")).is_err();
        rig.until(|| !in_use()).await;
        rig.assert_no_traces();
    });
}

#[test]
fn a_section_of_the_target_waits_for_what_is_on_its_way() {
    with_rig(|rig| async move {
        let key = rig.start_and_prove(rig.spec()).await;
        rig.target.hold(place());
        rig.assert_write_waits_for_nothing().await;
        rig.target.wait_held(1).await;
        let target = rig.node("dst");
        let section = rig.graph.drain_within(&target, &[], SHORTLY).await;
        assert!(matches!(section, Err(GraphError::DrainTimeout { .. })));
        rig.target.stop_holding();
        rig.target.release_all();
        let section = rig.graph.drain_within(&target, &[], LIMIT).await;
        let section = section.expect("nothing is in flight");
        assert_eq!(rig.target.in_flight(), 0);
        drop(section);
        rig.go_on(key);
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}
