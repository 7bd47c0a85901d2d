//! Who stands on whom: the plain data of the graph, and questions about it.
//!
//! A change is made on a copy, which `commit` then checks as a whole and puts
//! in place. Nothing here touches a driver or a request, except to ask a driver
//! what it wants of its children.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::GraphError;
use crate::backend::{AttachmentKind, Backend};
use crate::driver::ChildRole;
use crate::node::{Child, Node, NodeOptions};
use crate::options::BlockdevOptions;
use crate::permissions::{Perm, PermissionError, Permissions};

/// Nodes that may stand on one another. A request passes all of them on the stack of
/// one thread, and is opened on that of another.
pub(super) const MAX_DEPTH: usize = 100;

/// Longest that a drained section holds those who do not reach its node, but wait for requests
/// that do. Less if these give up earlier.
const HELD_FOR_OTHERS: Duration = Duration::from_secs(2);

/// What keeps a node alive when nothing stands on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// `blockdev-add`, until `blockdev-del`.
    Monitor,
    /// Nothing: the node was opened with its parent, and goes with it.
    Parent,
    /// Whoever inserted it (a job's filter), until it removes it.
    Inserter,
}

#[derive(Clone)]
pub(super) struct NodeEntry {
    pub(super) node: Arc<Node>,
    pub(super) owner: Owner,
    pub(super) children: Vec<ChildEntry>,
    /// What all its parents together need and share.
    pub(super) permissions: Permissions,
    /// What it is in this topology, whatever its driver.
    pub(super) options: NodeOptions,
    /// What it was opened or reopened with; `None` for nodes that cannot be reopened.
    pub(super) given: Option<Arc<BlockdevOptions>>,
    /// Id of the node it was opened with, as a child given inline.
    pub(super) opened_with: Option<u64>,
    /// Id of the layer down to which what shows through must stay as it is.
    pub(super) frozen_to: Option<u64>,
}

impl NodeEntry {
    pub(super) fn new(node: Arc<Node>, owner: Owner, children: Vec<ChildEntry>) -> Self {
        Self {
            options: node.options(),
            node,
            owner,
            children,
            permissions: Permissions::IDLE,
            given: None,
            opened_with: None,
            frozen_to: None,
        }
    }
}

/// A number for who comes to use a node (a backend, or the edge of a node above), higher
/// than those of all who came before.
pub(super) fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[derive(Clone)]
pub(super) struct ChildEntry {
    /// The driver's edge.
    pub(super) child: Arc<Child>,
    /// The node below.
    pub(super) target: Arc<Node>,
    pub(super) permissions: Permissions,
    /// See [`next_number`]: since it goes to this node.
    pub(super) number: u64,
}

impl ChildEntry {
    /// The record of a driver's edge.
    pub(super) fn new(edge: &Child) -> Self {
        Self {
            child: Arc::new(edge.share()),
            target: edge.node(),
            permissions: Permissions::IDLE,
            number: next_number(),
        }
    }
}

#[derive(Clone)]
pub(super) struct BackendEntry {
    pub(super) backend: Arc<Backend>,
    pub(super) target: Arc<Node>,
    pub(super) permissions: Permissions,
    /// See [`next_number`]: since it is attached to this node.
    pub(super) number: u64,
}

impl BackendEntry {
    pub(super) fn new(backend: &Arc<Backend>) -> Self {
        Self {
            backend: Arc::clone(backend),
            target: backend.root(),
            permissions: backend.permissions(),
            number: next_number(),
        }
    }
}

/// All nodes and backends, in the order in which they came.
#[derive(Clone, Default)]
pub(super) struct Topology {
    pub(super) nodes: Vec<NodeEntry>,
    pub(super) backends: Vec<BackendEntry>,
}

fn add_once(nodes: &mut Vec<Arc<Node>>, node: &Arc<Node>) {
    if !nodes.iter().any(|known| known.id() == node.id()) {
        nodes.push(Arc::clone(node));
    }
}

/// One edge to a node, seen from that node.
struct Parent {
    /// Higher for those that came later.
    number: u64,
    describe: String,
    role: &'static str,
    permissions: Permissions,
    /// It is a job's, beside the edge of the filter for which it stands.
    is_beside_edge: bool,
}

impl Topology {
    pub(super) fn node(&self, id: u64) -> Option<&NodeEntry> {
        self.nodes.iter().find(|entry| entry.node.id() == id)
    }

