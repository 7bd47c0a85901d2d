//! Images that are reopened, deleted, or not to be flushed: their tables come to
//! their file while that is theirs.

use std::io::Write as _;

use super::check::Image;
use super::recorder::Recorder;
use super::{Layout, on_main, open_on};
use crate::backend::{AttachmentKind, BackendUser};
use crate::buffer::AlignedBuffer;
use crate::driver::WriteFlags;
use crate::error::IoOp;
use crate::graph::Graph;
use crate::node::{Node, NodeOptions};
use crate::options::{
    BackingRef, BlockdevOptions, BlockdevRef, DriverOptions, FileOptions, Qcow2Options, RawOptions,
    ThrottleOptions,
};
use crate::permissions::{Perm, Permissions};
use crate::runtime::spawn_local;
use crate::test_storage::{Match, TestStorage};
use crate::throttle::ThrottleLimits;

const LAYOUT: Layout = Layout {
    cluster_bits: 12,
    refcount_order: 4,
    size: 4 << 20,
};

const WRITER: Permissions = Permissions {
    need: Perm::WRITE,
    share: Perm::ALL,
};

/// An image in memory, in node `f`.
fn recorded(graph: &Graph) -> Recorder {
    let recorder = Recorder::new(LAYOUT.image(), 1);
    graph
        .add_node(Some("f"), recorder.driver(), NodeOptions::default())
        .unwrap();
    recorder
}

/// An image in memory, in node `f`, whose requests can be held.
fn stored(graph: &Graph) -> TestStorage {
    let storage = TestStorage::new(8 << 20);
    storage.poke(0, &LAYOUT.image());
    graph
        .add_node(Some("f"), storage.driver(), NodeOptions::default())
        .unwrap();
    storage
}

fn qcow2(file: BlockdevRef) -> BlockdevOptions {
    BlockdevOptions {
        node_name: Some("a".to_owned()),
        ..BlockdevOptions::new(DriverOptions::Qcow2(Qcow2Options::new(file)))
    }
}

fn no_flush(mut options: BlockdevOptions) -> BlockdevOptions {
    options.cache.no_flush = Some(true);
    options
}

fn on_f() -> BlockdevRef {
    BlockdevRef::Name("f".to_owned())
}

async fn write(node: &Node, offset: u64, byte: u8) {
    let iov = AlignedBuffer::new(4096).io_vec(4096);
    iov.fill(byte);
    node.write(offset, iov, WriteFlags::default())
        .await
        .unwrap();
}

fn first_bytes(content: &[u8]) -> Vec<u8> {
    let report = Image::new(content).check();
    assert!(report.errors.is_empty(), "{report:?}");
    Image::new(content).sectors()[..16].to_vec()
}

fn two_clusters() -> Vec<u8> {
    [[1; 8], [2; 8]].concat()
}

#[test]
fn a_flush_that_need_not_be_durable_takes_the_tables_to_the_file_all_the_same() {
    on_main(|graph| async move {
        let recorder = recorded(&graph);
        let node = graph.blockdev_add(no_flush(qcow2(on_f()))).await.unwrap();
        let over = DriverOptions::Raw(RawOptions {
            file: BlockdevRef::Name("a".to_owned()),
            offset: 0,
            size: None,
        });
        let raw = BlockdevOptions {
            node_name: Some("r".to_owned()),
            ..no_flush(BlockdevOptions::new(over))
        };
        let raw = graph.blockdev_add(raw).await.unwrap();
        write(&node, 0, 1).await;
        node.flush().await.unwrap();
        write(&raw, 4096, 2).await;
        raw.flush().await.unwrap();
        assert_eq!(first_bytes(&recorder.content()), two_clusters());
    });
}

#[test]
fn an_image_that_becomes_read_only_leaves_nothing_in_memory() {
    on_main(|graph| async move {
        let recorder = recorded(&graph);
        let node = graph.blockdev_add(no_flush(qcow2(on_f()))).await.unwrap();
        write_two_clusters(&node).await;
        drop(node);
        let mut read_only = no_flush(qcow2(on_f()));
        read_only.read_only = Some(true);
        graph.reopen(vec![read_only]).await.unwrap();
        graph.blockdev_del("a").await.unwrap();
        assert_eq!(first_bytes(&recorder.content()), two_clusters());
    });
}

#[test]
fn a_file_is_the_images_until_its_tables_are_written() {
    on_main(|graph| async move {
        let storage = stored(&graph);
        let node = open_on(&graph, "a", "f", BackingRef::None).await.unwrap();
        write_two_clusters(&node).await;
        drop(node);
        storage.hold(Match::op(IoOp::Write));
        let deleted = spawn_local({
            let graph = std::rc::Rc::clone(&graph);
            async move { graph.blockdev_del("a").await }
        });
        storage.wait_held(1).await;
        let held = *storage.permissions().last().unwrap();
        assert!(held.need.contains(Perm::WRITE) && !held.share.contains(Perm::WRITE));
        let error = open_on(&graph, "b", "f", BackingRef::None)
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "Permission conflict on node 'f': permissions 'write, resize' are both required by \
             node 'a' (uses node 'f' as 'file' child) and unshared by node 'b' (uses node 'f' as \
             'file' child)."
        );
        storage.release_all();
        deleted.await.unwrap();
        assert_eq!(storage.permissions().last(), Some(&Permissions::IDLE));
        assert_eq!(first_bytes(&storage.snapshot()), two_clusters());
        open_on(&graph, "b", "f", BackingRef::None).await.unwrap();
    });
}

