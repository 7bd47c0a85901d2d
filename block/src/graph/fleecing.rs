//! What a job that fleeces has in the graph besides its filter: the scratch file in which
//! the filter saves what guests are about to change, and the way to read the snapshot.
//!
//! Both are nodes without a name of the user's, and go when the job lets them go.

use std::path::PathBuf;
use std::sync::Arc;

use super::topology::{BackendEntry, ChildEntry, NodeEntry, Owner};
use super::{Graph, GraphError};
use crate::backend::{Backend, BackendUser};
use crate::driver::ChildRole;
use crate::drivers::file::open_scratch;
use crate::drivers::snapshot_access::SnapshotAccessDriver;
use crate::node::{Child, Node, NodeOptions};
use crate::options::{CacheOptions, DiscardMode};
use crate::permissions::Permissions;
use crate::runtime::unblock;

impl Graph {
    /// Makes a sparse file of `size` bytes in `directory` that has no name there, and a
    /// node of it for `user`, who is attached with no rights. File and node go when
    /// nobody is attached any more, and the file also when the process ends.
    ///
    /// Errors: the file cannot be made. Cancel: it is gone again.
    pub async fn open_scratch(
        &self,
        directory: PathBuf,
        size: u64,
        user: Arc<dyn BackendUser>,
    ) -> Result<Arc<Backend>, GraphError> {
        let name = self.reserve_node_name(None)?;
        let node_name = name.as_str().to_owned();
        let driver = unblock(move || open_scratch(&node_name, &directory, size)).await?;
        let options = NodeOptions {
            discard: DiscardMode::Unmap,
            cache: CacheOptions {
                no_flush: true,
                ..CacheOptions::default()
            },
            ..NodeOptions::default()
        };
        let node = Node::new(name.as_str(), Box::new(driver), options);
        self.put_in_for(node, Vec::new(), Permissions::IDLE, user)
    }

    /// Lets `user` read the snapshot that the `copy-before-write` filter keeps: by a node
    /// of its own on the filter, which goes with the attachment.
    ///
    /// Errors: permissions conflict; nothing has changed.
    pub fn attach_snapshot(
        &self,
        filter: &Arc<Node>,
        permissions: Permissions,
        user: Arc<dyn BackendUser>,
    ) -> Result<Arc<Backend>, GraphError> {
        let name = self.reserve_node_name(None)?;
        let edge = Child::new(ChildRole::File, Arc::clone(filter));
        let entry = ChildEntry::new(&edge);
        let options = NodeOptions {
            // To free what has been read.
            discard: DiscardMode::Unmap,
            ..NodeOptions::default()
        };
        let driver = Box::new(SnapshotAccessDriver::new(edge));
        let node = Node::new(name.as_str(), driver, options);
        self.put_in_for(node, vec![entry], permissions, user)
    }

    fn put_in_for(
        &self,
        node: Arc<Node>,
        children: Vec<ChildEntry>,
        permissions: Permissions,
        user: Arc<dyn BackendUser>,
    ) -> Result<Arc<Backend>, GraphError> {
        let backend = Backend::new("", Arc::clone(&node), permissions, Some(user));
        let mut topology = self.topology.borrow().clone();
        let entry = NodeEntry::new(node, Owner::Parent, children);
        topology.nodes.push(entry);
        topology.backends.push(BackendEntry::new(&backend));
        let _removed = self.commit(topology)?;
        Ok(backend)
    }
}
