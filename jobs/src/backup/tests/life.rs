//! Starts, ends, and failures.

use block::test_storage::Match;
use block::{CbwPolicy, GraphError, IoOp, OnCbwError};

use crate::backup::{BackupSync, BitmapMode, prepare_backup};
use crate::{ErrorAction, OnError};

use super::*;

#[test]
fn a_full_backup_copies_everything_but_holes_and_goes() {
    with_rig(|rig| async move {
        rig.start(rig.spec()).await;
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
        let hole = 1024 * 512..1536 * 512;
        let ended = rig.target.ended();
        let in_hole = |offset: u64| hole.contains(&offset);
        assert!(
            !ended
                .iter()
                .any(|it| it.op == IoOp::Write && in_hole(it.offset))
        );
        assert_eq!(ended.last().map(|it| it.op), Some(IoOp::Flush));
        let statuses = rig.statuses();
        assert_eq!(statuses.first(), Some(&JobStatus::Created));
        assert!(!statuses.contains(&JobStatus::Ready));
    });
}

#[test]
fn a_refused_start_leaves_nothing_behind() {
    with_rig(|rig| async move {
        let text = |spec| {
            let rig = Rc::clone(&rig);
            async move { rig.try_start(spec).await.unwrap_err().to_string() }
        };
        let mut spec = rig.spec();
        spec.job_id = "1".to_owned();
        assert_eq!(text(spec).await, "Invalid job ID '1'");
        let mut spec = rig.spec();
        spec.speed = -1;
        assert_eq!(
            text(spec).await,
            "Parameter 'speed' expects a non-negative value"
        );
        let mut spec = rig.spec();
        spec.filter_node_name = Some("dst".to_owned());
        let duplicate = "Could not create node: Duplicate nodes with node-name='dst'";
        assert_eq!(text(spec).await, duplicate);
        let mut spec = rig.spec();
        spec.target = rig.node("src");
        assert_eq!(text(spec).await, "Source and target cannot be the same");
        let mut spec = rig.spec();
        spec.sync = BackupSync::Incremental;
        let required = "must provide a valid bitmap name for 'incremental' sync mode";
        assert_eq!(text(spec).await, required);
        let mut spec = rig.spec();
        spec.bitmap_mode = Some(BitmapMode::Always);
        assert_eq!(
            text(spec).await,
            "Cannot specify bitmap sync mode without a bitmap"
        );
        let mut spec = rig.spec();
        spec.perf.min_cluster_size = 3000;
        assert_eq!(
            text(spec).await,
            "min-cluster-size needs to be a power of 2"
        );
        let mut spec = rig.spec();
        spec.perf.min_cluster_size = 1 << 63;
        assert!(text(spec).await.starts_with("min-cluster-size too large"));
        let mut spec = rig.spec();
        spec.perf.max_workers = 0;
        let range = "max-workers must be between 1 and 2147483647";
        assert_eq!(text(spec).await, range);
        let mut spec = rig.spec();
        spec.perf.max_chunk = 4096;
        let below = "Required max-chunk (4096) is less than backup cluster size (65536)";
        assert_eq!(text(spec).await, below);
        let mut spec = rig.spec();
        spec.discard_source = true;
        assert!(text(spec).await.starts_with("Cannot discard node 'src'"));
        rig.assert_no_traces();
        rig.write(0, 4096, 9).await;
        assert!(rig.target.ended().is_empty());
    });
}

#[test]
fn odd_bounds_copy_all_the_same() {
    for (max_workers, max_chunk, min_cluster_size) in [
        (1, 100_000, 0),
        (i64::from(i32::MAX), i64::MAX, 0),
        (3, 0, 2 << 20),
    ] {
        with_rig(|rig| async move {
            let mut spec = rig.spec();
            spec.perf.max_workers = max_workers;
            spec.perf.max_chunk = max_chunk;
            spec.perf.min_cluster_size = min_cluster_size;
            rig.start(spec).await;
            rig.write(CLUSTER + 4096, 4096, 7).await;
            assert_eq!(rig.end().await, None);
            rig.assert_instant();
        });
    }
}

