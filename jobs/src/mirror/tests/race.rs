//! Staged races: a request is held at the moment in question, what is to happen
//! meanwhile happens, and the request goes on.

use block::IoOp;
use block::test_storage::{HoldAt, Match};

use crate::{CopyMode, JobStatus};

use super::*;

fn blocking(rig: &Rig) -> MirrorSpec {
    let mut spec = rig.spec();
    spec.copy_mode = CopyMode::WriteBlocking;
    spec
}

#[test]
fn a_write_in_flight_at_insertion_arrives() {
    for at in [HoldAt::Start, HoldAt::End] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            rig.source.hold_at(Match::op(IoOp::Write), at);
            let write = rig.begin_write(CHUNK, 4096, 7);
            rig.source.wait_held(1).await;
            let (there, spec) = (Rc::clone(&rig), rig.spec());
            let start = runtime::spawn_local(async move { there.start(spec).await });
            rig.until(|| rig.disk.is_drained()).await;
            assert!(!start.is_finished(), "it waits for the write");
            rig.source.release_all();
            write.await.expect("the write");
            let key = start.await;
            rig.wait_for(JobStatus::Ready).await;
            rig.pivot(key).await;
            assert_eq!(rig.target.peek(CHUNK, 1), [7]);
            rig.assert_equal();
        });
    }
}

#[test]
fn a_write_in_flight_when_the_mirror_becomes_ready_arrives() {
    for at in [HoldAt::Start, HoldAt::End] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            rig.source.hold_at(Match::op(IoOp::Write), at);
            let key = rig.start(rig.spec()).await;
            let write = rig.begin_write(0, 4096, 7);
            rig.source.wait_held(1).await;
            rig.wait_for(JobStatus::Ready).await;
            rig.source.release_all();
            write.await.expect("the write");
            rig.pivot(key).await;
            assert_eq!(rig.target.peek(0, 1), [7]);
            rig.assert_equal();
        });
    }
}

#[test]
fn a_write_in_flight_at_the_final_drain_arrives() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            let mut spec = rig.spec();
            spec.copy_mode = mode;
            let key = rig.ready(spec).await;
            rig.source.hold_at(Match::op(IoOp::Write), HoldAt::End);
            let write = rig.begin_write(CHUNK, 4096, 7);
            rig.source.wait_held(1).await;
            rig.act(|jobs| jobs.complete(key));
            rig.until(|| rig.disk.is_drained()).await;
            rig.source.release_all();
            write.await.expect("the write");
            rig.wait_for(JobStatus::Null).await;
            assert_eq!(rig.completed(), Some(None));
            rig.assert_on_target();
            assert_eq!(rig.target.peek(CHUNK, 1), [7]);
            rig.assert_equal();
        });
    }
}

#[test]
fn a_write_that_comes_during_the_pivot_goes_to_the_target() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig.ready(rig.spec()).await;
        rig.write(0, 4096, 6).await;
        rig.target.hold(Match::op(IoOp::Flush));
        rig.act(|jobs| jobs.complete(key));
        rig.target.wait_held(1).await;
        assert!(rig.disk.is_drained());
        let write = rig.begin_write(CHUNK, 4096, 7);
        rig.target.release_all();
        write.await.expect("the write");
        rig.wait_for(JobStatus::Null).await;
        rig.assert_on_target();
        assert_eq!(rig.target.peek(0, 1), [6]);
        assert_eq!(rig.target.peek(CHUNK, 1), [7]);
        assert_ne!(rig.source.peek(CHUNK, 1), [7]);
    });
}

#[test]
fn a_write_into_a_hole_that_was_passed_already_arrives() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        with_rig(|rig| async move {
            rig.source.poke(SIZE - CHUNK, &[1; 4096]);
            rig.source.hold(Match::op(IoOp::Read));
            let mut spec = rig.spec();
            spec.copy_mode = mode;
            let key = rig.start(spec).await;
            rig.source.wait_held(1).await;
            rig.write(0, 4096, 7).await;
            rig.source.release_all();
            rig.wait_for(JobStatus::Ready).await;
            rig.pivot(key).await;
            assert_eq!(rig.target.peek(0, 1), [7]);
            rig.assert_equal();
        });
    }
}

