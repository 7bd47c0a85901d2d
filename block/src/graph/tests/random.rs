//! Random changes of the graph: whatever is accepted or refused, records, edges,
//! rights and drained sections agree.

use proptest::prelude::*;

use super::*;
use crate::graph::Drained;
use crate::graph::topology::Topology;

#[derive(Clone, Debug)]
enum Step {
    Attach {
        node: usize,
        need: u8,
        share: u8,
        holds: bool,
    },
    Detach(usize),
    SetPermissions {
        backend: usize,
        need: u8,
        share: u8,
    },
    Drain(usize),
    EndSection(usize),
    InsertFilter {
        below: usize,
        section: usize,
    },
    RemoveFilter {
        filter: usize,
        section: usize,
    },
    Replace {
        old: usize,
        new: usize,
        section: usize,
    },
    Delete(usize),
    RefuseLocks {
        storage: usize,
        refuse: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..6usize;
    prop_oneof![
        3 => (which.clone(), 0..16u8, 0..16u8, any::<bool>())
            // Mostly generous, so that several users go together.
            .prop_map(|(node, need, share, holds)| Step::Attach {
                node, need: need & 3, share: share | 3 | 4, holds }),
        1 => (which.clone(), 0..16u8, 0..16u8, any::<bool>())
            .prop_map(|(node, need, share, holds)| Step::Attach { node, need, share, holds }),
        1 => which.clone().prop_map(Step::Detach),
        1 => (which.clone(), 0..16u8, 0..16u8)
            .prop_map(|(backend, need, share)| Step::SetPermissions { backend, need, share }),
        3 => which.clone().prop_map(Step::Drain),
        2 => which.clone().prop_map(Step::EndSection),
        3 => (which.clone(), which.clone())
            .prop_map(|(below, section)| Step::InsertFilter { below, section }),
        2 => (which.clone(), which.clone())
            .prop_map(|(filter, section)| Step::RemoveFilter { filter, section }),
        3 => (which.clone(), which.clone(), which.clone())
            .prop_map(|(old, new, section)| Step::Replace { old, new, section }),
        1 => which.clone().prop_map(Step::Delete),
        1 => (which, any::<bool>())
            .prop_map(|(storage, refuse)| Step::RefuseLocks { storage, refuse }),
    ]
}

fn perms(bits: u8) -> Perm {
    Perm::EACH
        .into_iter()
        .filter(|p| bits >> p.bit() & 1 != 0)
        .fold(Perm::NONE, |all, p| all | p)
}

/// The graph in words, to see that a refused change changed nothing.
fn picture(topology: &Topology) -> String {
    let nodes = topology.nodes.iter().map(|entry| {
        let children: Vec<_> = entry
            .children
            .iter()
            .map(|edge| (edge.child.node().name().to_owned(), edge.permissions))
            .collect();
        format!("{} {:?} {children:?}", entry.node.name(), entry.permissions)
    });
    let backends = topology.backends.iter().map(|entry| {
        let backend = &entry.backend;
        let root = backend.root().name().to_owned();
        format!("{} {root} {:?}", backend.id(), backend.permissions())
    });
    nodes.chain(backends).collect::<Vec<_>>().join("\n")
}

fn check(graph: &Graph, storages: &[(TestStorage, Arc<Node>)], sections: &[(Arc<Node>, Drained)]) {
    let topology = graph.topology.borrow().clone();
    for entry in &topology.nodes {
        for edge in &entry.children {
            assert_eq!(edge.child.node().id(), edge.target.id());
            assert!(topology.node(edge.target.id()).is_some(), "edge to nowhere");
        }
    }
    for entry in &topology.backends {
        assert_eq!(entry.backend.root().id(), entry.target.id());
        assert_eq!(entry.backend.permissions(), entry.permissions);
        let held = sections.iter().any(|(node, _)| {
            let reaching = topology.backends_to_drain(node.id());
            reaching.iter().any(|b| b.id() == entry.backend.id())
        });
        assert!(!held || entry.backend.is_drained(), "missed by a section");
    }
    for (storage, node) in storages {
        if let Some(entry) = topology.node(node.id()) {
            let set = storage.permissions().last().copied().unwrap_or_default();
            // At least what is needed: a storage may refuse to let go.
            assert_eq!(set.and(entry.permissions), set, "rights of {}", node.name());
        }
    }
    // What stands, stands together.
    let mut again = topology.clone();
    again.update_permissions().expect("no conflict, no loop");
    assert_eq!(picture(&again), picture(&topology));
}

async fn run(graph: Rc<Graph>, steps: Vec<Step>) {
    let storages: Vec<_> = ["a", "b", "c"].map(|name| disk(&graph, name)).into();
    let mut nodes: Vec<_> = storages.iter().map(|(_, node)| Arc::clone(node)).collect();
    let mut backends: Vec<Arc<Backend>> = Vec::new();
    let mut sections: Vec<(Arc<Node>, Drained)> = Vec::new();
    for step in steps {
        let before = picture(&graph.topology.borrow());
        let node = |i: usize| Arc::clone(&nodes[i % nodes.len()]);
        let rights = |need, share| Permissions {
            need: perms(need),
            share: perms(share),
        };
        let section = |i: usize| sections.get(i % sections.len().max(1)).map(|(_, d)| d);
        let result = match step {
            Step::Attach {
                node: at,
                need,
                share,
                holds,
            } => {
                let user = User {
                    holds,
                    ..User::new(AttachmentKind::Job)
                };
                graph
                    .attach("", &node(at), rights(need, share), Some(Arc::new(user)))
                    .map(|backend| backends.push(backend))
            }
            Step::Detach(i) if !backends.is_empty() => {
                graph.detach(&backends.swap_remove(i % backends.len()));
                Ok(())
            }
            Step::SetPermissions {
                backend,
                need,
                share,
            } if !backends.is_empty() => {
                graph.set_permissions(&backends[backend % backends.len()], rights(need, share))
            }
            Step::Drain(i) => {
                let drained = graph.drain(&node(i), &[]).await.expect("nothing in flight");
                sections.push((node(i), drained));
                Ok(())
            }
            Step::EndSection(i) if !sections.is_empty() => {
                drop(sections.swap_remove(i % sections.len()));
                Ok(())
            }
            Step::InsertFilter { below, section: i } => match section(i) {
                Some(drained) => graph
                    .insert_filter(None, &node(below), &[], drained, PassThrough::boxed)
                    .map(|filter| nodes.push(filter)),
                None => Ok(()),
            },
            Step::RemoveFilter { filter, section: i } => match section(i) {
                Some(drained) => graph.remove_filter(&node(filter), drained),
                None => Ok(()),
            },
            Step::Replace {
                old,
                new,
                section: i,
            } => match section(i) {
                Some(drained) => graph.replace(&node(old), &node(new), &[], drained),
                None => Ok(()),
            },
            Step::Delete(i) => graph.blockdev_del(node(i).name()).await,
            Step::RefuseLocks { storage, refuse } => {
                storages[storage % storages.len()]
                    .0
                    .refuse_permissions(refuse);
                Ok(())
            }
            _ => Ok(()),
        };
        if result.is_err() {
            assert_eq!(picture(&graph.topology.borrow()), before, "{result:?}");
        }
        check(&graph, &storages, &sections);
    }
    drop(sections);
    for backend in &backends {
        assert!(!backend.is_drained());
    }
}

proptest! {
    #[test]
    fn random_changes_keep_the_graph_whole(steps in prop::collection::vec(step(), 1..40)) {
        on_main(|graph| run(graph, steps));
    }
}
