//! Storages that hang: the guest goes on, and so does everybody else.

use block::IoOp;
use block::test_storage::Match;

use crate::{CopyMode, JobStatus, OnError};

use super::*;

#[test]
fn a_target_that_hangs_in_the_final_section_does_not_hold_the_guest() {
    for op in [IoOp::Write, IoOp::Flush] {
        for cancel in [false, true] {
            with_rig(|rig| async move {
                scribble(&rig.source);
                let mut spec = rig.hasty_spec();
                if cancel {
                    // Nothing but the cancel ends the section.
                    spec.section_limit = LIMIT;
                }
                let key = rig.ready(spec).await;
                // So that what is written is copied in the section, and not before.
                rig.act(|jobs| jobs.pause(key));
                rig.wait_for(JobStatus::Standby).await;
                rig.write(0, 4096, 6).await;
                rig.target.hold(Match::op(op));
                rig.act(|jobs| jobs.complete(key));
                rig.act(|jobs| jobs.resume(key));
                rig.target.wait_held(1).await;
                let write = rig.begin_write(CHUNK, 4096, 7);
                if cancel {
                    rig.act(|jobs| jobs.cancel(key, true));
                }
                write.await.expect("the write, though the target hangs");
                assert!(rig.target.held() > 0);
                assert_eq!(rig.source.peek(CHUNK, 1), [7]);
                rig.target.release_all();
                rig.wait_for(JobStatus::Null).await;
                if cancel {
                    assert!(rig.was_cancelled());
                    rig.assert_on_source();
                } else {
                    assert_eq!(rig.completed(), Some(None));
                    rig.assert_on_target();
                    assert_eq!(rig.target.peek(0, 1), [6]);
                    assert_eq!(rig.target.peek(CHUNK, 1), [7]);
                }
            });
        }
    }
}

/// A mirror that waits for `job-finalize`, with something to copy.
async fn pending(rig: &Rig, section_limit: Duration) -> JobKey {
    scribble(&rig.source);
    let mut spec = rig.spec();
    spec.section_limit = section_limit;
    spec.auto_finalize = false;
    let key = rig.ready(spec).await;
    rig.act(|jobs| jobs.complete(key));
    rig.wait_for(JobStatus::Pending).await;
    rig.write(0, 4096, 6).await;
    key
}

#[test]
fn a_target_that_hangs_in_the_late_section_does_not_hold_the_guest() {
    for op in [IoOp::Write, IoOp::Flush] {
        with_rig(|rig| async move {
            let key = pending(&rig, Duration::from_millis(10)).await;
            rig.target.hold(Match::op(op));
            rig.act(|jobs| jobs.finalize(key));
            rig.target.wait_held(1).await;
            let read = rig.guest(
                0,
                |disk| async move { disk.read(CHUNK, filled(4096, 0)).await },
            );
            read.await.expect("the read, though the target hangs");
            assert!(rig.target.held() > 0);
            rig.target.release_all();
            rig.wait_for(JobStatus::Null).await;
            assert_eq!(rig.completed(), Some(None));
            rig.assert_on_target();
            rig.assert_equal();
        });
    }
}

#[test]
fn a_cancel_ends_a_late_pivot_to_a_target_that_hangs() {
    for op in [IoOp::Write, IoOp::Flush] {
        with_rig(|rig| async move {
            let key = pending(&rig, LIMIT).await;
            rig.target.hold(Match::op(op));
            rig.act(|jobs| jobs.finalize(key));
            rig.target.wait_held(1).await;
            rig.act(|jobs| jobs.cancel(key, true));
            rig.wait_for(JobStatus::Null).await;
            assert!(rig.target.held() > 0, "nobody waited for it");
            assert_eq!(rig.disk.root().name(), "src");
            rig.write(CHUNK, 4096, 7).await;
            rig.target.release_all();
            rig.until(|| rig.target.in_flight() == 0).await;
        });
    }
}

