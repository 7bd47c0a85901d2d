//! `blockdev-reopen`: other options, and other children, for nodes in use.
//!
//! Everything is prepared first, while requests go on; then, in drained sections of
//! all nodes concerned, it takes effect as one change of the graph, or nothing does.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{Either, select, try_join_all};

use super::open::{check_detect_zeroes, inherit};
use super::topology::{ChildEntry, NodeEntry, Owner, Topology, next_number};
use super::{Graph, GraphError, above_inserted_filters};
use crate::driver::{ChildRole, Reopen, Reopened};
use crate::drivers::ReopenError;
use crate::node::{Child, Node, NodeOptions};
use crate::options::{BlockdevOptions, BlockdevRef, ChildChoice, DriverOptions, Written};
use crate::permissions::Perm;
use crate::runtime;

/// Longest that requests are held for a flush.
const HELD_FLUSH: Duration = Duration::from_secs(5);

impl Graph {
    /// Gives each named node the options of its entry: all of them, or none of any.
    ///
    /// An option that is left out goes back to its default, or to what an inline
    /// child inherits; `discard` alone stays. What a driver cannot change must be
    /// given as it is. A child is named to put it in place of the one that is there;
    /// inline options of a child change the one that was opened with the node. If a
    /// node has several entries, the last one counts, where it says something.
    ///
    /// Fails, without any change, for all the reasons for which a node cannot be
    /// opened or a graph changed; and if a node would have another size while a user
    /// of it does not share that. Cancel: nothing has changed.
    pub async fn reopen(&self, list: Vec<BlockdevOptions>) -> Result<(), GraphError> {
        let mut queue = Queue::default();
        {
            let topology = self.topology.borrow();
            for options in list {
                let name = options.node_name.as_deref();
                let name = name.ok_or(GraphError::NodeNameNotSpecified)?;
                let entry = topology
                    .node_named(name)
                    .ok_or_else(|| GraphError::NoSuchNode(name.to_owned()))?;
                queue.add(&topology, entry, options, None);
            }
        }
        // For early errors, and to see the children.
        let plan = queue.plan(&self.topology.borrow())?;
        self.topology.borrow().check_frozen(&plan)?;
        let mut prepared = Prepared::default();
        let mut outcomes = Vec::new();
        for wanted in &queue.entries {
            outcomes.push(prepared.prepare(self, wanted, &plan).await?);
        }

        // Nobody writes them yet. What is found is theirs whether they are reopened or not.
        let mut kept = Kept::default();
        for (wanted, outcome) in queue.entries.iter().zip(&outcomes) {
            if wanted.node.read_only() && !outcome.read_only {
                kept.0.push(Arc::clone(&wanted.node));
                wanted.node.reload_bitmaps().await?;
            }
        }

        // So that little is left to be flushed while requests are held.
        queue.flush().await?;
        let drains = queue.entries.iter();
        let sections = try_join_all(drains.map(|wanted| self.drain(&wanted.node, &[]))).await?;
        let reopened = queue.entries.iter().map(|wanted| Arc::clone(&wanted.node));
        let below = self.topology.borrow().all_below(reopened.collect());
        let held_until = sections.iter().filter_map(|section| section.held_until());
        while_held(held_until.min(), async {
            queue.flush().await?;
            for node in below {
                // They may have another file by then, or no right to write it.
                node.driver().release_reserve().await?;
            }
            Ok(())
        })
        .await?;
        // Nothing is awaited from here on; but much may have happened meanwhile.
        let mut topology = queue.plan(&self.topology.borrow())?;
        let children = |topology: &Topology, wanted: &Wanted| wanted.children(topology);
        for (wanted, outcome) in queue.entries.iter().zip(&outcomes) {
            if ids(&children(&topology, wanted)) != ids(&children(&plan, wanted)) {
                return Err(GraphError::ChangedMeanwhile(wanted.node.name().to_owned()));
            }
            if let Some(size) = outcome.size {
                check_size(&topology, &wanted.node, size)?;
            }
            if let Some(entry) = topology.node_mut(wanted.node.id()) {
                entry.options.read_only = outcome.read_only;
            }
        }
        let resized: Vec<_> = queue
            .entries
            .iter()
            .zip(&outcomes)
            .filter(|(wanted, outcome)| {
                let size = outcome.size.map(node_size);
                size.is_some_and(|size| size != wanted.node.size())
            })
            .map(|(wanted, _)| Arc::clone(&wanted.node))
            .collect();
        let backing = backing_changes(&self.topology.borrow(), &topology, &queue.entries);
        let removed = self.commit_reopened(topology, &prepared.0)?;
        prepared.0.clear();
        kept.0 = queue
            .entries
            .iter()
            .map(|wanted| Arc::clone(&wanted.node))
            .collect();
        kept.0.retain(|node| node.read_only());
        for (node, child) in backing {
            node.driver().set_backing(child);
        }
        for node in resized {
            self.tell_resized(&node);
        }
        drop(plan);
        drop(queue);
        drop(sections);
        // Those that are not written any more give up their bitmaps' files.
        kept.closed().await;
        removed.closed().await;
        Ok(())
    }
}

