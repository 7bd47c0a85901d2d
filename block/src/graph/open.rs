//! `blockdev-add` and `blockdev-del`.
//!
//! What the options mean to one driver is the driver's business.

use std::path::PathBuf;
use std::sync::Arc;

use self::hold::Holds;
use super::commit::Removed;
use super::names::ReservedName;
use super::topology::{BackendEntry, ChildEntry, MAX_DEPTH, NodeEntry, Owner, Topology};
use super::{Graph, GraphError, LocalFuture, above_inserted_filters};
use crate::backend::{AttachmentKind, Backend, BackendUser};
use crate::bitmaps::NamedBitmapError;
use crate::driver::{BlockDriver, ChildRole};
use crate::drivers::blkdebug::BlkdebugDriver;
use crate::drivers::copy_before_write::CopyBeforeWriteDriver;
use crate::drivers::copy_on_read::CopyOnReadDriver;
use crate::drivers::file::{FileNode, OpenFlags};
use crate::drivers::nbd::NbdDriver;
use crate::drivers::null::NullDriver;
use crate::drivers::preallocate::PreallocateDriver;
use crate::drivers::raw::RawDriver;
use crate::drivers::snapshot_access::SnapshotAccessDriver;
use crate::drivers::throttle::ThrottleDriver;
use crate::drivers::{OpenError, file};
use crate::node::{Child, MAX_SIZE, Node, NodeOptions};
use crate::options::{BlockdevOptions, BlockdevRef, DetectZeroes, DiscardMode, DriverOptions};
use crate::permissions::Permissions;
use crate::runtime::unblock;

mod hold;
mod qcow2;

impl Graph {
    /// Opens a node, and the children given inline, which belong to it and go
    /// with it. An inline child that does not say otherwise is read-only if its
    /// parent is, has its parent's cache options, and unmaps (the parent has
    /// decided whether to).
    ///
    /// A child given by name that is under a job's filter stands for the filter,
    /// unless the new node is read-only: its writes would bypass the job.
    ///
    /// Files are opened on helper threads, so main does not wait for a slow file
    /// system, and after an error closed there before this returns. Cancel:
    /// everything opened so far is closed.
    pub async fn blockdev_add(&self, options: BlockdevOptions) -> Result<Arc<Node>, GraphError> {
        if options.node_name.is_none() {
            return Err(GraphError::NodeNameRequired);
        }
        let (node, _) = self.open_into(options, Owner::Monitor, None).await?;
        Ok(node)
    }

    /// Opens a node as [`blockdev_add`](Self::blockdev_add) does, but for `user`: it is
    /// attached to the node from the start, with no rights, and the node goes when
    /// nobody uses it any more. `None` for a name makes one up.
    ///
    /// Errors, cancel: as `blockdev_add`.
    pub async fn open_for(
        &self,
        options: BlockdevOptions,
        user: Arc<dyn BackendUser>,
    ) -> Result<Arc<Backend>, GraphError> {
        match self.open_into(options, Owner::Parent, Some(user)).await? {
            (_, Some(backend)) => Ok(backend),
            // Where a user is given, a backend is made.
            (node, None) => Err(GraphError::NotMonitorOwned(node.name().to_owned())),
        }
    }

    async fn open_into(
        &self,
        options: BlockdevOptions,
        owner: Owner,
        user: Option<Arc<dyn BackendUser>>,
    ) -> Result<(Arc<Node>, Option<Arc<Backend>>), GraphError> {
        let mut opening = Opening {
            graph: self,
            nodes: Vec::new(),
            names: Vec::new(),
            named: Vec::new(),
            said: Vec::new(),
            depth: 0,
            holds: Holds::new(self),
        };
        match opening.open(options.clone(), options, owner).await {
            Ok(node) => {
                let backend = user
                    .map(|user| Backend::new("", Arc::clone(&node), Permissions::IDLE, Some(user)));
                // Nothing is awaited between this look and the change.
                match opening.look_again().and_then(|()| {
                    let mut topology = self.topology.borrow().clone();
                    // The nodes take over what is held for them.
                    topology
                        .backends
                        .retain(|entry| !opening.holds.contain(entry.backend.id()));
                    topology.nodes.extend(opening.in_order());
                    topology.check_freezable(&self.topology.borrow())?;
                    topology
                        .backends
                        .extend(backend.iter().map(BackendEntry::new));
                    self.commit(topology)
                }) {
                    Ok(removed) => {
                        // They are the graph's now.
                        opening.nodes.clear();
                        drop(opening);
                        removed.closed().await;
                        Ok((node, backend))
                    }
                    Err(error) => {
                        drop((node, backend));
                        opening.closed().await;
                        Err(error)
                    }
                }
            }
            Err(error) => {
                opening.closed().await;
                Err(error)
            }
        }
    }

