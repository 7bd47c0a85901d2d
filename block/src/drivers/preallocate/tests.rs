//! What the file has, and when.

use std::rc::Rc;

use super::*;
use crate::buffer::AlignedBuffer;
use crate::drivers::qcow2::tests::Layout;
use crate::error::IoOp;
use crate::graph::Graph;
use crate::node::NodeOptions;
use crate::options::{BackingRef, BlockdevOptions, BlockdevRef, Qcow2Options};
use crate::runtime::{EventLoop, spawn_local};
use crate::test_storage::{Match, TestStorage};

const MIB: u64 = 1 << 20;
const LAYOUT: Layout = Layout {
    cluster_bits: 16,
    refcount_order: 4,
    size: 32 * MIB,
};

fn named(name: &str) -> BlockdevRef {
    BlockdevRef::Name(name.to_owned())
}

/// The filter on node `f`, which takes 4 MiB.
fn filter() -> BlockdevOptions {
    BlockdevOptions::new(DriverOptions::Preallocate(PreallocateOptions {
        size: 4 << 20,
        ..PreallocateOptions::new(named("f"))
    }))
}

/// An image on a file, as node `q`.
fn image(file: BlockdevRef) -> BlockdevOptions {
    BlockdevOptions {
        node_name: Some("q".to_owned()),
        ..BlockdevOptions::new(DriverOptions::Qcow2(Qcow2Options {
            backing: BackingRef::None,
            ..Qcow2Options::new(file)
        }))
    }
}

/// An empty image in memory, in node `f`, and the filter on it, as node `p`.
async fn stack(graph: &Graph) -> (TestStorage, Arc<Node>) {
    let content = LAYOUT.image();
    let storage = TestStorage::new(content.len() as u64);
    storage.poke(0, &content);
    graph
        .add_node(Some("f"), storage.driver(), NodeOptions::default())
        .unwrap();
    let options = BlockdevOptions {
        node_name: Some("p".to_owned()),
        ..filter()
    };
    let filter = graph.blockdev_add(options).await.unwrap();
    (storage, filter)
}

async fn write(node: &Node, offset: u64, len: u64) {
    let iov = AlignedBuffer::new(len as usize).io_vec(len as usize);
    iov.fill(7);
    node.write(offset, iov, WriteFlags::default())
        .await
        .unwrap();
}

fn on_main<F: Future<Output = ()>>(test: impl FnOnce(Rc<Graph>) -> F) {
    let graph = Graph::new();
    EventLoop::new("test").unwrap().block_on(test(graph));
}

#[test]
fn space_is_taken_before_it_is_needed_and_given_back_before_the_right_to_the_file() {
    on_main(|graph| async move {
        let (storage, filter) = stack(&graph).await;
        let before = storage.size();
        let node = graph.blockdev_add(image(named("p"))).await.unwrap();
        assert_eq!(storage.size(), before);
        storage.forget_ended();
        write(&node, 0, MIB).await;
        let taken = storage.size();
        assert!(filter.size() < taken);
        assert_eq!(taken, 5 * MIB);
        write(&node, MIB, MIB).await;
        assert_eq!(storage.size(), taken);
        let resizes = storage.ended();
        let resizes = resizes.iter().filter(|e| e.op == IoOp::Truncate).count();
        assert_eq!(resizes, 1);
        drop(node);
        storage.hold(Match::op(IoOp::Truncate));
        let deleted = spawn_local({
            let graph = Rc::clone(&graph);
            async move { graph.blockdev_del("q").await }
        });
        storage.wait_held(1).await;
        let held = *storage.permissions().last().unwrap();
        assert!(held.need.contains(Perm::WRITE | Perm::RESIZE));
        assert!(!held.share.intersects(Perm::WRITE | Perm::RESIZE));
        storage.release_all();
        deleted.await.unwrap();
        assert_eq!(storage.size(), filter.size());
        assert!(storage.size() >= 2 * MIB && storage.size() < taken);
        assert_eq!(storage.permissions().last(), Some(&Permissions::IDLE));
        let node = graph.blockdev_add(image(named("p"))).await.unwrap();
        let iov = AlignedBuffer::new(512).io_vec(512);
        node.read(2 * MIB - 512, iov.clone()).await.unwrap();
        let mut byte = [0];
        iov.copy_to(0, &mut byte);
        assert_eq!(byte, [7]);
    });
}

