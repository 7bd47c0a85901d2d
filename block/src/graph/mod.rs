//! The graph of nodes and the backends attached to it. Lives on main.
//!
//! - `topology`: who stands on whom; permissions worked out from that;
//! - `commit`: a checked change, put in place all at once;
//! - `change`: insert a filter, replace a node, remove a filter;
//! - `open`: `blockdev-add` and `blockdev-del`;
//! - `reopen`: `blockdev-reopen`;
//! - `frozen`: links that must stay;
//! - `resize`: `block_resize`;
//! - `bitmaps`: bitmaps that are kept;
//! - `drain`: drained sections;
//! - `last_flush`: what has to be written before nodes go;
//! - `handle`: how other threads get here.
//!
//! Requests do not come by here: they read the edges (`Child`, `Backend`),
//! which are changed in drained sections only.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;

use self::last_flush::Closing;
use crate::backend::{AttachmentKind, Backend, BackendUser};
use crate::driver::{BlockDriver, ChildRole};
use crate::leaf::NoLeafCell;
use crate::node::{Node, NodeOptions};
use crate::permissions::{Perm, Permissions};
use crate::throttle::{ThrottleGroup, ThrottleGroups};

mod bitmaps;
mod change;
mod commit;
mod drain;
mod error;
mod filename;
mod fleecing;
mod frozen;
mod handle;
mod info;
mod last_flush;
pub(crate) mod names;
mod open;
mod reopen;
mod resize;
#[cfg(all(test, not(shuttle)))]
mod tests;
mod topology;

pub use bitmaps::{BitmapRoom, CopiedBitmaps};
pub use drain::Drained;
pub use error::{BusyBackend, GraphError};
pub use handle::GraphHandle;
pub use info::{BackendInfo, BitmapInfo, DumpEdge, DumpNode, GraphDump, NodeChild, NodeInfo};

use drain::Section;
use topology::{BackendEntry, NodeEntry, Owner, Topology};

/// How long a drained section waits for requests unless it is told otherwise.
pub const DEFAULT_DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// The graph. On main only; other threads use a [`GraphHandle`].
///
/// No `RefCell` borrow of it is held while a driver or a [`BackendUser`] is told of
/// something, so these may call back. Who is only asked for a name or a size may look
/// at the graph, but not change it.
pub struct Graph {
    id: u64,
    topology: NoLeafCell<Topology>,
    /// Names of nodes that are being opened.
    reserved: RefCell<HashSet<String>>,
    next_auto_name: Cell<u64>,
    /// Drained sections that may be active.
    sections: RefCell<Vec<Weak<Section>>>,
    drain_timeout: Cell<Duration>,
    handle: RefCell<Option<GraphHandle>>,
    throttle_groups: ThrottleGroups,
    closing: Arc<Closing>,
    /// See [`Graph::set_backing_directories`].
    backing_directories: RefCell<Vec<PathBuf>>,
}

impl Graph {
    /// An empty graph that belongs to the calling thread.
    pub fn new() -> Rc<Self> {
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        Rc::new(Self {
            id: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            topology: NoLeafCell::default(),
            reserved: RefCell::default(),
            next_auto_name: Cell::new(100),
            sections: RefCell::default(),
            drain_timeout: Cell::new(DEFAULT_DRAIN_TIMEOUT),
            handle: RefCell::default(),
            throttle_groups: ThrottleGroups::default(),
            closing: Arc::default(),
            backing_directories: RefCell::default(),
        })
    }

    /// Directories where backing files may be that the headers of images name,
    /// besides the directory of the image itself (and below).
    pub fn set_backing_directories(&self, directories: Vec<PathBuf>) {
        self.backing_directories.replace(directories);
    }

    /// The node of that name, or the node that the device of that name is
    /// attached to. Fails with [`GraphError::NotFound`], both names given.
    pub fn find(&self, name: &str) -> Result<Arc<Node>, GraphError> {
        let topology = self.topology.borrow();
        if let Some(entry) = topology.backend_named(name) {
            return Ok(Arc::clone(&entry.target));
        }
        match topology.node_named(name) {
            Some(entry) => Ok(Arc::clone(&entry.node)),
            None => Err(GraphError::NotFound {
                device: name.to_owned(),
                node: name.to_owned(),
            }),
        }
    }

    /// The node of that name; a device's name does not count. Fails with
    /// [`GraphError::NotFound`], the device name empty.
    pub fn find_node(&self, name: &str) -> Result<Arc<Node>, GraphError> {
        match self.topology.borrow().node_named(name) {
            Some(entry) => Ok(Arc::clone(&entry.node)),
            None => Err(GraphError::NotFound {
                device: String::new(),
                node: name.to_owned(),
            }),
        }
    }

    /// The backend of that name.
    pub fn find_backend(&self, name: &str) -> Option<Arc<Backend>> {
        let topology = self.topology.borrow();
        topology
            .backend_named(name)
            .map(|entry| Arc::clone(&entry.backend))
    }