    pub(super) fn node_mut(&mut self, id: u64) -> Option<&mut NodeEntry> {
        self.nodes.iter_mut().find(|entry| entry.node.id() == id)
    }

    pub(super) fn node_named(&self, name: &str) -> Option<&NodeEntry> {
        self.nodes.iter().find(|entry| entry.node.name() == name)
    }

    pub(super) fn backend_named(&self, name: &str) -> Option<&BackendEntry> {
        self.backends
            .iter()
            .find(|entry| !name.is_empty() && entry.backend.name() == name)
    }

    pub(super) fn backend_mut(&mut self, id: u64) -> Option<&mut BackendEntry> {
        self.backends
            .iter_mut()
            .find(|entry| entry.backend.id() == id)
    }

    /// Backends attached to the node itself.
    pub(super) fn backends_of(&self, id: u64) -> impl Iterator<Item = &BackendEntry> {
        self.backends
            .iter()
            .filter(move |entry| entry.target.id() == id)
    }

    /// Nodes that stand on the node, with the edge.
    pub(super) fn parents_of(&self, id: u64) -> impl Iterator<Item = (&NodeEntry, &ChildEntry)> {
        self.nodes.iter().flat_map(move |parent| {
            parent
                .children
                .iter()
                .filter(move |edge| edge.target.id() == id)
                .map(move |edge| (parent, edge))
        })
    }

    /// Ids of the node and of all nodes above it.
    pub(super) fn above(&self, id: u64) -> Vec<u64> {
        let mut ids = vec![id];
        let mut next = 0;
        while let Some(id) = ids.get(next).copied() {
            next += 1;
            for (parent, _) in self.parents_of(id) {
                if !ids.contains(&parent.node.id()) {
                    ids.push(parent.node.id());
                }
            }
        }
        ids
    }

    /// Backends whose requests may get to the node.
    pub(super) fn backends_reaching(&self, id: u64) -> Vec<Arc<Backend>> {
        let above = self.above(id);
        self.backends
            .iter()
            .filter(|entry| above.contains(&entry.target.id()))
            .map(|entry| Arc::clone(&entry.backend))
            .collect()
    }

    /// Backends whose requests may get to the node, or wait for requests that do: those
    /// that a drained section of the node holds.
    pub(super) fn backends_to_drain(&self, id: u64) -> Vec<Arc<Backend>> {
        let mut backends = self.backends_reaching(id);
        let mut next = 0;
        while let Some(backend) = backends.get(next).cloned() {
            next += 1;
            let served = backend.serves().map(|serves| serves.node);
            for more in served.iter().flat_map(|id| self.backends_reaching(*id)) {
                if !backends.iter().any(|known| known.id() == more.id()) {
                    backends.push(more);
                }
            }
        }
        backends
    }

    /// How long a drained section of the node may hold those who do not reach it, but wait for
    /// requests that do; `None` if there are none, save for `except`.
    pub(super) fn patience_of_others(&self, id: u64, except: &[u64]) -> Option<Duration> {
        let direct = self.backends_reaching(id);
        let is_other = |backend: &Backend| {
            let reaches = direct.iter().any(|direct| direct.id() == backend.id());
            backend.gate().holds() && !reaches && !except.contains(&backend.id())
        };
        let serving = self.backends_to_drain(id);
        let serving = serving.iter().filter_map(|backend| backend.serves());
        serving
            .filter(|serves| {
                let served = self.backends_reaching(serves.node);
                served.iter().any(|backend| is_other(backend))
            })
            .map(|serves| serves.patience.unwrap_or(HELD_FOR_OTHERS))
            .map(|patience| patience.min(HELD_FOR_OTHERS))
            .min()
    }

    /// Nodes where requests of the backends with these ids may be.
    pub(super) fn below(&self, backends: impl Iterator<Item = u64>) -> Vec<Arc<Node>> {
        let ids: Vec<u64> = backends.collect();
        let mut nodes: Vec<Arc<Node>> = Vec::new();
        for entry in &self.backends {
            if ids.contains(&entry.backend.id()) {
                add_once(&mut nodes, &entry.target);
            }
        }
        self.all_below(nodes)
    }

    /// Different nodes, and all below them.
    pub(super) fn all_below(&self, mut nodes: Vec<Arc<Node>>) -> Vec<Arc<Node>> {
        let mut next = 0;
        while let Some(node) = nodes.get(next).map(|node| node.id()) {
            next += 1;
            for edge in self.node(node).iter().flat_map(|entry| &entry.children) {
                add_once(&mut nodes, &edge.target);
            }
        }
        nodes
    }