#[test]
fn a_guest_that_rewrites_what_is_copied_late_does_not_keep_the_pivot_from_ending() {
    with_rig(|rig| async move {
        let key = pending(&rig, Duration::from_millis(10)).await;
        rig.write(0, SIZE, 5).await;
        // Each copy takes as long as the guest takes to dirty the chunk again.
        rig.source
            .delay(Match::op(IoOp::Read), Duration::from_millis(5));
        let disk = Arc::clone(&rig.disk);
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let writer = rig.guest(1, move |_| async move {
            while !stopped.load(std::sync::atomic::Ordering::SeqCst) {
                for offset in (0..SIZE).step_by(CHUNK as usize) {
                    disk.write(offset, filled(4096, 8), WriteFlags::default())
                        .await?;
                }
                runtime::yield_now().await;
            }
            Ok(())
        });
        rig.act(|jobs| jobs.finalize(key));
        rig.wait_for(JobStatus::Null).await;
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        writer.await.expect("the guest never fails");
        assert_eq!(rig.completed(), Some(None));
        rig.assert_on_target();
    });
}

#[test]
fn a_cancel_frees_the_writes_that_wait_for_a_target_that_hangs() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.copy_mode = CopyMode::WriteBlocking;
        let key = rig.ready(spec).await;
        rig.target.hold(Match::any());
        let first = rig.begin_write(0, 4096, 6);
        rig.target.wait_held(1).await;
        let same = rig.begin_write(0, 4096, 7);
        let zeroes = rig.guest(1, |disk| async move {
            disk.write_zeroes(2 * CHUNK, CHUNK, ZeroFlags::default())
                .await
        });
        let discard = rig.guest(
            1,
            |disk| async move { disk.discard(4 * CHUNK, CHUNK).await },
        );
        rig.target.wait_held(3).await;
        assert!(!first.is_finished() && !same.is_finished());
        rig.act(|jobs| jobs.cancel(key, true));
        for request in [first, same, zeroes, discard] {
            request.await.expect("though the target hangs");
        }
        rig.wait_for(JobStatus::Null).await;
        rig.until(|| rig.disk.root().name() == "src").await;
        assert!(rig.target.held() >= 3);
        assert_eq!(rig.source.peek(0, 1), [7]);
        let busy = rig.graph.check_not_blocked(&rig.node("dst"));
        assert!(busy.is_err(), "the target may still be written");
        rig.target.release_all();
        rig.until(|| rig.graph.check_not_blocked(&rig.node("dst")).is_ok())
            .await;
        rig.assert_on_source();
    });
}

#[test]
fn a_target_that_hangs_while_a_mirror_catches_up_does_not_hold_the_guest() {
    with_rig(|rig| async move {
        let key = pending(&rig, Duration::from_millis(10)).await;
        rig.write(0, SIZE, 5).await;
        rig.target.hold(Match::op(IoOp::Write));
        rig.act(|jobs| jobs.finalize(key));
        rig.target.wait_held(1).await;
        let writes = [0, CHUNK, 2 * CHUNK, SIZE - CHUNK].map(|at| rig.begin_write(at, 4096, 7));
        for write in writes {
            write.await.expect("the write, though the target hangs");
        }
        assert!(rig.target.held() > 0);
        rig.target.release_all();
        rig.wait_for(JobStatus::Null).await;
        assert_eq!(rig.completed(), Some(None));
        rig.assert_on_target();
        rig.assert_equal();
    });
}

/// Waits until the guest's writes go to the target by themselves. The copier is
/// expected to wait after an error nearly all the time.
async fn catches_up(rig: &Rig, offset: u64) {
    let mut there = 0;
    for byte in (1..=250).cycle() {
        rig.write(offset, CHUNK, byte).await;
        there = match rig.target.peek(offset, 1) == [byte] {
            true => there + 1,
            false => 0,
        };
        if there == 5 {
            return;
        }
        runtime::sleep(Duration::from_millis(2)).await;
    }
}

