//! The filter and its snapshot: a request is held at the moment in question, what is to
//! happen meanwhile happens, and the request goes on.

use std::future::Future;

use super::*;
use crate::buffer::AlignedBuffer;
use crate::chain::tests::{layer, node};
use crate::driver::ChildRole;
use crate::drivers::snapshot_access::SnapshotAccessDriver;
use crate::node::NodeOptions;
use crate::runtime::{EventLoop, LocalTask, spawn_local};
use crate::test_storage::{CHUNK, Match, TestStorage};

const CLUSTER: u64 = MIN_CLUSTER;
const SIZE: u64 = 32 * CLUSTER;
const LIMIT: Duration = Duration::from_secs(60);

pub(super) struct Rig {
    pub(super) source: TestStorage,
    pub(super) target: TestStorage,
    pub(super) filter: Arc<Node>,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) access: Arc<Node>,
}

pub(super) fn child(role: ChildRole, node: &Arc<Node>) -> Child {
    Child::new(role, Arc::clone(node))
}

fn rig_with(policy: CbwPolicy, part: Option<&DirtyBitmap>) -> Rig {
    let (source, target) = (TestStorage::new(SIZE), TestStorage::new(SIZE));
    source.poke(0, &[1; SIZE as usize]);
    let unmap = NodeOptions {
        discard: DiscardMode::Unmap,
        ..NodeOptions::default()
    };
    let file = child(ChildRole::File, &Node::new("src", source.driver(), unmap));
    let kept = child(ChildRole::Target, &node("dst", target.driver()));
    let driver = CopyBeforeWriteDriver::new(file, kept, policy, part).unwrap();
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
    rig_with(CbwPolicy::default(), None)
}

pub(super) fn run<Fut: Future<Output = ()>>(test: Fut) {
    let test = async {
        let limit = std::pin::pin!(runtime::sleep(LIMIT));
        match select(std::pin::pin!(test), limit).await {
            Either::Left(_) => {}
            Either::Right(_) => panic!("the test hangs"),
        }
    };
    EventLoop::new("test").unwrap().block_on(test);
}

impl Rig {
    pub(super) fn begin_write(&self, offset: u64, byte: u8) -> LocalTask<Result<(), IoError>> {
        let filter = Arc::clone(&self.filter);
        spawn_local(async move {
            let iov = AlignedBuffer::new(CHUNK as usize).io_vec(CHUNK as usize);
            iov.fill(byte);
            filter.write(offset, iov, WriteFlags::default()).await
        })
    }

    pub(super) async fn write(&self, offset: u64, byte: u8) {
        self.begin_write(offset, byte).await.unwrap();
    }

    pub(super) fn begin_read(&self, offset: u64, len: u64) -> LocalTask<Result<Vec<u8>, IoError>> {
        let access = Arc::clone(&self.access);
        spawn_local(async move {
            let iov = AlignedBuffer::new(len as usize).io_vec(len as usize);
            access.read(offset, iov.clone()).await?;
            let mut bytes = vec![0; len as usize];
            iov.copy_to(0, &mut bytes);
            Ok(bytes)
        })
    }

    /// What the snapshot has there.
    pub(super) async fn seen(&self, offset: u64) -> u8 {
        self.begin_read(offset, 512).await.unwrap()[0]
    }
}

/// Lets tasks go on that can.
pub(super) async fn settle() {
    for _ in 0..10 {
        runtime::yield_now().await;
    }
}

#[test]
fn what_is_written_over_is_in_the_target_before_the_source_changes() {
    run(async {
        let rig = rig();
        rig.source.hold(Match::op(IoOp::Write));
        let write = rig.begin_write(CLUSTER + CHUNK, 2);
        rig.source.wait_held(1).await;
        assert_eq!(
            rig.target.peek(CLUSTER, CLUSTER as usize),
            vec![1; CLUSTER as usize]
        );
        assert_eq!(rig.target.peek(0, 1), [0], "no more than the cluster");
        rig.source.release_all();
        write.await.unwrap();
        assert_eq!(rig.source.peek(CLUSTER + CHUNK, 1), [2]);
        assert_eq!(rig.seen(CLUSTER + CHUNK).await, 1);
        assert_eq!(rig.seen(0).await, 1);
    });
}