    /// The node and those below that writes to it get to as they are: not what is
    /// copied to a `target`, nor the images that show through.
    pub(super) fn written_through(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        let mut nodes = vec![Arc::clone(node)];
        let mut next = 0;
        while let Some(node) = nodes.get(next).map(|node| node.id()) {
            next += 1;
            for edge in self.node(node).iter().flat_map(|entry| &entry.children) {
                if !matches!(edge.child.role(), ChildRole::Target | ChildRole::Backing) {
                    add_once(&mut nodes, &edge.target);
                }
            }
        }
        nodes
    }

    /// Lets all parents of `old` stand on `new`, except the backends and the
    /// nodes given.
    pub(super) fn move_parents(
        &mut self,
        old: &Arc<Node>,
        new: &Arc<Node>,
        except: &[&Arc<Backend>],
        except_nodes: &[u64],
    ) {
        let excepted = |backend: &Backend| except.iter().any(|b| b.id() == backend.id());
        let backends = self
            .backends
            .iter_mut()
            .filter(|entry| !excepted(&entry.backend))
            .map(|entry| (&mut entry.target, &mut entry.number));
        let edges = self
            .nodes
            .iter_mut()
            .filter(|parent| !except_nodes.contains(&parent.node.id()))
            .flat_map(|parent| &mut parent.children)
            .map(|edge| (&mut edge.target, &mut edge.number));
        let mut moved: Vec<_> = backends
            .chain(edges)
            .filter(|(target, _)| target.id() == old.id())
            .collect();
        // The newest goes first, as with QEMU.
        moved.sort_by_key(|(_, number)| std::cmp::Reverse(**number));
        for (target, number) in moved {
            *target = Arc::clone(new);
            *number = next_number();
        }
    }

    /// Takes out the nodes that nothing keeps, and gives them, parents first.
    pub(super) fn remove_orphans(&mut self) -> Vec<NodeEntry> {
        let mut removed = Vec::new();
        while let Some(index) = self.nodes.iter().position(|entry| {
            let id = entry.node.id();
            entry.owner == Owner::Parent
                && self.parents_of(id).next().is_none()
                && self.backends_of(id).next().is_none()
        }) {
            removed.push(self.nodes.remove(index));
        }
        removed
    }

    /// Indices of all nodes, parents before children.
    pub(super) fn order(&self) -> Result<Vec<usize>, GraphError> {
        let mut waiting: Vec<usize> = self
            .nodes
            .iter()
            .map(|entry| self.parents_of(entry.node.id()).count())
            .collect();
        let mut order: Vec<usize> = (0..self.nodes.len()).filter(|i| waiting[*i] == 0).collect();
        let mut next = 0;
        while let Some(index) = order.get(next).copied() {
            next += 1;
            for edge in &self.nodes[index].children {
                // An edge to a node that has gone: it was deleted while its
                // parent was being opened.
                let below = self
                    .nodes
                    .iter()
                    .position(|entry| entry.node.id() == edge.target.id())
                    .ok_or_else(|| GraphError::NotFound {
                        device: edge.target.name().to_owned(),
                        node: edge.target.name().to_owned(),
                    })?;
                waiting[below] -= 1;
                if waiting[below] == 0 {
                    order.push(below);
                }
            }
        }
        if order.len() < self.nodes.len() {
            return Err(self.cycle(&order));
        }
        Ok(order)
    }

    /// Refuses more than [`MAX_DEPTH`] nodes on one another; `order` is that of
    /// [`order`](Self::order).
    fn check_depth(&self, order: &[usize]) -> Result<(), GraphError> {
        // How many nodes stand on each another up to each, itself included.
        let mut depths: HashMap<u64, usize> = HashMap::new();
        for entry in order.iter().filter_map(|index| self.nodes.get(*index)) {
            let depth = *depths.entry(entry.node.id()).or_insert(1);
            if depth > MAX_DEPTH {
                return Err(GraphError::TooDeep(entry.node.name().to_owned()));
            }
            for edge in &entry.children {
                let below = depths.entry(edge.target.id()).or_insert(1);
                *below = (*below).max(depth + 1);
            }
        }
        Ok(())
    }

