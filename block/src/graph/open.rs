//! `blockdev-add` and `blockdev-del`.

use std::sync::Arc;

use super::topology::Owner;
use super::{Graph, GraphError};
use crate::backend::AttachmentKind;
use crate::node::Node;
use crate::options::BlockdevOptions;

impl Graph {
    /// Opens a node and the children given inline.
    pub async fn blockdev_add(&self, options: BlockdevOptions) -> Result<Arc<Node>, GraphError> {
        if options.node_name.is_none() {
            return Err(GraphError::NodeNameRequired);
        }
        Err(GraphError::Open {
            message: "No driver can be opened".to_owned(),
            source: None,
        })
    }

    /// Removes a node that `blockdev-add` made, and the children that it owns.
    pub async fn blockdev_del(&self, name: &str) -> Result<(), GraphError> {
        let mut topology = self.topology.borrow().clone();
        let Some(entry) = topology.nodes.iter_mut().find(|e| e.node.name() == name) else {
            return Err(GraphError::NoSuchNode(name.to_owned()));
        };
        let owner = std::mem::replace(&mut entry.owner, Owner::Parent);
        let node = Arc::clone(&entry.node);
        let root = topology
            .backends_of(node.id())
            .any(|entry| entry.backend.kind() == AttachmentKind::Root);
        if root {
            return Err(GraphError::NodeInUse(name.to_owned()));
        }
        self.check_not_blocked(&node)?;
        if owner != Owner::Monitor {
            return Err(GraphError::NotMonitorOwned(name.to_owned()));
        }
        let used = topology.parents_of(node.id()).next().is_some()
            || topology.backends_of(node.id()).next().is_some();
        if used {
            return Err(GraphError::HasParents(name.to_owned()));
        }
        self.commit(topology)
    }
}