#[test]
fn a_cluster_is_copied_once_and_free_after_that() {
    run(async {
        let rig = rig();
        rig.write(0, 2).await;
        rig.target.forget_ended();
        rig.source.forget_ended();
        rig.write(CHUNK, 3).await;
        assert!(rig.target.ended().is_empty());
        assert_eq!(rig.source.ended().len(), 1, "the write itself");
    });
}

#[test]
fn zero_writes_and_discards_are_preceded_by_copies_too() {
    run(async {
        let rig = rig();
        rig.filter
            .write_zeroes(0, CHUNK, ZeroFlags::default())
            .await
            .unwrap();
        rig.filter
            .driver()
            .discard(CLUSTER, 2 * CLUSTER)
            .await
            .unwrap();
        for cluster in 0..3 {
            assert_eq!(rig.target.peek(cluster * CLUSTER, 1), [1]);
            assert_eq!(rig.seen(cluster * CLUSTER).await, 1);
        }
    });
}

#[test]
fn a_discard_that_the_source_ignores_has_nothing_copied() {
    run(async {
        let (source, target) = (TestStorage::new(SIZE), TestStorage::new(SIZE));
        source.poke(0, &[1; SIZE as usize]);
        target.fail(Match::op(IoOp::Write), libc::ENOSPC);
        let file = child(ChildRole::File, &node("src", source.driver()));
        let kept = child(ChildRole::Target, &node("dst", target.driver()));
        let driver = CopyBeforeWriteDriver::new(file, kept, CbwPolicy::default(), None).unwrap();
        driver.discard(0, CLUSTER).await.unwrap();
        assert!(target.ended().is_empty() && source.ended().is_empty());
    });
}

#[test]
fn of_two_writes_to_one_cluster_the_second_waits_for_the_copy() {
    run(async {
        let rig = rig();
        rig.target.hold(Match::op(IoOp::Write));
        let first = rig.begin_write(0, 2);
        rig.target.wait_held(1).await;
        let second = rig.begin_write(CHUNK, 3);
        let other = rig.begin_write(CLUSTER, 4);
        rig.target.wait_held(2).await;
        settle().await;
        assert!(!second.is_finished() && !first.is_finished());
        assert_eq!(rig.target.held(), 2, "one copy for each cluster");
        rig.target.release_all();
        first.await.unwrap();
        second.await.unwrap();
        other.await.unwrap();
        assert_eq!(rig.seen(0).await, 1);
    });
}

#[test]
fn the_failure_of_one_requests_copy_is_not_the_others() {
    run(async {
        let rig = rig();
        rig.target.hold(Match::op(IoOp::Write));
        rig.target.fail_once(Match::op(IoOp::Write), libc::EIO);
        let first = rig.begin_write(0, 2);
        rig.target.wait_held(1).await;
        let second = rig.begin_write(CHUNK, 3);
        settle().await;
        rig.target.release_all();
        assert_eq!(first.await.unwrap_err().errno, libc::EIO);
        second.await.unwrap();
        assert_eq!(rig.source.peek(0, 1), [1], "the first has not happened");
        assert_eq!(rig.seen(CHUNK).await, 1);
        assert!(rig.snapshot.broken().is_none());
    });
}

#[test]
fn a_broken_snapshot_lets_the_guest_go_on_and_is_never_read_again() {
    run(async {
        let policy = CbwPolicy {
            on_error: OnCbwError::BreakSnapshot,
            timeout: None,
        };
        let rig = rig_with(policy, None);
        rig.target.fail_once(Match::op(IoOp::Write), libc::ENOSPC);
        rig.write(0, 2).await;
        assert_eq!(rig.source.peek(0, 1), [2]);
        assert_eq!(rig.snapshot.broken(), Some(libc::ENOSPC));
        for offset in [0, CLUSTER] {
            let error = rig.begin_read(offset, 512).await.unwrap_err();
            assert_eq!(error.errno, libc::EACCES);
            let status = rig.access.block_status(offset, 512).await;
            assert_eq!(status.unwrap_err().errno, libc::EACCES);
        }
        rig.target.forget_ended();
        rig.write(CLUSTER, 3).await;
        assert!(rig.target.ended().is_empty(), "nothing is copied any more");
    });
}

#[test]
fn a_read_under_way_fails_if_the_snapshot_breaks_meanwhile() {
    run(async {
        let policy = CbwPolicy {
            on_error: OnCbwError::BreakSnapshot,
            timeout: None,
        };
        let rig = rig_with(policy, None);
        rig.source.hold(Match::op(IoOp::Read).range(0..512));
        let read = rig.begin_read(0, 512);
        rig.source.wait_held(1).await;
        rig.target.fail(Match::op(IoOp::Write), libc::EIO);
        rig.write(CLUSTER, 3).await;
        rig.source.release_all();
        assert_eq!(read.await.unwrap_err().errno, libc::EACCES);
    });
}

