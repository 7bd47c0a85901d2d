//! `block_resize`.

use std::sync::Arc;

use super::{Graph, GraphError};
use crate::backend::Backend;
use crate::node::Node;
use crate::permissions::{Perm, Permissions};

/// Whoever resizes a node: shares everything.
const RESIZER: Permissions = Permissions {
    need: Perm::RESIZE,
    share: Perm::ALL,
};

impl Graph {
    /// Changes the size of `node` to `size` bytes, in a drained section, and tells
    /// all who are attached to it or above it
    /// ([`BackendUser::resized`](crate::BackendUser::resized)).
    ///
    /// Fails, without any change, if a user of the node does not share resizing, if
    /// requests do not end, if a bitmap records the node's writes, or if the storage
    /// cannot. Cancel: the size is the old or the new one, and users may not have
    /// been told.
    pub async fn resize(&self, node: &Arc<Node>, size: u64) -> Result<(), GraphError> {
        let resizer = Attached {
            graph: self,
            backend: self.attach("", node, RESIZER, None)?,
        };
        let drained = self.drain(node, &[&resizer.backend]).await?;
        let resized = node.resize(size).await;
        // A size that was changed in spite of an error is told, too.
        self.tell_resized(node);
        drop(drained);
        Ok(resized?)
    }

    /// Tells all who may send requests to `node` that its size has changed.
    pub(super) fn tell_resized(&self, node: &Arc<Node>) {
        let users = self.topology.borrow().backends_reaching(node.id());
        for backend in users {
            if let Some(user) = backend.user() {
                user.resized();
            }
        }
    }
}

/// An attachment for as long as something is done.
struct Attached<'a> {
    graph: &'a Graph,
    backend: Arc<Backend>,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        self.graph.detach(&self.backend);
    }
}
