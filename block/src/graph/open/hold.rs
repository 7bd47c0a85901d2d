//! Rights on a file that are had before its content is looked at.
//!
//! A format reads tables when it is opened, and relies on them from then on. Were the
//! image locked only when the node comes into the graph, somebody else could write it
//! in between.

use std::sync::Arc;

use super::Opening;
use crate::backend::{AttachmentKind, Backend, BackendUser};
use crate::driver::ChildRole;
use crate::graph::{Graph, GraphError};
use crate::node::Node;
use crate::permissions::Permissions;

/// Stands for a node that is not in the graph yet.
struct Opener {
    parent: String,
    role: ChildRole,
}

impl BackendUser for Opener {
    fn kind(&self) -> AttachmentKind {
        AttachmentKind::Child {
            parent: Arc::from(self.parent.as_str()),
            role: self.role,
        }
    }

    fn describe(&self) -> String {
        format!("node '{}'", self.parent)
    }
}

/// Attachments that stand for nodes being opened. Dropping takes them off.
pub(super) struct Holds<'a> {
    graph: &'a Graph,
    backends: Vec<Arc<Backend>>,
}

impl<'a> Holds<'a> {
    pub(super) fn new(graph: &'a Graph) -> Self {
        Self {
            graph,
            backends: Vec::new(),
        }
    }

    /// Whether an attachment is one of these.
    pub(super) fn contain(&self, id: u64) -> bool {
        self.backends.iter().any(|backend| backend.id() == id)
    }
}

impl Drop for Holds<'_> {
    fn drop(&mut self) {
        for backend in &self.backends {
            self.graph.detach(backend);
        }
    }
}

impl Opening<'_> {
    /// Lets the node `parent`, which is being opened, have `rights` on `node` from now
    /// until it is in the graph, as its child in `role`.
    ///
    /// Errors: as the change of the graph would give them.
    pub(super) fn hold(
        &mut self,
        parent: &str,
        role: ChildRole,
        node: &Arc<Node>,
        rights: Permissions,
    ) -> Result<(), GraphError> {
        let own = self.nodes.iter().find(|e| e.node.id() == node.id());
        let Some(entry) = own.cloned() else {
            let opener = Arc::new(Opener {
                parent: parent.to_owned(),
                role,
            });
            let backend = self.graph.attach("", node, rights, Some(opener))?;
            self.holds.backends.push(backend);
            return Ok(());
        };
        for edge in &entry.children {
            let role = edge.child.role();
            let below = node.driver().child_permissions(role, rights);
            self.hold(node.name(), role, &edge.target, below)?;
        }
        node.driver().check_permissions(rights)?;
        node.driver().set_permissions();
        Ok(())
    }
}
