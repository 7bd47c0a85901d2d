//! A mirror that does not get on: what clients are told, the deadline, and the switch to
//! write-blocking.

use block::IoOp;
use block::test_storage::Match;

use super::*;
use crate::CopyMode;

const SOON: Duration = Duration::from_millis(50);

impl Rig {
    fn stalls(&self) -> usize {
        let events = self.events.borrow();
        let stalls = events
            .iter()
            .filter(|event| matches!(event.kind, JobEventKind::Stalled { .. }));
        stalls.count()
    }
}

#[test]
fn a_mirror_that_makes_no_progress_says_so_once_and_shows_it_until_it_does() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target.hold(Match::op(IoOp::Write));
        let spec = MirrorSpec {
            stall_after: SOON,
            ..rig.spec()
        };
        let key = rig.start(spec).await;
        rig.until(|| rig.stalls() > 0).await;
        assert!(rig.jobs.query()[0].rates.expect("a mirror").is_stalled);
        rig.target.release_all();
        rig.wait_for(JobStatus::Ready).await;
        rig.until(|| !rig.jobs.query()[0].rates.expect("a mirror").is_stalled)
            .await;
        rig.pivot(key).await;
        assert_eq!(rig.stalls(), 1);
        rig.assert_equal();
    });
}

#[test]
fn a_mirror_in_mode_auto_switches_to_write_blocking_for_good() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target.hold(Match::op(IoOp::Write));
        let spec = MirrorSpec {
            stall_after: SOON,
            switches: true,
            ..rig.spec()
        };
        let key = rig.start(spec).await;
        let mode = || rig.jobs.query()[0].copy_mode;
        assert_eq!(mode(), Some(CopyMode::Background));
        rig.until(|| mode() == Some(CopyMode::WriteBlocking)).await;
        rig.target.release_all();
        rig.wait_for(JobStatus::Ready).await;
        rig.write(64 * KIB, 4096, 9).await;
        assert_eq!(rig.target.peek(64 * KIB, 1), [9], "it is on both");
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn a_mirror_that_is_not_ready_in_time_fails_and_says_what_was_missing() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let spec = MirrorSpec {
            deadline: Some(SOON),
            // One request, then a long wait.
            speed: 1,
            ..rig.spec()
        };
        rig.start(spec).await;
        rig.wait_for(JobStatus::Null).await;
        let error = rig.completed().flatten().expect("it fails");
        assert!(
            error.starts_with("The mirror was not ready within"),
            "{error}"
        );
        assert!(error.contains("bytes are left"), "{error}");
        assert_eq!(
            rig.stalls(),
            1,
            "nobody has to wait for what hangs to hear of it"
        );
        rig.assert_on_source();
    });
}

#[test]
fn progress_counts_what_the_guest_itself_puts_on_the_target() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig
            .ready(MirrorSpec {
                copy_mode: CopyMode::WriteBlocking,
                ..rig.spec()
            })
            .await;
        rig.write(0, 64 * KIB, 7).await;
        rig.write_zeroes(128 * KIB, 64 * KIB, true).await;
        rig.write(512, 512, 8).await;
        let discard = rig.guest(0, |disk| async move { disk.discard(256 * KIB, 4096).await });
        discard.await.expect("a discard");
        let all = SIZE + 128 * KIB + 512;
        rig.until(|| {
            let info = rig.jobs.query().remove(0);
            (info.current_progress, info.total_progress) == (all, all)
        })
        .await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn actively_synced_is_not_shown_over_what_is_left_to_the_copier() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig
            .ready(MirrorSpec {
                copy_mode: CopyMode::WriteBlocking,
                on_target_error: crate::OnError::Ignore,
                ..rig.spec()
            })
            .await;
        let synced = || rig.jobs.query()[0].actively_synced == Some(true);
        for (storage, op) in [
            (&rig.source, IoOp::Write),
            (&rig.target, IoOp::Write),
            (&rig.target, IoOp::WriteZeroes),
        ] {
            rig.until(synced).await;
            // The copier does nothing about it for now.
            rig.act(|jobs| jobs.pause(key));
            rig.until(|| rig.jobs.query()[0].status == JobStatus::Standby)
                .await;
            assert!(synced());
            storage.fail_once(Match::op(op), libc::EIO);
            match op {
                IoOp::WriteZeroes => rig.write_zeroes(4096, 8192, true).await,
                _ => drop(rig.begin_write(4096, 8192, 7).await),
            }
            assert!(!synced(), "{op:?}");
            rig.act(|jobs| jobs.resume(key));
        }
        rig.until(synced).await;
        rig.assert_equal();
        rig.pivot(key).await;
    });
}

#[test]
fn a_mirror_that_is_ready_in_time_has_no_deadline_any_more() {
    with_rig(|rig| async move {
        let spec = MirrorSpec {
            deadline: Some(Duration::from_secs(30)),
            stall_after: SOON,
            ..rig.spec()
        };
        let key = rig.ready(spec).await;
        for n in 0..10 {
            rig.write(n * 64 * KIB, 4096, 9).await;
        }
        rig.pivot(key).await;
        assert_eq!(rig.stalls(), 0);
        rig.assert_equal();
    });
}
