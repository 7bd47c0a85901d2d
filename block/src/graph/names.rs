//! Names of nodes and devices: one name space, QEMU's rules.

use super::{Graph, GraphError};

/// Longest node name in bytes.
const MAX_NODE_NAME: usize = 31;

/// Whether `name` is an identifier: a letter, then letters, digits, `-`, `.`
/// and `_`.
pub(crate) fn is_identifier(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

/// A node name that nobody else can take until this is dropped. It is held
/// while the node is being opened.
pub(super) struct ReservedName<'a> {
    graph: &'a Graph,
    name: String,
}

impl ReservedName<'_> {
    pub(super) fn as_str(&self) -> &str {
        &self.name
    }
}

impl Drop for ReservedName<'_> {
    fn drop(&mut self) {
        self.graph.reserved.borrow_mut().remove(&self.name);
    }
}

impl Graph {
    /// Takes `name` for a node, or makes one up.
    pub(super) fn reserve_node_name(
        &self,
        name: Option<&str>,
    ) -> Result<ReservedName<'_>, GraphError> {
        let name = match name {
            Some(name) => {
                self.check_node_name(name)?;
                name.to_owned()
            }
            None => {
                // No identifier begins with '#', so these clash with no other.
                let number = self.next_auto_name.get();
                self.next_auto_name.set(number + 1);
                format!("#block{number:03}")
            }
        };
        self.reserved.borrow_mut().insert(name.clone());
        Ok(ReservedName { graph: self, name })
    }

    fn check_node_name(&self, name: &str) -> Result<(), GraphError> {
        if !is_identifier(name) {
            return Err(GraphError::InvalidNodeName(name.to_owned()));
        }
        let topology = self.topology.borrow();
        if topology.backend_named(name).is_some() {
            return Err(GraphError::NodeNameIsDevice(name.to_owned()));
        }
        if topology.node_named(name).is_some() || self.reserved.borrow().contains(name) {
            return Err(GraphError::DuplicateNodeName(name.to_owned()));
        }
        if name.len() > MAX_NODE_NAME {
            return Err(GraphError::NodeNameTooLong);
        }
        Ok(())
    }

    /// Checks the name of a new backend. An empty one is no name.
    pub(super) fn check_device_name(&self, name: &str) -> Result<(), GraphError> {
        if name.is_empty() {
            return Ok(());
        }
        if !is_identifier(name) {
            return Err(GraphError::InvalidDeviceName);
        }
        let topology = self.topology.borrow();
        if topology.backend_named(name).is_some() {
            return Err(GraphError::DuplicateDevice(name.to_owned()));
        }
        if topology.node_named(name).is_some() || self.reserved.borrow().contains(name) {
            return Err(GraphError::DeviceNameIsNode(name.to_owned()));
        }
        Ok(())
    }
}
