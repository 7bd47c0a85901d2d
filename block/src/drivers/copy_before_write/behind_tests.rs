//! Saving behind the guest's back: what is kept is written, or fails, or is not needed any more,
//! at the moment in question.

use super::behind::{Saved, Saves};
use super::copy::Entered;
use super::tests::{Rig, child, run, settle};
use super::*;
use crate::buffer::AlignedBuffer;
use crate::chain::tests::node;
use crate::drivers::file::tests::open_image;
use crate::drivers::snapshot_access::SnapshotAccessDriver;
use crate::node::NodeOptions;
use crate::sync::atomic::AtomicU64;
use crate::test_storage::{CHUNK, Match, TestStorage};

const CLUSTER: u64 = MIN_CLUSTER;
const SIZE: u64 = 256 * CLUSTER;
/// Clusters that fit in memory.
const ROOM: u64 = (1 << 20) / CLUSTER;

/// A filter, a way to its target for whoever saves, and what becomes of requests.
struct Kept {
    rig: Rig,
    kept_in: Arc<Node>,
}

impl std::ops::Deref for Kept {
    type Target = Rig;

    fn deref(&self) -> &Rig {
        &self.rig
    }
}

/// How often a job was told.
#[derive(Default)]
struct Told(AtomicU64);

impl SnapshotObserver for Told {
    fn copied_by_guest(&self, _: u64, _: u64) {}

    fn changed(&self) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// With a target that has not shown anything yet, and a job that takes what there is.
fn new_rig(policy: CbwPolicy) -> Kept {
    let (source, target) = (TestStorage::new(SIZE), TestStorage::new(SIZE));
    source.poke(0, &[1; SIZE as usize]);
    let unmap = NodeOptions {
        discard: DiscardMode::Unmap,
        ..NodeOptions::default()
    };
    let file = child(ChildRole::File, &Node::new("src", source.driver(), unmap));
    let kept_in = Node::new("dst", target.driver(), unmap);
    let kept = child(ChildRole::Target, &kept_in);
    let driver = CopyBeforeWriteDriver::new(file, kept, policy, None).unwrap();
    let snapshot = Arc::clone(driver.kept());
    snapshot.save_behind(true);
    let filter = node("cbw", Box::new(driver));
    let access = SnapshotAccessDriver::new(child(ChildRole::File, &filter));
    let rig = Rig {
        source,
        target,
        snapshot,
        access: node("acc", Box::new(access)),
        filter,
    };
    Kept { rig, kept_in }
}

fn rig_with(policy: CbwPolicy) -> Kept {
    let rig = new_rig(policy);
    rig.snapshot.behind.prove();
    rig
}

fn rig() -> Kept {
    rig_with(CbwPolicy::default())
}

impl Kept {
    async fn write_saves(&self, saves: Saves) -> Saved {
        saves
            .write_to(Entered::Child(Arc::clone(&self.kept_in)))
            .await
    }

    async fn save_all(&self) {
        while let Some(saves) = self.snapshot.take_saves() {
            let saved = self.write_saves(saves).await;
            assert!(saved.error.is_none(), "{saved:?}");
        }
    }

