//! What queries say of nodes and backends.

use std::sync::Arc;

use super::Graph;
use super::filename::Filenames;
use super::topology::Topology;
use crate::backend::{AttachmentKind, Backend};
use crate::dirty_bitmap::DirtyBitmap;
use crate::driver::{ChildRole, ImageDetails};
use crate::node::Node;
use crate::options::{CacheOptions, DetectZeroes, DiscardMode};
use crate::permissions::Permissions;

/// A node, for `query-named-block-nodes` and `query-block`.
#[derive(Clone, Debug)]
pub struct NodeInfo {
    /// `node-name`.
    pub name: String,
    /// `drv`.
    pub driver: &'static str,
    /// `file`, also `image.filename`: what is behind the node; empty if nothing.
    pub filename: String,
    /// `ro`.
    pub read_only: bool,
    /// `image.virtual-size` in bytes.
    pub size: u64,
    /// `cache.direct` and `cache.no-flush`.
    pub cache: CacheOptions,
    /// `detect_zeroes`.
    pub detect_zeroes: DetectZeroes,
    /// What a discard does.
    pub discard: DiscardMode,
    /// `image.cluster-size` in bytes, if there are clusters.
    pub cluster_size: Option<u32>,
    /// `write_threshold` in bytes; 0 if nobody wants to hear.
    pub write_threshold: u64,
    /// The node that this one shows, or that shows through it: a filter's child, or
    /// the backing image.
    pub below: Option<Arc<Node>>,
    /// `backing_file`: what is behind the backing image.
    pub backing_filename: Option<String>,
    /// Whether the driver knows more of the image than its size (`dirty-flag`).
    pub has_details: bool,
    /// What the image's header says, if it has one.
    pub details: Option<ImageDetails>,
    /// Where the backing file is that the header names (`full-backing-filename`), if
    /// that can be told.
    pub header_backing: Option<String>,
    /// Whether the node is a filter.
    pub is_filter: bool,
    /// Whether `blockdev-del` may remove it, were it unused.
    pub monitor_owned: bool,
    /// Its children.
    pub children: Vec<NodeChild>,
    /// Its bitmaps, the latest first: those without a name, then those with one.
    pub bitmaps: Vec<BitmapInfo>,
}

/// An edge of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeChild {
    /// Part that the child plays.
    pub role: ChildRole,
    /// Name of the child.
    pub node: String,
}

/// A bitmap of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name; `None` for those of jobs, and those that record while a named one is
    /// frozen.
    pub name: Option<String>,
    /// Whether writes are recorded in it, or in its successor.
    pub recording: bool,
    /// Whether somebody uses it, so that it cannot be changed.
    pub busy: bool,
    /// Whether writes may be missing in it.
    pub inconsistent: bool,
    /// Whether it is kept when the node is closed, and after a crash.
    pub persistent: bool,
    /// Chunk size in bytes.
    pub granularity: u64,
    /// Dirty bytes, whole chunks.
    pub count: u64,
}

/// A backend, for `query-block`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendInfo {
    /// Name; empty for exports and jobs.
    pub name: String,
    /// Name of the node it is attached to.
    pub node: String,
    /// Who it is.
    pub user: String,
    /// Requests in flight.
    pub in_flight: usize,
}

/// A graph as `x-debug-query-block-graph` shows it.
#[derive(Clone, Debug, Default)]
pub struct GraphDump {
    /// Users and nodes.
    pub nodes: Vec<DumpNode>,
    /// Who stands on whom.
    pub edges: Vec<DumpEdge>,
    /// Who has which number: the first that was mentioned has 1.
    numbers: Vec<Vertex>,
}

/// A user or a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpNode {
    /// Its number in this dump.
    pub id: u64,
    /// `block-backend`, `block-job` or `block-driver`.
    pub kind: &'static str,
    /// Name of the node or device, or who the job is. May be empty.
    pub name: String,
}

/// A user of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DumpEdge {
    /// Number of the user.
    pub parent: u64,
    /// Number of the node.
    pub child: u64,
    /// As what it uses the node: `root`, `file`, …
    pub name: &'static str,
    /// What it needs and shares.
    pub permissions: Permissions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vertex {
    Backend(u64),
    Node(u64),
}