impl Graph {
    /// Makes a node read-only, or writable, with the children that were opened with it;
    /// otherwise it stays as it is. As [`reopen`](Self::reopen).
    pub async fn set_read_only(&self, node: &Arc<Node>, read_only: bool) -> Result<(), GraphError> {
        let given = {
            let topology = self.topology.borrow();
            let entry = topology.node(node.id());
            entry.and_then(|entry| entry.given.clone())
        };
        let given = given.ok_or_else(|| ReopenError::NotSupported {
            driver: node.driver_name(),
            node: node.name().to_owned(),
        })?;
        let options = BlockdevOptions {
            node_name: Some(node.name().to_owned()),
            read_only: Some(read_only),
            ..BlockdevOptions::clone(&given)
        };
        self.reopen(vec![options]).await
    }
}

/// What is left to be written, with requests held: it takes long only if the storage does not
/// answer. Some may be held no longer than `until`.
async fn while_held(
    until: Option<Instant>,
    written: impl Future<Output = Result<(), GraphError>>,
) -> Result<(), GraphError> {
    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
    let limit = left.unwrap_or(HELD_FLUSH).min(HELD_FLUSH);
    match select(pin!(written), pin!(runtime::sleep(limit))).await {
        Either::Left((written, _)) => written,
        Either::Right(_) => Err(GraphError::FlushTimeout(limit)),
    }
}

fn ids(children: &[(ChildRole, Arc<Node>)]) -> Vec<(ChildRole, u64)> {
    let with_id = |(role, node): &(ChildRole, Arc<Node>)| (*role, node.id());
    children.iter().map(with_id).collect()
}

/// What a node shows of a driver's size.
fn node_size(size: u64) -> u64 {
    size.next_multiple_of(crate::node::SECTOR_SIZE)
}

fn check_size(topology: &Topology, node: &Arc<Node>, size: u64) -> Result<(), GraphError> {
    let fixed = topology
        .node(node.id())
        .is_some_and(|entry| !entry.permissions.share.contains(Perm::RESIZE));
    if fixed && node.size() != node_size(size) {
        return Err(GraphError::FixedSize {
            node: node.name().to_owned(),
            old: node.size(),
            new: node_size(size),
        });
    }
    Ok(())
}

/// The nodes to be reopened, parents before the children that were opened with them.
#[derive(Default)]
struct Queue {
    entries: Vec<Wanted>,
}

/// What a node is to be.
struct Wanted {
    node: Arc<Node>,
    /// What was said of it.
    given: BlockdevOptions,
    /// That, with what is inherited.
    options: BlockdevOptions,
    /// What its driver was opened with.
    old: DriverOptions,
    /// How that was written.
    written: Written,
}