#[test]
fn max_workers_beyond_an_integers_range_are_refused_and_the_most_are_bounded() {
    with_rig(|rig| async move {
        for max_workers in [i64::MIN, -1, 0, 1 << 31, 1 << 32, i64::MAX] {
            let mut spec = rig.spec();
            spec.perf.max_workers = max_workers;
            let refused = rig.try_start(spec).await.unwrap_err().to_string();
            let range = "max-workers must be between 1 and 2147483647";
            assert_eq!(refused, range, "{max_workers}");
        }
        rig.assert_no_traces();
        let mut spec = rig.spec();
        spec.perf.max_workers = i32::MAX.into();
        spec.perf.max_chunk = CLUSTER as i64;
        rig.target.hold(Match::op(IoOp::Write));
        rig.start(spec).await;
        rig.target.wait_held(1).await;
        assert!(rig.target.held() <= 64);
        rig.target.release_all();
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}

#[test]
fn a_broken_snapshot_never_ends_in_success() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.policy = CbwPolicy {
            on_error: OnCbwError::BreakSnapshot,
            timeout: None,
        };
        spec.speed = 1;
        let key = rig.start(spec).await;
        rig.act(|jobs| jobs.pause(key));
        rig.wait_for(JobStatus::Paused).await;
        let last = SIZE - 4096;
        rig.target
            .fail_once(Match::op(IoOp::Write).range(last..SIZE), libc::EIO);
        rig.write(last, 4096, 7).await;
        assert_eq!(rig.source.peek(last, 1), [7]);
        // All that is left can be copied now.
        rig.act(|jobs| jobs.set_speed(key, 0));
        rig.act(|jobs| jobs.resume(key));
        let error = rig.end().await.expect("it fails");
        assert!(error.starts_with("The snapshot is broken"), "{error}");
        rig.assert_no_traces();
    });
}

#[test]
fn a_snapshot_of_new_writes_fails_as_soon_as_it_is_broken() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.sync = BackupSync::None;
        spec.policy.on_error = OnCbwError::BreakSnapshot;
        rig.start(spec).await;
        rig.write(0, 4096, 7).await;
        assert_eq!(rig.target.peek(0, 8192)[..], rig.instant[..8192]);
        rig.target.fail(Match::op(IoOp::Write), libc::ENOSPC);
        rig.write(CLUSTER, 4096, 7).await;
        let error = rig.end().await.expect("it fails");
        assert!(error.starts_with("The snapshot is broken"), "{error}");
        assert!(error.contains("No space left on device"), "{error}");
        rig.assert_no_traces();
    });
}

#[test]
fn a_guest_write_that_cannot_be_saved_fails_and_the_backup_stays_good() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.speed = 1;
        let key = rig.start(spec).await;
        rig.act(|jobs| jobs.pause(key));
        rig.wait_for(JobStatus::Paused).await;
        let last = SIZE - 4096;
        rig.target
            .fail_once(Match::op(IoOp::Write).range(last..SIZE), libc::EIO);
        let error = rig.begin_write(last, 4096, 7).await.unwrap_err();
        assert_eq!(error.errno, libc::EIO);
        assert_eq!(rig.source.peek(last, 1)[0], rig.instant[last as usize]);
        rig.write(last, 4096, 7).await;
        rig.act(|jobs| jobs.set_speed(key, 0));
        rig.act(|jobs| jobs.resume(key));
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}

#[test]
fn a_failed_read_or_write_fails_the_job_by_default() {
    for (op, error) in [(IoOp::Read, libc::EIO), (IoOp::Write, libc::ENOSPC)] {
        with_rig(|rig| async move {
            let storage = if op == IoOp::Read {
                &rig.source
            } else {
                &rig.target
            };
            storage.fail(Match::op(op).range(CLUSTER..CLUSTER + 512), error);
            rig.start(rig.spec()).await;
            let text = crate::JobFailure::from_errno(error).message;
            assert_eq!(rig.end().await, Some(text));
            assert_eq!(rig.errors(), 1);
            rig.assert_no_traces();
            // The guest does not care.
            rig.write(CLUSTER, 4096, 7).await;
        });
    }
}

#[test]
fn what_failed_is_copied_again_if_errors_are_ignored() {
    with_rig(|rig| async move {
        rig.target.fail_once(Match::op(IoOp::Write), libc::EIO);
        let mut spec = rig.spec();
        spec.on_target_error = OnError::Ignore;
        rig.start(spec).await;
        assert_eq!(rig.end().await, None);
        assert_eq!(rig.errors(), 1);
        rig.assert_instant();
    });
}