#[test]
fn a_write_to_a_chunk_that_the_copier_has_read_is_copied_again() {
    for op in [IoOp::Read, IoOp::BlockStatus] {
        with_rig(|rig| async move {
            rig.source.poke(0, &[1; 4096]);
            rig.source
                .hold_at(Match::op(op).range(0..CHUNK), HoldAt::End);
            let key = rig.start(rig.spec()).await;
            rig.source.wait_held(1).await;
            rig.write(0, 512, 7).await;
            rig.write(8192, 512, 8).await;
            rig.source.release_all();
            rig.wait_for(JobStatus::Ready).await;
            rig.pivot(key).await;
            assert_eq!(rig.target.peek(0, 1), [7]);
            assert_eq!(rig.target.peek(8192, 1), [8]);
            rig.assert_equal();
        });
    }
}

#[test]
fn a_discard_of_a_chunk_that_the_copier_has_read_arrives() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            rig.source
                .hold_at(Match::op(IoOp::Read).range(0..CHUNK), HoldAt::End);
            let mut spec = rig.spec();
            spec.copy_mode = mode;
            let key = rig.start(spec).await;
            rig.source.wait_held(1).await;
            let discard = rig.guest(3, |disk| async move { disk.discard(0, 2 * CHUNK).await });
            if mode == CopyMode::Background {
                discard.await.expect("the discard");
                rig.source.release_all();
            } else {
                rig.source.release_all();
                discard.await.expect("the discard");
            }
            rig.wait_for(JobStatus::Ready).await;
            rig.pivot(key).await;
            assert_eq!(rig.target.peek(0, 1), [0]);
            rig.assert_equal();
        });
    }
}

#[test]
fn a_discard_that_the_source_ignores_leaves_the_mirror_as_it_is() {
    for mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            let mut spec = rig.spec();
            let node =
                rig.graph
                    .add_node(Some("keeps"), rig.source.driver(), NodeOptions::default());
            let node = node.expect("another node of the source");
            let disk = rig.graph.attach("disk1", &node, device(), None);
            let disk = disk.expect("a device");
            spec.source = node;
            spec.copy_mode = mode;
            let key = rig.ready(spec).await;
            rig.target.forget_ended();
            rig.source.forget_ended();
            let discard = rig.guest(3, move |_| async move { disk.discard(0, SIZE).await });
            discard.await.expect("the discard");
            rig.act(|jobs| jobs.complete(key));
            rig.wait_for(JobStatus::Null).await;
            let requests = [rig.source.ended(), rig.target.ended()].concat();
            let copied = requests.iter().any(|request| request.op != IoOp::Flush);
            assert!(!copied, "nothing had changed: {requests:?}");
            rig.assert_equal();
        });
    }
}

#[test]
fn a_write_blocking_write_waits_for_the_copier_on_its_chunk_and_for_no_other() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target.hold(Match::op(IoOp::Write).range(0..CHUNK));
        let mut spec = blocking(&rig);
        spec.buf_size = CHUNK as i64;
        let key = rig.start(spec).await;
        rig.target.wait_held(1).await;
        let same = rig.begin_write(4096, 4096, 7);
        rig.write(SIZE - CHUNK, CHUNK, 8).await;
        assert_eq!(rig.target.peek(SIZE - CHUNK, 1), [8]);
        assert!(!same.is_finished());
        assert_ne!(rig.source.peek(4096, 1), [7], "it has not begun");
        rig.target.release_all();
        same.await.expect("the write");
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        assert_eq!(rig.target.peek(4096, 1), [7]);
        rig.assert_equal();
    });
}