impl GraphDump {
    fn number(&mut self, vertex: Vertex) -> u64 {
        let known = self.numbers.iter().position(|v| *v == vertex);
        let index = known.unwrap_or_else(|| {
            self.numbers.push(vertex);
            self.numbers.len() - 1
        });
        index as u64 + 1
    }
}

fn bitmaps(topology: &Topology, node: &Arc<Node>) -> Vec<BitmapInfo> {
    let unnamed = |bits: &DirtyBitmap, recording| BitmapInfo {
        name: None,
        recording,
        busy: false,
        inconsistent: false,
        persistent: false,
        granularity: bits.granularity(),
        count: bits.count_bytes(),
    };
    // Clients look for what a job records at the node that it is about.
    let filters = topology.nodes.iter().filter(|entry| {
        let mut below = entry.children.iter();
        below.any(|edge| edge.target.id() == node.id() && edge.child.role() != ChildRole::Target)
    });
    let recorded = filters.filter_map(|entry| entry.node.driver().recorded());
    let own = node.driver().own_bitmaps();
    let of_filters = recorded.chain(own).map(|bits| BitmapInfo {
        name: None,
        recording: bits.recording,
        busy: false,
        persistent: false,
        inconsistent: false,
        granularity: bits.granularity,
        count: bits.count,
    });
    let mut all: Vec<BitmapInfo> = of_filters.collect();
    all.extend(
        node.unnamed_bitmaps()
            .iter()
            .map(|bits| unnamed(bits, true)),
    );
    let named = node.named_bitmaps();
    for bitmap in named.iter().rev() {
        let successor = bitmap.successor();
        all.extend(successor.map(|bits| unnamed(&bits, bitmap.is_recording())));
    }
    all.extend(named.iter().rev().map(|bitmap| {
        let bits = bitmap.bits();
        BitmapInfo {
            name: Some(bitmap.name().to_owned()),
            recording: bitmap.is_recording(),
            busy: bitmap.is_busy(),
            inconsistent: bitmap.is_inconsistent(),
            persistent: bitmap.is_persistent(),
            granularity: bits.granularity(),
            count: bits.count_bytes(),
        }
    }));
    all
}

/// The place of a file that the header of the image `file` names; `None` if the image
/// is no file. Names that are addresses stay as they are.
pub(super) fn full_name(named: &str, file: &str) -> Option<String> {
    let is_address = named
        .split_once(':')
        .is_some_and(|(scheme, _)| !scheme.is_empty() && !scheme.contains('/'));
    if named.starts_with('/') || is_address {
        return Some(named.to_owned());
    }
    if file.starts_with("json:") {
        return None;
    }
    let directory = file.rfind('/').map_or("", |slash| &file[..=slash]);
    Some(format!("{directory}{named}"))
}

/// Files and formats do, and what shows them does.
fn has_details(topology: &Topology, node: &Arc<Node>) -> bool {
    match node.driver_name() {
        "file" | "host_device" | "qcow2" => true,
        "snapshot-access" => false,
        "blkdebug" => topology
            .child(node.id(), ChildRole::Image)
            .is_some_and(|below| has_details(topology, below)),
        _ => topology
            .child(node.id(), ChildRole::File)
            .is_some_and(|below| has_details(topology, below)),
    }
}

