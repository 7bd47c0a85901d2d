//! What is copied, and requests that meet copies under way.

use std::rc::Rc;

use futures_util::future::join_all;

use super::*;
use crate::backend::Backend;
use crate::chain::tests::{layer, node};
use crate::drivers::qcow2::tests::Layout;
use crate::graph::Graph;
use crate::node::NodeOptions;
use crate::options::{
    BackingRef, BlockdevOptions, BlockdevRef, CopyOnReadOptions, DiscardMode, DriverOptions,
    Qcow2Options,
};
use crate::runtime::{EventLoop, Iothread, LocalTask, spawn_local};
use crate::test_storage::{CHUNK, Match, TestStorage};

fn read(top: &Arc<Node>, chunk: u64) -> u8 {
    let iov = AlignedBuffer::new(512).io_vec(512);
    EventLoop::new("read")
        .unwrap()
        .block_on(top.read(chunk * CHUNK, iov.clone()))
        .unwrap();
    let mut byte = [0];
    iov.copy_to(0, &mut byte);
    byte[0]
}

fn depth(top: &Arc<Node>, chunk: u64) -> u32 {
    let status = top.chain_status(None, chunk * CHUNK, CHUNK);
    EventLoop::new("status")
        .unwrap()
        .block_on(status)
        .unwrap()
        .depth
}

#[test]
fn what_is_read_from_a_layer_above_the_bottom_is_copied_once() {
    let lowest = layer("lowest", 64, &[1], None);
    let base = layer("base", 64, &[0, 40], Some(&lowest));
    let top = layer("top", 64, &[2], Some(&base));
    let child = Child::new(ChildRole::File, Arc::clone(&top));
    let filter = node("cor", Box::new(CopyOnReadDriver::new(child, Some(&base))));
    assert_eq!(
        (read(&filter, 0), read(&filter, 1), read(&filter, 2)),
        (1, 1, 1)
    );
    assert_eq!((depth(&top, 0), depth(&top, 1), depth(&top, 2)), (1, 3, 1));
    // Not read, and not near to what was.
    assert_eq!(depth(&top, 40), 2);
    assert_eq!(read(&filter, 41), 0);
    assert_eq!(depth(&top, 40), 2);
}

const CLUSTER: u64 = 4096;
const SIZE: u64 = 64 * CLUSTER;
const LAYOUT: Layout = Layout {
    cluster_bits: 12,
    refcount_order: 4,
    size: SIZE,
};

/// A disk full of ones below an empty image, which is filled by what is read.
struct Stack {
    graph: Rc<Graph>,
    /// Where the image is, and the disk below.
    image: TestStorage,
    base: TestStorage,
    /// The image itself, and the filter with a user.
    top: Arc<Node>,
    user: Arc<Backend>,
}

impl Stack {
    async fn new(graph: Rc<Graph>) -> Self {
        let (image, base) = (TestStorage::new(1 << 20), TestStorage::new(SIZE));
        image.poke(0, &LAYOUT.image());
        base.poke(0, &[1; SIZE as usize]);
        let options = NodeOptions {
            discard: DiscardMode::Unmap,
            ..NodeOptions::default()
        };
        for (name, storage) in [("f", &image), ("base", &base)] {
            graph
                .add_node(Some(name), storage.driver(), options)
                .unwrap();
        }
        let named = |name: &str| BlockdevRef::Name(name.to_owned());
        let add = |name: &str, driver| {
            let options = BlockdevOptions {
                node_name: Some(name.to_owned()),
                discard: Some(DiscardMode::Unmap),
                ..BlockdevOptions::new(driver)
            };
            graph.blockdev_add(options)
        };
        let qcow2 = DriverOptions::Qcow2(Qcow2Options {
            backing: BackingRef::Node(named("base")),
            ..Qcow2Options::new(named("f"))
        });
        let top = add("top", qcow2).await.unwrap();
        let copy = DriverOptions::CopyOnRead(CopyOnReadOptions {
            file: named("top"),
            bottom: None,
        });
        let filter = add("cor", copy).await.unwrap();
        let writer = Permissions {
            need: Perm::CONSISTENT_READ | Perm::WRITE,
            share: Perm::ALL,
        };
        let user = graph.attach("vda", &filter, writer, None).unwrap();
        Self {
            graph,
            image,
            base,
            top,
            user,
        }
    }

