//! Puts a changed topology in place: all of it, or nothing. And closes the nodes
//! that have gone.

use std::sync::Arc;

use futures_channel::oneshot;

use super::last_flush::Closing;
use super::topology::{NodeEntry, Topology};
use super::{Graph, GraphError};
use crate::node::Node;
use crate::permissions::Permissions;
use crate::runtime;

impl Graph {
    /// Checks `new` as a whole (loops, conflicts, rights, image locks), then
    /// makes it the graph. After an error everything is as before.
    ///
    /// The caller has drained what sends requests over the edges that change, and
    /// closes what is removed, or has it closed by dropping it.
    pub(super) fn commit(&self, new: Topology) -> Result<Removed, GraphError> {
        self.commit_reopened(new, &[])
    }

    /// As [`commit`](Self::commit), for `reopened` nodes in whose driver something is
    /// prepared: that holds, too, from now on.
    pub(super) fn commit_reopened(
        &self,
        mut new: Topology,
        reopened: &[Arc<Node>],
    ) -> Result<Removed, GraphError> {
        let old = self.topology.borrow().clone();
        let removed = new.remove_orphans();
        old.check_frozen(&new)?;
        for node in reopened {
            node.driver().reopen_begin();
        }
        new.update_permissions()?;

        let order = new.order()?;
        let changed = changed_permissions(&old, &new, reopened);
        let mut checked: Vec<&Arc<Node>> = Vec::new();
        for Change {
            node,
            before,
            wanted,
        } in &changed
        {
            if let Err(error) = node.driver().check_permissions(*wanted) {
                let prepared = reopened.iter().any(|n| n.id() == node.id());
                if !prepared
                    && before.need.contains(wanted.need)
                    && wanted.share.contains(before.share)
                {
                    // Nothing new is asked for, so nobody can be against it. A
                    // driver that fails to let go keeps more than it needs, until
                    // the next change.
                    tracing::warn!(node = node.name(), %error, "image locks were not loosened");
                    continue;
                }
                for node in checked.iter().rev() {
                    node.driver().abort_permissions();
                }
                return Err(error.into());
            }
            checked.push(node);
        }

        // Nothing can fail from here on.
        for entry in &new.backends {
            if entry.backend.root().id() != entry.target.id() {
                entry.backend.store_root(Arc::clone(&entry.target));
            }
            entry.backend.store_permissions(entry.permissions);
        }
        for edge in new.nodes.iter().flat_map(|entry| &entry.children) {
            if edge.child.node().id() != edge.target.id() {
                edge.child.store(Arc::clone(&edge.target));
            }
        }
        for node in reopened {
            node.driver().reopen_commit();
        }
        for node in &checked {
            node.driver().set_permissions();
        }
        // Children first, since what a node wants may be what its child wants.
        for entry in order.iter().rev().filter_map(|index| new.nodes.get(*index)) {
            entry.node.set_options(entry.options);
            entry.node.refresh_limits();
        }
        self.topology.replace(new);
        self.inherit_sections();
        Ok(self.removed(removed))
    }

    /// To be closed: parents first.
    pub(super) fn removed(&self, nodes: Vec<NodeEntry>) -> Removed {
        Removed {
            nodes,
            closing: Arc::clone(&self.closing),
        }
    }
}

/// Nodes that are in the graph no more, parents first.
///
/// They are closed on a helper thread, since the last close of an image may write
/// it back, and never end on dead storage. Dropping this does not wait for that.
#[must_use = "whoever can wait should wait until the nodes are closed"]
pub(super) struct Removed {
    nodes: Vec<NodeEntry>,
    closing: Arc<Closing>,
}

impl Removed {
    /// Waits until they are closed. Who else still holds one, or has requests in
    /// it, keeps its file open.
    ///
    /// Cancel: they are closed all the same.
    pub(super) async fn closed(mut self) {
        if let Some(closed) = self.close() {
            // An error is a driver that panicked on that thread.
            let _ = closed.await;
        }
    }

    fn close(&mut self) -> Option<oneshot::Receiver<()>> {
        let nodes = std::mem::take(&mut self.nodes);
        if nodes.is_empty() {
            return None;
        }
        // What a close writes is not held back by their limits.
        for entry in &nodes {
            entry.node.driver().drained_begin();
        }
        let under_way = self.closing.begin();
        let (done, closed) = oneshot::channel();
        runtime::unblock_detached(move || {
            for entry in &nodes {
                entry.node.driver().close();
            }
            // When none of them writes any more.
            for entry in &nodes {
                entry.node.close_bitmaps();
            }
            drop(nodes);
            drop(under_way);
            // Nobody may be waiting.
            let _ = done.send(());
        });
        Some(closed)
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = self.close();
    }
}

/// What changes for a node.
struct Change {
    node: Arc<Node>,
    before: Permissions,
    wanted: Permissions,
}

/// Nodes whose users together want something else than before, and those that are
/// reopened. Those that have
/// gone give up what they hold when they are closed.
fn changed_permissions(old: &Topology, new: &Topology, reopened: &[Arc<Node>]) -> Vec<Change> {
    new.nodes
        .iter()
        .map(|entry| Change {
            node: Arc::clone(&entry.node),
            before: old
                .node(entry.node.id())
                .map_or(Permissions::IDLE, |entry| entry.permissions),
            wanted: entry.permissions,
        })
        .filter(|change| {
            change.before != change.wanted
                || reopened.iter().any(|node| node.id() == change.node.id())
        })
        .collect()
}