#[test]
fn a_write_waits_for_a_read_of_the_source_and_reads_overlap() {
    run(async {
        let rig = rig();
        rig.source
            .hold(Match::op(IoOp::Read).range(CHUNK..CHUNK + 512));
        let reads = [rig.begin_read(CHUNK, 512), rig.begin_read(CHUNK, 1024)];
        rig.source.wait_held(2).await;
        rig.source.stop_holding();
        let write = rig.begin_write(0, 2);
        // Elsewhere nobody waits.
        rig.write(CLUSTER, 3).await;
        settle().await;
        assert!(!write.is_finished());
        assert_eq!(rig.source.peek(0, 1), [1]);
        while rig.source.release_one() {}
        write.await.unwrap();
        for read in reads {
            assert!(read.await.unwrap().iter().all(|byte| *byte == 1));
        }
        assert_eq!(rig.source.peek(0, 1), [2]);
    });
}

#[test]
fn a_read_of_the_source_holds_no_write_to_what_is_copied() {
    run(async {
        let rig = rig();
        rig.write(CLUSTER, 2).await;
        rig.source.hold(Match::op(IoOp::Read).range(0..512));
        let read = rig.begin_read(0, 3 * CLUSTER);
        rig.source.wait_held(1).await;
        rig.write(CLUSTER + CHUNK, 3).await;
        rig.write(2 * CLUSTER, 3).await;
        rig.source.release_all();
        assert!(read.await.unwrap().iter().all(|byte| *byte == 1));
    });
}

#[test]
fn a_write_that_was_held_by_the_end_of_a_long_read_goes_on_when_that_is_not_needed() {
    run(async {
        let rig = rig();
        let whole = rig.snapshot.look(0..2 * CLUSTER).ok().unwrap();
        assert_eq!(whole.0, 0..2 * CLUSTER);
        let write = rig.begin_write(CLUSTER, 2);
        settle().await;
        assert!(!write.is_finished());
        // The second cluster is copied by now.
        let front = rig.snapshot.look(0..2 * CLUSTER).ok().unwrap();
        assert_eq!(front.0, 0..CLUSTER);
        drop(whole);
        write.await.unwrap();
        drop(front);
    });
}

#[test]
fn a_snapshot_that_has_ended_cannot_be_read() {
    run(async {
        let rig = rig();
        rig.source.hold(Match::op(IoOp::Read).range(0..512));
        let read = rig.begin_read(0, 512);
        rig.source.wait_held(1).await;
        rig.snapshot.end();
        rig.write(0, 2).await;
        rig.source.release_all();
        assert_eq!(read.await.unwrap_err().errno, libc::EACCES);
        let error = rig.begin_read(CLUSTER, 512).await.unwrap_err();
        assert_eq!(error.errno, libc::EACCES);
        let status = rig.access.block_status(0, 512).await;
        assert_eq!(status.unwrap_err().errno, libc::EACCES);
    });
}

#[test]
fn a_read_over_copied_and_other_clusters_sees_one_instant() {
    run(async {
        let rig = rig();
        rig.write(CLUSTER, 2).await;
        rig.write(3 * CLUSTER + CHUNK, 2).await;
        let bytes = rig.begin_read(512, SIZE - 512).await.unwrap();
        assert!(bytes.iter().all(|byte| *byte == 1));
    });
}

#[test]
fn a_dead_target_holds_a_request_no_longer_than_its_timeout() {
    for on_error in [OnCbwError::BreakGuestWrite, OnCbwError::BreakSnapshot] {
        run(async {
            let timeout = Some(Duration::from_millis(1));
            let rig = rig_with(CbwPolicy { on_error, timeout }, None);
            rig.target.hold(Match::any());
            let result = rig.begin_write(0, 2).await;
            match on_error {
                OnCbwError::BreakGuestWrite => {
                    assert_eq!(result.unwrap_err().errno, libc::ETIMEDOUT);
                    assert_eq!(rig.source.peek(0, 1), [1]);
                    assert!(rig.snapshot.broken().is_none());
                }
                OnCbwError::BreakSnapshot => {
                    result.unwrap();
                    assert_eq!(rig.source.peek(0, 1), [2]);
                    assert_eq!(rig.snapshot.broken(), Some(libc::ETIMEDOUT));
                }
            }
            assert!(rig.filter.driver().drained_poll(), "the target is in use");
            rig.target.release_all();
            while rig.filter.driver().drained_poll() {
                runtime::sleep(Duration::from_millis(1)).await;
            }
            // What was given up has been done all the same, and once.
            rig.write(CHUNK, 3).await;
        });
    }
}