/// A mirror that catches up, and never gets there: half of the target fails.
async fn catching_up(rig: &Rig) -> JobKey {
    scribble(&rig.source);
    rig.target
        .fail(Match::op(IoOp::Write).range(0..SIZE / 2), libc::EIO);
    let mut spec = rig.spec();
    spec.on_target_error = OnError::Ignore;
    let key = rig.start(spec).await;
    catches_up(rig, SIZE - CHUNK).await;
    key
}

#[test]
fn a_mirror_that_is_paused_while_it_catches_up_does_not_hold_the_guest() {
    with_rig(|rig| async move {
        let key = catching_up(&rig).await;
        rig.act(|jobs| jobs.pause(key));
        rig.wait_for(JobStatus::Paused).await;
        rig.target.hold(Match::op(IoOp::Write));
        rig.write(SIZE - CHUNK, CHUNK, 7).await;
        assert_eq!(
            rig.target.held(),
            0,
            "nothing is written while it is paused"
        );
        rig.target.stop_holding();
        rig.target.stop_failing();
        rig.act(|jobs| jobs.resume(key));
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn a_target_that_hangs_for_the_guest_alone_does_not_hold_it_while_the_mirror_catches_up() {
    with_rig(|rig| async move {
        let key = catching_up(&rig).await;
        rig.target
            .hold(Match::op(IoOp::Write).range(SIZE - CHUNK..SIZE));
        let write = rig.begin_write(SIZE - CHUNK, CHUNK, 7);
        rig.target.wait_held(1).await;
        write.await.expect("the write, though the target hangs");
        assert_eq!(rig.target.held(), 1);
        rig.target.release_all();
        rig.target.stop_failing();
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn a_mirror_that_caught_up_and_waits_to_be_finalized_does_not_hold_the_guest() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = rig.spec();
        spec.on_target_error = OnError::Ignore;
        spec.auto_finalize = false;
        let key = rig.ready(spec).await;
        rig.target
            .fail(Match::op(IoOp::Write).range(0..SIZE / 2), libc::EIO);
        rig.write(0, SIZE / 2, 6).await;
        rig.act(|jobs| jobs.complete(key));
        catches_up(&rig, SIZE - CHUNK).await;
        rig.target.stop_failing();
        rig.wait_for(JobStatus::Pending).await;
        rig.target.hold(Match::op(IoOp::Write));
        rig.write(SIZE - CHUNK, CHUNK, 7).await;
        assert_eq!(rig.target.held(), 0, "nothing is written while it waits");
        rig.target.stop_holding();
        rig.act(|jobs| jobs.finalize(key));
        rig.wait_for(JobStatus::Null).await;
        assert_eq!(rig.completed(), Some(None));
        rig.assert_on_target();
        rig.assert_equal();
    });
}

#[test]
fn a_guest_whose_requests_hang_refuses_a_mirror_soon_and_says_who_it_is() {
    with_rig(|rig| async move {
        rig.source.hold(Match::op(IoOp::Write).range(0..CHUNK));
        let stuck = rig.begin_write(0, 4096, 7);
        rig.source.wait_held(1).await;
        let error = rig.try_start(rig.spec()).await.expect_err("a refusal");
        let text = error.to_string();
        assert!(text.contains("has 1 in flight"), "{text}");
        rig.write(CHUNK, 4096, 8).await;
        rig.source.release_all();
        stuck.await.expect("the write");
        rig.assert_on_source();
    });
}

#[test]
fn a_pivot_that_hangs_does_not_hold_the_guest_of_another_mirror() {
    with_rig(|rig| async move {
        let key = pending(&rig, LIMIT).await;
        rig.target.hold(Match::op(IoOp::Write));
        rig.act(|jobs| jobs.finalize(key));
        rig.target.wait_held(1).await;
        // Another disk, whose mirror ends with a section held for main.
        let storages = [TestStorage::new(SIZE), TestStorage::new(SIZE)];
        scribble(&storages[0]);
        let [source, target] = [("src1", 0), ("dst1", 1)].map(|(name, which)| {
            let options = NodeOptions::default();
            let node = rig
                .graph
                .add_node(Some(name), storages[which].driver(), options);
            node.expect("a node")
        });
        let disk = rig.graph.attach("disk1", &source, device(), None);
        let disk = disk.expect("a device");
        let other = start_mirror(
            &rig.graph,
            &rig.jobs,
            MirrorSpec::new("j1", source, Arc::clone(&target)),
        );
        let other = other.await.expect("the mirror starts");
        rig.until(|| {
            let jobs = rig.jobs.query();
            let status = |job: &crate::JobInfo| job.id.as_str() == "j1" && job.status.is_ready();
            jobs.iter().any(status)
        })
        .await;
        rig.act(|jobs| jobs.complete(other));
        rig.until(|| disk.root().id() == target.id() && !disk.is_drained())
            .await;
        assert!(rig.target.held() > 0, "the first still hangs");
        assert_eq!(storages[0].snapshot(), storages[1].snapshot());
        rig.target.release_all();
        rig.until(|| rig.disk.root().name() == "dst").await;
        rig.assert_equal();
    });
}

#[test]
fn a_guest_whose_requests_hang_is_held_for_a_moment_and_the_end_tried_again() {
    for late in [false, true] {
        for cancel in [false, true] {
            with_rig(|rig| async move {
                let key = if late {
                    pending(&rig, LIMIT).await
                } else {
                    scribble(&rig.source);
                    rig.ready(rig.spec()).await
                };
                rig.source.hold(Match::op(IoOp::Write).range(0..CHUNK));
                let stuck = rig.begin_write(0, 4096, 7);
                rig.source.wait_held(1).await;
                let act = |jobs: &mut crate::JobsGuard<'_>| match late {
                    false => jobs.complete(key),
                    true => jobs.finalize(key),
                };
                rig.act(act);
                rig.until(|| rig.disk.is_drained()).await;
                rig.write(CHUNK, 4096, 8).await;
                assert_eq!(rig.source.held(), 1, "the other one still hangs");
                assert_eq!(rig.completed(), None);
                if cancel {
                    rig.act(|jobs| jobs.cancel(key, true));
                }
                rig.source.release_all();
                stuck.await.expect("the write");
                rig.wait_for(JobStatus::Null).await;
                if cancel {
                    assert!(rig.was_cancelled());
                    rig.until(|| rig.disk.root().name() == "src").await;
                    rig.assert_on_source();
                } else {
                    assert_eq!(rig.completed(), Some(None));
                    rig.assert_on_target();
                    rig.assert_equal();
                }
            });
        }
    }
}

#[test]
fn a_cancel_of_a_mirror_whose_own_requests_hang_does_not_hold_the_guest() {
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
                rig.write(0, SIZE, 7).await;
                rig.write_zeroes(CHUNK, CHUNK, true).await;
                let discard = rig.guest(
                    0,
                    |disk| async move { disk.discard(4 * CHUNK, CHUNK).await },
                );
                discard.await.expect("the discard");
                let flush = rig.guest(0, |disk| async move { disk.flush().await });
                flush.await.expect("the flush");
                assert!(rig.target.held() > 0, "the target still hangs");
                rig.target.release_all();
                rig.wait_for(JobStatus::Null).await;
                assert!(rig.was_cancelled());
                assert!(!rig.statuses().contains(&JobStatus::Ready));
                rig.assert_on_source();
            });
        }
    }
}

#[test]
fn a_cancel_lets_the_target_go_for_as_long_as_requests_to_it_are_on_their_way() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target.hold(Match::op(IoOp::Write));
        let key = rig.start(rig.spec()).await;
        rig.target.wait_held(1).await;
        rig.act(|jobs| jobs.cancel(key, true));
        while rig.target.cancels() < 3 {
            runtime::sleep(Duration::from_millis(1)).await;
        }
        rig.target.release_all();
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.was_cancelled());
    });
}
