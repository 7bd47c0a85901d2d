//! The edge from a node to one below.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::Node;
use crate::driver::ChildRole;

/// An edge from a node down to the node it stands on.
///
/// A driver gets it when it is opened and asks it for the node below with each
/// request. The graph changes it under drain, in one step for all readers.
#[derive(Debug)]
pub struct Child {
    edge: Arc<Edge>,
}

#[derive(Debug)]
struct Edge {
    role: ChildRole,
    /// The node below. Written on main, in a drained section.
    node: ArcSwap<Node>,
}

impl Child {
    pub(crate) fn new(role: ChildRole, node: Arc<Node>) -> Self {
        Self {
            edge: Arc::new(Edge {
                role,
                node: ArcSwap::new(node),
            }),
        }
    }

    /// The node below at this moment. Ask once per request.
    pub fn node(&self) -> Arc<Node> {
        self.edge.node.load_full()
    }

    /// The part that it plays.
    pub fn role(&self) -> ChildRole {
        self.edge.role
    }

    /// The same edge, for the graph's records.
    pub(crate) fn share(&self) -> Self {
        Self {
            edge: Arc::clone(&self.edge),
        }
    }

    pub(crate) fn store(&self, node: Arc<Node>) {
        self.edge.node.store(node);
    }
}