    /// Puts an opened driver without children into the graph as a node, as
    /// `blockdev-add` does. `None` makes up a name.
    pub fn add_node(
        &self,
        name: Option<&str>,
        driver: Box<dyn BlockDriver>,
        options: NodeOptions,
    ) -> Result<Arc<Node>, GraphError> {
        let name = self.reserve_node_name(name)?;
        let node = Node::new(name.as_str(), driver, options);
        let mut topology = self.topology.borrow().clone();
        let entry = NodeEntry::new(Arc::clone(&node), Owner::Monitor, Vec::new());
        topology.nodes.push(entry);
        let _removed = self.commit(topology)?;
        Ok(node)
    }

    /// Attaches a device, job or export to `node`. `name` is a device's id, and
    /// empty for others. If the node is in a drained section, the backend begins
    /// drained.
    ///
    /// A [`Root`](AttachmentKind::Root) that needs to write a node under a job's filter is
    /// attached above the filter, because the job would not see its writes below:
    /// [`Backend::root`] tells. Not so a job (whose requests are only counted): it is
    /// refused, since filters let nobody write past them.
    ///
    /// Fails, without any change, if the name is bad or taken, if other users of
    /// a node on the way down do not go with it, or if an image lock is refused.
    pub fn attach(
        &self,
        name: &str,
        node: &Arc<Node>,
        permissions: Permissions,
        user: Option<Arc<dyn BackendUser>>,
    ) -> Result<Arc<Backend>, GraphError> {
        self.check_device_name(name)?;
        let mut topology = self.topology.borrow().clone();
        let kind = user.as_ref().map_or(AttachmentKind::Root, |u| u.kind());
        let is_job = user.as_ref().is_some_and(|user| !user.holds_requests());
        let writes = kind == AttachmentKind::Root && permissions.need.contains(Perm::WRITE);
        let target = if writes && !is_job {
            above_inserted_filters(&topology, node)
        } else {
            Arc::clone(node)
        };
        if topology.node(target.id()).is_none() {
            return Err(GraphError::NotFound {
                device: String::new(),
                node: node.name().to_owned(),
            });
        }
        if target.id() != node.id() {
            tracing::info!(
                node = node.name(),
                filter = target.name(),
                "a writable user is attached above the job's filter"
            );
        }
        let below = (target.id() != node.id()).then(|| topology.clone());
        let backend = Backend::new(name, target, permissions, user.clone());
        topology.backends.push(BackendEntry::new(&backend));
        let committed = self.commit(topology);
        if let (Err(GraphError::Conflict { .. }), Some(mut below)) = (&committed, below) {
            // If what it needs is a conflict with the filter, which users know, that is told.
            let needs = Permissions {
                share: Perm::ALL,
                ..permissions
            };
            let backend = Backend::new(name, Arc::clone(node), needs, user);
            below.backends.push(BackendEntry::new(&backend));
            below.update_permissions()?;
        }
        let _removed = committed?;
        Ok(backend)
    }

    /// Takes a backend off the graph. Its requests should have ended: what is
    /// still in flight goes on to the node, which may be closed meanwhile. From
    /// now on its writes fail with `EPERM`. Detaching twice does nothing.
    pub fn detach(&self, backend: &Arc<Backend>) {
        let mut topology = self.topology.borrow().clone();
        let before = topology.backends.len();
        topology.backends.retain(|e| e.backend.id() != backend.id());
        if topology.backends.len() == before {
            return;
        }
        if backend.in_flight() > 0 {
            tracing::warn!(
                backend = backend.describe(),
                in_flight = backend.in_flight(),
                "detached with requests in flight"
            );
        }
        backend.store_permissions(Permissions::IDLE);
        // Less is needed than before, so nobody should be against it.
        if let Err(error) = self.commit(topology) {
            tracing::error!(
                %error,
                backend = backend.describe(),
                "Detached, but the permissions of others could not be worked out again"
            );
            // It is off all the same. The rest is caught up with by the next change.
            let mut topology = self.topology.borrow_mut();
            topology.backends.retain(|e| e.backend.id() != backend.id());
        }
    }

    /// Changes what a backend needs and shares.
    ///
    /// Fails, without any change, as [`attach`](Self::attach) does; and with
    /// [`GraphError::BelowFilter`] if a [`Root`](AttachmentKind::Root) that did not
    /// write so far would do so below a job's filter, which would not see it.
    pub fn set_permissions(
        &self,
        backend: &Arc<Backend>,
        permissions: Permissions,
    ) -> Result<(), GraphError> {
        let mut topology = self.topology.borrow().clone();
        if let Some(entry) = topology.backend_mut(backend.id()) {
            let before = std::mem::replace(&mut entry.permissions, permissions);
            let target = Arc::clone(&entry.target);
            let gained = permissions.need.without(before.need);
            let filter = above_inserted_filters(&topology, &target);
            if *backend.kind() == AttachmentKind::Root
                && gained.contains(Perm::WRITE)
                && filter.id() != target.id()
            {
                return Err(GraphError::BelowFilter {
                    user: backend.describe(),
                    node: target.name().to_owned(),
                    filter: filter.name().to_owned(),
                });
            }
        }
        let _removed = self.commit(topology)?;
        Ok(())
    }

