//! Nodes that are written while they are compared.

use super::*;
use crate::backup::{BackupSpec, start_backup};

#[test]
fn what_is_written_between_the_two_reads_is_no_difference() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target.hold(Match::op(IoOp::Read).range(MIB..MIB + 512));
        rig.start(rig.spec());
        // The source has been read there, or will be soon.
        rig.until(|| rig.target.held() > 0).await;
        rig.until(|| rig.source_was_read_at(MIB)).await;
        rig.begin_write(MIB, 4096, 7).await;
        rig.target.poke(MIB, &[7; 4096]);
        rig.target.stop_holding();
        rig.target.release_all();
        rig.concluded().await;
        assert_eq!(rig.error(), None);
        assert_eq!(rig.found().differences, 0);
    });
}

#[test]
fn what_a_mirror_has_yet_to_copy_is_no_difference() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.mirror().await;
        rig.target.hold(Match::op(IoOp::Write));
        rig.begin_write(MIB, 4096, 7).await;
        rig.until(|| rig.target.held() > 0).await;
        rig.target.forget_ended();
        rig.start(rig.spec());
        // Found, not counted, and read again.
        rig.until(|| rig.target_reads_at(MIB) >= 3).await;
        assert_eq!(rig.found().differences, 0);
        rig.target.stop_holding();
        rig.target.release_all();
        rig.concluded().await;
        assert_eq!(rig.error(), None);
        assert_eq!(rig.found().differences, 0);
    });
}

#[test]
fn what_is_wrong_on_a_mirrors_target_is_found_under_a_guest_that_writes() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.mirror().await;
        rig.target.poke(2 * MIB + 512, &[0]);
        let stop = Arc::new(AtomicBool::new(false));
        let (disk, stopped) = (Arc::clone(&rig.disk), Arc::clone(&stop));
        let handle = rig.guest.handle().clone();
        let guest = runtime::spawn_local(async move {
            handle
                .call(move || async move {
                    let mut byte = 0u8;
                    while !stopped.load(Ordering::SeqCst) {
                        byte = byte.wrapping_add(1);
                        // The same place again and again, and many places.
                        for offset in [MIB, u64::from(byte) * 4096] {
                            disk.write(offset, filled(512, byte), WriteFlags::default())
                                .await
                                .expect("a guest write succeeds");
                        }
                        runtime::sleep(Duration::from_micros(200)).await;
                    }
                })
                .await
                .expect("the iothread lives");
        });
        loop {
            let key = rig.start(rig.spec());
            rig.concluded().await;
            assert_eq!(rig.found().ranges, one(2 * MIB + 512..2 * MIB + 1024));
            if rig.error().is_none() {
                break;
            }
            // On a machine under load a place that is always written may stay undecided.
            assert!(rig.found().undecided_bytes > 0);
            rig.jobs.act(|jobs| jobs.dismiss(key)).expect("dismiss");
            rig.until(|| rig.status().is_none()).await;
        }
        stop.store(true, Ordering::SeqCst);
        guest.await;
    });
}

#[test]
fn a_long_range_that_is_written_all_the_time_is_decided_too() {
    with_rig(|rig| async move {
        const LEN: u64 = 600 * KIB;
        rig.begin_write(0, LEN, 255).await;
        let writer = {
            let (rig, mut byte) = (Rc::clone(&rig), 0u8);
            runtime::spawn_local(async move {
                while rig.status() != Some(JobStatus::Concluded) {
                    byte = byte.wrapping_add(1);
                    rig.begin_write(0, LEN, byte | 1).await;
                }
            })
        };
        rig.start(rig.spec());
        rig.concluded().await;
        writer.await;
        assert_eq!(rig.error(), None);
        let found = rig.found();
        assert_eq!((found.differences, found.differing_bytes), (1, LEN));
        assert_eq!(found.undecided_bytes, 0);
    });
}

#[test]
fn a_comparison_of_a_mirror_that_ends_does_not_end_well() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        let mirror = rig.mirror().await;
        rig.target.poke(MIB, &[0]);
        rig.target.hold(Match::op(IoOp::Read).range(MIB..MIB + 512));
        rig.start(rig.spec());
        rig.until(|| rig.target.held() > 0).await;
        rig.jobs
            .act(|jobs| jobs.cancel(mirror, true))
            .expect("cancel");
        rig.until(|| !rig.jobs.query().iter().any(|job| job.id.as_str() == "m0"))
            .await;
        rig.target.stop_holding();
        rig.target.release_all();
        rig.concluded().await;
        let error = rig
            .error()
            .expect("what it compared is not mirrored any more");
        assert!(error.contains("mirror"), "{error}");
    });
}

#[test]
fn the_guest_is_measured_as_long_as_a_comparison_lasts() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        rig.target.hold(Match::op(IoOp::Read));
        let key = rig.start(rig.spec());
        rig.until(|| rig.target.held() > 0).await;
        assert!(rig.disk.is_measured());
        rig.jobs.act(|jobs| jobs.cancel(key, true)).expect("cancel");
        rig.until(|| !rig.disk.is_measured()).await;
    });
}

impl Rig {
    /// Makes a backup of all, and waits for its end.
    async fn back_up(&self) {
        let spec = BackupSpec::new("b0", self.node("src"), self.node("dst"));
        start_backup(&self.graph, &self.jobs, spec)
            .await
            .expect("the backup starts");
        self.until(|| self.jobs.query().is_empty()).await;
        let history = self.jobs.history();
        assert_eq!(history.last().expect("it").outcome, JobOutcome::Completed);
    }
}

#[test]
fn a_finished_backup_differs_exactly_where_the_guest_has_written_since() {
    with_rig(|rig| async move {
        scribble(&rig, 0..SIZE);
        // The target had something else.
        rig.target.poke(0, &vec![3; SIZE as usize]);
        rig.back_up().await;
        let key = rig.start(rig.spec());
        rig.concluded().await;
        assert_eq!((rig.found().differences, rig.error()), (0, None));
        rig.jobs.act(|jobs| jobs.dismiss(key)).expect("dismiss");
        rig.until(|| rig.jobs.query().is_empty()).await;

        // Written before, and written again and again while it is compared.
        rig.begin_write(MIB, 4096, 0).await;
        let writer = {
            let (rig, mut byte) = (Rc::clone(&rig), 0u8);
            runtime::spawn_local(async move {
                while rig.status() != Some(JobStatus::Concluded) {
                    // Never what the backup has there.
                    byte = byte.wrapping_add(2);
                    rig.begin_write(3 * MIB, 4096, byte).await;
                }
            })
        };
        rig.begin_write(3 * MIB, 4096, 0).await;
        rig.start(rig.spec());
        rig.concluded().await;
        writer.await;
        let found = rig.found();
        assert_eq!(found.ranges.first(), Some(&(MIB..MIB + 4096)));
        // On a machine under load a place that is always written may stay undecided.
        let decided = found.differing_bytes + found.undecided_bytes;
        assert_eq!(decided, 2 * 4096);
        assert!(
            found
                .ranges
                .iter()
                .all(|it| it.start == MIB || it.start >= 3 * MIB)
        );
        assert_eq!(rig.error().is_none(), found.undecided_bytes == 0);
    });
}
