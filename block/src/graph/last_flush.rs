//! What has to reach the storage before nodes go, or the program ends.
//!
//! Formats keep tables in memory, and write them when they are closed at the latest.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::{Either, join, join_all, select};

use super::Graph;
use super::topology::Topology;
use crate::driver::CancelReach;
use crate::node::Node;
use crate::permissions::Perm;
use crate::runtime::sleep;
use crate::wait::Waiters;

/// How long the last flush of a node may take before what waits for a server in it
/// is given up, again and again.
const LAST_FLUSH_PATIENCE: Duration = Duration::from_secs(1);

/// Nodes that are being closed on helper threads.
#[derive(Default)]
pub(super) struct Closing {
    /// Sets of nodes; sequentially consistent with the registration of waiters.
    count: AtomicUsize,
    waiters: Waiters,
}

impl Closing {
    /// Counts one more, until the result is dropped: on any thread.
    pub(super) fn begin(self: &Arc<Self>) -> CloseUnderWay {
        self.count.fetch_add(1, Ordering::SeqCst);
        CloseUnderWay(Arc::clone(self))
    }

    /// Returns when none is under way. Cancel: they go on.
    async fn done(&self) {
        let none = || (self.count.load(Ordering::SeqCst) == 0).then_some(());
        self.waiters.until(none).await;
    }
}

/// Nodes that are being closed.
pub(super) struct CloseUnderWay(Arc<Closing>);

impl Drop for CloseUnderWay {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::SeqCst);
        self.0.waiters.wake();
    }
}

/// Lets what was held back to limit its rate go, as a drained section does, until it
/// is dropped: where the last user of a node flushes it, nobody's rate is limited.
struct Unlimited(Vec<Arc<Node>>);

impl Unlimited {
    fn begin(nodes: Vec<Arc<Node>>) -> Self {
        for node in &nodes {
            node.driver().drained_begin();
        }
        Self(nodes)
    }
}

impl Drop for Unlimited {
    fn drop(&mut self) {
        for node in &self.0 {
            node.driver().drained_end();
        }
    }
}

impl Graph {
    /// Flushes all nodes that are written, so that the program may end: formats keep
    /// tables in memory. And waits for those that are being closed, which write theirs.
    /// One that hangs keeps no other from being flushed, no rate is limited, and a
    /// server that is away is not waited for. Then saves persistent bitmaps. Errors are logged. Cancel: some are flushed.
    pub async fn flush_all(&self) {
        let nodes: Vec<_> = {
            let topology = self.topology.borrow();
            let nodes = topology.nodes.iter();
            nodes.map(|entry| Arc::clone(&entry.node)).collect()
        };
        let unlimited = Unlimited::begin(nodes.clone());
        let written = nodes.iter().filter(|node| !node.read_only());
        join(join_all(written.map(last_flush)), self.closing.done()).await;
        for node in &nodes {
            release_reserve(node).await;
        }
        drop(unlimited);
        // After all that formats write to their files.
        join_all(nodes.iter().map(|node| node.save_bitmaps())).await;
    }

    /// Writes out what nodes have in memory that are not in `after`, the graph that is
    /// to be; and nodes that nobody writes there give back what they took in advance. When they are closed, others may have the nodes below already, and nobody
    /// may be there any more to wait. Cancel: some is written.
    pub(super) async fn flush_for_removal(&self, mut after: Topology) {
        let removed = after.remove_orphans();
        // If that is refused, nothing comes of it anyway.
        let _ = after.update_permissions();
        let writes = Perm::WRITE | Perm::RESIZE;
        let written = |node: &Node| {
            let entry = after.node(node.id());
            entry.is_some_and(|entry| entry.permissions.need.intersects(writes))
        };
        let before = self.topology.borrow().nodes.clone();
        let mut unused: Vec<_> = before.into_iter().map(|entry| entry.node).collect();
        unused.retain(|node| !written(node));
        drop(after);
        let dirty = removed
            .into_iter()
            .map(|entry| entry.node)
            .filter(|node| node.driver().is_dirty());
        for node in dirty {
            let below = self.topology.borrow().all_below(vec![Arc::clone(&node)]);
            let unlimited = Unlimited::begin(below);
            if let Err(error) = node.flush().await {
                let node = node.name();
                // As at any close: it goes all the same.
                tracing::error!(node, %error, "a node could not be flushed before its end");
            }
            drop(unlimited);
        }
        for node in unused {
            release_reserve(&node).await;
        }
    }
}

async fn release_reserve(node: &Arc<Node>) {
    if let Err(error) = node.driver().release_reserve().await {
        let node = node.name();
        tracing::warn!(node, %error, "space that was taken in advance is not given back");
    }
}

async fn last_flush(node: &Arc<Node>) {
    let flush = pin!(node.flush());
    let impatience = pin!(async {
        loop {
            sleep(LAST_FLUSH_PATIENCE).await;
            // Not one that is only slow: the watchdog has the last word on that.
            node.cancel_in_flight(CancelReach::Waiting);
        }
    });
    let Either::Left((result, _)) = select(flush, impatience).await;
    if let Err(error) = result {
        tracing::error!(%error, "a node could not be flushed at the end");
    }
}
