//! What requests do, and what goes wrong with them.

use std::sync::Arc;

use futures_util::future::{Either, join_all, select};

use super::check::Image;
use super::recorder::Recorder;
use super::{Layout, on_main, open_on};
use crate::buffer::{AlignedBuffer, IoVec};
use crate::driver::{ExtentFlags, WriteFlags, ZeroFlags};
use crate::error::IoOp;
use crate::graph::Graph;
use crate::node::{Node, NodeOptions};
use crate::options::{BackingRef, BlockdevRef, DiscardMode};
use crate::runtime::{Iothread, spawn_local, yield_now};
use crate::test_storage::{Match, TestStorage};

pub(super) const CLUSTER: u64 = 4096;
pub(super) const SIZE: u64 = 1 << 20;
pub(super) const LAYOUT: Layout = Layout {
    cluster_bits: 12,
    refcount_order: 4,
    size: SIZE,
};

pub(super) fn options() -> NodeOptions {
    NodeOptions {
        discard: DiscardMode::Unmap,
        ..NodeOptions::default()
    }
}

/// An image in memory, in node `name`, on node `f` and the name.
pub(super) async fn image(graph: &Graph, name: &str, backing: BackingRef) -> (Recorder, Arc<Node>) {
    let recorder = Recorder::new(LAYOUT.image(), 1);
    let file = format!("f{name}");
    graph
        .add_node(Some(&file), recorder.driver(), options())
        .unwrap();
    let node = open_on(graph, name, &file, backing).await.unwrap();
    (recorder, node)
}

pub(super) fn filled(len: u64, byte: u8) -> IoVec {
    let iov = AlignedBuffer::new(len as usize).io_vec(len as usize);
    iov.fill(byte);
    iov
}

pub(super) async fn write(node: &Node, offset: u64, len: u64, byte: u8) {
    node.write(offset, filled(len, byte), WriteFlags::default())
        .await
        .unwrap();
}

/// First byte of each sector.
pub(super) async fn sectors(node: &Node, offset: u64, len: u64) -> Vec<u8> {
    let iov = filled(len, 0xee);
    node.read(offset, iov.clone()).await.unwrap();
    let mut bytes = vec![0; len as usize];
    iov.copy_to(0, &mut bytes);
    bytes.chunks(512).map(|sector| sector[0]).collect()
}

async fn status(node: &Node, offset: u64, len: u64) -> (u64, ExtentFlags) {
    let extent = node.block_status(offset, len).await.unwrap();
    (extent.len, extent.flags)
}

const DATA: ExtentFlags = ExtentFlags {
    data: true,
    zero: false,
    allocated: true,
};
const ZERO: ExtentFlags = ExtentFlags {
    data: false,
    zero: true,
    allocated: true,
};
const NOTHING: ExtentFlags = ExtentFlags {
    data: false,
    zero: true,
    allocated: false,
};
const BELOW: ExtentFlags = ExtentFlags {
    data: false,
    zero: false,
    allocated: false,
};

#[test]
fn status_tells_of_this_layer_only() {
    on_main(|graph| async move {
        let (_, base) = image(&graph, "base", BackingRef::None).await;
        write(&base, 0, SIZE / 2, 1).await;
        let backing = BackingRef::Node(BlockdevRef::Name("base".into()));
        let (_, top) = image(&graph, "top", backing).await;
        write(&top, CLUSTER, 2 * CLUSTER, 2).await;
        let zero = ZeroFlags::default();
        top.write_zeroes(3 * CLUSTER, CLUSTER, zero).await.unwrap();
        assert_eq!(status(&top, 0, SIZE).await, (CLUSTER, BELOW));
        assert_eq!(
            status(&top, CLUSTER, SIZE - CLUSTER).await,
            (2 * CLUSTER, DATA)
        );
        assert_eq!(status(&top, 3 * CLUSTER, CLUSTER).await, (CLUSTER, ZERO));
        let rest = SIZE - 4 * CLUSTER;
        assert_eq!(status(&top, 4 * CLUSTER, rest).await, (rest, BELOW));
        assert_eq!(status(&base, SIZE / 2, SIZE / 2).await, (SIZE / 2, NOTHING));
        let whole = top.chain_status(None, 0, SIZE).await.unwrap();
        assert_eq!((whole.len, whole.depth, whole.data), (CLUSTER, 2, true));
    });
}

