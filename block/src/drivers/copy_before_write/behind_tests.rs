//! Saving behind the guest's back: a save is held or fails, and what is to happen meanwhile
//! happens.

use super::tests::{Rig, child, run, settle};
use super::*;
use crate::chain::tests::node;
use crate::drivers::snapshot_access::SnapshotAccessDriver;
use crate::node::NodeOptions;
use crate::test_storage::{CHUNK, Match, TestStorage};

const CLUSTER: u64 = MIN_CLUSTER;
const SIZE: u64 = 256 * CLUSTER;
/// Clusters that fit in memory.
const ROOM: u64 = (1 << 20) / CLUSTER;

/// Of a target that has not shown anything yet.
fn new_rig(policy: CbwPolicy) -> Rig {
    let (source, target) = (TestStorage::new(SIZE), TestStorage::new(SIZE));
    source.poke(0, &[1; SIZE as usize]);
    let unmap = NodeOptions {
        discard: DiscardMode::Unmap,
        ..NodeOptions::default()
    };
    let file = child(ChildRole::File, &Node::new("src", source.driver(), unmap));
    let kept = Node::new("dst", target.driver(), unmap);
    let kept = Target::Child(child(ChildRole::Target, &kept));
    let account = SnapshotAccount::new(SIZE, CLUSTER, None).unwrap();
    let driver = CopyBeforeWriteDriver::with_target(file, kept, account, policy, Saving::Behind);
    let snapshot = Arc::clone(driver.kept());
    let filter = node("cbw", Box::new(driver));
    let access = SnapshotAccessDriver::new(child(ChildRole::File, &filter));
    Rig {
        source,
        target,
        snapshot,
        access: node("acc", Box::new(access)),
        filter,
    }
}

fn rig() -> Rig {
    let rig = new_rig(CbwPolicy::default());
    rig.snapshot.behind.prove();
    rig
}

impl Rig {
    /// What is held at the target, and is let go on.
    async fn release_saves(&self) {
        self.target.stop_holding();
        self.target.release_all();
        let all = || self.snapshot.pending_bytes() == self.snapshot.todo_bytes();
        self.snapshot.until(0..SIZE, all).await;
    }
}

#[test]
fn a_write_goes_on_while_what_it_changes_is_on_its_way() {
    run(async {
        let rig = rig();
        rig.target.hold(Match::op(IoOp::Write));
        rig.write(0, 2).await;
        rig.target.wait_held(1).await;
        assert_eq!(rig.source.peek(0, 1), [2]);
        // And so does the next one to the same cluster.
        rig.write(0, 3).await;
        assert_eq!(rig.target.held(), 1);
        rig.release_saves().await;
        assert_eq!(rig.target.peek(0, CLUSTER as usize), [1; CLUSTER as usize]);
        assert_eq!(rig.seen(0).await, 1);
    });
}

#[test]
fn a_target_has_to_show_first_that_it_takes_what_it_gets() {
    run(async {
        let rig = new_rig(CbwPolicy::default());
        let mut cluster = 0;
        while !rig.snapshot.behind.may_release() {
            rig.target.hold(Match::op(IoOp::Write));
            let write = rig.begin_write(cluster * CLUSTER, 2);
            rig.target.wait_held(1).await;
            settle().await;
            assert!(!write.is_finished(), "cluster {cluster}");
            rig.target.release_all();
            write.await.unwrap();
            cluster += 1;
        }
        assert!(cluster > 1);
        rig.target.hold(Match::op(IoOp::Write));
        rig.write(cluster * CLUSTER, 2).await;
        rig.release_saves().await;
    });
}

#[test]
fn what_is_in_memory_is_not_copied_yet_and_who_reads_it_waits() {
    run(async {
        let rig = rig();
        rig.target.hold(Match::op(IoOp::Write));
        rig.write(CLUSTER, 2).await;
        rig.target.wait_held(1).await;
        assert_eq!(rig.snapshot.pending_bytes(), SIZE);
        assert_eq!(rig.snapshot.todo_bytes(), SIZE - CLUSTER);
        assert!(rig.snapshot.not_copied().unwrap().is_dirty(CLUSTER));
        // Also of a read that begins before it, and of block status.
        let read = rig.begin_read(0, 3 * CLUSTER);
        let access = Arc::clone(&rig.access);
        let status = runtime::spawn_local(async move { access.block_status(CLUSTER, 512).await });
        settle().await;
        assert!(!read.is_finished() && !status.is_finished());
        assert_eq!(rig.seen(0).await, 1, "elsewhere nobody waits");
        rig.release_saves().await;
        assert!(read.await.unwrap().iter().all(|byte| *byte == 1));
        assert!(status.await.unwrap().flags.data);
        assert_eq!(rig.snapshot.pending_bytes(), SIZE - CLUSTER);
    });
}

#[test]
fn who_writes_more_than_there_is_room_for_waits_until_some_is_saved() {
    run(async {
        let rig = rig();
        rig.target.hold(Match::op(IoOp::Write));
        for cluster in 0..ROOM {
            rig.write(cluster * CLUSTER, 2).await;
        }
        rig.target.wait_held(ROOM as usize).await;
        let write = rig.begin_write(ROOM * CLUSTER, 2);
        settle().await;
        assert!(!write.is_finished());
        assert!(rig.snapshot.holds_guests());
        assert!(rig.target.release_one());
        write.await.unwrap();
        assert!(!rig.snapshot.holds_guests());
        rig.release_saves().await;
        for cluster in 0..=ROOM {
            assert_eq!(rig.target.peek(cluster * CLUSTER, 1), [1]);
        }
    });
}

