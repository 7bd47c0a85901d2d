//! Puts a changed topology in place: all of it, or nothing.

use std::sync::Arc;

use super::topology::Topology;
use super::{Graph, GraphError};
use crate::node::Node;
use crate::permissions::Permissions;

impl Graph {
    /// Checks `new` as a whole (loops, conflicts, rights, image locks), then
    /// makes it the graph. After an error everything is as before.
    ///
    /// The caller has drained what sends requests over the edges that change.
    pub(super) fn commit(&self, mut new: Topology) -> Result<(), GraphError> {
        let old = self.topology.borrow().clone();
        let removed = new.remove_orphans();
        new.update_permissions()?;

        let changed = changed_permissions(&old, &new);
        let mut checked: Vec<&Arc<Node>> = Vec::new();
        for (node, wanted) in &changed {
            if let Err(error) = node.driver().check_permissions(*wanted) {
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
        for node in &checked {
            node.driver().set_permissions();
        }
        self.topology.replace(new);
        for entry in removed {
            entry.node.driver().close();
        }
        self.inherit_sections();
        Ok(())
    }
}

/// Nodes whose users together want something else than before. Nodes that have
/// gone want nothing.
fn changed_permissions(old: &Topology, new: &Topology) -> Vec<(Arc<Node>, Permissions)> {
    let mut changed = Vec::new();
    for entry in &old.nodes {
        if new.node(entry.node.id()).is_none() && entry.permissions != Permissions::IDLE {
            changed.push((Arc::clone(&entry.node), Permissions::IDLE));
        }
    }
    for entry in &new.nodes {
        let before = old
            .node(entry.node.id())
            .map_or(Permissions::IDLE, |entry| entry.permissions);
        if before != entry.permissions {
            changed.push((Arc::clone(&entry.node), entry.permissions));
        }
    }
    changed
}