#[test]
fn no_look_at_the_status_goes_on_and_on() {
    // Each second level table is looked at: there are 32 KiB of disk in one.
    let huge = Layout {
        cluster_bits: 9,
        size: 1 << 30,
        ..LAYOUT
    };
    on_main(|graph| async move {
        let recorder = Recorder::new(huge.image(), 1);
        graph
            .add_node(Some("f"), recorder.driver(), options())
            .unwrap();
        let node = open_on(&graph, "disk", "f", BackingRef::None).await;
        let node = node.unwrap();
        let (mut at, mut looks) = (0, 0);
        while at < huge.size {
            let (len, flags) = status(&node, at, huge.size - at).await;
            assert_eq!(flags, NOTHING);
            at += len;
            looks += 1;
        }
        assert_eq!(looks, 8);
    });
}

#[test]
fn a_part_of_a_cluster_is_copied_from_below_and_the_backing_image_stays() {
    on_main(|graph| async move {
        let (_, base) = image(&graph, "base", BackingRef::None).await;
        write(&base, 0, SIZE, 1).await;
        let backing = BackingRef::Node(BlockdevRef::Name("base".into()));
        let (recorder, top) = image(&graph, "top", backing).await;
        write(&top, 1024, 512, 2).await;
        write(&top, 3 * CLUSTER - 512, CLUSTER, 3).await;
        assert_eq!(sectors(&top, 0, CLUSTER).await, [1, 1, 2, 1, 1, 1, 1, 1]);
        let around = sectors(&top, 2 * CLUSTER, 2 * CLUSTER).await;
        assert_eq!(around[..7], [1; 7]);
        assert_eq!(around[7..15], [3; 8]);
        assert_eq!(around[15], 1);
        // Discarded clusters do not show what is below.
        top.discard(0, CLUSTER).await.unwrap();
        assert_eq!(sectors(&top, 0, CLUSTER).await, [0; 8]);
        assert_eq!(sectors(&base, 0, SIZE).await, [1; (SIZE / 512) as usize]);
        top.flush().await.unwrap();
        let report = Image::new(&recorder.content()).check();
        assert!(report.errors.is_empty() && report.leaks == 0, "{report:?}");
    });
}

#[test]
fn a_disk_grows_with_zeroes_and_shrinks() {
    on_main(|graph| async move {
        let (_, base) = image(&graph, "base", BackingRef::None).await;
        graph.resize(&base, 4 * SIZE).await.unwrap();
        write(&base, 0, 4 * SIZE, 1).await;
        let backing = BackingRef::Node(BlockdevRef::Name("base".into()));
        let (recorder, top) = image(&graph, "top", backing).await;
        write(&top, SIZE - 512, 512, 2).await;
        // What the longer backing image has there does not show.
        graph.resize(&top, 3 * SIZE).await.unwrap();
        assert_eq!(top.size(), 3 * SIZE);
        let grown = sectors(&top, SIZE, 2 * SIZE).await;
        assert!(grown.iter().all(|byte| *byte == 0));
        write(&top, 2 * SIZE, SIZE, 3).await;
        graph.resize(&top, SIZE / 2).await.unwrap();
        assert_eq!(
            sectors(&top, 0, SIZE / 2).await,
            [1; (SIZE / 1024) as usize]
        );
        let report = Image::new(&recorder.content()).check();
        assert!(report.errors.is_empty() && report.leaks == 0, "{report:?}");
        assert!(graph.resize(&top, 1 << 62).await.is_err());
        assert_eq!(top.size(), SIZE / 2);
    });
}

#[test]
fn storage_that_fails_loses_nothing_that_was_there() {
    for after in 0..40 {
        on_main(|graph| async move {
            let (recorder, node) = image(&graph, "a", BackingRef::None).await;
            write(&node, 0, 8 * CLUSTER, 1).await;
            node.flush().await.unwrap();
            recorder.fail_writes_after(after);
            let mut failed = false;
            for i in 0..20 {
                let at = (i * 7 % 100) * CLUSTER + 512;
                let write = node.write(at, filled(512, 2), WriteFlags::default());
                failed |= write.await.is_err();
                failed |= node.flush().await.is_err();
                let report = Image::new(&recorder.content()).check();
                assert!(report.errors.is_empty(), "{after}: {report:?}");
            }
            assert!(failed);
            recorder.heal();
            write(&node, 0, SIZE, 4).await;
            node.flush().await.unwrap();
            let content = recorder.content();
            let report = Image::new(&content).check();
            assert!(report.errors.is_empty(), "{after}: {report:?}");
            assert!(Image::new(&content).sectors().iter().all(|b| *b == 4));
        });
    }
}