#[test]
fn who_gives_up_waiting_for_the_copy_of_another_leaves_nothing_behind() {
    run(async {
        let policy = CbwPolicy {
            timeout: Some(Duration::from_millis(1)),
            ..CbwPolicy::default()
        };
        let rig = rig_with(policy, None);
        rig.target.hold(Match::any());
        rig.begin_write(0, 2).await.unwrap_err();
        for _ in 0..10 {
            let again = rig.begin_write(CHUNK, 3).await;
            assert_eq!(again.unwrap_err().errno, libc::ETIMEDOUT);
        }
        settle().await;
        assert_eq!(rig.snapshot.waiters(), 0);
        rig.target.release_all();
    });
}

#[test]
fn copies_have_a_bounded_amount_of_memory_in_flight() {
    for ends in [false, true] {
        run(async {
            let rig = rig();
            rig.target.hold(Match::op(IoOp::Write));
            let clusters = SIZE / CLUSTER;
            let writes: Vec<_> = (0..clusters)
                .map(|cluster| rig.begin_write(cluster * CLUSTER, 2))
                .collect();
            let most = (1 << 20) / CLUSTER as usize;
            rig.target.wait_held(most).await;
            settle().await;
            assert_eq!(rig.target.held(), most);
            if ends {
                rig.snapshot.end();
                for write in writes {
                    write.await.unwrap();
                }
                assert_eq!(rig.target.held(), most, "nothing is begun any more");
                rig.target.release_all();
                return;
            }
            rig.target.release_all();
            for write in writes {
                write.await.unwrap();
            }
            for cluster in 0..clusters {
                assert_eq!(rig.target.peek(cluster * CLUSTER, 1), [1]);
            }
        });
    }
}

#[test]
fn the_size_stays_as_long_as_the_snapshot_is_needed() {
    run(async {
        let rig = rig();
        for size in [CLUSTER, 2 * SIZE] {
            let error = rig.filter.driver().resize(size).await.unwrap_err();
            assert_eq!(error.errno, libc::EBUSY);
        }
        assert_eq!(rig.filter.size(), SIZE);
        rig.snapshot.end();
        rig.filter.driver().resize(CLUSTER).await.unwrap();
        assert_eq!(rig.filter.size(), CLUSTER);
    });
}

#[test]
fn what_a_bitmap_leaves_out_is_neither_copied_nor_read() {
    run(async {
        let part = DirtyBitmap::new(SIZE, 4096).unwrap();
        part.set(CLUSTER + 4096, 1);
        let rig = rig_with(CbwPolicy::default(), Some(&part));
        assert_eq!(rig.snapshot.pending_bytes(), CLUSTER);
        rig.write(0, 2).await;
        assert!(rig.target.ended().is_empty());
        assert_eq!(rig.seen(CLUSTER).await, 1);
        for (offset, len) in [(0, 512), (CLUSTER, CLUSTER + 512)] {
            let error = rig.begin_read(offset, len).await.unwrap_err();
            assert_eq!(error.errno, libc::EACCES);
        }
    });
}

#[test]
fn what_is_discarded_of_the_snapshot_is_not_copied_any_more() {
    run(async {
        let rig = rig();
        rig.access
            .driver()
            .discard(CHUNK, 2 * CLUSTER)
            .await
            .unwrap();
        rig.write(CLUSTER, 2).await;
        assert_eq!(rig.target.peek(CLUSTER, 1), [0]);
        assert_eq!(
            rig.begin_read(CLUSTER, 512).await.unwrap_err().errno,
            libc::EACCES
        );
        // The clusters that it does not fill stay.
        rig.write(0, 2).await;
        rig.write(2 * CLUSTER, 2).await;
        assert_eq!((rig.seen(0).await, rig.seen(2 * CLUSTER).await), (1, 1));
    });
}