impl Queue {
    /// Queues a node with what `given` says of it, and the children that were opened
    /// with it and stay.
    fn add(
        &mut self,
        topology: &Topology,
        entry: &NodeEntry,
        mut given: BlockdevOptions,
        parent: Option<(&BlockdevOptions, ChildRole)>,
    ) {
        let node = &entry.node;
        let known = self.entries.iter().position(|w| w.node.id() == node.id());
        if let Some(known) = known {
            fill_in(&mut given, &self.entries[known].given);
        }
        let options = match parent {
            Some((parent, role)) => inherit(role, &given, parent),
            None => BlockdevOptions {
                discard: given.discard.or(Some(node.options().discard)),
                ..given.clone()
            },
        };
        let wanted = Wanted {
            node: Arc::clone(node),
            written: match &entry.given {
                Some(old) => old.written.clone(),
                None => Written::default(),
            },
            old: match &entry.given {
                Some(old) => old.driver.clone(),
                None => given.driver.clone(),
            },
            given,
            options: options.clone(),
        };
        match known {
            Some(known) => self.entries[known] = wanted,
            None => self.entries.push(wanted),
        }
        for (role, choice) in options.driver.children() {
            let Some(child) = opened_with(topology, entry, role) else {
                continue;
            };
            match choice {
                ChildChoice::Node(BlockdevRef::Inline(inline)) => {
                    let inline = BlockdevOptions::clone(inline);
                    self.add(topology, child, inline, Some((&options, role)));
                }
                // It keeps what was said of it, and inherits the rest anew.
                ChildChoice::Node(BlockdevRef::Name(name)) if name == child.node.name() => {
                    if let Some(given) = &child.given {
                        let given = BlockdevOptions::clone(given);
                        self.add(topology, child, given, Some((&options, role)));
                    }
                }
                ChildChoice::Node(BlockdevRef::Name(_)) | ChildChoice::Nothing => {}
            }
        }
    }

    /// What was written is durable, and tables are in their files. Cancel: some are.
    async fn flush(&self) -> Result<(), GraphError> {
        for wanted in &self.entries {
            wanted.node.flush().await?;
        }
        Ok(())
    }

    /// `current` with the new options and children. Rights are not worked out yet.
    fn plan(&self, current: &Topology) -> Result<Topology, GraphError> {
        let mut topology = current.clone();
        for wanted in &self.entries {
            wanted.check(&topology)?;
            wanted.change(&mut topology)?;
        }
        Ok(topology)
    }
}

/// What an earlier entry of the same node said and this one does not.
fn fill_in(given: &mut BlockdevOptions, earlier: &BlockdevOptions) {
    given.read_only = given.read_only.or(earlier.read_only);
    given.auto_read_only = given.auto_read_only.or(earlier.auto_read_only);
    given.cache.direct = given.cache.direct.or(earlier.cache.direct);
    given.cache.no_flush = given.cache.no_flush.or(earlier.cache.no_flush);
    given.discard = given.discard.or(earlier.discard);
}

/// The child in `role`, if it was opened with the node. Filters of jobs above it do
/// not count.
fn opened_with<'a>(
    topology: &'a Topology,
    entry: &NodeEntry,
    role: ChildRole,
) -> Option<&'a NodeEntry> {
    let mut child = topology.node(topology.child(entry.node.id(), role)?.id())?;
    while child.owner == Owner::Inserter {
        let below = topology.child(child.node.id(), ChildRole::File)?;
        child = topology.node(below.id())?;
    }
    (child.opened_with == Some(entry.node.id())).then_some(child)
}

impl Wanted {
    /// Children of the node in `topology`.
    fn children(&self, topology: &Topology) -> Vec<(ChildRole, Arc<Node>)> {
        let entry = topology.node(self.node.id());
        let edges = entry.iter().flat_map(|entry| &entry.children);
        edges
            .map(|edge| (edge.child.role(), Arc::clone(&edge.target)))
            .collect()
    }