    /// Names an edge of a cycle: nodes not in `order` are in one or below one,
    /// and following parents from there ends in one.
    fn cycle(&self, order: &[usize]) -> GraphError {
        let in_cycle = |id: u64| {
            self.nodes
                .iter()
                .enumerate()
                .any(|(i, e)| e.node.id() == id && !order.contains(&i))
        };
        let edge = self
            .nodes
            .iter()
            .flat_map(|entry| entry.children.iter().map(move |edge| (entry, edge)))
            .filter(|(parent, edge)| in_cycle(parent.node.id()) && in_cycle(edge.target.id()))
            .find(|(parent, edge)| self.above(parent.node.id()).contains(&edge.target.id()));
        let name = |node: Option<&Arc<Node>>| node.map_or("", |n| n.name()).to_owned();
        GraphError::Loop {
            child: name(edge.map(|(_, e)| &e.target)),
            role: edge.map_or("", |(_, e)| e.child.role().as_str()),
            parent: name(edge.map(|(p, _)| &p.node)),
        }
    }

    /// Works out what each edge and node needs and shares from the backends
    /// down, and checks that it goes together. Asks drivers, changes none.
    pub(super) fn update_permissions(&mut self) -> Result<(), GraphError> {
        let order = self.order()?;
        self.check_depth(&order)?;
        for index in order {
            let parents = self.parent_edges(&self.nodes[index].node);
            check_conflicts(self.nodes[index].node.name(), &parents)?;
            let entry = &mut self.nodes[index];
            entry.permissions = parents
                .iter()
                .fold(Permissions::IDLE, |all, p| all.and(p.permissions));
            let writes = Perm::WRITE | Perm::WRITE_UNCHANGED;
            if entry.permissions.need.intersects(writes) && entry.options.read_only {
                return Err(match entry.node.read_only() {
                    true => PermissionError::ReadOnly.into(),
                    false => GraphError::Writers(entry.node.name().to_owned()),
                });
            }
            let driver = entry.node.driver();
            for edge in &mut entry.children {
                edge.permissions = match parents.is_empty() {
                    true => driver.unused_child_permissions(edge.child.role()),
                    false => driver.child_permissions(edge.child.role(), entry.permissions),
                };
            }
        }
        Ok(())
    }

    /// All edges to a node, in the order in which they came.
    fn parent_edges(&self, node: &Arc<Node>) -> Vec<Parent> {
        let nodes = self.parents_of(node.id()).map(|(parent, edge)| Parent {
            number: edge.number,
            describe: format!("node '{}'", parent.node.name()),
            role: edge.child.role().as_str(),
            permissions: edge.permissions,
            is_beside_edge: false,
        });
        let backends = self.backends_of(node.id()).map(|entry| Parent {
            number: entry.number,
            describe: entry.backend.describe(),
            role: match entry.backend.kind() {
                AttachmentKind::Root => "root",
                AttachmentKind::Job => "main node",
                AttachmentKind::Child { role, .. } => role.as_str(),
            },
            permissions: entry.permissions,
            is_beside_edge: matches!(
                entry.backend.kind(),
                AttachmentKind::Child {
                    role: ChildRole::File,
                    ..
                }
            ),
        });
        let mut edges: Vec<Parent> = nodes.chain(backends).collect();
        edges.sort_by_key(|edge| edge.number);
        edges
    }

    /// The node below in `role`.
    pub(super) fn child(&self, id: u64, role: ChildRole) -> Option<&Arc<Node>> {
        self.node(id)?
            .children
            .iter()
            .find(|edge| edge.child.role() == role)
            .map(|edge| &edge.target)
    }
}

fn check_conflicts(node: &str, parents: &[Parent]) -> Result<(), GraphError> {
    // What only a job's own hold requires comes last: QEMU has no such holds.
    find_conflict(node, parents, |requires| !requires.is_beside_edge)?;
    find_conflict(node, parents, |requires| requires.is_beside_edge)
}

fn find_conflict(
    node: &str,
    parents: &[Parent],
    counts: impl Fn(&Parent) -> bool,
) -> Result<(), GraphError> {
    // The newest first, as QEMU names them.
    for (i, unshares) in parents.iter().enumerate().rev() {
        for (j, requires) in parents.iter().enumerate().rev() {
            let perms = requires
                .permissions
                .need
                .without(unshares.permissions.share);
            if i != j && !perms.is_empty() && counts(requires) {
                return Err(GraphError::Conflict {
                    node: node.to_owned(),
                    perms,
                    required_by: requires.describe.clone(),
                    required_as: requires.role,
                    unshared_by: unshares.describe.clone(),
                    unshared_as: unshares.role,
                });
            }
        }
    }
    Ok(())
}
