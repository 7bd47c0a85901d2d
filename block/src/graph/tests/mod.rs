//! The graph under running requests, on real loops, over the test storage.

use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::ThreadId;

use super::{Graph, GraphError};
use crate::backend::{AttachmentKind, Backend, BackendUser, Serves};
use crate::buffer::{AlignedBuffer, IoVec};
use crate::driver::{BlockDriver, BoxFuture, ChildRole, Extent, Limits, WriteFlags, ZeroFlags};
use crate::error::{IoError, IoOp};
use crate::node::{Child, Node, NodeOptions};
use crate::options::DiscardMode;
use crate::permissions::{Perm, PermissionError, Permissions};
use crate::runtime::{EventLoop, spawn_local};
use crate::test_storage::{HoldAt, Match, TestStorage};

mod backing;
mod change;
mod drain;
mod kept;
mod node_io;
mod open;
mod permissions;
mod random;
mod reopen;
mod resize;
mod stress;

const SIZE: u64 = 1 << 20;

/// Runs a test on a main loop of its own.
pub(super) fn on_main<F: Future<Output = ()>>(test: impl FnOnce(Rc<Graph>) -> F) {
    let main = EventLoop::new("test").expect("an event loop");
    let graph = Graph::new();
    main.block_on(test(graph));
}

fn options() -> NodeOptions {
    NodeOptions {
        discard: DiscardMode::Unmap,
        ..NodeOptions::default()
    }
}

/// A storage and a node of it.
pub(super) fn disk(graph: &Graph, name: &str) -> (TestStorage, Arc<Node>) {
    let storage = TestStorage::new(SIZE);
    let node = graph
        .add_node(Some(name), storage.driver(), options())
        .expect("a free name");
    (storage, node)
}

/// A device that reads and writes, and lets others do what they like.
fn writer() -> Permissions {
    Permissions {
        need: Perm::CONSISTENT_READ | Perm::WRITE,
        share: Perm::ALL,
    }
}

fn attach(graph: &Graph, name: &str, node: &Arc<Node>) -> Arc<Backend> {
    graph
        .attach(name, node, writer(), None)
        .expect("nobody is against it")
}

fn bytes(len: usize, byte: u8) -> IoVec {
    let iov = AlignedBuffer::new(len).io_vec(len);
    iov.fill(byte);
    iov
}

async fn write(backend: &Arc<Backend>, offset: u64, byte: u8) -> Result<(), IoError> {
    backend
        .write(offset, bytes(512, byte), WriteFlags::default())
        .await
}

/// Shows its child's data, and counts what goes through it.
pub(super) struct PassThrough {
    child: Child,
    passed: Arc<AtomicUsize>,
    /// What it lets others do with its child.
    share: Arc<Mutex<Perm>>,
    end: Option<End>,
}

/// Tells on which threads a driver is closed and dropped.
struct End(mpsc::Sender<(&'static str, ThreadId)>);

impl End {
    fn tell(&self, what: &'static str) {
        // The test may have ended.
        let _ = self.0.send((what, std::thread::current().id()));
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.tell("dropped");
    }
}

impl PassThrough {
    pub(super) fn boxed(child: Child) -> Box<dyn BlockDriver> {
        Self::counting(child, Arc::default())
    }

    fn counting(child: Child, passed: Arc<AtomicUsize>) -> Box<dyn BlockDriver> {
        Box::new(Self {
            child,
            passed,
            share: Arc::new(Mutex::new(Perm::ALL)),
            end: None,
        })
    }

    fn telling(child: Child, end: End) -> Box<dyn BlockDriver> {
        Box::new(Self {
            child,
            passed: Arc::default(),
            share: Arc::new(Mutex::new(Perm::ALL)),
            end: Some(end),
        })
    }
}

impl BlockDriver for PassThrough {
    fn close(&self) {
        if let Some(end) = &self.end {
            end.tell("closed");
        }
    }
    fn name(&self) -> &'static str {
        "pass-through"
    }
    fn size(&self) -> u64 {
        self.child.node().size()
    }
    fn limits(&self) -> Limits {
        self.child.node().limits()
    }
    fn filename(&self) -> String {
        String::new()
    }
    fn filtered(&self) -> Option<Arc<Node>> {
        Some(self.child.node())
    }
    fn child_permissions(&self, _: ChildRole, users: Permissions) -> Permissions {
        Permissions {
            share: users.share & *self.share.lock().unwrap(),
            ..users
        }
    }
    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.child.node().read(offset, iov).await })
    }
    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        self.passed.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move { self.child.node().write(offset, iov, flags).await })
    }
    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.child.node().write_zeroes(offset, len, flags).await })
    }
    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.child.node().discard(offset, len).await })
    }
    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.child.node().flush().await })
    }
    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move { self.child.node().block_status(offset, len).await })
    }
}

/// A user that says when it is idle, and counts its sections.
struct User {
    kind: AttachmentKind,
    holds: bool,
    blocker: Option<&'static str>,
    serves: Option<Serves>,
    busy: AtomicBool,
    sections: AtomicUsize,
}

impl User {
    fn new(kind: AttachmentKind) -> Self {
        Self {
            kind,
            holds: true,
            blocker: None,
            serves: None,
            busy: AtomicBool::new(false),
            sections: AtomicUsize::new(0),
        }
    }

    fn sections(&self) -> usize {
        self.sections.load(Ordering::SeqCst)
    }
}

impl BackendUser for User {
    fn drained_begin(&self) {
        self.sections.fetch_add(1, Ordering::SeqCst);
    }
    fn drained_poll(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }
    fn drained_end(&self) {
        self.sections.fetch_sub(1, Ordering::SeqCst);
    }
    fn holds_requests(&self) -> bool {
        self.holds
    }
    fn serves(&self) -> Option<Serves> {
        self.serves
    }
    fn kind(&self) -> AttachmentKind {
        self.kind.clone()
    }
    fn blocker(&self) -> Option<String> {
        self.blocker.map(str::to_owned)
    }
    fn describe(&self) -> String {
        "mirror job 'j0'".to_owned()
    }
}

/// Polls `future` once; `None` if it is not ready.
async fn poll_once<T>(future: &mut (impl Future<Output = T> + Unpin)) -> Option<T> {
    std::future::poll_fn(|cx| {
        std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(cx) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

/// Lets all tasks of the loop run that can.
async fn settle() {
    for _ in 0..20 {
        crate::runtime::yield_now().await;
    }
}
