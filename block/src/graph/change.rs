//! Changes of the graph under running requests. Each needs a drained section
//! that holds back everyone who could be on the way over an edge that changes.

use std::sync::Arc;

use super::topology::{ChildEntry, NodeEntry, Owner, next_number};
use super::{Drained, Graph, GraphError, above_inserted_filters};
use crate::backend::{AttachmentKind, Backend};
use crate::driver::{BlockDriver, ChildRole};
use crate::node::{Child, Node, NodeOptions};
use crate::options::{DetectZeroes, DiscardMode};
use crate::permissions::Perm;

impl Graph {
    /// Puts a filter between `below` and all that stands on it, except the
    /// backends given. `make` gets the filter's edge to `below` and makes the
    /// driver; it must not do I/O. The filter stays until
    /// [`remove_filter`](Self::remove_filter). `None` makes up a name.
    ///
    /// Fails, without any change, if the name is bad or taken, if permissions
    /// conflict in the new graph, if a link to `below` is frozen, or if `drained`
    /// does not hold all who reach `below`.
    pub fn insert_filter(
        &self,
        name: Option<&str>,
        below: &Arc<Node>,
        except: &[&Arc<Backend>],
        drained: &Drained,
        make: impl FnOnce(Child) -> Box<dyn BlockDriver>,
    ) -> Result<Arc<Node>, GraphError> {
        self.insert(name, below, except, None, drained, make)
    }

    /// As [`insert_filter`](Self::insert_filter), for a filter whose requests get to
    /// `target`, too: the nodes that make that up go on standing on `below` itself, where
    /// they do, so that the filter's requests never get to the filter.
    pub fn insert_filter_with_target(
        &self,
        name: Option<&str>,
        below: &Arc<Node>,
        target: &Arc<Node>,
        drained: &Drained,
        make: impl FnOnce(Child) -> Box<dyn BlockDriver>,
    ) -> Result<Arc<Node>, GraphError> {
        self.insert(name, below, &[], Some(target), drained, make)
    }

    fn insert(
        &self,
        name: Option<&str>,
        below: &Arc<Node>,
        except: &[&Arc<Backend>],
        target: Option<&Arc<Node>>,
        drained: &Drained,
        make: impl FnOnce(Child) -> Box<dyn BlockDriver>,
    ) -> Result<Arc<Node>, GraphError> {
        let name = self.reserve_node_name(name)?;
        self.check_in_graph(below)?;
        self.check_drained(below, drained)?;
        let edge = Child::new(ChildRole::File, Arc::clone(below));
        let recorded = ChildEntry::new(&edge);
        let filter = Node::new(
            name.as_str(),
            make(edge),
            NodeOptions {
                discard: DiscardMode::Unmap,
                detect_zeroes: DetectZeroes::Off,
                // As with QEMU; what is below says whether there may be writers.
                read_only: false,
                ..below.options()
            },
        );
        let mut topology = self.topology.borrow().clone();
        topology.check_insertion(below)?;
        let reached = topology.all_below(target.into_iter().cloned().collect());
        let mut stay: Vec<u64> = reached.iter().map(|node| node.id()).collect();
        stay.push(filter.id());
        topology.move_parents(below, &filter, except, &stay);
        topology.nodes.push(NodeEntry::new(
            Arc::clone(&filter),
            Owner::Inserter,
            vec![recorded],
        ));
        let _removed = self.commit(topology)?;
        Ok(filter)
    }

    /// Takes a filter out that [`insert_filter`](Self::insert_filter) put in:
    /// what stands on it stands on its child again. The filter is closed.
    pub fn remove_filter(&self, filter: &Arc<Node>, drained: &Drained) -> Result<(), GraphError> {
        self.check_in_graph(filter)?;
        self.check_drained(filter, drained)?;
        let mut topology = self.topology.borrow().clone();
        let below = topology.child(filter.id(), ChildRole::File).map(Arc::clone);
        let entry = topology
            .nodes
            .iter_mut()
            .find(|entry| entry.node.id() == filter.id());
        let (Some(entry), Some(below)) = (entry, below) else {
            return Err(GraphError::NotFilter(filter.name().to_owned()));
        };
        if entry.owner != Owner::Inserter {
            return Err(GraphError::NotFilter(filter.name().to_owned()));
        }
        entry.owner = Owner::Parent;
        topology.move_parents(filter, &below, &[], &[filter.id()]);
        let _removed = self.commit(topology)?;
        Ok(())
    }

