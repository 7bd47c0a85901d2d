//! A snapshot of a job whose target has no clusters of its own: a request has no more
//! copied than it changes. What users see of clusters stays as it is.

use super::tests::{Rig, child, run, settle};
use super::*;
use crate::chain::tests::node;
use crate::drivers::snapshot_access::SnapshotAccessDriver;
use crate::node::NodeOptions;
use crate::test_storage::{CHUNK, Match, TestStorage};

const CLUSTER: u64 = MIN_CLUSTER;
/// The last cluster, and its last chunk, are cut off by the end of the disk.
const SIZE: u64 = 4 * CLUSTER + CHUNK + 512;

fn rig_with(source: TestStorage, target: TestStorage, part: Option<&DirtyBitmap>) -> Rig {
    source.poke(0, &[1; SIZE as usize]);
    let unmap = NodeOptions {
        discard: DiscardMode::Unmap,
        ..NodeOptions::default()
    };
    let file = child(ChildRole::File, &Node::new("src", source.driver(), unmap));
    let kept = child(ChildRole::Target, &node("dst", target.driver()));
    let cluster = cluster_of(&kept.node(), 0);
    let fine = fine_cluster(&file.node(), &kept.node()).unwrap_or(cluster);
    let account = SnapshotAccount::fine(SIZE, cluster, fine, part).unwrap();
    let kept = Target::Child(kept);
    let driver = CopyBeforeWriteDriver::with_target(file, kept, account, CbwPolicy::default());
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
    rig_with(TestStorage::new(SIZE), TestStorage::new(SIZE), None)
}

impl Rig {
    /// Where the target has what the disk held: start and end of each run.
    fn saved(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for at in (0..SIZE).step_by(512) {
            let bytes = self.target.peek(at, 512);
            assert!(bytes.iter().all(|byte| *byte == bytes[0]));
            match ranges.last_mut() {
                _ if bytes[0] == 0 => {}
                Some((_, end)) if *end == at => *end = at + 512,
                _ => ranges.push((at, at + 512)),
            }
        }
        ranges
    }

    /// The whole snapshot is what the disk held.
    async fn assert_old(&self) {
        let bytes = self.begin_read(0, SIZE).await.unwrap();
        assert!(bytes.iter().all(|byte| *byte == 1));
    }
}

#[test]
fn a_small_write_has_no_more_copied_than_it_changes() {
    run(async {
        let rig = rig();
        rig.write(CLUSTER + CHUNK, 2).await;
        assert_eq!(rig.saved(), [(CLUSTER + CHUNK, CLUSTER + 2 * CHUNK)]);
        assert_eq!(rig.snapshot.pending_bytes(), SIZE - CHUNK);
        rig.target.forget_ended();
        rig.write(CLUSTER + CHUNK, 3).await;
        assert!(rig.target.ended().is_empty(), "it is copied once");
        rig.write(CLUSTER + 2 * CHUNK, 3).await;
        assert_eq!(rig.saved(), [(CLUSTER + CHUNK, CLUSTER + 3 * CHUNK)]);
        rig.assert_old().await;
    });
}

#[test]
fn zeroes_and_discards_that_are_not_aligned_are_rounded_out() {
    run(async {
        let rig = rig();
        let zeroes = ZeroFlags::default();
        let start = CHUNK - 512;
        rig.filter.write_zeroes(start, 1024, zeroes).await.unwrap();
        assert_eq!(rig.saved(), [(0, 2 * CHUNK)]);
        let start = CLUSTER + CHUNK + 512;
        let discarded = rig.filter.driver().discard(start, 2 * CHUNK).await;
        discarded.unwrap();
        let end = CLUSTER + 4 * CHUNK;
        assert_eq!(rig.saved(), [(0, 2 * CHUNK), (CLUSTER + CHUNK, end)]);
        rig.assert_old().await;
    });
}

#[test]
fn the_end_of_the_disk_may_cut_a_chunk_off() {
    run(async {
        let rig = rig();
        assert_eq!(rig.snapshot.pending_bytes(), SIZE);
        let zeroes = ZeroFlags::default();
        rig.filter
            .write_zeroes(SIZE - 512, 512, zeroes)
            .await
            .unwrap();
        assert_eq!(rig.saved(), [(SIZE - 512, SIZE)]);
        assert_eq!(rig.snapshot.pending_bytes(), SIZE - 512);
        rig.filter.write_zeroes(0, SIZE, zeroes).await.unwrap();
        assert!(rig.snapshot.is_complete());
        assert_eq!(rig.saved(), [(0, SIZE)]);
        rig.assert_old().await;
    });
}

