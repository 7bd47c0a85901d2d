//! Failing storages, and failing ends.

use block::IoOp;
use block::test_storage::Match;

use crate::{CopyMode, ErrorAction, IoSide, IoStatus, JobStatus, OnError};

use super::*;

impl Rig {
    fn errors(&self) -> Vec<(IoSide, ErrorAction)> {
        self.events
            .borrow()
            .iter()
            .filter_map(|event| match event.kind {
                JobEventKind::Error { operation, action } => Some((operation, action)),
                _ => None,
            })
            .collect()
    }

    /// The job has failed with this text, and the guest is where it was.
    async fn assert_failed(&self, text: &str) {
        self.wait_for(JobStatus::Null).await;
        let error = self.completed().expect("an end").expect("a failure");
        assert!(error.contains(text), "{error}");
        assert!(!self.was_cancelled());
        self.assert_on_source();
        self.write(0, 4096, 99).await;
        assert_eq!(self.source.peek(0, 1), [99]);
    }
}

#[test]
fn a_failed_target_write_fails_the_job_and_not_the_guest() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target
            .fail_once(Match::op(IoOp::Write).range(CHUNK..2 * CHUNK), libc::EIO);
        rig.start(rig.spec()).await;
        rig.assert_failed("Input/output error").await;
        assert_eq!(rig.errors(), [(IoSide::Write, ErrorAction::Report)]);
        assert!(!rig.statuses().contains(&JobStatus::Ready));
    });
}

#[test]
fn a_failed_source_read_fails_the_job_and_not_the_guest() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.source.fail_once(Match::op(IoOp::Read), libc::EIO);
        rig.start(rig.spec()).await;
        rig.assert_failed("Input/output error").await;
        assert_eq!(rig.errors(), [(IoSide::Read, ErrorAction::Report)]);
    });
}

#[test]
fn ranges_that_failed_are_copied_again_if_errors_are_ignored() {
    for op in [IoOp::Write, IoOp::Flush, IoOp::Read, IoOp::BlockStatus] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            let storage = match op {
                IoOp::Write | IoOp::Flush => &rig.target,
                _ => &rig.source,
            };
            storage.fail_once(Match::op(op), libc::EIO);
            let mut spec = rig.spec();
            spec.on_target_error = OnError::Ignore;
            spec.on_source_error = OnError::Ignore;
            let key = rig.ready(spec).await;
            // What a source does not tell of its extents, reading it does.
            assert_eq!(rig.errors().len(), usize::from(op != IoOp::BlockStatus));
            rig.pivot(key).await;
            rig.assert_equal();
            rig.assert_on_target();
        });
    }
}

#[test]
fn ignored_errors_do_not_make_the_copier_spin() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target.fail(Match::op(IoOp::Write), libc::EIO);
        let mut spec = rig.spec();
        spec.on_target_error = OnError::Ignore;
        spec.buf_size = CHUNK as i64;
        let key = rig.start(spec).await;
        rig.until(|| rig.errors().len() >= 3).await;
        let began = std::time::Instant::now();
        let before = rig.errors().len();
        rig.until(|| rig.errors().len() > before).await;
        // 100, 200, then 400 ms and more: never sooner, however busy the machine.
        assert!(began.elapsed() + Duration::from_millis(50) >= Duration::from_millis(100));
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        rig.assert_on_source();
    });
}

#[test]
fn the_wait_after_errors_outlasts_drained_sections_and_what_succeeds_beside() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target
            .fail(Match::op(IoOp::Write).range(0..4096), libc::EIO);
        let mut spec = rig.spec();
        spec.on_target_error = OnError::Ignore;
        spec.buf_size = CHUNK as i64;
        let began = std::time::Instant::now();
        let key = rig.start(spec).await;
        // The rest of the disk is copied; every pass comes to the bad chunk again.
        while rig.errors().len() < 4 {
            rig.write(SIZE - CHUNK, 4096, 8).await;
            drop(rig.graph.drain_all().await.expect("a section"));
            runtime::sleep(Duration::from_millis(5)).await;
        }
        let waits = Duration::from_millis(100 + 200 + 400);
        assert!(began.elapsed() >= waits, "{:?}", began.elapsed());
        // A resume is a reason to try again at once, with short waits.
        rig.target.stop_failing();
        rig.act(|jobs| jobs.pause(key));
        rig.wait_for(JobStatus::Paused).await;
        rig.act(|jobs| jobs.resume(key));
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn no_space_on_the_target_pauses_the_job_until_the_user_resumes_it() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target.fail(Match::op(IoOp::Write), libc::ENOSPC);
        let mut spec = rig.spec();
        spec.on_target_error = OnError::Enospc;
        let key = rig.start(spec).await;
        rig.wait_for(JobStatus::Paused).await;
        let info = rig.jobs.query().remove(0);
        assert_eq!(info.io_status, IoStatus::NoSpace);
        assert!(
            rig.errors()
                .iter()
                .all(|e| *e == (IoSide::Write, ErrorAction::Stop))
        );
        rig.write(0, 4096, 7).await;
        rig.target.stop_failing();
        rig.act(|jobs| jobs.resume(key));
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        rig.assert_equal();
        rig.assert_on_target();
    });
}