    /// A request by the user, from entry to end.
    fn begin<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        request: impl FnOnce(Arc<Node>) -> F + 'static,
    ) -> LocalTask<T> {
        let user = Arc::clone(&self.user);
        spawn_local(async move {
            let _in_flight = user.enter().await;
            request(user.root()).await
        })
    }

    fn read(&self, offset: u64, len: u64) -> LocalTask<Result<Vec<u8>, IoError>> {
        self.begin(move |node| async move { sectors(&node, offset, len).await })
    }

    fn write(&self, offset: u64, len: u64, byte: u8) -> LocalTask<Result<(), IoError>> {
        self.begin(move |node| async move {
            let iov = AlignedBuffer::new(len as usize).io_vec(len as usize);
            iov.fill(byte);
            node.write(offset, iov, WriteFlags::default()).await
        })
    }

    /// First bytes of the sectors of the image, without what is below.
    async fn is_copied(&self, offset: u64, len: u64) -> bool {
        let status = self.top.chain_status(None, offset, len).await.unwrap();
        status.depth == 1 && status.len == len
    }
}

/// First byte of each sector.
async fn sectors(node: &Node, offset: u64, len: u64) -> Result<Vec<u8>, IoError> {
    let iov = AlignedBuffer::new(len as usize).io_vec(len as usize);
    node.read(offset, iov.clone()).await?;
    let mut bytes = vec![0; len as usize];
    iov.copy_to(0, &mut bytes);
    Ok(bytes.chunks(512).map(|sector| sector[0]).collect())
}

fn on_stack<F: Future<Output = ()>>(test: impl FnOnce(Stack) -> F) {
    EventLoop::new("test").unwrap().block_on(async move {
        let stack = Stack::new(Graph::new()).await;
        test(stack).await;
    });
}

fn reads(storage: &TestStorage) -> usize {
    let ended = storage.ended();
    ended.iter().filter(|e| e.op == IoOp::Read).count()
}

#[test]
fn two_reads_of_one_range_copy_it_once() {
    on_stack(|stack| async move {
        stack.base.hold(Match::op(IoOp::Read));
        let first = stack.read(0, CLUSTER);
        let second = stack.read(512, CLUSTER - 512);
        stack.base.wait_held(1).await;
        assert_eq!(stack.base.held(), 1);
        stack.base.release_all();
        assert_eq!(first.await.unwrap(), [1; 8]);
        assert_eq!(second.await.unwrap(), [1; 7]);
        assert_eq!(reads(&stack.base), 1);
        assert!(stack.is_copied(0, CLUSTER).await);
        assert!(!stack.is_copied(CLUSTER, CLUSTER).await);
    });
}

/// Where a copy is when something else comes: it reads what is below, or writes it.
fn copying(stack: &Stack) -> [(TestStorage, Match); 2] {
    [
        (stack.base.clone(), Match::op(IoOp::Read)),
        (stack.image.clone(), Match::op(IoOp::Write)),
    ]
}

#[test]
fn a_write_beside_a_copy_of_its_place_is_not_overwritten_by_it() {
    for step in 0..2 {
        for (at, len) in [(0, CLUSTER), (512, 512), (CLUSTER - 512, 1024)] {
            on_stack(|stack| async move {
                let (storage, what) = copying(&stack)[step].clone();
                storage.hold(what);
                let read = stack.read(0, CLUSTER);
                storage.wait_held(1).await;
                let write = stack.write(at, len, 2);
                storage.release_all();
                write.await.unwrap();
                // Before the write, or after it: a sector is one or the other.
                let read = read.await.unwrap();
                assert!(read.iter().all(|byte| [1, 2].contains(byte)), "{read:?}");
                let now = stack.read(0, 2 * CLUSTER).await.unwrap();
                let written = at / 512..(at + len) / 512;
                let expected: Vec<u8> = (0..16)
                    .map(|sector| 1 + u8::from(written.contains(&sector)))
                    .collect();
                assert_eq!(now, expected);
            });
        }
    }
}

#[test]
fn a_discard_or_zeroes_beside_a_copy_do_not_bring_back_what_is_below() {
    for step in 0..2 {
        for discard in [false, true] {
            on_stack(|stack| async move {
                let (storage, what) = copying(&stack)[step].clone();
                storage.hold(what);
                let read = stack.read(0, 4 * CLUSTER);
                storage.wait_held(1).await;
                let zeroes = stack.begin(move |node| async move {
                    let flags = ZeroFlags {
                        may_unmap: true,
                        ..ZeroFlags::default()
                    };
                    match discard {
                        true => node.discard(CLUSTER, CLUSTER).await,
                        false => node.write_zeroes(CLUSTER, CLUSTER, flags).await,
                    }
                });
                storage.release_all();
                zeroes.await.unwrap();
                read.await.unwrap();
                let now = stack.read(0, 4 * CLUSTER).await.unwrap();
                assert_eq!(now[..8], [1; 8]);
                assert_eq!(now[8..16], [0; 8]);
                assert_eq!(now[16..], [1; 16]);
            });
        }
    }
}

