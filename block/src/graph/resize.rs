//! `block_resize`.

use std::sync::Arc;

use super::{Graph, GraphError};
use crate::backend::Backend;
use crate::bitmaps::NamedBitmap;
use crate::error::IoError;
use crate::node::{MAX_SIZE, Node, SECTOR_SIZE};
use crate::permissions::{Perm, Permissions};

/// Whoever resizes a node: shares everything.
const RESIZER: Permissions = Permissions {
    need: Perm::RESIZE,
    share: Perm::ALL,
};

fn resize_error(node: &Arc<Node>, error: IoError) -> GraphError {
    match error.errno {
        libc::EOPNOTSUPP if node.driver_name() == "raw" => GraphError::FixedRaw,
        libc::EOPNOTSUPP => GraphError::NoResize,
        libc::EFBIG if node.skip_filters().driver_name() == "qcow2" => GraphError::NoLargerL1,
        // Also of a node below, where it is more.
        libc::EFBIG if error.offset > MAX_SIZE => GraphError::TooLarge(error.offset),
        _ => GraphError::Resize(error),
    }
}

impl Graph {
    /// Changes the size of `node` to `size` bytes, in a drained section, and tells
    /// all who are attached to it or above it
    /// ([`BackendUser::resized`](crate::BackendUser::resized)).
    ///
    /// Named bitmaps follow: what is new is clean, what has gone is forgotten.
    ///
    /// Fails, without any change, if a user of the node does not share resizing, if
    /// requests do not end, if a bitmap is busy or the file of persistent ones has no room, or
    /// if the storage cannot. Cancel: the size is the old or the new one, and users may not
    /// have been told.
    pub async fn resize(&self, node: &Arc<Node>, size: u64) -> Result<(), GraphError> {
        let resizer = Attached {
            graph: self,
            backend: self.attach("", node, RESIZER, None)?,
        };
        if size > MAX_SIZE {
            return Err(GraphError::TooLarge(size));
        }
        if node.read_only() {
            return Err(GraphError::ImageReadOnly);
        }
        if node.limits().cluster_size.is_some() && !size.is_multiple_of(SECTOR_SIZE) {
            return Err(GraphError::UnalignedSize);
        }
        let drained = self.drain(node, &[&resizer.backend]).await?;
        for bitmap in self.bitmaps_above(node) {
            bitmap.check_resize(size)?;
        }
        let mut keepers = self.keepers_above(node);
        // It looks by itself as well, but cannot say as much.
        keepers.extend(node.keeps_bitmaps().then(|| Arc::clone(node)));
        let mut noted = Ok(());
        for keeper in &keepers {
            if noted.is_ok() {
                noted = keeper.note_resize(Some(size)).await;
            }
        }
        let resized = match noted {
            Ok(()) => {
                let resized = node.resize(size).await;
                // A size that was changed in spite of an error is told, too.
                self.tell_resized(node);
                resized.map_err(|error| resize_error(node, error))
            }
            Err(error) => Err(error.into()),
        };
        for keeper in &keepers {
            // Else any size is taken for the disk's after a crash: nothing is lost.
            if let Err(error) = keeper.note_resize(None).await {
                tracing::error!(node = keeper.name(), %error, "bitmaps were resized in memory only");
            }
        }
        drop(drained);
        resized
    }

    /// The named bitmaps of the node, and of those above.
    fn bitmaps_above(&self, node: &Arc<Node>) -> Vec<Arc<NamedBitmap>> {
        let topology = self.topology.borrow();
        let above = topology.above(node.id());
        let above = above.iter().filter_map(|id| topology.node(*id));
        above.flat_map(|entry| entry.node.named_bitmaps()).collect()
    }

    /// Tells all who may send requests to `node` that its size has changed. The named
    /// bitmaps of all nodes have their nodes' sizes then.
    pub(super) fn tell_resized(&self, node: &Arc<Node>) {
        let nodes = self.topology.borrow().nodes.clone();
        for entry in nodes {
            entry.node.fit_bitmaps();
        }
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
