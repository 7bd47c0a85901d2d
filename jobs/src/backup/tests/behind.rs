//! What guests' requests do not wait for: copies that are on their way to the target.

use block::test_storage::Match;
use block::{BlockdevOptions, BlockdevRef, DriverOptions, GraphError, IoOp, SnapshotAccessOptions};

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
        // Who starts it pauses it for a moment.
        self.until(|| self.statuses().last() == Some(&JobStatus::Running))
            .await;
        for cluster in 20..60 {
            self.write(cluster * CLUSTER, CHUNK, 7).await;
        }
        key
    }

    async fn wait_until_paused(&self) {
        self.until(|| self.statuses().last() == Some(&JobStatus::Paused))
            .await;
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
        rig.start_and_prove(rig.spec()).await;
        rig.target.fail(place(), libc::EIO);
        rig.assert_write_waits_for_nothing().await;
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
        rig.wait_until_paused().await;
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
fn a_resumed_job_does_not_stop_again_for_what_was_before() {
    with_rig(|rig| async move {
        let spec = BackupSpec {
            on_target_error: OnError::Stop,
            ..rig.spec()
        };
        let key = rig.start_and_prove(spec).await;
        rig.target.fail(place(), libc::ENOSPC);
        rig.assert_write_waits_for_nothing().await;
        rig.wait_until_paused().await;
        // Paused, it tries nothing, not in sections of others either.
        let target = rig.node("dst");
        let section = rig.graph.drain_within(&target, &[], LIMIT).await;
        let tried = rig.target.ended().len();
        runtime::sleep(SHORTLY * 6).await;
        assert_eq!(rig.target.ended().len(), tried);
        drop(section.expect("nothing is in flight"));
        rig.target.stop_failing();
        rig.go_on(key);
        rig.act(|jobs| jobs.resume(key));
        assert_eq!(rig.end().await, None);
        assert_eq!(rig.errors(), 1);
        rig.assert_instant();
    });
}

#[test]
fn a_paused_job_holds_no_guest_up() {
    with_rig(|rig| async move {
        let key = rig.start_and_prove(rig.spec()).await;
        rig.target.hold(place());
        rig.assert_write_waits_for_nothing().await;
        rig.target.wait_held(1).await;
        rig.target.release_all();
        rig.target.stop_holding();
        rig.act(|jobs| jobs.pause(key));
        rig.wait_until_paused().await;
        // Each has its copy made before it goes on.
        for chunk in 1..4 {
            let at = PLACE + chunk * CHUNK;
            rig.write(at, CHUNK, 9).await;
            let saved = &rig.instant[at as usize..][..CHUNK as usize];
            assert!(rig.target.peek(at, CHUNK as usize) == saved);
        }
        rig.go_on(key);
        rig.act(|jobs| jobs.resume(key));
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}

#[test]
fn where_the_target_has_to_be_right_at_any_moment_guests_wait_for_it() {
    with_rig(|rig| async move {
        let spec = BackupSpec {
            sync: BackupSync::None,
            ..rig.spec()
        };
        let key = rig.start_and_prove(spec).await;
        rig.target.hold(place());
        let write = rig.begin_write(PLACE, CHUNK, 9);
        rig.target.wait_held(1).await;
        assert!(!write.is_finished());
        assert_ne!(rig.source.peek(PLACE, 1), [9]);
        rig.target.release_all();
        write.await.expect("a guest write succeeds");
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

#[test]
fn a_job_that_is_paused_while_it_sleeps_has_guests_copy_by_themselves() {
    with_rig(|rig| async move {
        let key = rig.start_and_prove(rig.spec()).await;
        // Nothing is in flight, and it may start nothing.
        runtime::sleep(SHORTLY * 4).await;
        rig.act(|jobs| jobs.pause(key));
        rig.wait_until_paused().await;
        rig.write(PLACE, CHUNK, 9).await;
        let place = PLACE as usize..(PLACE + CHUNK) as usize;
        assert_eq!(rig.target.peek(PLACE, place.len()), rig.instant[place]);
        rig.go_on(key);
        rig.act(|jobs| jobs.resume(key));
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}

#[test]
fn who_reads_what_is_in_memory_holds_up_no_section() {
    with_rig(|rig| async move {
        let spec = BackupSpec {
            filter_node_name: Some("f".to_owned()),
            ..rig.spec()
        };
        let key = rig.start_and_prove(spec).await;
        let file = BlockdevRef::Name("f".to_owned());
        let options = DriverOptions::SnapshotAccess(SnapshotAccessOptions { file });
        let options = BlockdevOptions {
            node_name: Some("access".to_owned()),
            ..BlockdevOptions::new(options)
        };
        let access = rig.graph.blockdev_add(options).await.expect("a node");
        let perms = Permissions {
            need: Perm::CONSISTENT_READ,
            share: Perm::ALL,
        };
        let attached = rig.graph.attach("reader", &access, perms, None);
        let reader = attached.expect("a reader");
        rig.target.hold(place());
        // One is being written, and the other is not.
        rig.write(PLACE, CHUNK, 9).await;
        rig.target.wait_held(1).await;
        rig.write(PLACE + CHUNK, CHUNK, 9).await;
        let iov = AlignedBuffer::new(2 * CHUNK as usize).io_vec(2 * CHUNK as usize);
        reader.read(PLACE, iov.clone()).await.expect("a read");
        let mut bytes = vec![0; iov.len()];
        iov.copy_to(0, &mut bytes);
        let place = PLACE as usize..(PLACE + 2 * CHUNK) as usize;
        assert_eq!(bytes, rig.instant[place]);
        rig.graph.detach(&reader);
        rig.target.stop_holding();
        rig.target.release_all();
        rig.graph.blockdev_del("access").await.expect("it goes");
        rig.go_on(key);
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}

#[test]
fn a_source_that_fails_holds_up_no_saves() {
    with_rig(|rig| async move {
        let spec = BackupSpec {
            on_source_error: OnError::Ignore,
            ..rig.spec()
        };
        let key = rig.start_and_prove(spec).await;
        let bad = PLACE + 3 * CLUSTER;
        let bad = Match::op(IoOp::Read).range(bad..bad + CHUNK);
        rig.source.fail(bad, libc::EIO);
        rig.go_on(key);
        // The third wait is 400 ms long.
        rig.until(|| rig.errors() == 3).await;
        rig.write(PLACE, CHUNK, 9).await;
        let place = PLACE as usize..(PLACE + CHUNK) as usize;
        let is_saved = || rig.target.peek(PLACE, CHUNK as usize) == rig.instant[place.clone()];
        rig.until(is_saved).await;
        assert_eq!(rig.errors(), 3);
        rig.source.stop_failing();
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}
