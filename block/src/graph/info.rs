//! What queries say of nodes and backends.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};

use super::Graph;
use crate::driver::ChildRole;
use crate::node::Node;
use crate::options::{CacheOptions, DetectZeroes, DiscardMode};
use crate::runtime::sleep;

/// A node, for `query-named-block-nodes` and `query-block`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// `node-name`.
    pub name: String,
    /// `drv`.
    pub driver: &'static str,
    /// `file`, also `image.filename`: what is behind the node; empty if nothing.
    pub filename: String,
    /// `ro`.
    pub read_only: bool,
    /// `image.virtual-size` in bytes.
    pub size: u64,
    /// `cache.direct` and `cache.no-flush`.
    pub cache: CacheOptions,
    /// `detect_zeroes`.
    pub detect_zeroes: DetectZeroes,
    /// What a discard does.
    pub discard: DiscardMode,
    /// `image.cluster-size` in bytes, if there are clusters.
    pub cluster_size: Option<u32>,
    /// `backing_file_depth`.
    pub backing_depth: u64,
    /// Whether the node is a filter.
    pub is_filter: bool,
    /// Whether `blockdev-del` may remove it, were it unused.
    pub monitor_owned: bool,
    /// Its children.
    pub children: Vec<NodeChild>,
    /// Bitmaps that record its writes.
    pub bitmaps: Vec<BitmapInfo>,
}

/// An edge of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeChild {
    /// Part that the child plays.
    pub role: ChildRole,
    /// Name of the child.
    pub node: String,
}

/// A bitmap of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Chunk size in bytes.
    pub granularity: u64,
    /// Dirty bytes, whole chunks.
    pub count: u64,
}

/// A backend, for `query-block`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// Name; empty for exports and jobs.
    pub name: String,
    /// Name of the node it is attached to.
    pub node: String,
    /// Who it is.
    pub user: String,
    /// Requests in flight.
    pub in_flight: usize,
}

impl Graph {
    /// Flushes all nodes that are written, so that the program may end: formats keep
    /// tables in memory. One that hangs keeps nobody else, and a server that is away
    /// is not waited for. Errors are logged. Cancel: some are flushed.
    pub async fn flush_all(&self) {
        let nodes: Vec<_> = self
            .topology
            .borrow()
            .nodes
            .iter()
            .map(|entry| Arc::clone(&entry.node))
            .collect();
        let flushes = nodes
            .iter()
            .filter(|node| !node.read_only())
            .map(last_flush);
        join_all(flushes).await;
    }

    /// All nodes, in the order in which they came.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        let nodes: Vec<_> = self
            .topology
            .borrow()
            .nodes
            .iter()
            .map(|entry| Arc::clone(&entry.node))
            .collect();
        nodes.iter().filter_map(|node| self.info(node)).collect()
    }

    /// One node; `None` if it is not in the graph any more.
    pub fn info(&self, node: &Arc<Node>) -> Option<NodeInfo> {
        let topology = self.topology.borrow();
        let entry = topology.node(node.id())?;
        let mut backing_depth = 0;
        let mut at = node;
        while let Some(backing) = topology.child(at.id(), ChildRole::Backing) {
            backing_depth += 1;
            at = backing;
        }
        let options = node.options();
        Some(NodeInfo {
            name: node.name().to_owned(),
            driver: node.driver_name(),
            filename: node.driver().filename(),
            read_only: node.read_only(),
            size: node.size(),
            cache: options.cache,
            detect_zeroes: options.detect_zeroes,
            discard: options.discard,
            cluster_size: node.limits().cluster_size,
            backing_depth,
            is_filter: node.driver().is_filter(),
            monitor_owned: entry.owner == super::Owner::Monitor,
            children: entry
                .children
                .iter()
                .map(|edge| NodeChild {
                    role: edge.child.role(),
                    node: edge.target.name().to_owned(),
                })
                .collect(),
            bitmaps: node
                .bitmaps()
                .iter()
                .map(|bitmap| BitmapInfo {
                    granularity: bitmap.granularity(),
                    count: bitmap.count_bytes(),
                })
                .collect(),
        })
    }

    /// All backends, in the order in which they came.
    pub fn backends(&self) -> Vec<BackendInfo> {
        let topology = self.topology.borrow();
        topology
            .backends
            .iter()
            .map(|entry| BackendInfo {
                name: entry.backend.name().to_owned(),
                node: entry.target.name().to_owned(),
                user: entry
                    .backend
                    .user()
                    .map_or_else(|| entry.backend.describe(), |user| user.describe()),
                in_flight: entry.backend.in_flight(),
            })
            .collect()
    }
}

/// How long the last flush of a node may take before what waits for a server in it
/// is given up, again and again.
const LAST_FLUSH_PATIENCE: Duration = Duration::from_secs(1);

async fn last_flush(node: &Arc<Node>) {
    let flush = pin!(node.flush());
    let impatience = pin!(async {
        loop {
            sleep(LAST_FLUSH_PATIENCE).await;
            node.cancel_in_flight();
        }
    });
    let Either::Left((result, _)) = select(flush, impatience).await;
    if let Err(error) = result {
        tracing::error!(%error, "a node could not be flushed at the end");
    }
}