    /// Removes a node that `blockdev-add` made and that nothing uses, and the
    /// children that belong to it. Their files are closed when this returns, unless
    /// somebody still holds a node or has requests in it.
    ///
    /// Cancel: it is there as before, or removed and will be closed.
    pub async fn blockdev_del(&self, name: &str) -> Result<(), GraphError> {
        self.flush_for_removal(self.without(name)?).await;
        // Somebody may have come to use it meanwhile.
        let topology = self.without(name)?;
        self.commit(topology)?.closed().await;
        Ok(())
    }

    /// The graph in which nothing keeps the node `name`, if that may be.
    fn without(&self, name: &str) -> Result<Topology, GraphError> {
        let mut topology = self.topology.borrow().clone();
        let Some(entry) = topology.nodes.iter_mut().find(|e| e.node.name() == name) else {
            return Err(GraphError::NoSuchNode(name.to_owned()));
        };
        let owner = std::mem::replace(&mut entry.owner, Owner::Parent);
        let node = Arc::clone(&entry.node);
        let root = topology
            .backends_of(node.id())
            .any(|entry| *entry.backend.kind() == AttachmentKind::Root);
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
        Ok(topology)
    }
}

/// Nodes that have been opened and are not in the graph yet, children first.
/// Dropping it closes them.
struct Opening<'a> {
    graph: &'a Graph,
    nodes: Vec<NodeEntry>,
    names: Vec<ReservedName<'a>>,
    /// Files that are being opened because the header of an image names them,
    /// symbolic links resolved.
    named: Vec<PathBuf>,
    /// What was said of children given by name, by the number of the edge.
    said: Vec<(u64, Arc<Node>)>,
    /// Nodes whose children are being opened, each above the next.
    depth: usize,
    holds: Holds<'a>,
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

impl<'a> Opening<'a> {
    fn take(&mut self) -> Removed {
        self.graph.removed(self.nodes.drain(..).rev().collect())
    }

    /// While files were opened, jobs' filters may have come above children given by
    /// name, or nodes may have gone.
    fn look_again(&mut self) -> Result<(), GraphError> {
        let topology = self.graph.topology.borrow();
        let own: Vec<u64> = self.nodes.iter().map(|entry| entry.node.id()).collect();
        for entry in &mut self.nodes {
            for edge in &mut entry.children {
                if own.contains(&edge.target.id()) {
                    continue;
                }
                let said = self.said.iter().find(|(number, _)| *number == edge.number);
                let said = said.map_or(&edge.target, |(_, node)| node);
                if topology.node(said.id()).is_none() {
                    return Err(GraphError::NotFound {
                        device: String::new(),
                        node: said.name().to_owned(),
                    });
                }
                if !entry.node.read_only() && edge.child.role() != ChildRole::Backing {
                    edge.target = above_inserted_filters(&topology, said);
                } else if topology.node(edge.target.id()).is_none() {
                    edge.target = Arc::clone(said);
                }
            }
        }
        Ok(())
    }

    /// Closes them, with their names still reserved.
    async fn closed(mut self) {
        self.take().closed().await;
    }