#[test]
fn an_image_that_goes_or_is_only_read_any_more_needs_no_reserve() {
    on_main(|graph| async move {
        let (storage, filter) = stack(&graph).await;
        let node = graph.blockdev_add(image(named("p"))).await.unwrap();
        write(&node, 0, MIB).await;
        assert!(storage.size() > filter.size());
        let read_only = BlockdevOptions {
            read_only: Some(true),
            ..image(named("p"))
        };
        graph.reopen(vec![read_only]).await.unwrap();
        assert_eq!(storage.size(), filter.size());
        graph.reopen(vec![image(named("p"))]).await.unwrap();
        write(&node, 8 * MIB, 4 * MIB).await;
        assert!(storage.size() > filter.size());
        // Past the filter: it must not cut off what comes then.
        graph.reopen(vec![image(named("f"))]).await.unwrap();
        assert_eq!(storage.size(), filter.size());
        write(&node, 16 * MIB, 4 * MIB).await;
        graph.blockdev_del("p").await.unwrap();
        drop(node);
        let end = storage.size();
        graph.blockdev_del("q").await.unwrap();
        assert_eq!(storage.size(), end);
    });
}

#[test]
fn the_end_of_the_program_gives_back_what_an_inline_filter_took() {
    on_main(|graph| async move {
        let (storage, named_filter) = stack(&graph).await;
        let inline = BlockdevRef::Inline(Box::new(filter()));
        let node = graph.blockdev_add(image(inline)).await.unwrap();
        write(&node, 0, MIB).await;
        let taken = storage.size();
        graph.flush_all().await;
        let end = storage.size();
        assert!(end < taken);
        write(&node, 8 * MIB, 4 * MIB).await;
        assert!(storage.size() > end + 4 * MIB);
        drop(node);
        graph.blockdev_del("q").await.unwrap();
        assert!(storage.size() < end + 6 * MIB);
        // Sees what the file has.
        assert_eq!(named_filter.size(), storage.size());
    });
}

#[test]
fn storage_that_has_no_space_for_a_reserve_gets_none() {
    for (op, errno) in [
        (IoOp::WriteZeroes, libc::EOPNOTSUPP),
        (IoOp::WriteZeroes, libc::ENOSPC),
    ] {
        on_main(|graph| async move {
            let (storage, filter) = stack(&graph).await;
            let node = graph.blockdev_add(image(named("p"))).await.unwrap();
            storage.fail(Match::op(op), errno);
            for at in 0..8 {
                write(&node, at * MIB, MIB).await;
                assert_eq!(storage.size(), filter.size());
            }
            let failed = storage.ended();
            let failed = failed.iter().filter(|e| e.errno != 0).count();
            assert_eq!(failed, 1);
            node.flush().await.unwrap();
        });
    }
}

#[test]
fn a_size_that_a_user_asks_for_is_what_the_file_gets() {
    on_main(|graph| async move {
        let (storage, filter) = stack(&graph).await;
        for size in [8 * MIB, MIB, 3 * MIB] {
            graph.resize(&filter, size).await.unwrap();
            assert_eq!((storage.size(), filter.size()), (size, size));
        }
        filter.grow(4 * MIB).await.unwrap();
        assert_eq!((storage.size(), filter.size()), (8 * MIB, 4 * MIB));
        filter.grow(8 * MIB).await.unwrap();
        assert_eq!((storage.size(), filter.size()), (8 * MIB, 8 * MIB));
        filter.grow(9 * MIB).await.unwrap();
        graph.resize(&filter, 10 * MIB).await.unwrap();
        assert_eq!((storage.size(), filter.size()), (10 * MIB, 10 * MIB));
        filter.driver().release_reserve().await.unwrap();
        assert_eq!(storage.size(), 10 * MIB);
    });
}

#[test]
fn sizes_that_make_no_sense_are_refused_and_huge_ones_ask_for_nothing() {
    let sizes = |align, size| {
        let file = named("f");
        Sizes::new(&PreallocateOptions { file, align, size })
    };
    let text = |sizes: Result<Sizes, OpenError>| sizes.unwrap_err().to_string();
    assert_eq!(
        text(sizes(1000, 0)),
        "prealloc-align parameter of preallocate filter is not aligned to 512"
    );
    assert_eq!(
        text(sizes(-1, 0)),
        "Parameter 'prealloc-align' expects a non-negative number below 2^64"
    );
    assert_eq!(
        text(sizes(0, i64::MIN)),
        "Parameter 'prealloc-size' expects a non-negative number below 2^64"
    );
    assert_eq!(sizes(0, 0).unwrap().end(512), None);
    assert_eq!(sizes(1536, 0).unwrap().end(512), Some(1536));
    assert_eq!(sizes(512, i64::MAX).unwrap().end(1 << 63), None);
}