#[test]
fn overlapping_write_blocking_writes_end_in_the_same_order_on_both_sides() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig.ready(blocking(&rig)).await;
        rig.target.hold(Match::op(IoOp::Write));
        let first = rig.begin_write(0, 3 * CHUNK, 7);
        rig.target.wait_held(1).await;
        let others: Vec<_> = (1..=4)
            .map(|n| {
                rig.guest(n % 4, move |disk| async move {
                    let offset = n as u64 * 16384;
                    disk.write(offset, filled(2 * CHUNK, n as u8), WriteFlags::default())
                        .await
                })
            })
            .collect();
        assert_eq!(rig.target.held(), 1);
        rig.target.release_all();
        first.await.expect("the first write");
        for other in others {
            other.await.expect("the others");
        }
        rig.assert_equal();
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn the_guest_may_scribble_over_its_buffer_in_a_write_blocking_write() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.ready(blocking(&rig)).await;
        rig.source.hold_at(Match::op(IoOp::Write), HoldAt::End);
        let payload = filled(4096, 7);
        let same = payload.clone();
        let write = rig.guest(0, move |disk| async move {
            disk.write(0, same, WriteFlags::default()).await
        });
        rig.source.wait_held(1).await;
        payload.fill(9);
        rig.source.release_all();
        write.await.expect("the write");
        rig.assert_equal();
    });
}

#[test]
fn zero_writes_smaller_than_a_chunk_lose_nothing_beside_the_copier() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        rig.target.hold(Match::op(IoOp::Write));
        let mut spec = blocking(&rig);
        spec.buf_size = CHUNK as i64;
        let key = rig.start(spec).await;
        rig.target.wait_held(1).await;
        // Chunks that are dirty still, in all ways a range can lie.
        for (offset, len) in [
            (10 * CHUNK + 512, 512),
            (12 * CHUNK - 512, 1024),
            (14 * CHUNK, 512),
            (16 * CHUNK - 512, 512),
            (18 * CHUNK - 4096, CHUNK + 8192),
        ] {
            let zero = rig.guest(1, move |disk| async move {
                disk.write_zeroes(offset, len, ZeroFlags::default()).await
            });
            zero.await.expect("the zero write");
        }
        rig.target.release_all();
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn a_drained_section_of_somebody_else_parks_the_job_and_lets_it_go_on() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let mut spec = blocking(&rig);
        spec.speed = 512 * KIB as i64;
        let key = rig.start(spec).await;
        rig.target.wait_ended(1).await;
        let drained = rig.graph.drain_all().await.expect("a section");
        assert_eq!(rig.target.in_flight() + rig.source.in_flight(), 0);
        let write = rig.begin_write(0, 4096, 7);
        drop(drained);
        write.await.expect("the write");
        let drained = rig
            .graph
            .drain(&rig.node("dst"), &[])
            .await
            .expect("a section");
        assert_eq!(rig.target.in_flight(), 0);
        drop(drained);
        rig.act(|jobs| jobs.set_speed(key, 0));
        rig.wait_for(JobStatus::Ready).await;
        rig.pivot(key).await;
        rig.assert_equal();
    });
}

#[test]
fn a_cancel_in_any_phase_leaves_the_source_and_no_filter() {
    // While a read, a write or the flush of the copier is held.
    for (on_target, op) in [
        (false, IoOp::BlockStatus),
        (false, IoOp::Read),
        (true, IoOp::Write),
        (true, IoOp::Flush),
    ] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            let storage = if on_target { &rig.target } else { &rig.source };
            storage.hold(Match::op(op));
            let key = rig.start(rig.spec()).await;
            storage.wait_held(1).await;
            rig.act(|jobs| jobs.cancel(key, true));
            storage.release_all();
            rig.wait_for(JobStatus::Null).await;
            assert!(rig.was_cancelled());
            rig.assert_on_source();
            rig.write(0, 4096, 9).await;
            assert_eq!(rig.source.peek(0, 1), [9]);
        });
    }
}