    fn open<'b>(
        &'b mut self,
        options: BlockdevOptions,
        given: BlockdevOptions,
        owner: Owner,
    ) -> LocalFuture<'b, Result<Arc<Node>, GraphError>>
    where
        'a: 'b,
    {
        Box::pin(async move {
            let first_child = self.nodes.len();
            if self.depth >= MAX_DEPTH {
                return Err(GraphError::TooDeep(self.name(&options)?));
            }
            self.depth += 1;
            let opened = self.open_driver(&options).await;
            self.depth -= 1;
            let opened = opened?;
            if opened.driver.size() > MAX_SIZE {
                return Err(OpenError::TooLarge.into());
            }
            let node = Node::new(
                &opened.name,
                opened.driver,
                NodeOptions {
                    read_only: opened.read_only,
                    ..options.node_options()
                },
            );
            for edge in &opened.children {
                let inline = &mut self.nodes[first_child..];
                if let Some(child) = inline
                    .iter_mut()
                    .find(|entry| entry.node.id() == edge.target.id())
                {
                    child.opened_with = Some(node.id());
                }
            }
            self.nodes.push(NodeEntry {
                given: Some(Arc::new(given)),
                frozen_to: opened.frozen_to,
                ..NodeEntry::new(Arc::clone(&node), owner, opened.children)
            });
            node.load_bitmaps().await?;
            Ok(node)
        })
    }

    /// Reserves the name of a node: the order in which that is done is that of the nodes.
    fn name(&mut self, options: &BlockdevOptions) -> Result<String, GraphError> {
        check_detect_zeroes(options.node_options())?;
        let reserved = self.graph.reserve_node_name(options.node_name.as_deref())?;
        let name = reserved.as_str().to_owned();
        self.names.push(reserved);
        Ok(name)
    }

    /// The nodes, in the order of their names.
    fn in_order(&self) -> Vec<NodeEntry> {
        let mut nodes = self.nodes.clone();
        let place = |entry: &NodeEntry| {
            let mut names = self.names.iter();
            names.position(|name| name.as_str() == entry.node.name())
        };
        nodes.sort_by_cached_key(place);
        nodes
    }

    /// As with QEMU, a format or filter has its name after its `file`, and before its
    /// other children.
    async fn open_driver(&mut self, options: &BlockdevOptions) -> Result<Opened, GraphError> {
        let NodeOptions {
            read_only, cache, ..
        } = options.node_options();
        match &options.driver {
            DriverOptions::File(file_options) => {
                let name = self.name(options)?;
                let flags = OpenFlags {
                    read_only,
                    auto_read_only: options.auto_read_only.unwrap_or(false),
                    cache,
                };
                let (node, file_options) = (name.clone(), file_options.clone());
                let driver: Result<_, OpenError> = unblock(move || {
                    let file = file::open(&node, &file_options, flags)?;
                    Ok((file.read_only(), FileNode::new(file, file_options)))
                })
                .await;
                let (read_only, driver) = driver?;
                Ok(Opened::new(name, read_only, Box::new(driver), Vec::new()))
            }
            DriverOptions::Raw(raw) => {
                let (file, entry) = self.child(ChildRole::File, &raw.file, options).await?;
                let name = self.name(options)?;
                let driver = Box::new(RawDriver::new(&name, raw, file)?);
                Ok(Opened::new(name, read_only, driver, vec![entry]))
            }
            DriverOptions::Qcow2(image) => self.open_qcow2(image, options).await,
            DriverOptions::Nbd(nbd) => {
                let name = self.name(options)?;
                let driver = NbdDriver::open(
                    &name,
                    nbd,
                    read_only,
                    options.auto_read_only.unwrap_or(false),
                )
                .await?;
                let read_only = driver.read_only();
                Ok(Opened::new(name, read_only, Box::new(driver), Vec::new()))
            }
            DriverOptions::Blkdebug(debug) => {
                let name = self.name(options)?;
                let (image, entry) = self.child(ChildRole::Image, &debug.image, options).await?;
                let driver = BlkdebugDriver::open(debug, image)
                    .await
                    .map_err(OpenError::from)?;
                let children = vec![entry];
                Ok(Opened::new(name, read_only, Box::new(driver), children))
            }
            DriverOptions::CopyOnRead(copy) => {
                let (file, entry) = self.child(ChildRole::File, &copy.file, options).await?;
                let name = self.name(options)?;
                let bottom = match &copy.bottom {
                    Some(name) => Some(self.bottom(&file.node(), name)?),
                    None => None,
                };
                let driver = Box::new(CopyOnReadDriver::new(file, bottom.as_ref()));
                Ok(Opened {
                    frozen_to: bottom.map(|node| node.id()),
                    ..Opened::new(name, read_only, driver, vec![entry])
                })
            }
            DriverOptions::CopyBeforeWrite(copy) => {
                let (file, file_entry) = self.child(ChildRole::File, &copy.file, options).await?;
                let name = self.name(options)?;
                let (target, target_entry) =
                    self.child(ChildRole::Target, &copy.target, options).await?;
                let part = match &copy.bitmap {
                    Some((node, name)) => {
                        let bitmap = self.graph.find_bitmap(node, name)?;
                        if bitmap.is_inconsistent() {
                            return Err(NamedBitmapError::Inconsistent(name.clone()).into());
                        }
                        Some(bitmap.bits())
                    }
                    None => None,
                };
                let driver = CopyBeforeWriteDriver::new(file, target, copy.policy, part.as_deref())
                    .map_err(OpenError::from)?;
                let children = vec![file_entry, target_entry];
                Ok(Opened::new(name, read_only, Box::new(driver), children))
            }
            DriverOptions::SnapshotAccess(access) => {
                let (file, entry) = self.child(ChildRole::File, &access.file, options).await?;
                let name = self.name(options)?;
                let driver = Box::new(SnapshotAccessDriver::new(file));
                Ok(Opened::new(name, read_only, driver, vec![entry]))
            }
            DriverOptions::Throttle(throttle) => {
                let (file, entry) = self.child(ChildRole::File, &throttle.file, options).await?;
                let name = self.name(options)?;
                let group = self.graph.throttle_group(&throttle.group)?;
                let driver = Box::new(ThrottleDriver::new(group, file));
                Ok(Opened::new(name, read_only, driver, vec![entry]))
            }
            DriverOptions::NullCo(null) => {
                let name = self.name(options)?;
                let driver = Box::new(NullDriver::new(*null));
                Ok(Opened::new(name, read_only, driver, Vec::new()))
            }
            DriverOptions::Preallocate(preallocate) => {
                let (file, entry) = self
                    .child(ChildRole::File, &preallocate.file, options)
                    .await?;
                let name = self.name(options)?;
                let driver = Box::new(PreallocateDriver::new(preallocate, file)?);
                Ok(Opened::new(name, read_only, driver, vec![entry]))
            }
        }
    }

    /// The node of that name, if it is a layer of the image in `top`.
    fn bottom(&self, top: &Arc<Node>, name: &str) -> Result<Arc<Node>, GraphError> {
        let mut next = Some(Arc::clone(top));
        while let Some(node) = next {
            if node.name() == name {
                return Ok(node);
            }
            next = node.driver().filtered().or_else(|| node.driver().backing());
        }
        Err(match self.graph.find_node(name) {
            Ok(_) => GraphError::BottomElsewhere {
                bottom: name.to_owned(),
                file: top.name().to_owned(),
            },
            Err(_) => GraphError::NoBottom(name.to_owned()),
        })
    }

    /// The edge to a child, which is opened if it is given inline: one for the
    /// driver, and the graph's record of it.
    async fn child(
        &mut self,
        role: ChildRole,
        child: &BlockdevRef,
        parent: &BlockdevOptions,
    ) -> Result<(Child, ChildEntry), GraphError> {
        let (node, said) = match child {
            BlockdevRef::Name(name) => {
                let node = self.graph.find(name)?;
                if parent.read_only == Some(true) || role == ChildRole::Backing {
                    (Arc::clone(&node), Some(node))
                } else {
                    let topology = self.graph.topology.borrow();
                    (above_inserted_filters(&topology, &node), Some(node))
                }
            }
            BlockdevRef::Inline(options) => {
                let given = BlockdevOptions::clone(options);
                let options = inherit(role, options, parent);
                (self.open(options, given, Owner::Parent).await?, None)
            }
        };
        let child = Child::new(role, node);
        let entry = ChildEntry::new(&child);
        self.said.extend(said.map(|node| (entry.number, node)));
        Ok((child, entry))
    }
}

