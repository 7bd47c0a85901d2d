//! Mistakes that others have made and mended, and that must not come back here. (Writes
//! that are lost around the beginning have a file of their own, `first_instant`.)

use std::sync::atomic::{AtomicBool, Ordering};

use block::IoOp;
use block::test_storage::Match;

use super::*;
use crate::{CopyMode, OnError};

fn error_count(rig: &Rig) -> usize {
    let events = rig.events.borrow();
    let errors = events
        .iter()
        .filter(|event| matches!(event.kind, JobEventKind::Error { .. }));
    errors.count()
}

/// With `ignore` it is tried again for ever, with pauses; and it can be ended.
#[test]
fn a_soft_cancel_with_a_dead_target_does_not_spin_and_can_be_forced() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.on_target_error = OnError::Ignore;
        let key = rig.ready(spec).await;
        rig.target.fail(Match::any(), libc::EPIPE);
        let began = std::time::Instant::now();
        rig.write(0, 4096, 7).await;
        rig.act(|jobs| jobs.cancel(key, false));
        rig.until(|| error_count(&rig) >= 5).await;
        // 100, 200 and 400 ms, and more: never sooner, however busy the machine.
        assert!(began.elapsed() >= Duration::from_millis(700));
        assert_eq!(rig.completed(), None);
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.was_cancelled());
        rig.assert_on_source();
    });
}

/// Of the guest's own writes in write-blocking mode, too.
#[test]
fn errors_of_the_guests_own_writes_of_a_dead_target_are_told_ever_more_rarely() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        spec.on_target_error = OnError::Ignore;
        rig.ready(spec).await;
        rig.target.fail(Match::op(IoOp::Write), libc::EPIPE);
        let disk = Arc::clone(&rig.disk);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let writer = rig.guest(0, move |_| async move {
            while !stopped.load(Ordering::SeqCst) {
                disk.write(0, filled(4096, 8), WriteFlags::default())
                    .await?;
                runtime::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        });
        let began = std::time::Instant::now();
        rig.until(|| error_count(&rig) >= 7).await;
        // Both the guest's and the copier's wait for 100, 200 and 400 ms between them.
        assert!(began.elapsed() >= Duration::from_millis(700));
        stop.store(true, Ordering::SeqCst);
        writer.await.expect("the guest never fails");
        rig.target.stop_failing();
        rig.until(|| rig.jobs.query()[0].actively_synced == Some(true))
            .await;
        rig.assert_equal();
    });
}

/// Chains of overlapping requests, from all sides at once, each waiting for others.
#[test]
fn write_blocking_writes_that_overlap_never_wait_for_one_another_in_a_circle() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        // The copier is in between.
        let key = rig.start(spec).await;
        for round in 0..20 {
            rig.target.hold(Match::op(IoOp::Write));
            let writes: Vec<_> = (0..16)
                .map(|n| {
                    let offset = (n * 7 % 16) * CHUNK / 2;
                    rig.guest((n % 4) as usize, move |disk| async move {
                        let payload = filled(CHUNK + 512 * n, (round * 16 + n) as u8);
                        disk.write(offset, payload, WriteFlags::default()).await
                    })
                })
                .collect();
            rig.target.wait_held(1).await;
            rig.target.release_all();
            for write in writes {
                write.await.expect("a guest write succeeds");
            }
        }
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

/// The filter, its name, the target and the job's id are free for the next attempt.
#[test]
fn a_failed_mirror_leaves_nothing_behind_that_a_second_one_could_stumble_over() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let spec = || MirrorSpec {
            filter_node_name: Some("filter0".to_owned()),
            ..rig.spec()
        };
        for op in [IoOp::Write, IoOp::Flush] {
            rig.target.fail(Match::op(op), libc::EIO);
            rig.start(spec()).await;
            rig.wait_for(JobStatus::Null).await;
            assert!(rig.completed().flatten().is_some());
            rig.assert_on_source();
            rig.target.stop_failing();
            rig.events.borrow_mut().clear();
        }
        let key = rig.ready(spec()).await;
        rig.pivot(key).await;
        rig.assert_on_target();
        rig.assert_equal();
    });
}

#[test]
fn a_concluded_mirror_that_nobody_dismisses_is_in_nobodys_way() {
    for fails in [false, true] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            let mut spec = rig.spec();
            spec.auto_dismiss = false;
            if fails {
                rig.target.fail(Match::op(IoOp::Write), libc::EIO);
                rig.start(spec).await;
            } else {
                let key = rig.ready(spec).await;
                rig.act(|jobs| jobs.cancel(key, false));
            }
            rig.wait_for(JobStatus::Concluded).await;
            rig.target.stop_failing();
            rig.assert_on_source();
            let other = MirrorSpec {
                job_id: "j1".to_owned(),
                ..rig.spec()
            };
            let key = rig.start(other).await;
            rig.until(|| rig.jobs.query().iter().any(|job| job.status.is_ready()))
                .await;
            rig.act(|jobs| jobs.complete(key));
            rig.until(|| rig.jobs.query().len() == 1).await;
            rig.assert_on_target();
            rig.assert_equal();
        });
    }
}

/// Sections that come all the time do not make it any faster.
#[test]
fn frequent_drained_sections_do_not_defeat_the_speed_limit_of_a_mirror() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.speed = 1024 * KIB as i64;
        spec.buf_size = CHUNK as i64;
        let began = std::time::Instant::now();
        rig.start(spec).await;
        let copied = || rig.jobs.query()[0].current_progress;
        while copied() < 512 * KIB {
            drop(rig.graph.drain_all().await.expect("a section"));
            runtime::sleep(Duration::from_millis(1)).await;
        }
        let least = Duration::from_millis(400 - 100);
        assert!(began.elapsed() >= least, "{:?}", began.elapsed());
    });
}
