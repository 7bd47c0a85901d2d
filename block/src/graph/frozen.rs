//! Links of backing chains that must stay as they are while a node relies on them.
//!
//! A `copy-on-read` filter with a `bottom` does: it would copy from the wrong layers, or
//! read nothing at all. Filters that jobs put in between are no change of what shows.

use std::sync::Arc;

use super::GraphError;
use super::topology::{NodeEntry, Owner, Topology};
use crate::driver::ChildRole;
use crate::node::Node;

/// A link from a node to the one that shows in it, or through it.
#[derive(Debug, PartialEq, Eq)]
struct Link {
    parent: u64,
    role: ChildRole,
    /// The node below, without filters of jobs.
    child: u64,
}

impl Topology {
    /// What shows in a filter, or through the holes of an image.
    fn shown(&self, entry: &NodeEntry) -> Option<(ChildRole, Arc<Node>)> {
        let filter = entry.node.driver().is_filter();
        let shows = |role: ChildRole| match role {
            ChildRole::Backing => !filter,
            ChildRole::File | ChildRole::Image => filter,
            ChildRole::DataFile | ChildRole::Target => false,
        };
        let mut edges = entry.children.iter();
        let edge = edges.find(|edge| shows(edge.child.role()))?;
        Some((edge.child.role(), Arc::clone(&edge.target)))
    }

    /// The node, or what shows in it if it is a job's filter. Not below `bottom`.
    fn without_inserted(&self, node: Arc<Node>, bottom: u64) -> Arc<Node> {
        let mut node = node;
        while node.id() != bottom {
            let entry = self.node(node.id());
            let inserted = entry.filter(|entry| entry.owner == Owner::Inserter);
            match inserted.and_then(|entry| self.shown(entry)) {
                Some((_, below)) => node = below,
                None => break,
            }
        }
        node
    }

    /// The links from `top` down to the node `bottom`, from the top.
    fn links(&self, top: &NodeEntry, bottom: u64) -> Vec<Link> {
        let mut links = Vec::new();
        let mut entry = Some(top);
        while let Some(parent) = entry.filter(|entry| entry.node.id() != bottom) {
            let Some((role, child)) = self.shown(parent) else {
                break;
            };
            let child = self.without_inserted(child, bottom);
            links.push(Link {
                parent: parent.node.id(),
                role,
                child: child.id(),
            });
            entry = self.node(child.id());
        }
        links
    }

    fn frozen_links(&self) -> Vec<Link> {
        let frozen = self.nodes.iter().filter_map(|entry| {
            let bottom = entry.frozen_to?;
            Some(self.links(entry, bottom))
        });
        frozen.flatten().collect()
    }

    fn name(&self, id: u64) -> String {
        let entry = self.node(id);
        entry.map_or_else(String::new, |entry| entry.node.name().to_owned())
    }

    /// Refuses what changes a link that is frozen now, unless who relies on it goes.
    pub(super) fn check_frozen(&self, new: &Topology) -> Result<(), GraphError> {
        let relied_on = self
            .nodes
            .iter()
            .filter(|entry| new.node(entry.node.id()).is_some());
        for (top, bottom) in relied_on.filter_map(|entry| Some((entry, entry.frozen_to?))) {
            for link in self.links(top, bottom) {
                let child = new.child(link.parent, link.role).map(Arc::clone);
                let child = child.map(|child| new.without_inserted(child, link.child));
                if child.is_none_or(|child| child.id() != link.child) {
                    return Err(GraphError::FrozenLink {
                        role: link.role.as_str(),
                        parent: self.name(link.parent),
                        child: self.name(link.child),
                    });
                }
            }
        }
        Ok(())
    }

    /// Refuses to put a filter above `node` where that changes a frozen link.
    pub(super) fn check_insertion(&self, node: &Arc<Node>) -> Result<(), GraphError> {
        let links = self.frozen_links();
        match links.into_iter().find(|link| link.child == node.id()) {
            Some(link) => Err(GraphError::FrozenAbove {
                role: link.role.as_str(),
                child: node.name().to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// Refuses a new node, which is in `self` already, that relies on links that are
    /// frozen in `old`.
    pub(super) fn check_freezable(&self, old: &Topology) -> Result<(), GraphError> {
        let frozen = old.frozen_links();
        let new = self
            .nodes
            .iter()
            .filter(|entry| old.node(entry.node.id()).is_none());
        for (top, bottom) in new.filter_map(|entry| Some((entry, entry.frozen_to?))) {
            let mut links = self.links(top, bottom).into_iter();
            if let Some(link) = links.find(|link| frozen.contains(link)) {
                return Err(GraphError::FrozenTwice {
                    role: link.role.as_str(),
                    parent: self.name(link.parent),
                    child: self.name(link.child),
                });
            }
        }
        Ok(())
    }
}