#[test]
fn who_copies_the_rest_of_a_cluster_skips_what_is_saved_of_it() {
    run(async {
        let rig = rig();
        rig.write(CHUNK, 2).await;
        let first = rig.snapshot.claim(0..CLUSTER).unwrap();
        assert_eq!(first.range(), 0..CHUNK);
        let rest = rig.snapshot.claim(0..CLUSTER).unwrap();
        assert_eq!(rest.range(), 2 * CHUNK..CLUSTER);
        // A write beside what is in flight does not wait for it, one to it does.
        let copied = rig.begin_write(CHUNK, 3);
        let busy = rig.begin_write(CLUSTER - CHUNK, 3);
        copied.await.unwrap();
        settle().await;
        assert!(!busy.is_finished());
        assert_eq!(rig.source.peek(CLUSTER - CHUNK, 1), [1]);
        rest.copied_to(CLUSTER - CHUNK);
        busy.await.unwrap();
        assert_eq!(
            rig.saved(),
            [(CHUNK, 2 * CHUNK), (CLUSTER - CHUNK, CLUSTER)],
            "what was given back the write has saved itself"
        );
        drop(first);
        assert_eq!(rig.snapshot.claim(0..CLUSTER).unwrap().range(), 0..CHUNK);
    });
}

#[test]
fn writes_to_neighbours_in_one_cluster_do_not_wait_for_each_other() {
    run(async {
        let rig = rig();
        rig.target.hold(Match::op(IoOp::Write).range(0..512));
        let held = rig.begin_write(0, 2);
        rig.target.wait_held(1).await;
        rig.write(CHUNK, 3).await;
        settle().await;
        assert!(!held.is_finished());
        rig.target.release_all();
        held.await.unwrap();
        rig.assert_old().await;
    });
}

#[test]
fn a_bitmap_and_discards_of_the_snapshot_count_in_whole_clusters() {
    run(async {
        let part = DirtyBitmap::new(SIZE, 512).unwrap();
        part.set(2 * CLUSTER + 512, 1);
        part.set(3 * CLUSTER, CHUNK);
        let rig = rig_with(TestStorage::new(SIZE), TestStorage::new(SIZE), Some(&part));
        assert_eq!(rig.snapshot.pending_bytes(), 2 * CLUSTER);
        let whole = rig.begin_read(2 * CLUSTER, 2 * CLUSTER).await.unwrap();
        assert!(whole.iter().all(|byte| *byte == 1));
        let beside = rig.begin_read(2 * CLUSTER - 512, 512).await;
        assert_eq!(beside.unwrap_err().errno, libc::EACCES);
        // What a discard does not fill stays.
        let snapshot = rig.access.driver();
        snapshot
            .discard(2 * CLUSTER, CLUSTER - CHUNK)
            .await
            .unwrap();
        assert_eq!(rig.seen(2 * CLUSTER).await, 1);
        snapshot
            .discard(2 * CLUSTER, CLUSTER + CHUNK)
            .await
            .unwrap();
        let gone = rig.begin_read(3 * CLUSTER - 512, 512).await;
        assert_eq!(gone.unwrap_err().errno, libc::EACCES);
        assert_eq!(rig.seen(3 * CLUSTER).await, 1);
        assert_eq!(rig.snapshot.pending_bytes(), CLUSTER);
    });
}

#[test]
fn targets_with_clusters_or_larger_requests_get_those() {
    run(async {
        let limits = |cluster_size, request_alignment| Limits {
            cluster_size,
            request_alignment,
            ..Limits::default()
        };
        for (limits, cluster) in [
            (limits(Some(CLUSTER as u32), 512), CLUSTER),
            (limits(Some(512), 512), CLUSTER),
            (limits(None, 16384), 16384),
            (limits(None, 512), CHUNK),
        ] {
            let target = TestStorage::with_limits(SIZE, limits);
            let rig = rig_with(TestStorage::new(SIZE), target, None);
            assert_eq!(rig.snapshot.cluster(), cluster);
        }
    });
}