#[test]
fn storage_that_cannot_grow_is_full() {
    on_main(|graph| async move {
        let mut content = LAYOUT.image();
        content.resize(64 * 1024, 0);
        let storage = TestStorage::new(content.len() as u64);
        storage.poke(0, &content);
        storage.fail(Match::op(IoOp::Truncate), libc::EOPNOTSUPP);
        graph
            .add_node(Some("f"), storage.driver(), options())
            .unwrap();
        let node = open_on(&graph, "a", "f", BackingRef::None).await.unwrap();
        let write = node.write(0, filled(SIZE, 1), WriteFlags::default());
        assert_eq!(write.await.unwrap_err().errno, libc::ENOSPC);
        node.flush().await.unwrap();
        let report = Image::new(&storage.snapshot()).check();
        assert!(report.errors.is_empty(), "{report:?}");
    });
}

const THREADS: u64 = 4;
const TASKS: u64 = 4;

/// Requests of many threads wait for each other in `imago`, whose locks know nothing
/// of our loops: nobody sleeps for ever, and nobody's data is lost.
#[test]
fn four_iothreads_share_an_image_with_requests_held_below() {
    on_main(|graph| async move {
        let storage = TestStorage::new(8 << 20);
        storage.poke(0, &LAYOUT.image());
        graph
            .add_node(Some("f"), storage.driver(), options())
            .unwrap();
        let node = open_on(&graph, "a", "f", BackingRef::None).await.unwrap();
        let threads: Vec<_> = (0..THREADS)
            .map(|i| Iothread::spawn(&format!("io{i}")).unwrap())
            .collect();
        let all = join_all(threads.iter().zip(0..).map(|(thread, i)| {
            let (node, handle) = (Arc::clone(&node), thread.handle().clone());
            async move { handle.call(move || use_own_sectors_at_once(node, i)).await }
        }));
        let mut all = Box::pin(all);
        // Each request below is held until it is let go here, tables' and data's.
        storage.hold(Match::any());
        let outcomes = loop {
            let held = Box::pin(storage.wait_held(1));
            match select(all, held).await {
                Either::Left((outcomes, _)) => break outcomes,
                Either::Right((_, rest)) => all = rest,
            }
            // Others catch up.
            yield_now().await;
            storage.release_one();
        };
        for outcome in outcomes {
            outcome.expect("no task has panicked");
        }
        storage.release_all();
        for thread in threads {
            thread.stop();
        }
        node.flush().await.unwrap();
        let content = storage.snapshot();
        let report = Image::new(&content).check();
        assert!(report.errors.is_empty(), "{report:?}");
    });
}

async fn use_own_sectors_at_once(node: Arc<Node>, thread: u64) {
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| spawn_local(use_own_sectors(Arc::clone(&node), thread * TASKS + task)))
        .collect();
    for task in tasks {
        task.await;
    }
}

/// Writes, zeroes, discards and reads every sixteenth sector, which is its own.
async fn use_own_sectors(node: Arc<Node>, own: u64) {
    let mut values = [0u8; 48];
    let mut seed = own + 1;
    for round in 0..150u64 {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let index = (seed >> 33) % 48;
        let at = (index * 32 + own) * 512;
        match (seed >> 40) % 8 {
            0..4 => {
                let value = (round % 250 + 1) as u8;
                write(&node, at, 512, value).await;
                values[index as usize] = value;
            }
            4 => {
                let flags = ZeroFlags {
                    may_unmap: true,
                    ..ZeroFlags::default()
                };
                node.write_zeroes(at, 512, flags).await.unwrap();
                values[index as usize] = 0;
            }
            5 => node.flush().await.unwrap(),
            _ => {
                // Clusters that nobody keeps anything in come and go meanwhile.
                let spare = SIZE - (own + 1) * 2 * CLUSTER;
                write(&node, spare, 2 * CLUSTER, 9).await;
                node.discard(spare, 2 * CLUSTER).await.unwrap();
            }
        }
        let read = sectors(&node, at, 512).await;
        assert_eq!(read[0], values[index as usize], "task {own}, round {round}");
    }
}