#[test]
fn the_snapshot_cannot_be_written() {
    run(async {
        let rig = rig();
        let iov = AlignedBuffer::new(512).io_vec(512);
        let written = rig.access.write(0, iov, WriteFlags::default()).await;
        assert_eq!(written.unwrap_err().errno, libc::EOPNOTSUPP);
        let zeroed = rig.access.write_zeroes(0, 512, ZeroFlags::default()).await;
        zeroed.unwrap_err();
        assert_eq!(rig.source.peek(0, 1), [1]);
    });
}

#[test]
fn zeroes_are_saved_as_zeroes() {
    run(async {
        let rig = rig();
        rig.source.poke(0, &[0; CLUSTER as usize]);
        rig.write(0, 2).await;
        assert_eq!(rig.seen(0).await, 0);
        let ended = rig.target.ended();
        assert!(!ended.iter().any(|it| it.op == IoOp::Write));
        assert!(ended.iter().any(|it| it.op == IoOp::WriteZeroes));
    });
}

#[test]
fn a_claimed_cluster_goes_back_if_it_is_not_copied() {
    run(async {
        let rig = rig();
        let claim = rig.snapshot.claim(0..2 * CLUSTER).unwrap();
        assert_eq!(claim.range(), 0..2 * CLUSTER);
        assert!(rig.snapshot.claim(0..2 * CLUSTER).is_none());
        let write = rig.begin_write(CLUSTER, 2);
        settle().await;
        assert!(!write.is_finished());
        claim.copied_to(CLUSTER);
        write.await.unwrap();
        assert_eq!(
            rig.target.peek(CLUSTER, 1),
            [1],
            "the write has copied it itself"
        );
        assert_eq!(rig.snapshot.pending_bytes(), SIZE - 2 * CLUSTER);
    });
}

#[test]
fn only_what_the_topmost_layer_has_is_copied_if_asked_for() {
    let base = layer("base", 64, &[], None);
    let own: Vec<u64> = (16..32).collect();
    let top = layer("top", 64, &own, Some(&base));
    run(async {
        let target = TestStorage::new(top.size());
        let kept = child(ChildRole::Target, &node("dst", target.driver()));
        let file = child(ChildRole::File, &top);
        let driver = CopyBeforeWriteDriver::new(file, kept, CbwPolicy::default(), None).unwrap();
        let snapshot = Arc::clone(driver.kept());
        snapshot.only_allocated();
        let filter = node("cbw", Box::new(driver));
        for cluster in [0, 1] {
            let iov = AlignedBuffer::new(512).io_vec(512);
            filter
                .write(cluster * CLUSTER, iov, WriteFlags::default())
                .await
                .unwrap();
        }
        assert_eq!(snapshot.pending_bytes(), top.size() - 2 * CLUSTER);
        let of_target = target.ended();
        let written = of_target.iter().filter(|it| it.op == IoOp::Write);
        assert_eq!(written.map(|it| it.offset).collect::<Vec<_>>(), [CLUSTER]);
    });
}

#[test]
fn requests_pass_when_the_snapshot_is_not_needed_any_more() {
    run(async {
        let rig = rig();
        rig.target.hold(Match::op(IoOp::Write));
        let first = rig.begin_write(0, 2);
        rig.target.wait_held(1).await;
        let second = rig.begin_write(CHUNK, 3);
        settle().await;
        rig.snapshot.end();
        // Also the one whose own copy is under way.
        first.await.unwrap();
        second.await.unwrap();
        rig.write(CLUSTER, 4).await;
        rig.target.release_all();
    });
}

#[test]
fn what_the_guest_feels_is_noted_as_long_as_somebody_listens() {
    run(async {
        let rig = rig();
        rig.write(0, 2).await;
        assert_eq!(rig.snapshot.latency().take(), None);
        let keeper = shown_snapshot(&rig.access).expect("a snapshot");
        assert!(Arc::ptr_eq(&keeper, &rig.snapshot));
        assert!(shown_snapshot(&rig.filter).is_none());
        let listening = [keeper.listen(), keeper.listen()];
        rig.write(CLUSTER, 2).await;
        rig.write(0, 3).await;
        assert_eq!(keeper.latency().take().map(|felt| felt.count), Some(2));
        for listening in listening {
            rig.write(0, 4).await;
            assert_eq!(keeper.latency().take().map(|felt| felt.count), Some(1));
            drop(listening);
        }
        rig.write(0, 5).await;
        assert_eq!(keeper.latency().take(), None);
    });
}