#[test]
fn a_cancel_of_a_paused_or_pending_or_completing_mirror_leaves_the_source() {
    #[derive(Clone, Copy, PartialEq)]
    enum Phase {
        Paused,
        Standby,
        Pending,
        DrainWaits,
        FlushInSection,
    }
    for phase in [
        Phase::Paused,
        Phase::Standby,
        Phase::Pending,
        Phase::DrainWaits,
        Phase::FlushInSection,
    ] {
        with_rig(|rig| async move {
            scribble(&rig.source);
            let mut spec = rig.spec();
            spec.auto_finalize = phase != Phase::Pending;
            if phase == Phase::Paused {
                spec.speed = 64 * KIB as i64;
            }
            let key = rig.start(spec).await;
            if phase != Phase::Paused {
                rig.wait_for(JobStatus::Ready).await;
            }
            let mut write = None;
            match phase {
                Phase::Paused => {
                    rig.act(|jobs| jobs.pause(key));
                    rig.wait_for(JobStatus::Paused).await;
                }
                Phase::Standby => {
                    rig.act(|jobs| jobs.pause(key));
                    rig.wait_for(JobStatus::Standby).await;
                }
                Phase::Pending => {
                    rig.act(|jobs| jobs.complete(key));
                    rig.wait_for(JobStatus::Pending).await;
                }
                Phase::DrainWaits => {
                    rig.source.hold(Match::op(IoOp::Write));
                    write = Some(rig.begin_write(0, 4096, 7));
                    rig.source.wait_held(1).await;
                    rig.act(|jobs| jobs.complete(key));
                    rig.until(|| rig.disk.is_drained()).await;
                }
                Phase::FlushInSection => {
                    rig.write(0, 512, 7).await;
                    rig.target.hold(Match::op(IoOp::Flush));
                    rig.act(|jobs| jobs.complete(key));
                    rig.target.wait_held(1).await;
                }
            }
            rig.act(|jobs| jobs.cancel(key, true));
            rig.source.release_all();
            rig.target.release_all();
            if let Some(write) = write {
                write.await.expect("the write");
            }
            rig.wait_for(JobStatus::Null).await;
            assert!(rig.was_cancelled());
            rig.assert_on_source();
            rig.write(CHUNK, 4096, 9).await;
        });
    }
}

#[test]
fn a_force_cancel_ends_the_wait_for_a_drained_section_without_its_end() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig.ready(rig.spec()).await;
        rig.source.hold(Match::op(IoOp::Write));
        let write = rig.begin_write(0, 4096, 7);
        rig.source.wait_held(1).await;
        rig.act(|jobs| jobs.complete(key));
        rig.until(|| rig.disk.is_drained()).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Aborting).await;
        rig.source.release_all();
        write.await.expect("the write");
        rig.wait_for(JobStatus::Null).await;
        rig.assert_on_source();
    });
}

/// A mirror that was completed and waits for `job-finalize`.
async fn pending(rig: &Rig) -> JobKey {
    scribble(&rig.source);
    let mut spec = rig.spec();
    spec.auto_finalize = false;
    let key = rig.ready(spec).await;
    rig.act(|jobs| jobs.complete(key));
    rig.wait_for(JobStatus::Pending).await;
    key
}

#[test]
fn a_cancel_while_the_late_rest_is_copied_keeps_the_guest_on_the_source() {
    with_rig(|rig| async move {
        let key = pending(&rig).await;
        rig.write(0, 4096, 7).await;
        rig.target.hold(Match::op(IoOp::Write));
        rig.act(|jobs| jobs.finalize(key));
        rig.target.wait_held(1).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.target.release_all();
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.was_cancelled());
        rig.assert_on_source();
    });
}

#[test]
fn a_cancel_while_the_late_drain_waits_keeps_the_guest_on_the_source() {
    with_rig(|rig| async move {
        let key = pending(&rig).await;
        rig.source.hold_at(Match::op(IoOp::Write), HoldAt::End);
        let write = rig.begin_write(CHUNK, 4096, 7);
        rig.source.wait_held(1).await;
        rig.act(|jobs| jobs.finalize(key));
        rig.until(|| rig.disk.is_drained()).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.source.release_all();
        write.await.expect("the write");
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.was_cancelled());
        rig.assert_on_source();
        assert_eq!(rig.source.peek(CHUNK, 1), [7]);
    });
}

#[test]
fn a_cancel_before_a_queued_pivot_keeps_the_guest_on_the_source() {
    with_rig(|rig| async move {
        scribble(&rig.source);
        let key = rig.ready(rig.spec()).await;
        rig.write(0, 4096, 7).await;
        rig.target.hold(Match::op(IoOp::Flush));
        rig.act(|jobs| jobs.complete(key));
        rig.target.wait_held(1).await;
        rig.target.release_all();
        // Main does nothing else meanwhile, so `prepare` is queued and does not run.
        while rig.jobs.query()[0].status != JobStatus::Pending {
            std::thread::yield_now();
        }
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.was_cancelled());
        rig.assert_on_source();
    });
}