#[test]
fn errors_of_the_time_in_which_it_was_stopped_do_not_stop_a_mirror_again() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        spec.on_target_error = OnError::Stop;
        let key = rig.ready(spec).await;
        rig.target.fail(Match::op(IoOp::Write), libc::ENOSPC);
        rig.write(0, 4096, 6).await;
        rig.wait_for(JobStatus::Standby).await;
        rig.write(CHUNK, 4096, 7).await;
        // The disk is made larger, and all is well.
        rig.target.stop_failing();
        rig.act(|jobs| jobs.resume(key));
        rig.until(|| rig.source.snapshot() == rig.target.snapshot() || rig.errors().len() > 1)
            .await;
        assert_eq!(rig.errors(), [(IoSide::Write, ErrorAction::Stop)]);
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn a_failed_write_blocking_write_of_the_target_is_copied_later() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        spec.on_target_error = OnError::Ignore;
        let key = rig.ready(spec).await;
        rig.target.fail_once(Match::op(IoOp::Write), libc::EIO);
        rig.write(512, 1024, 7).await;
        rig.until(|| rig.errors() == [(IoSide::Write, ErrorAction::Ignore)])
            .await;
        rig.target
            .fail_once(Match::op(IoOp::WriteZeroes), libc::EIO);
        rig.write_zeroes(8 * CHUNK, CHUNK, true).await;
        rig.pivot(key).await;
        rig.assert_equal();
        rig.assert_on_target();
    });
}

#[test]
fn a_failed_write_blocking_write_of_the_target_fails_the_job_if_it_is_reported() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        rig.ready(spec).await;
        rig.target.fail_once(Match::op(IoOp::Write), libc::EIO);
        rig.write(512, 1024, 7).await;
        rig.assert_failed("Input/output error").await;
    });
}

#[test]
fn a_failed_write_of_the_source_is_told_to_the_guest_and_not_mirrored() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        let key = rig.ready(spec).await;
        rig.source.fail_once(Match::op(IoOp::Write), libc::EIO);
        let error = rig.begin_write(0, CHUNK, 7).await.expect_err("it fails");
        assert_eq!(error.errno, libc::EIO);
        assert_ne!(rig.target.peek(0, 1), [7]);
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn a_failure_in_the_final_section_keeps_the_guest_on_the_source() {
    for op in [IoOp::Write, IoOp::Flush] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            let key = rig.ready(rig.spec()).await;
            rig.target.fail(Match::op(op), libc::EIO);
            rig.write(CHUNK, 512, 7).await;
            rig.act(|jobs| jobs.complete(key));
            rig.assert_failed("Input/output error").await;
        });
    }
}

#[test]
fn a_flush_that_failed_at_completion_is_tried_again_after_resume() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.on_target_error = OnError::Stop;
        let key = rig.ready(spec).await;
        rig.target.fail(Match::op(IoOp::Flush), libc::EIO);
        rig.write(CHUNK, 512, 7).await;
        rig.act(|jobs| jobs.complete(key));
        rig.wait_for(JobStatus::Standby).await;
        rig.write(0, 512, 8).await;
        rig.target.stop_failing();
        rig.act(|jobs| jobs.resume(key));
        rig.wait_for(JobStatus::Null).await;
        assert_eq!(rig.completed(), Some(None));
        rig.assert_equal();
        rig.assert_on_target();
    });
}

#[test]
fn a_refused_replacement_fails_the_job_and_keeps_the_guest_on_the_source() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig.ready(rig.spec()).await;
        // Somebody on the target who goes with a mirror, and not with a device.
        let hermit = Permissions {
            need: Perm::NONE,
            share: !Perm::CONSISTENT_READ,
        };
        let hermit = rig.graph.attach("hermit", &rig.node("dst"), hermit, None);
        hermit.expect("nothing conflicts yet");
        rig.act(|jobs| jobs.complete(key));
        rig.assert_failed("Cannot switch from node 'src' to node 'dst'")
            .await;
    });
}