#[test]
fn no_space_on_the_target_pauses_the_job_until_the_user_resumes_it() {
    with_rig(|rig| async move {
        rig.target.fail(Match::op(IoOp::Write), libc::ENOSPC);
        let mut spec = rig.spec();
        spec.on_target_error = OnError::Enospc;
        let key = rig.start(spec).await;
        rig.wait_for(JobStatus::Paused).await;
        let stops = |event: &JobEvent| {
            matches!(
                event.kind,
                JobEventKind::Error {
                    action: ErrorAction::Stop,
                    ..
                }
            )
        };
        rig.until(|| rig.events.borrow().iter().any(stops)).await;
        rig.target.stop_failing();
        rig.write(0, 4096, 7).await;
        rig.act(|jobs| jobs.resume(key));
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}

#[test]
fn a_cancelled_backup_lets_the_guest_go_on_though_the_target_hangs() {
    with_rig(|rig| async move {
        rig.target.hold(Match::op(IoOp::Write));
        let key = rig.start(rig.spec()).await;
        rig.target.wait_held(1).await;
        let write = rig.begin_write(SIZE - 4096, 4096, 7);
        rig.act(|jobs| jobs.cancel(key, true));
        write.await.expect("it does not wait any more");
        rig.target.release_all();
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.statuses().contains(&JobStatus::Aborting));
        rig.until(|| rig.graph.nodes().len() == 2).await;
        rig.assert_no_traces();
    });
}

#[test]
fn a_paused_backup_copies_only_what_the_guest_is_about_to_change() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.speed = 1;
        let key = rig.start(spec).await;
        rig.act(|jobs| jobs.pause(key));
        rig.wait_for(JobStatus::Paused).await;
        rig.target.forget_ended();
        rig.write(SIZE - CLUSTER, 4096, 7).await;
        let ended = rig.target.ended();
        let writes: Vec<_> = ended.iter().filter(|it| it.op == IoOp::Write).collect();
        assert!(writes.len() <= 1, "{writes:?}");
        rig.act(|jobs| jobs.resume(key));
        rig.act(|jobs| jobs.set_speed(key, 0));
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
    });
}

#[test]
fn a_source_that_is_discarded_gets_no_writer_meanwhile() {
    with_rig(|rig| async move {
        // One that nobody uses.
        let source = TestStorage::new(SIZE);
        source.poke(0, &rig.instant);
        let options = rig.node("src").options();
        let node = rig.graph.add_node(Some("own"), source.driver(), options);
        let mut spec = rig.spec();
        spec.source = node.expect("a source");
        spec.discard_source = true;
        source.hold(Match::op(IoOp::Read));
        rig.start(spec).await;
        source.wait_held(1).await;
        let writer = || rig.graph.attach("late", &rig.node("own"), device(), None);
        assert!(matches!(writer(), Err(GraphError::Conflict { .. })));
        source.release_all();
        assert_eq!(rig.end().await, None);
        let target = rig.target.snapshot();
        assert!(rig.instant == target, "the target differs from the instant");
        assert!(source.snapshot().iter().all(|byte| *byte == 0));
        let late = writer().expect("nobody is against it any more");
        rig.graph.detach(&late);
    });
}

#[test]
fn what_is_prepared_can_be_taken_back() {
    with_rig(|rig| async move {
        let drained = rig.graph.drain(&rig.node("src"), &[]).await.unwrap();
        let prepared = prepare_backup(&rig.graph, &rig.jobs, rig.spec(), &drained).unwrap();
        assert_ne!(rig.disk.root().name(), "src");
        prepared.take_back(&drained);
        assert_eq!(rig.disk.root().name(), "src");
        drop(drained);
        rig.write(0, 4096, 7).await;
        rig.wait_for(JobStatus::Null).await;
        assert!(!rig.statuses().contains(&JobStatus::Running));
        assert!(rig.target.ended().is_empty());
        rig.assert_no_traces();
    });
}

#[test]
fn what_is_prepared_goes_by_itself_if_it_is_forgotten() {
    with_rig(|rig| async move {
        let drained = rig.graph.drain(&rig.node("src"), &[]).await.unwrap();
        let prepared = prepare_backup(&rig.graph, &rig.jobs, rig.spec(), &drained).unwrap();
        drop((prepared, drained));
        rig.wait_for(JobStatus::Null).await;
        rig.until(|| rig.graph.nodes().len() == 2).await;
        rig.assert_no_traces();
    });
}