    /// Checks what no driver has to be asked for.
    fn check(&self, topology: &Topology) -> Result<(), GraphError> {
        let name = self.node.name();
        let entry = topology
            .node(self.node.id())
            .ok_or_else(|| GraphError::NoSuchNode(name.to_owned()))?;
        let Some(old) = &entry.given else {
            return Err(ReopenError::NotSupported {
                driver: self.node.driver_name(),
                node: name.to_owned(),
            }
            .into());
        };
        let changed = |option: &str| ReopenError::CannotChange(option.to_owned());
        if self.options.driver.driver_name() != old.driver.driver_name() {
            let missing = old
                .driver
                .fixed_option()
                .filter(|option| self.options.driver.fixed_option() != Some(option));
            return Err(match missing {
                Some(option) => ReopenError::CannotReset(option.to_owned()).into(),
                None => changed("driver").into(),
            });
        }
        if self.given.node_name.as_deref().is_some_and(|n| n != name) {
            return Err(changed("node-name").into());
        }
        if !old.driver.can_be_reopened() {
            return Err(ReopenError::NotSupported {
                driver: self.node.driver_name(),
                node: name.to_owned(),
            }
            .into());
        }
        check_detect_zeroes(self.options.node_options())?;
        let said = self.options.driver.children();
        let has_backing = topology.child(self.node.id(), ChildRole::Backing).is_some();
        if has_backing && !said.iter().any(|(role, _)| *role == ChildRole::Backing) {
            return Err(GraphError::BackingMissing(name.to_owned()));
        }
        for (role, choice) in said {
            if let ChildChoice::Node(BlockdevRef::Inline(_)) = choice
                && opened_with(topology, entry, role).is_none()
            {
                return Err(changed(&format!("{}.driver", role.as_str())).into());
            }
        }
        Ok(())
    }

    /// Whether its child in this role, or what shows in it through filters of jobs, is the
    /// node of that name.
    fn stands_on(&self, topology: &Topology, role: ChildRole, name: &str) -> bool {
        let Some(child) = topology.child(self.node.id(), role) else {
            return false;
        };
        let shown = topology
            .node_named(name)
            .is_some_and(|entry| above_inserted_filters(topology, &entry.node).id() == child.id());
        shown || child.name() == name
    }

    /// Makes the change in `topology`.
    fn change(&self, topology: &mut Topology) -> Result<(), GraphError> {
        for (role, choice) in self.options.driver.children() {
            match choice {
                ChildChoice::Node(BlockdevRef::Name(name)) => {
                    self.change_child(topology, role, name)?;
                }
                ChildChoice::Node(BlockdevRef::Inline(_)) => {}
                ChildChoice::Nothing => {
                    if let Some(entry) = topology.node_mut(self.node.id()) {
                        entry.children.retain(|edge| edge.child.role() != role);
                    }
                }
            }
        }
        let read_only = self.node.read_only();
        if let Some(entry) = topology.node_mut(self.node.id()) {
            entry.options = NodeOptions {
                // Until its driver has said what it can do.
                read_only,
                ..self.options.node_options()
            };
            entry.given = Some(Arc::new(self.given.clone()));
        }
        Ok(())
    }