#[test]
fn a_drained_section_waits_for_a_copy_and_holds_the_next() {
    on_stack(|stack| async move {
        stack.image.hold(Match::op(IoOp::Write));
        let read = stack.read(0, CLUSTER);
        stack.image.wait_held(1).await;
        let graph = Rc::clone(&stack.graph);
        let top = Arc::clone(&stack.top);
        let drained = spawn_local(async move { graph.drain(&top, &[]).await });
        while !stack.user.is_drained() {
            crate::runtime::yield_now().await;
        }
        let later = stack.read(CLUSTER, CLUSTER);
        assert!(stack.user.in_flight() > 0);
        stack.image.release_all();
        let section = drained.await.unwrap();
        assert_eq!(read.await.unwrap(), [1; 8]);
        assert!(stack.is_copied(0, CLUSTER).await);
        assert!(!stack.is_copied(CLUSTER, CLUSTER).await);
        drop(section);
        assert_eq!(later.await.unwrap(), [1; 8]);
        assert!(stack.is_copied(CLUSTER, CLUSTER).await);
    });
}

#[test]
fn a_copy_that_fails_is_told_to_the_reader_and_leaves_others_their_way() {
    on_stack(|stack| async move {
        stack.image.hold(Match::op(IoOp::Write));
        let read = stack.read(0, CLUSTER);
        stack.image.wait_held(1).await;
        let second = stack.read(0, CLUSTER);
        stack.image.fail(Match::op(IoOp::Write), libc::ENOSPC);
        stack.image.release_all();
        // A read that is held is one that the failure does not hit any more.
        let first = read.await;
        let second = second.await;
        assert!(first.is_err() || second.is_err(), "{first:?} {second:?}");
        for outcome in [first, second] {
            match outcome {
                Ok(read) => assert_eq!(read, [1; 8]),
                Err(error) => assert_eq!(error.errno, libc::ENOSPC),
            }
        }
        stack.image.stop_failing();
        assert_eq!(stack.read(0, CLUSTER).await.unwrap(), [1; 8]);
        stack.write(0, 512, 2).await.unwrap();
        // What is below cannot be read: neither copied nor shown.
        stack.base.fail(Match::op(IoOp::Read), libc::EIO);
        let error = stack.read(8 * CLUSTER, CLUSTER).await.unwrap_err();
        assert_eq!(error.errno, libc::EIO);
        assert!(!stack.is_copied(8 * CLUSTER, CLUSTER).await);
        stack.base.stop_failing();
        let now = stack.read(0, SIZE).await.unwrap();
        assert_eq!((now[0], &now[1..]), (2, &[1; 511][..]));
        assert_eq!(stack.base.snapshot(), [1; SIZE as usize]);
    });
}

const THREADS: u64 = 4;

/// Each thread has sectors of its own in every cluster, so that copies of all meet the
/// writes of all.
async fn use_own_sectors(node: Arc<Node>, thread: u64) {
    let mut values = [1u8; (SIZE / CLUSTER) as usize];
    let mut seed = thread + 1;
    for round in 0..200u64 {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let cluster = (seed >> 33) % (SIZE / CLUSTER);
        let at = cluster * CLUSTER + thread * 1024;
        let value = &mut values[cluster as usize];
        match (seed >> 50) % 4 {
            0 => {
                *value = (2 + round) as u8;
                let iov = AlignedBuffer::new(1024).io_vec(1024);
                iov.fill(*value);
                node.write(at, iov, WriteFlags::default()).await.unwrap();
            }
            1 => {
                *value = 0;
                let flags = ZeroFlags::default();
                node.write_zeroes(at, 1024, flags).await.unwrap();
            }
            _ => {}
        }
        let read = sectors(&node, at, 1024).await.unwrap();
        assert_eq!(read, [*value; 2], "thread {thread}, round {round}");
    }
}

#[test]
fn iothreads_that_read_and_write_the_same_clusters_find_what_they_wrote() {
    on_stack(|stack| async move {
        let threads: Vec<_> = (0..THREADS)
            .map(|i| Iothread::spawn(&format!("io{i}")).unwrap())
            .collect();
        let all = threads.iter().zip(0..).map(|(thread, i)| {
            let (node, handle) = (stack.user.root(), thread.handle().clone());
            async move { handle.call(move || use_own_sectors(node, i)).await }
        });
        for outcome in join_all(all).await {
            outcome.expect("no task has panicked");
        }
        for thread in threads {
            thread.stop();
        }
        assert_eq!(stack.base.snapshot(), [1; SIZE as usize]);
    });
}