struct Opened {
    name: String,
    read_only: bool,
    driver: Box<dyn BlockDriver>,
    children: Vec<ChildEntry>,
    /// See [`NodeEntry::frozen_to`].
    frozen_to: Option<u64>,
}

impl Opened {
    fn new(
        name: String,
        read_only: bool,
        driver: Box<dyn BlockDriver>,
        children: Vec<ChildEntry>,
    ) -> Self {
        Self {
            name,
            read_only,
            driver,
            children,
            frozen_to: None,
        }
    }
}

/// Refuses to unmap zeroes that were written as data where discards do nothing.
pub(super) fn check_detect_zeroes(options: NodeOptions) -> Result<(), GraphError> {
    if options.detect_zeroes == DetectZeroes::Unmap && options.discard != DiscardMode::Unmap {
        return Err(GraphError::DetectZeroesUnmap);
    }
    Ok(())
}

/// A child's options, completed by its parent's. A backing image is only read
/// unless it says otherwise.
pub(super) fn inherit(
    role: ChildRole,
    child: &BlockdevOptions,
    parent: &BlockdevOptions,
) -> BlockdevOptions {
    let mut options = child.clone();
    let (read_only, auto_read_only) = match role {
        ChildRole::Backing => (Some(true), Some(false)),
        ChildRole::File | ChildRole::DataFile | ChildRole::Target | ChildRole::Image => {
            (parent.read_only, parent.auto_read_only)
        }
    };
    options.read_only = child.read_only.or(read_only);
    options.auto_read_only = child.auto_read_only.or(auto_read_only);
    options.cache.direct = child.cache.direct.or(parent.cache.direct);
    options.cache.no_flush = child.cache.no_flush.or(parent.cache.no_flush);
    options.discard = child.discard.or(Some(DiscardMode::Unmap));
    options
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::graph::tests::{PassThrough, disk, on_main};
    use crate::options::RawOptions;

    fn raw_over(name: &str) -> BlockdevOptions {
        BlockdevOptions {
            node_name: Some("top".to_owned()),
            ..BlockdevOptions::new(DriverOptions::Raw(RawOptions {
                file: BlockdevRef::Name(name.to_owned()),
                offset: 0,
                size: None,
            }))
        }
    }

    #[test]
    fn a_filter_that_comes_or_goes_while_a_node_is_opened_is_not_bypassed() {
        on_main(|graph| async move {
            let (_storage, node) = disk(&graph, "a");
            let mut opening = Opening {
                graph: &graph,
                nodes: Vec::new(),
                names: Vec::new(),
                named: Vec::new(),
                said: Vec::new(),
                depth: 0,
                holds: Holds::new(&graph),
            };
            let opened = opening
                .open(raw_over("a"), raw_over("a"), Owner::Monitor)
                .await;
            opened.expect("it opens");
            let drained = graph.drain(&node, &[]).await.unwrap();
            let filter = graph
                .insert_filter(Some("f"), &node, &[], &drained, PassThrough::boxed)
                .unwrap();
            opening.look_again().unwrap();
            assert_eq!(opening.nodes[0].children[0].target.id(), filter.id());
            graph.remove_filter(&filter, &drained).unwrap();
            opening.look_again().unwrap();
            assert_eq!(opening.nodes[0].children[0].target.id(), node.id());
            graph.blockdev_del("a").await.unwrap();
            let error = opening.look_again().unwrap_err();
            let text = "Cannot find device='' nor node-name='a'";
            assert_eq!(error.to_string(), text);
            opening.closed().await;
        });
    }
}