    fn change_child(
        &self,
        topology: &mut Topology,
        role: ChildRole,
        name: &str,
    ) -> Result<(), GraphError> {
        if role == ChildRole::Image && !self.stands_on(topology, role, name) {
            // What a rule was made for stays.
            return Err(ReopenError::CannotChange(role.as_str().to_owned()).into());
        }
        let child = topology
            .node_named(name)
            .map(|entry| Arc::clone(&entry.node));
        let child = child.ok_or_else(|| GraphError::NotFound {
            device: String::new(),
            node: name.to_owned(),
        })?;
        if topology.above(self.node.id()).contains(&child.id()) {
            return Err(GraphError::Loop {
                child: name.to_owned(),
                role: role.as_str(),
                parent: self.node.name().to_owned(),
            });
        }
        let read_only = self.options.node_options().read_only;
        let child = match role {
            ChildRole::Backing => child,
            _ if read_only => {
                let filter = above_inserted_filters(topology, &child);
                let is_current = topology
                    .child(self.node.id(), role)
                    .is_some_and(|current| current.id() == filter.id());
                if is_current { filter } else { child }
            }
            _ => above_inserted_filters(topology, &child),
        };
        let Some(entry) = topology.node_mut(self.node.id()) else {
            return Ok(());
        };
        let edge = entry
            .children
            .iter_mut()
            .find(|edge| edge.child.role() == role);
        match edge {
            Some(edge) if edge.target.id() == child.id() => {}
            Some(edge) => {
                edge.target = child;
                edge.number = next_number();
            }
            None if role == ChildRole::Backing && self.node.driver().has_layers() => {
                let edge = Child::new(role, child);
                entry.children.push(ChildEntry::new(&edge));
            }
            None => {
                return Err(ReopenError::CannotChange(role.as_str().to_owned()).into());
            }
        }
        Ok(())
    }
}

/// Nodes that get another backing image, with the driver's edge to it, or lose theirs.
fn backing_changes(
    old: &Topology,
    new: &Topology,
    entries: &[Wanted],
) -> Vec<(Arc<Node>, Option<Child>)> {
    let edge = |topology: &Topology, id: u64| {
        let children = topology.node(id).map(|entry| &entry.children);
        let mut edges = children.into_iter().flatten();
        edges
            .find(|edge| edge.child.role() == ChildRole::Backing)
            .map(|edge| (edge.child.share(), edge.target.id()))
    };
    entries
        .iter()
        .filter_map(|wanted| {
            let id = wanted.node.id();
            match (edge(old, id), edge(new, id)) {
                (Some((_, old)), Some((_, new))) if old == new => None,
                (_, Some((child, _))) => Some((Arc::clone(&wanted.node), Some(child))),
                (Some(_), None) => Some((Arc::clone(&wanted.node), None)),
                (None, None) => None,
            }
        })
        .collect()
}

/// Nodes that are not to keep bitmaps: because they are read-only, still or again. Dropping it
/// has their files closed.
#[derive(Default)]
struct Kept(Vec<Arc<Node>>);

impl Kept {
    /// Waits until their files are closed. Cancel: they will be.
    async fn closed(self) {
        for node in self.0.iter().map(Arc::clone) {
            runtime::unblock(move || node.close_bitmaps()).await;
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        for node in self.0.drain(..).filter(|node| node.keeps_bitmaps()) {
            runtime::unblock_detached(move || node.close_bitmaps());
        }
    }
}

/// Nodes whose drivers have something prepared. Dropping it takes that back.
#[derive(Default)]
struct Prepared(Vec<Arc<Node>>);

impl Prepared {
    async fn prepare(
        &mut self,
        graph: &Graph,
        wanted: &Wanted,
        plan: &Topology,
    ) -> Result<Reopened, GraphError> {
        let given = &wanted.given;
        match given.written.refused_after(&wanted.written, &given.driver) {
            (Some(name), _) => return Err(ReopenError::CannotReset(name.to_owned()).into()),
            (_, Some(name)) => return Err(ReopenError::CannotChange(name.to_owned()).into()),
            (None, None) => {}
        }
        let children = wanted.children(plan);
        let throttle_group = match &wanted.options.driver {
            DriverOptions::Throttle(options) => Some(graph.throttle_group(&options.group)?),
            _ => None,
        };
        // Before the await: the future may be dropped.
        self.0.push(Arc::clone(&wanted.node));
        let reopened = wanted.node.driver().reopen_prepare(Reopen {
            node: wanted.node.name(),
            options: wanted.options.node_options(),
            auto_read_only: wanted.options.auto_read_only.unwrap_or(false),
            driver: &wanted.options.driver,
            old: &wanted.old,
            children: &children,
            throttle_group: throttle_group.as_ref(),
        });
        Ok(reopened.await?)
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        for node in self.0.iter().rev() {
            node.driver().reopen_abort();
        }
    }
}