#[test]
fn an_image_that_is_used_while_it_is_flushed_for_its_deletion_stays() {
    on_main(|graph| async move {
        let storage = stored(&graph);
        let node = open_on(&graph, "a", "f", BackingRef::None).await.unwrap();
        write(&node, 0, 1).await;
        storage.hold(Match::op(IoOp::Write));
        let deleted = spawn_local({
            let graph = std::rc::Rc::clone(&graph);
            async move { graph.blockdev_del("a").await }
        });
        storage.wait_held(1).await;
        let user = graph.attach("vda", &node, WRITER, None).unwrap();
        storage.release_all();
        let error = deleted.await.unwrap_err();
        assert_eq!(error.to_string(), "Node a is in use");
        write(&user.root(), 4096, 2).await;
        user.flush().await.unwrap();
        assert_eq!(first_bytes(&storage.snapshot()), two_clusters());
    });
}

#[test]
fn a_file_that_grows_while_it_is_reopened_is_no_obstacle() {
    on_main(|graph| async move {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        image.write_all(&LAYOUT.image()).unwrap();
        let file = || {
            BlockdevRef::Inline(Box::new(BlockdevOptions::new(DriverOptions::File(
                FileOptions {
                    filename: image.path().to_owned(),
                    locking: None,
                    host_device: false,
                    bitmap_file: None,
                },
            ))))
        };
        let node = graph.blockdev_add(qcow2(file())).await.unwrap();
        let user = graph.attach("vda", &node, WRITER, None).unwrap();
        let length = || image.as_file().metadata().unwrap().len();
        let before = length();
        let mut reopen = Box::pin(graph.reopen(vec![no_flush(qcow2(file()))]));
        // The file is being opened once more.
        let pending = std::future::poll_fn(|cx| {
            std::task::Poll::Ready(reopen.as_mut().poll(cx).is_pending())
        });
        assert!(pending.await);
        write(&user.root(), 0, 1).await;
        assert!(length() > before);
        reopen.await.unwrap();
        write(&user.root(), 4096, 2).await;
        user.flush().await.unwrap();
        let content = std::fs::read(image.path()).unwrap();
        assert_eq!(first_bytes(&content), two_clusters());
    });
}

/// A user without rights, for whom a node is opened.
struct Idle;

impl BackendUser for Idle {
    fn kind(&self) -> AttachmentKind {
        AttachmentKind::Job
    }

    fn describe(&self) -> String {
        "a test".to_owned()
    }
}

/// A node in the throttle group `slow`, which has no limits yet.
fn throttled(graph: &Graph, file: BlockdevRef) -> BlockdevOptions {
    let none = ThrottleLimits::default();
    graph.throttle_groups().create("slow", none).unwrap();
    BlockdevOptions::new(DriverOptions::Throttle(ThrottleOptions {
        file,
        group: "slow".to_owned(),
    }))
}

/// What comes after the first write waits for an hour.
fn limit(graph: &Graph) {
    let mut limits = ThrottleLimits::default();
    limits.bps_write.rate = 1;
    let group = graph.throttle_groups().find("slow").unwrap();
    group.set_limits(limits).unwrap();
}

async fn write_two_clusters(node: &Node) {
    write(node, 0, 1).await;
    write(node, 4096, 2).await;
}

#[test]
fn no_limit_holds_for_the_tables_of_an_image_that_is_deleted() {
    for named in [false, true] {
        on_main(|graph| async move {
            let storage = stored(&graph);
            let mut throttle = throttled(&graph, on_f());
            let below = if named {
                throttle.node_name = Some("t".to_owned());
                graph.blockdev_add(throttle).await.unwrap();
                BlockdevRef::Name("t".to_owned())
            } else {
                BlockdevRef::Inline(Box::new(throttle))
            };
            let node = graph.blockdev_add(qcow2(below)).await.unwrap();
            write_two_clusters(&node).await;
            limit(&graph);
            drop(node);
            graph.blockdev_del("a").await.unwrap();
            assert_eq!(first_bytes(&storage.snapshot()), two_clusters());
        });
    }
}

#[test]
fn the_end_waits_for_images_that_are_being_closed_whatever_their_limit() {
    for limited in [false, true] {
        on_main(|graph| async move {
            let storage = stored(&graph);
            let below = match limited {
                true => BlockdevRef::Inline(Box::new(throttled(&graph, on_f()))),
                false => on_f(),
            };
            let user = graph
                .open_for(qcow2(below), std::sync::Arc::new(Idle))
                .await
                .unwrap();
            write_two_clusters(&user.root()).await;
            if limited {
                limit(&graph);
            }
            storage.hold(Match::op(IoOp::Write));
            graph.detach(&user);
            drop(user);
            storage.wait_held(1).await;
            let mut end = Box::pin(graph.flush_all());
            let pending = std::future::poll_fn(|cx| {
                std::task::Poll::Ready(end.as_mut().poll(cx).is_pending())
            });
            assert!(pending.await);
            storage.release_all();
            end.await;
            assert_eq!(first_bytes(&storage.snapshot()), two_clusters());
        });
    }
}