    /// Guests write until no more is kept.
    async fn fill_room(&self) {
        for cluster in 0..ROOM {
            self.write(cluster * CLUSTER, 2).await;
        }
    }
}

#[test]
fn a_write_goes_on_before_the_target_has_what_it_changes() {
    run(async {
        let rig = rig();
        rig.write(0, 2).await;
        assert_eq!(rig.source.peek(0, 1), [2]);
        // And so does the next one to the same cluster.
        rig.write(0, 3).await;
        assert_eq!(rig.target.peek(0, 1), [0]);
        rig.save_all().await;
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
        rig.write(cluster * CLUSTER, 2).await;
        assert!(rig.snapshot.take_saves().is_some());
    });
}

#[test]
fn what_is_in_memory_is_not_copied_yet_and_is_read_there() {
    run(async {
        let rig = rig();
        rig.source.poke(2 * CLUSTER, &[0; CLUSTER as usize]);
        for cluster in 1..4 {
            rig.write(cluster * CLUSTER, 2).await;
        }
        let in_memory = 3 * CLUSTER;
        assert_eq!(rig.snapshot.pending_bytes(), SIZE);
        assert_eq!(rig.snapshot.todo_bytes(), SIZE - in_memory);
        assert!(rig.snapshot.not_copied().unwrap().is_dirty(CLUSTER));
        // From the source, from memory, and from the source again; and not in whole clusters.
        let assert_seen = async || {
            let expected = |cluster: u64| u8::from(cluster != 2);
            let read = rig.begin_read(0, 5 * CLUSTER).await.unwrap();
            for (cluster, bytes) in (0..).zip(read.chunks(CLUSTER as usize)) {
                assert!(
                    bytes.iter().all(|byte| *byte == expected(cluster)),
                    "{cluster}"
                );
            }
            let (start, len) = (CLUSTER + 4096, CLUSTER);
            let read = rig.begin_read(start, len).await.unwrap();
            for (at, byte) in (start..).zip(read) {
                assert_eq!(byte, expected(at / CLUSTER), "{at}");
            }
            for (cluster, zero) in [(1, false), (2, true), (3, false)] {
                let at = cluster * CLUSTER + 512;
                let extent = rig.access.block_status(at, SIZE - at).await.unwrap();
                assert_eq!(
                    (extent.flags.zero, extent.flags.data),
                    (zero, !zero),
                    "{cluster}"
                );
            }
        };
        assert_seen().await;
        // And while it is on its way.
        rig.target.hold(Match::any());
        let saves = rig.snapshot.take_saves().unwrap();
        let mut write = Box::pin(rig.write_saves(saves));
        assert!(futures_util::poll!(write.as_mut()).is_pending());
        assert_seen().await;
        rig.target.stop_holding();
        rig.target.release_all();
        assert!(write.await.error.is_none());
        assert_seen().await;
        assert_eq!(rig.snapshot.pending_bytes(), SIZE - in_memory);
    });
}

#[test]
fn a_buffer_that_somebody_reads_is_not_used_again() {
    run(async {
        let rig = rig();
        rig.write(0, 2).await;
        let (_, content, _) = rig.snapshot.behind.look(512).unwrap();
        rig.save_all().await;
        assert!(rig.snapshot.behind.look(512).is_none());
        for cluster in 1..20 {
            rig.write(cluster * CLUSTER, 3).await;
            rig.save_all().await;
            rig.source.poke(0, &[4; SIZE as usize]);
        }
        let iov = AlignedBuffer::new(CLUSTER as usize).io_vec(CLUSTER as usize);
        content.copy_to(0, &iov);
        let mut bytes = vec![0; CLUSTER as usize];
        iov.copy_to(0, &mut bytes);
        assert!(bytes.iter().all(|byte| *byte == 1));
    });
}

#[test]
fn what_is_not_needed_any_more_is_not_tried_again() {
    run(async {
        let rig = rig();
        rig.write(0, 2).await;
        rig.write(CLUSTER, 2).await;
        let saves = rig.snapshot.take_saves().unwrap();
        rig.snapshot.end();
        let saved = rig.write_saves(saves).await;
        assert!(saved.error.is_none() && saved.bytes == 0);
        assert!(rig.target.ended().is_empty());
    });
}

#[test]
fn who_writes_more_than_there_is_room_for_waits_until_some_is_saved() {
    run(async {
        let rig = rig();
        rig.fill_room().await;
        let first = rig.begin_write(ROOM * CLUSTER, 2);
        settle().await;
        let second = rig.begin_write((ROOM + 1) * CLUSTER, 2);
        settle().await;
        assert!(!first.is_finished() && !second.is_finished());
        assert!(rig.snapshot.holds_guests());
        let saves = rig.snapshot.take_saves().unwrap();
        assert!(saves.ranges().len() < ROOM as usize);
        assert_eq!(saves.ranges()[0], 0..CLUSTER, "the oldest");
        let saved = rig.write_saves(saves).await;
        assert!(saved.error.is_none() && saved.moved == saved.bytes);
        first.await.unwrap();
        second.await.unwrap();
        assert!(!rig.snapshot.holds_guests());
        rig.save_all().await;
        for cluster in 0..ROOM + 2 {
            assert_eq!(rig.target.peek(cluster * CLUSTER, 1), [1]);
        }
    });
}

#[test]
fn who_waits_for_room_too_long_is_told() {
    run(async {
        let rig = rig_with(CbwPolicy {
            timeout: Some(Duration::from_millis(50)),
            ..CbwPolicy::default()
        });
        rig.fill_room().await;
        let error = rig.begin_write(ROOM * CLUSTER, 2).await.unwrap_err();
        assert_eq!(error.errno, libc::ETIMEDOUT);
        assert_eq!(rig.source.peek(ROOM * CLUSTER, 1), [1]);
        rig.save_all().await;
        assert!(rig.snapshot.broken().is_none());
    });
}

#[test]
fn what_fails_is_kept_and_requests_wait_for_their_copies_again() {
    run(async {
        let rig = rig();
        rig.fill_room().await;
        let waiting = rig.begin_write(ROOM * CLUSTER, 2);
        settle().await;
        // Some of it, and what the guest waits for.
        rig.target
            .fail(Match::op(IoOp::Write).range(CLUSTER..SIZE), libc::ENOSPC);
        let saves = rig.snapshot.take_saves().unwrap();
        let saved = rig.write_saves(saves).await;
        assert_eq!(saved.error.unwrap().errno, libc::ENOSPC);
        assert_eq!((saved.bytes, saved.moved), (CLUSTER, CLUSTER));
        // Also who waits for room already.
        assert_eq!(waiting.await.unwrap_err().errno, libc::ENOSPC);
        assert_eq!(rig.source.peek(ROOM * CLUSTER, 1), [1]);
        rig.target.stop_failing();
        rig.save_all().await;
        rig.target.hold(Match::op(IoOp::Write));
        let write = rig.begin_write(ROOM * CLUSTER, 2);
        rig.target.wait_held(1).await;
        assert!(!write.is_finished());
        rig.target.release_all();
        write.await.unwrap();
        for cluster in 0..=ROOM {
            assert_eq!(rig.seen(cluster * CLUSTER).await, 1);
        }
        assert!(rig.snapshot.broken().is_none());
    });
}

#[test]
fn a_job_that_takes_no_more_has_requests_wait_for_their_copies() {
    run(async {
        let rig = rig();
        rig.fill_room().await;
        let waiting = rig.begin_write(ROOM * CLUSTER, 2);
        settle().await;
        assert!(!waiting.is_finished());
        rig.snapshot.save_behind(false);
        waiting.await.unwrap();
        assert_eq!(rig.target.peek(ROOM * CLUSTER, 1), [1]);
        rig.write((ROOM + 1) * CLUSTER, 2).await;
        assert_eq!(rig.target.peek((ROOM + 1) * CLUSTER, 1), [1]);
        // What is kept stays for when it goes on.
        assert_eq!(rig.target.peek(0, 1), [0]);
        rig.save_all().await;
        assert_eq!(rig.target.peek(0, 1), [1]);
    });
}

#[test]
fn while_some_is_being_written_more_gathers_and_the_job_is_told_of_it_once() {
    run(async {
        let rig = rig();
        let told = Arc::new(Told::default());
        rig.snapshot
            .observe(Arc::clone(&told) as Arc<dyn SnapshotObserver>);
        let count = || told.0.load(SeqCst);
        rig.write(0, 2).await;
        assert_eq!(count(), 1);
        rig.write(CLUSTER, 2).await;
        assert_eq!(count(), 1, "the job has not looked yet");
        let first = rig.snapshot.take_saves().unwrap();
        assert_eq!(first.ranges().len(), 2);
        for cluster in 2..5 {
            rig.write(cluster * CLUSTER, 2).await;
        }
        assert!(rig.snapshot.take_saves().is_none());
        assert_eq!(count(), 1, "it will look when that is done");
        rig.write(5 * CLUSTER, 2).await;
        assert_eq!(count(), 2, "enough for another");
        let second = rig.snapshot.take_saves().unwrap();
        assert_eq!(second.ranges().len(), 4);
        rig.write(6 * CLUSTER, 2).await;
        assert!(rig.snapshot.take_saves().is_none());
        for saves in [second, first] {
            assert!(rig.write_saves(saves).await.error.is_none());
        }
        rig.save_all().await;
        for cluster in 0..7 {
            assert_eq!(rig.target.peek(cluster * CLUSTER, 1), [1]);
        }
    });
}

#[test]
fn what_the_target_takes_together_is_all_there() {
    run(async {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        let rig = rig();
        let disk = open_image(file.path(), false);
        let disk = Node::new("disk", Box::new(disk), NodeOptions::default());
        // Not in the order of the disk, and some beside each other.
        let clusters = [40, 7, 100, 8];
        for cluster in clusters {
            rig.write(cluster * CLUSTER, 2).await;
        }
        let saves = rig.snapshot.take_saves().unwrap();
        let saved = saves.write_to(Entered::Child(disk)).await;
        assert!(saved.error.is_none());
        assert_eq!((saved.bytes, saved.moved), (4 * CLUSTER, 4 * CLUSTER));
        let bytes = std::fs::read(file.path()).unwrap();
        for (at, cluster) in bytes.chunks(CLUSTER as usize).enumerate() {
            let saved = clusters.contains(&(at as u64));
            assert!(cluster.iter().all(|byte| *byte == u8::from(saved)), "{at}");
        }
        assert_eq!(rig.snapshot.pending_bytes(), SIZE - 4 * CLUSTER);
        assert!(rig.target.ended().is_empty());
    });
}

#[test]
fn what_is_dropped_before_it_is_saved_is_the_next_again() {
    run(async {
        let rig = rig();
        rig.write(0, 2).await;
        rig.write(CLUSTER, 2).await;
        drop(rig.snapshot.take_saves());
        rig.target.hold(Match::op(IoOp::Write));
        let saves = rig.snapshot.take_saves().unwrap();
        assert_eq!(saves.ranges(), [0..CLUSTER, CLUSTER..2 * CLUSTER]);
        {
            let mut write = pin!(rig.write_saves(saves));
            assert!(futures_util::poll!(write.as_mut()).is_pending());
        }
        rig.target.stop_holding();
        rig.target.release_all();
        rig.save_all().await;
        assert_eq!(rig.seen(0).await, 1);
        assert_eq!(rig.seen(CLUSTER).await, 1);
    });
}

#[test]
fn at_the_end_of_the_snapshot_what_is_kept_is_forgotten() {
    run(async {
        let rig = rig();
        rig.fill_room().await;
        let saves = rig.snapshot.take_saves().unwrap();
        let waiting = rig.begin_write(ROOM * CLUSTER, 2);
        settle().await;
        assert!(!waiting.is_finished());
        rig.snapshot.end();
        waiting.await.unwrap();
        let read = rig.begin_read(0, 512).await;
        assert_eq!(read.unwrap_err().errno, libc::EACCES);
        assert!(rig.snapshot.take_saves().is_none());
        drop(saves);
        assert!(rig.snapshot.take_saves().is_none());
        assert!(rig.target.ended().is_empty());
        assert!(rig.snapshot.not_copied().unwrap().is_dirty(0));
        assert!(rig.snapshot.broken().is_none());
    });
}

#[test]
fn what_is_taken_out_of_the_snapshot_meanwhile_is_discarded_once_it_is_saved() {
    run(async {
        let rig = rig();
        rig.write(0, 2).await;
        rig.snapshot.discard(0, CLUSTER).await.unwrap();
        rig.save_all().await;
        let ended = rig.target.ended();
        assert_eq!(ended.last().map(|it| it.op), Some(IoOp::Discard));
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
        rig.target.release_all();
        rig.target.stop_holding();
        zeroes.await.unwrap();
    });
}
