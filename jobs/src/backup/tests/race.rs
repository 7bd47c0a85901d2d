//! What the guest does while a backup runs never gets to the target.

use block::test_storage::{HoldAt, Match};
use block::{CbwPolicy, IoOp, OnCbwError};

use super::*;

#[test]
fn a_write_in_flight_at_the_start_is_part_of_the_instant() {
    for at in [HoldAt::Start, HoldAt::End] {
        with_rig(|rig| async move {
            rig.source.hold_at(Match::op(IoOp::Write), at);
            let write = rig.begin_write(CLUSTER, 4096, 7);
            rig.source.wait_held(1).await;
            let (there, spec) = (Rc::clone(&rig), rig.spec());
            let start = runtime::spawn_local(async move { there.start(spec).await });
            rig.until(|| rig.disk.is_drained()).await;
            rig.source.release_all();
            write.await.expect("the write");
            start.await;
            assert_eq!(rig.end().await, None);
            assert_eq!(rig.target.peek(CLUSTER, 1), [7]);
        });
    }
}

#[test]
fn a_write_to_what_is_being_copied_waits_and_is_not_in_the_copy() {
    with_rig(|rig| async move {
        rig.source
            .hold_at(Match::op(IoOp::Read).range(0..4096), HoldAt::Start);
        rig.start(rig.spec()).await;
        rig.source.wait_held(1).await;
        rig.source.stop_holding();
        let write = rig.begin_write(0, 4096, 7);
        // Elsewhere nobody waits for the job's request.
        rig.write(SIZE - 4096, 4096, 8).await;
        assert!(!write.is_finished());
        assert_ne!(rig.source.peek(0, 1), [7]);
        while rig.source.release_one() {}
        write.await.expect("the write");
        assert_eq!(rig.end().await, None);
        rig.assert_instant();
        assert_eq!(rig.source.peek(0, 1), [7]);
    });
}

#[test]
fn a_write_waits_for_no_more_than_what_is_being_copied() {
    // Data at the front of a longer range that is looked at, or zeroes there.
    for op in [IoOp::Write, IoOp::WriteZeroes] {
        with_rig(|rig| async move {
            if op == IoOp::WriteZeroes {
                let zeroed = rig.disk.discard(0, CLUSTER).await;
                zeroed.expect("a discard");
                rig.target.poke(0, &[1; CLUSTER as usize]);
            }
            let instant = rig.source.snapshot();
            rig.target.hold(Match::op(op).range(0..4096));
            rig.start(rig.spec()).await;
            rig.target.wait_held(1).await;
            rig.write(512 * KIB, 4096, 7).await;
            rig.target.release_all();
            assert_eq!(rig.end().await, None);
            assert!(rig.target.snapshot() == instant);
        });
    }
}

#[test]
fn a_small_write_has_no_more_copied_than_it_must() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.speed = 1;
        let key = rig.start(spec).await;
        rig.act(|jobs| jobs.pause(key));
        rig.wait_for(JobStatus::Paused).await;
        let last = SIZE - CLUSTER;
        rig.target.forget_ended();
        rig.write(last, 4096, 7).await;
        let bytes: u64 = rig
            .target
            .ended()
            .iter()
            .filter(|it| it.op == IoOp::Write)
            .map(|it| it.len)
            .sum();
        assert_eq!(bytes, 4096);
        rig.act(|jobs| jobs.cancel(key, true));
    });
}

#[test]
fn a_dead_target_holds_the_guest_no_longer_than_the_timeout() {
    with_rig(|rig| async move {
        let mut spec = rig.spec();
        spec.policy = CbwPolicy {
            on_error: OnCbwError::BreakSnapshot,
            timeout: Some(Duration::from_millis(10)),
        };
        rig.target.hold(Match::any());
        rig.start(spec).await;
        rig.write(SIZE - 4096, 4096, 7).await;
        rig.target.release_all();
        assert!(rig.end().await.is_some(), "it never ends in success");
        rig.until(|| rig.graph.nodes().len() == 2).await;
        rig.assert_no_traces();
    });
}

#[test]
fn the_target_holds_one_instant_whatever_four_threads_write() {
    for seed in 0..8u64 {
        with_rig(|rig| async move {
            let mut random = seed * 2 + 1;
            let mut next = move |bound: u64| {
                random = random
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (random >> 33) % bound
            };
            rig.start(rig.spec()).await;
            let mut writes = std::collections::VecDeque::new();
            for n in 0..400 {
                let len = 512 << next(5);
                let offset = next((SIZE - len) / 512) * 512;
                let thread = next(4) as usize;
                writes.push_back(rig.begin_write_on(thread, offset, len, n as u8));
                if writes.len() >= 16
                    && let Some(write) = writes.pop_front()
                {
                    write.await.expect("a guest write succeeds");
                }
            }
            for write in writes {
                write.await.expect("a guest write succeeds");
            }
            assert_eq!(rig.end().await, None);
            rig.assert_instant();
        });
    }
}
