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
        for Change {
            node,
            before,
            wanted,
        } in &changed
        {
            if let Err(error) = node.driver().check_permissions(*wanted) {
                if before.need.contains(wanted.need) && wanted.share.contains(before.share) {
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

/// What changes for a node.
struct Change {
    node: Arc<Node>,
    before: Permissions,
    wanted: Permissions,
}

/// Nodes whose users together want something else than before. Nodes that have
/// gone want nothing.
fn changed_permissions(old: &Topology, new: &Topology) -> Vec<Change> {
    let gone = old
        .nodes
        .iter()
        .filter(|entry| new.node(entry.node.id()).is_none())
        .map(|entry| (entry, entry.permissions, Permissions::IDLE));
    let stay = new.nodes.iter().map(|entry| {
        let before = old
            .node(entry.node.id())
            .map_or(Permissions::IDLE, |entry| entry.permissions);
        (entry, before, entry.permissions)
    });
    gone.chain(stay)
        .filter(|(_, before, wanted)| before != wanted)
        .map(|(entry, before, wanted)| Change {
            node: Arc::clone(&entry.node),
            before,
            wanted,
        })
        .collect()
}