impl Graph {
    /// All nodes, in the order in which they came.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        let nodes: Vec<_> = self
            .topology
            .borrow()
            .nodes
            .iter()
            .map(|entry| Arc::clone(&entry.node))
            .collect();
        nodes.iter().filter_map(|node| self.info(node)).collect()
    }

    /// One node; `None` if it is not in the graph any more.
    pub fn info(&self, node: &Arc<Node>) -> Option<NodeInfo> {
        let topology = self.topology.borrow();
        let entry = topology.node(node.id())?;
        let backing = topology.child(node.id(), ChildRole::Backing);
        let filtered = node.driver().filtered();
        let options = node.options();
        let mut filenames = Filenames::new(&topology);
        let details = node.driver().image_details();
        let header_backing = details.as_ref().and_then(|details| {
            let file = topology.child(node.id(), ChildRole::File)?;
            let named = details.backing_filename.as_ref()?;
            full_name(named, &filenames.shown(file.id()))
        });
        Some(NodeInfo {
            name: node.name().to_owned(),
            driver: node.driver_name(),
            filename: filenames.shown(node.id()),
            read_only: node.read_only(),
            size: node.size(),
            cache: options.cache,
            detect_zeroes: options.detect_zeroes,
            discard: options.discard,
            cluster_size: node.limits().cluster_size,
            write_threshold: node.write_threshold(),
            backing_filename: backing.map(|node| filenames.shown(node.id())),
            has_details: has_details(&topology, node),
            details,
            header_backing,
            below: filtered.or_else(|| backing.map(Arc::clone)),
            is_filter: node.driver().is_filter(),
            monitor_owned: entry.owner == super::Owner::Monitor,
            children: entry
                .children
                .iter()
                .map(|edge| NodeChild {
                    role: edge.child.role(),
                    node: edge.target.name().to_owned(),
                })
                .collect(),
            bitmaps: bitmaps(&topology, node),
        })
    }

    /// Bytes that the node's image takes on its storage, backing images left out;
    /// `None` if that cannot be told. Cancel: nothing happens.
    pub async fn allocated_size(&self, node: &Arc<Node>) -> Option<u64> {
        let mut sum = 0u64;
        let mut nodes = vec![Arc::clone(node)];
        while let Some(node) = nodes.pop() {
            let children: Vec<Arc<Node>> = {
                let topology = self.topology.borrow();
                let edges = topology.node(node.id())?.children.iter();
                edges
                    .filter(|edge| edge.child.role() != ChildRole::Backing)
                    .map(|edge| Arc::clone(&edge.target))
                    .collect()
            };
            if node.driver_name() == "blkdebug" {
                // As in QEMU, where it stands for what it may not be.
                return None;
            }
            if children.is_empty() {
                sum = sum.saturating_add(node.driver().allocated_size().await?);
            }
            nodes.extend(children);
        }
        Some(sum)
    }

    /// The whole graph, for debugging: who uses what, and with what rights.
    pub fn dump(&self) -> GraphDump {
        let topology = self.topology.borrow();
        let mut dump = GraphDump::default();
        for entry in &topology.backends {
            let backend = &entry.backend;
            let (kind, name, role) = match (backend.kind(), backend.user()) {
                (AttachmentKind::Job, Some(user)) => ("block-job", user.describe(), "main node"),
                (AttachmentKind::Child { parent, role }, _) => {
                    ("block-driver", parent.to_string(), role.as_str())
                }
                _ => ("block-backend", backend.name().to_owned(), "root"),
            };
            let parent = dump.number(Vertex::Backend(backend.id()));
            dump.nodes.push(DumpNode {
                id: parent,
                kind,
                name,
            });
            let child = dump.number(Vertex::Node(entry.target.id()));
            dump.edges.push(DumpEdge {
                parent,
                child,
                name: role,
                permissions: entry.permissions,
            });
        }
        for entry in &topology.nodes {
            let parent = dump.number(Vertex::Node(entry.node.id()));
            dump.nodes.push(DumpNode {
                id: parent,
                kind: "block-driver",
                name: entry.node.name().to_owned(),
            });
            for edge in &entry.children {
                let child = dump.number(Vertex::Node(edge.target.id()));
                dump.edges.push(DumpEdge {
                    parent,
                    child,
                    name: edge.child.role().as_str(),
                    permissions: edge.permissions,
                });
            }
        }
        dump
    }

    /// The backends of devices and exports that reach one of the nodes: those whose
    /// requests drained sections hold back.
    pub fn guests_of(&self, nodes: &[Arc<Node>]) -> Vec<Arc<Backend>> {
        let topology = self.topology.borrow();
        let reaching = |node: &Arc<Node>| topology.backends_reaching(node.id());
        let mut guests: Vec<Arc<Backend>> = nodes.iter().flat_map(reaching).collect();
        guests.retain(|backend| backend.gate().holds());
        guests.sort_by_key(|backend| backend.id());
        guests.dedup_by_key(|backend| backend.id());
        guests
    }

    /// All backends, in the order in which they came.
    pub fn backends(&self) -> Vec<BackendInfo> {
        let topology = self.topology.borrow();
        topology
            .backends
            .iter()
            .map(|entry| BackendInfo {
                name: entry.backend.name().to_owned(),
                node: entry.target.name().to_owned(),
                user: entry
                    .backend
                    .user()
                    .map_or_else(|| entry.backend.describe(), |user| user.describe()),
                in_flight: entry.backend.in_flight(),
            })
            .collect()
    }
}