#[test]
fn who_waits_for_room_too_long_is_told() {
    run(async {
        let policy = CbwPolicy {
            timeout: Some(Duration::from_millis(50)),
            ..CbwPolicy::default()
        };
        let rig = new_rig(policy);
        rig.snapshot.behind.prove();
        rig.target.hold(Match::op(IoOp::Write));
        for cluster in 0..ROOM {
            rig.write(cluster * CLUSTER, 2).await;
        }
        let error = rig.begin_write(ROOM * CLUSTER, 2).await.unwrap_err();
        assert_eq!(error.errno, libc::ETIMEDOUT);
        assert_eq!(rig.source.peek(ROOM * CLUSTER, 1), [1]);
        rig.release_saves().await;
        assert!(rig.snapshot.broken().is_none());
    });
}

#[test]
fn what_fails_is_kept_and_requests_wait_again() {
    run(async {
        let rig = rig();
        rig.target.fail(Match::op(IoOp::Write), libc::ENOSPC);
        rig.write(0, 2).await;
        while rig.snapshot.behind.may_release() {
            settle().await;
        }
        // The guest is told from now on, as it was asked for.
        let error = rig.begin_write(CLUSTER, 2).await.unwrap_err();
        assert_eq!(error.errno, libc::ENOSPC);
        assert_eq!(rig.source.peek(CLUSTER, 1), [1]);
        assert!(rig.snapshot.broken().is_none());
        // Who copies the rest is told when it has failed again.
        let failure = loop {
            match rig.snapshot.take_save_failure() {
                Some(failure) => break failure,
                None => runtime::sleep(Duration::from_millis(10)).await,
            }
        };
        assert_eq!((failure.errno, failure.offset), (libc::ENOSPC, 0));
        rig.target.stop_failing();
        assert_eq!(rig.seen(0).await, 1);
        assert_eq!(rig.target.peek(0, CLUSTER as usize), [1; CLUSTER as usize]);
        assert!(rig.snapshot.take_save_failure().is_none());
    });
}

#[test]
fn what_fails_once_is_told_to_nobody() {
    run(async {
        let rig = rig();
        rig.target.fail_once(Match::op(IoOp::Write), libc::EIO);
        rig.write(0, 2).await;
        assert_eq!(rig.seen(0).await, 1);
        assert!(rig.snapshot.take_save_failure().is_none());
        assert_eq!(rig.target.peek(0, 1), [1]);
    });
}

#[test]
fn what_fails_breaks_a_snapshot_that_is_to_be_broken_then() {
    run(async {
        let policy = CbwPolicy {
            on_error: OnCbwError::BreakSnapshot,
            timeout: None,
        };
        let rig = new_rig(policy);
        rig.snapshot.behind.prove();
        rig.target.fail(Match::op(IoOp::Write), libc::ENOSPC);
        rig.write(0, 2).await;
        let broken = || rig.snapshot.broken().is_some();
        rig.snapshot.until(0..SIZE, broken).await;
        assert_eq!(rig.snapshot.broken(), Some(libc::ENOSPC));
        assert!(!rig.snapshot.is_complete());
        assert_eq!(
            rig.begin_read(0, 512).await.unwrap_err().errno,
            libc::EACCES
        );
    });
}

#[test]
fn the_end_of_the_snapshot_is_the_end_of_what_is_tried_again() {
    run(async {
        let rig = rig();
        rig.target.fail(Match::op(IoOp::Write), libc::EIO);
        rig.write(0, 2).await;
        rig.target.wait_ended(1).await;
        let read = rig.begin_read(0, 512);
        settle().await;
        assert!(!read.is_finished());
        rig.snapshot.end();
        assert_eq!(read.await.unwrap_err().errno, libc::EACCES);
        settle().await;
        rig.target.stop_failing();
        rig.target.forget_ended();
        assert!(rig.snapshot.not_copied().unwrap().is_dirty(0));
        runtime::sleep(Duration::from_millis(300)).await;
        assert!(rig.target.ended().is_empty(), "nobody wants it any more");
        assert!(rig.snapshot.broken().is_none());
    });
}

#[test]
fn what_is_taken_out_of_the_snapshot_meanwhile_is_discarded_once_it_is_saved() {
    run(async {
        let rig = rig();
        rig.target.hold(Match::op(IoOp::Write));
        rig.write(0, 2).await;
        rig.target.wait_held(1).await;
        rig.snapshot.discard(0, CLUSTER).await.unwrap();
        rig.release_saves().await;
        let discards = || {
            let ended = rig.target.ended();
            ended.iter().filter(|it| it.op == IoOp::Discard).count()
        };
        while discards() < 2 {
            settle().await;
        }
        assert_eq!(rig.target.peek(0, 1), [0]);
    });
}

#[test]
fn a_long_request_waits_for_its_copies() {
    run(async {
        let rig = rig();
        rig.target.hold(Match::op(IoOp::Write));
        let filter = Arc::clone(&rig.filter);
        let zeroes = runtime::spawn_local(async move {
            let flags = ZeroFlags::default();
            filter.write_zeroes(0, 4 * CLUSTER, flags).await
        });
        rig.target.wait_held(1).await;
        settle().await;
        assert!(!zeroes.is_finished());
        assert_eq!(rig.source.peek(0, CHUNK as usize), [1; CHUNK as usize]);
        rig.release_saves().await;
        zeroes.await.unwrap();
    });
}