    /// Works out all permissions again: for a filter whose wishes have changed.
    pub fn refresh_permissions(&self) -> Result<(), GraphError> {
        let topology = self.topology.borrow().clone();
        let _removed = self.commit(topology)?;
        Ok(())
    }

    /// Fails if someone attached to the node says that it must be left alone, or if it is
    /// the backing image of another. The newest of them is named.
    pub fn check_not_blocked(&self, node: &Arc<Node>) -> Result<(), GraphError> {
        let above = {
            let topology = self.topology.borrow();
            let edges = topology.parents_of(node.id());
            let backing = edges.filter(|(_, edge)| edge.child.role() == ChildRole::Backing);
            let newest = backing.max_by_key(|(_, edge)| edge.number);
            newest.map(|(parent, edge)| (edge.number, Arc::clone(&parent.node)))
        };
        let job = self.blocker(node);
        let reason = match (job, above) {
            (Some((job, reason)), Some((above, _))) if job > above => reason,
            (_, Some((_, above))) => format!("node is used as backing hd of '{}'", above.name()),
            (Some((_, reason)), None) => reason,
            (None, None) => return Ok(()),
        };
        Err(GraphError::Blocked {
            node: node.name().to_owned(),
            reason,
        })
    }

    /// As [`check_not_blocked`](Self::check_not_blocked), for what may be done with the
    /// backing image of another node: it is backed up, or a backup or commit writes it, as
    /// far as rights allow.
    pub fn check_no_job(&self, node: &Arc<Node>) -> Result<(), GraphError> {
        match self.blocker(node) {
            Some((_, reason)) => Err(GraphError::Blocked {
                node: node.name().to_owned(),
                reason,
            }),
            None => Ok(()),
        }
    }

    /// The newest attachment that says that the node must be left alone, and why.
    fn blocker(&self, node: &Arc<Node>) -> Option<(u64, String)> {
        let attached: Vec<_> = {
            let topology = self.topology.borrow();
            let entries = topology.backends_of(node.id());
            entries
                .map(|entry| (entry.number, Arc::clone(&entry.backend)))
                .collect()
        };
        let blockers = attached.into_iter().filter_map(|(number, backend)| {
            let reason = backend.user()?.blocker()?;
            Some((number, reason))
        });
        blockers.max()
    }

    /// Fails if other nodes stand on the node, or a job holds it (also as a
    /// target: then its attachment has a [blocker](BackendUser::blocker)).
    pub fn check_root_node(&self, node: &Arc<Node>) -> Result<(), GraphError> {
        let has_parents = self
            .topology
            .borrow()
            .parents_of(node.id())
            .next()
            .is_some();
        let job = self.backends_at(node).iter().any(|backend| {
            *backend.kind() == AttachmentKind::Job
                || backend.user().is_some_and(|user| user.blocker().is_some())
        });
        if has_parents || job {
            return Err(GraphError::NotRootNode);
        }
        Ok(())
    }

    fn backends_at(&self, node: &Arc<Node>) -> Vec<Arc<Backend>> {
        self.topology
            .borrow()
            .backends_of(node.id())
            .map(|entry| Arc::clone(&entry.backend))
            .collect()
    }

    /// The node below in `role`.
    pub fn child(&self, node: &Arc<Node>, role: ChildRole) -> Option<Arc<Node>> {
        self.topology
            .borrow()
            .child(node.id(), role)
            .map(Arc::clone)
    }

    /// The throttle groups that `throttle` filters may refer to.
    pub fn throttle_groups(&self) -> &ThrottleGroups {
        &self.throttle_groups
    }

    fn throttle_group(&self, name: &str) -> Result<Arc<ThrottleGroup>, GraphError> {
        let group = self.throttle_groups.find(name);
        group.ok_or_else(|| GraphError::NoSuchThrottleGroup(name.to_owned()))
    }

    /// How long a drained section waits for requests.
    pub fn set_drain_timeout(&self, timeout: Duration) {
        self.drain_timeout.set(timeout);
    }
}

/// The topmost filter that a job has put over `node`, or `node`.
fn above_inserted_filters(topology: &Topology, node: &Arc<Node>) -> Arc<Node> {
    let mut node = Arc::clone(node);
    loop {
        let filter = topology
            .parents_of(node.id())
            .find(|(parent, edge)| {
                parent.owner == Owner::Inserter && edge.child.role() == ChildRole::File
            })
            .map(|(parent, _)| Arc::clone(&parent.node));
        match filter {
            Some(filter) => node = filter,
            None => return node,
        }
    }
}

/// A future of main that borrows the graph.
type LocalFuture<'a, T> = LocalBoxFuture<'a, T>;