    /// Lets all that stands on `old` stand on `new`, except the backends given:
    /// the pivot of a mirror. `old` stays in the graph, if something owns it.
    ///
    /// Fails, without any change, if `new` stands on `old` (that would be a
    /// loop), if a device or export would see the size change, if permissions
    /// conflict in the new graph, or if `drained` does not hold all who reach
    /// `old`.
    pub fn replace(
        &self,
        old: &Arc<Node>,
        new: &Arc<Node>,
        except: &[&Arc<Backend>],
        drained: &Drained,
    ) -> Result<(), GraphError> {
        self.check_in_graph(old)?;
        self.check_in_graph(new)?;
        self.check_drained(old, drained)?;
        let mut topology = self.topology.borrow().clone();
        let seen = topology
            .backends_reaching(old.id())
            .iter()
            .any(|b| *b.kind() != AttachmentKind::Job && !except.iter().any(|e| e.id() == b.id()));
        if seen && old.size() != new.size() {
            return Err(GraphError::SizeMismatch {
                old: old.name().to_owned(),
                old_size: old.size(),
                new: new.name().to_owned(),
                new_size: new.size(),
            });
        }
        topology.move_parents(old, new, except, &[]);
        let _removed = self.commit(topology)?;
        Ok(())
    }

    /// Lets one device stand on another node, with the rights that it has: `drive` of
    /// `qom-set`, which puts a filter over a disk and takes it out again. Who writes a
    /// node under a job's filter stands on the filter, as with
    /// [`attach`](Self::attach).
    ///
    /// Fails, without any change, if the device would see its size change, if it
    /// would leave a job's filter, if permissions or image locks conflict in the new
    /// graph, or if `drained` does not hold the device.
    pub fn move_backend(
        &self,
        backend: &Arc<Backend>,
        node: &Arc<Node>,
        drained: &Drained,
    ) -> Result<(), GraphError> {
        self.check_in_graph(node)?;
        let mut topology = self.topology.borrow().clone();
        let to = match backend.permissions().need.contains(Perm::WRITE) {
            true => above_inserted_filters(&topology, node),
            false => Arc::clone(node),
        };
        let Some(entry) = topology.backend_mut(backend.id()) else {
            return Err(GraphError::NotFound {
                device: backend.name().to_owned(),
                node: String::new(),
            });
        };
        let from = std::mem::replace(&mut entry.target, Arc::clone(&to));
        entry.number = next_number();
        if !drained.covers(self.id, backend) {
            return Err(GraphError::NotDrained {
                node: from.name().to_owned(),
                backend: backend.describe(),
            });
        }
        let below = topology.all_below(vec![Arc::clone(&to)]);
        let left = topology.written_through(&from).into_iter().find(|node| {
            let entry = topology.node(node.id());
            entry.is_some_and(|entry| entry.owner == Owner::Inserter)
                && !below.iter().any(|kept| kept.id() == node.id())
        });
        if let Some(filter) = left {
            return Err(GraphError::LeavesFilter {
                user: backend.describe(),
                filter: filter.name().to_owned(),
                node: to.name().to_owned(),
            });
        }
        if from.size() != to.size() {
            return Err(GraphError::SizeMismatch {
                old: from.name().to_owned(),
                old_size: from.size(),
                new: to.name().to_owned(),
                new_size: to.size(),
            });
        }
        let _removed = self.commit(topology)?;
        Ok(())
    }

    fn check_in_graph(&self, node: &Arc<Node>) -> Result<(), GraphError> {
        match self.topology.borrow().node(node.id()) {
            Some(_) => Ok(()),
            None => Err(GraphError::NotFound {
                device: String::new(),
                node: node.name().to_owned(),
            }),
        }
    }

    /// Whether every backend that a section of `node` has to hold is held by `drained`,
    /// or was excepted from it.
    fn check_drained(&self, node: &Arc<Node>, drained: &Drained) -> Result<(), GraphError> {
        let backends = self.topology.borrow().backends_to_drain(node.id());
        for backend in backends {
            if !drained.covers(self.id, &backend) {
                return Err(GraphError::NotDrained {
                    node: node.name().to_owned(),
                    backend: backend.describe(),
                });
            }
        }
        Ok(())
    }
}
