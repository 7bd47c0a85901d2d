//! Backing chains: who stands on an image, and links that must stay.

use super::*;
use crate::drivers::null::NullDriver;
use crate::graph::topology::{ChildEntry, NodeEntry, Owner};
use crate::options::NullCoOptions;

/// An image on `below`, which shows through it; relies on the links down to `bottom`.
fn stack(graph: &Graph, name: &str, below: &Arc<Node>, bottom: Option<&Arc<Node>>) -> Arc<Node> {
    let edge = Child::new(ChildRole::Backing, Arc::clone(below));
    let driver = Box::new(NullDriver::new(NullCoOptions::default()));
    let node = Node::new(name, driver, options());
    let mut topology = graph.topology.borrow().clone();
    topology.nodes.push(NodeEntry {
        frozen_to: bottom.map(|node| node.id()),
        ..NodeEntry::new(
            Arc::clone(&node),
            Owner::Monitor,
            vec![ChildEntry::new(&edge)],
        )
    });
    topology
        .check_freezable(&graph.topology.borrow())
        .expect("nothing else is frozen");
    drop(graph.commit(topology).expect("a sound graph"));
    node
}

/// Lets `node` stand on another, or on nothing.
fn rebase(graph: &Graph, node: &Arc<Node>, below: Option<&Arc<Node>>) -> Result<(), GraphError> {
    let mut topology = graph.topology.borrow().clone();
    let entry = topology.node_mut(node.id()).unwrap();
    entry.children = below
        .map(|below| Child::new(ChildRole::Backing, Arc::clone(below)))
        .iter()
        .map(ChildEntry::new)
        .collect();
    graph.commit(topology).map(drop)
}

#[test]
fn a_backing_image_is_left_alone_but_by_backups() {
    on_main(|graph| async move {
        let (_storage, base) = disk(&graph, "base");
        stack(&graph, "top", &base, None);
        stack(&graph, "second", &base, None);
        let text = "Node 'base' is busy: node is used as backing hd of 'second'";
        let refused = graph.blockdev_del("base").await.unwrap_err();
        assert_eq!(refused.to_string(), text);
        assert!(graph.check_not_blocked(&base).is_err());
        graph.check_no_job(&base).unwrap();

        let job = Arc::new(User {
            blocker: Some("a job has it"),
            ..User::new(AttachmentKind::Job)
        });
        let job = graph.attach("", &base, Permissions::IDLE, Some(job));
        let job = job.unwrap();
        let newest = graph.check_not_blocked(&base).unwrap_err().to_string();
        assert_eq!(newest, "Node 'base' is busy: a job has it");
        assert!(graph.check_no_job(&base).is_err());
        graph.detach(&job);

        graph.blockdev_del("second").await.unwrap();
        graph.blockdev_del("top").await.unwrap();
        graph.blockdev_del("base").await.unwrap();
    });
}

#[test]
fn links_that_a_node_relies_on_stay_until_it_goes() {
    on_main(|graph| async move {
        let (_lowest_storage, lowest) = disk(&graph, "lowest");
        let base = stack(&graph, "base", &lowest, None);
        let top = stack(&graph, "top", &base, None);
        let upper = stack(&graph, "upper", &top, Some(&base));
        let text = "Cannot change frozen 'backing' link from 'top' to 'base'";
        for below in [None, Some(&lowest)] {
            let refused = rebase(&graph, &top, below).unwrap_err();
            assert_eq!(refused.to_string(), text);
        }
        assert!(rebase(&graph, &upper, Some(&base)).is_err());
        // Below the bottom nothing is relied on.
        rebase(&graph, &base, None).unwrap();
        rebase(&graph, &base, Some(&lowest)).unwrap();

        let drained = graph.drain_all().await.unwrap();
        let refused = graph.insert_filter(Some("f"), &base, &[], &drained, PassThrough::boxed);
        let refused = refused.unwrap_err().to_string();
        assert_eq!(refused, "Cannot change 'backing' link to 'base'");
        drop(drained);

        graph.blockdev_del("upper").await.unwrap();
        rebase(&graph, &top, None).unwrap();
    });
}

#[test]
fn a_jobs_filter_in_a_frozen_chain_may_go() {
    on_main(|graph| async move {
        let (_storage, base) = disk(&graph, "base");
        let top = stack(&graph, "top", &base, None);
        let drained = graph.drain_all().await.unwrap();
        let filter = graph.insert_filter(Some("f"), &base, &[], &drained, PassThrough::boxed);
        let filter = filter.unwrap();
        stack(&graph, "upper", &top, Some(&base));
        graph.remove_filter(&filter, &drained).unwrap();
        drop(drained);
        assert!(rebase(&graph, &top, None).is_err());
    });
}

#[test]
fn a_link_is_frozen_once() {
    on_main(|graph| async move {
        let (_storage, base) = disk(&graph, "base");
        let top = stack(&graph, "top", &base, None);
        let upper = stack(&graph, "upper", &top, Some(&base));
        let edge = Child::new(ChildRole::Backing, Arc::clone(&upper));
        let driver = Box::new(NullDriver::new(NullCoOptions::default()));
        let mut topology = graph.topology.borrow().clone();
        topology.nodes.push(NodeEntry {
            frozen_to: Some(top.id()),
            ..NodeEntry::new(
                Node::new("uppermost", driver, options()),
                Owner::Monitor,
                vec![ChildEntry::new(&edge)],
            )
        });
        let refused = topology.check_freezable(&graph.topology.borrow());
        let text = "Cannot change 'backing' link from 'upper' to 'top'";
        assert_eq!(refused.unwrap_err().to_string(), text);
    });
}

#[test]
fn what_a_filters_target_is_made_of_goes_on_standing_below_the_filter() {
    on_main(|graph| async move {
        let (_storage, below) = disk(&graph, "a");
        let device = attach(&graph, "vda", &below);
        let target = stack(&graph, "target", &below, None);
        let other = stack(&graph, "other", &below, None);
        let drained = graph.drain(&below, &[]).await.unwrap();
        let filter = graph
            .insert_filter_with_target(Some("f"), &below, &target, &drained, PassThrough::boxed)
            .unwrap();
        let stands_on = |node: &Arc<Node>| {
            let topology = graph.topology.borrow();
            let edges = &topology.node(node.id()).unwrap().children;
            edges[0].target.name().to_owned()
        };
        assert_eq!(stands_on(&target), "a");
        assert_eq!(stands_on(&other), "f");
        assert_eq!(device.root().id(), filter.id());
        drop(drained);
        let drained = graph.drain(&filter, &[]).await.unwrap();
        graph.remove_filter(&filter, &drained).unwrap();
        assert_eq!(
            (stands_on(&target), stands_on(&other)),
            ("a".into(), "a".into())
        );
    });
}
