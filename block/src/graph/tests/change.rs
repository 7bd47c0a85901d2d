//! Filters and replacements under running requests.

use super::*;
use crate::options::{BlockdevOptions, BlockdevRef, DriverOptions, RawOptions};

#[test]
fn a_write_in_flight_at_filter_insertion_ends_first_and_a_held_one_goes_through_the_filter() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let backend = attach(&graph, "vda", &node);
        storage.hold(Match::op(IoOp::Write));
        let before = spawn_local({
            let backend = Arc::clone(&backend);
            async move { write(&backend, 0, 1).await }
        });
        storage.wait_held(1).await;
        let mut drain = Box::pin(graph.drain(&node, &[]));
        assert!(poll_once(&mut drain).await.is_none());
        let after = spawn_local({
            let backend = Arc::clone(&backend);
            async move { write(&backend, 512, 2).await }
        });
        settle().await;
        storage.release_all();

        let drained = drain.await.unwrap();
        assert_eq!(storage.ended().len(), 1, "the first write ended");
        let passed = Arc::new(AtomicUsize::new(0));
        let filter = graph
            .insert_filter(Some("f"), &node, &[], &drained, |child| {
                PassThrough::counting(child, Arc::clone(&passed))
            })
            .unwrap();
        drop(drained);
        before.await.unwrap();
        after.await.unwrap();
        assert_eq!(passed.load(Ordering::SeqCst), 1);
        assert_eq!(backend.root().id(), filter.id());
        assert_eq!(storage.peek(512, 512), [2; 512]);
    });
}

#[test]
fn an_excepted_backend_stays_below_the_filter() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let device = attach(&graph, "vda", &node);
        let job = attach(&graph, "", &node);
        let drained = graph.drain(&node, &[&job]).await.unwrap();
        graph
            .insert_filter(Some("f"), &node, &[&job], &drained, PassThrough::boxed)
            .unwrap();
        assert_eq!(device.root().name(), "f");
        assert_eq!(job.root().name(), "a");
    });
}

#[test]
fn held_requests_go_to_the_replacement_after_a_pivot() {
    on_main(|graph| async move {
        let (source_storage, source) = disk(&graph, "a");
        let (target_storage, target) = disk(&graph, "b");
        let device = attach(&graph, "vda", &source);
        let drained = graph.drain(&source, &[]).await.unwrap();
        let filter = graph
            .insert_filter(Some("f"), &source, &[], &drained, PassThrough::boxed)
            .unwrap();
        drop(drained);
        write(&device, 0, 1).await.unwrap();

        let drained = graph.drain(&source, &[]).await.unwrap();
        let held = spawn_local({
            let device = Arc::clone(&device);
            async move { write(&device, 0, 2).await }
        });
        settle().await;
        graph.replace(&filter, &target, &[], &drained).unwrap();
        graph.remove_filter(&filter, &drained).unwrap();
        drop(drained);
        held.await.unwrap();
        assert_eq!(device.root().name(), "b");
        assert_eq!(source_storage.peek(0, 512), [1; 512]);
        assert_eq!(target_storage.peek(0, 512), [2; 512]);
        graph.blockdev_del("a").await.unwrap();
        assert_eq!(graph.nodes().len(), 1);
    });
}

#[test]
fn a_removed_filter_gives_its_parents_to_its_child() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let device = attach(&graph, "vda", &node);
        let drained = graph.drain_all().await.unwrap();
        let lower = graph
            .insert_filter(Some("lower"), &node, &[], &drained, PassThrough::boxed)
            .unwrap();
        let upper = graph
            .insert_filter(None, &lower, &[], &drained, PassThrough::boxed)
            .unwrap();
        assert!(upper.name().starts_with("#block"), "{}", upper.name());
        graph.remove_filter(&lower, &drained).unwrap();
        assert_eq!(device.root().id(), upper.id());
        let below = graph.child(&upper, ChildRole::File).unwrap();
        assert_eq!(below.id(), node.id());
        assert!(graph.find("lower").is_err());
        drop(drained);
        write(&device, 0, 7).await.unwrap();
        assert!(matches!(
            graph.remove_filter(&node, &graph.drain_all().await.unwrap()),
            Err(GraphError::NotFilter(_))
        ));
    });
}

#[test]
fn changes_are_refused_unless_everyone_is_drained() {
    on_main(|graph| async move {
        let (_a, node) = disk(&graph, "a");
        let (_b, other) = disk(&graph, "b");
        let device = attach(&graph, "vda", &node);
        let of_other = graph.drain(&other, &[]).await.unwrap();
        let error = graph
            .insert_filter(Some("f"), &node, &[], &of_other, PassThrough::boxed)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "Cannot change the graph at node 'a': block device 'vda' is not drained"
        );
        assert!(matches!(
            graph.replace(&node, &other, &[], &of_other),
            Err(GraphError::NotDrained { .. })
        ));
        let another = Graph::new();
        let foreign = another.drain_all().await.unwrap();
        assert!(matches!(
            graph.replace(&node, &other, &[], &foreign),
            Err(GraphError::NotDrained { .. })
        ));
        assert_eq!(device.root().id(), node.id());
        assert_eq!(graph.nodes().len(), 2);
    });
}

#[test]
fn a_refused_filter_leaves_the_graph_as_it_was() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let device = attach(&graph, "vda", &node);
        let job = attach(&graph, "", &node);
        let set = storage.permissions();
        let drained = graph.drain(&node, &[]).await.unwrap();
        let selfish = |child| -> Box<dyn BlockDriver> {
            Box::new(PassThrough {
                child,
                passed: Arc::default(),
                share: Arc::new(Mutex::new(Perm::CONSISTENT_READ)),
                end: None,
            })
        };
        let error = graph
            .insert_filter(Some("f"), &node, &[&job], &drained, selfish)
            .unwrap_err();
        assert!(matches!(error, GraphError::Conflict { .. }), "{error}");
        assert_eq!(device.root().id(), node.id());
        assert_eq!(graph.nodes().len(), 1);
        assert_eq!(storage.permissions(), set);

        // The same when the image lock is refused.
        storage.refuse_permissions(true);
        graph.detach(&job);
        let error = graph
            .insert_filter(Some("f"), &node, &[], &drained, selfish)
            .unwrap_err();
        assert!(matches!(error, GraphError::Permission(_)), "{error}");
        assert_eq!(device.root().id(), node.id());
        // The name is free again.
        storage.refuse_permissions(false);
        graph
            .insert_filter(Some("f"), &node, &[], &drained, PassThrough::boxed)
            .unwrap();
    });
}

#[test]
fn a_replacement_that_stands_on_the_replaced_node_is_refused() {
    on_main(|graph| async move {
        let (_a, node) = disk(&graph, "a");
        let device = attach(&graph, "vda", &node);
        let drained = graph.drain_all().await.unwrap();
        let filter = graph
            .insert_filter(Some("f"), &node, &[], &drained, PassThrough::boxed)
            .unwrap();
        let error = graph.replace(&node, &filter, &[], &drained).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Making 'f' a file child of 'f' would create a cycle"
        );
        assert_eq!(device.root().id(), filter.id());
    });
}

#[test]
fn a_replacement_of_another_size_is_refused_where_a_device_sees_it() {
    on_main(|graph| async move {
        let (_a, node) = disk(&graph, "a");
        let small = graph
            .add_node(Some("b"), TestStorage::new(SIZE / 2).driver(), options())
            .unwrap();
        let user = Arc::new(User::new(AttachmentKind::Job));
        let job = graph
            .attach("", &node, Permissions::IDLE, Some(user))
            .unwrap();
        let drained = graph.drain_all().await.unwrap();
        graph.replace(&node, &small, &[], &drained).unwrap();
        assert_eq!(job.root().id(), small.id());
        let device = attach(&graph, "vda", &node);
        assert!(matches!(
            graph.replace(&node, &small, &[], &drained),
            Err(GraphError::SizeMismatch { .. })
        ));
        assert_eq!(device.root().id(), node.id());
    });
}

#[test]
fn backends_moved_to_a_drained_node_stay_drained_with_it() {
    on_main(|graph| async move {
        let (_a, old) = disk(&graph, "a");
        let (_b, new) = disk(&graph, "b");
        let device = attach(&graph, "vda", &old);
        let of_new = graph.drain(&new, &[]).await.unwrap();
        let of_old = graph.drain(&old, &[]).await.unwrap();
        graph.replace(&old, &new, &[], &of_old).unwrap();
        drop(of_old);
        assert!(device.is_drained());
        drop(of_new);
        assert!(!device.is_drained());
    });
}

#[test]
fn a_writable_user_of_a_node_under_a_jobs_filter_is_attached_above_it() {
    on_main(|graph| async move {
        let (_a, node) = disk(&graph, "a");
        let drained = graph.drain_all().await.unwrap();
        let filter = graph
            .insert_filter(Some("f"), &node, &[], &drained, PassThrough::boxed)
            .unwrap();
        drop(drained);
        let writes = attach(&graph, "", &node);
        assert_eq!(writes.root().id(), filter.id());
        let reads = Permissions {
            need: Perm::CONSISTENT_READ,
            share: Perm::ALL,
        };
        let reads = graph.attach("", &node, reads, None).unwrap();
        assert_eq!(reads.root().id(), node.id());
        assert_eq!(writes.root().skip_filters().id(), node.id());
    });
}

/// A node that a user puts over another one, as with `blockdev-add`.
async fn user_filter(graph: &Graph, name: &str, below: &str) -> Arc<Node> {
    let mut options = BlockdevOptions::new(DriverOptions::Raw(RawOptions {
        file: BlockdevRef::Name(below.to_owned()),
        offset: 0,
        size: None,
    }));
    options.node_name = Some(name.to_owned());
    graph.blockdev_add(options).await.unwrap()
}

#[test]
fn a_device_is_moved_above_its_node_and_back_with_requests_in_flight_and_held() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let device = attach(&graph, "vda", &node);
        let above = user_filter(&graph, "above", "a").await;
        storage.hold(Match::op(IoOp::Write));
        let before = spawn_local({
            let device = Arc::clone(&device);
            async move { write(&device, 0, 1).await }
        });
        storage.wait_held(1).await;
        let mut drain = Box::pin(graph.drain(&node, &[]));
        assert!(poll_once(&mut drain).await.is_none());
        let after = spawn_local({
            let device = Arc::clone(&device);
            async move { write(&device, 512, 2).await }
        });
        settle().await;
        storage.release_all();
        let drained = drain.await.unwrap();
        graph.move_backend(&device, &above, &drained).unwrap();
        drop(drained);
        before.await.unwrap();
        after.await.unwrap();
        assert_eq!(device.root().name(), "above");
        assert!(graph.blockdev_del("above").await.is_err(), "it is used");

        let drained = graph.drain(&above, &[]).await.unwrap();
        graph.move_backend(&device, &node, &drained).unwrap();
        // Where it is already.
        graph.move_backend(&device, &node, &drained).unwrap();
        drop(drained);
        graph.blockdev_del("above").await.unwrap();
        write(&device, 1024, 3).await.unwrap();
        assert_eq!(storage.peek(512, 512), [2; 512]);
        assert_eq!(storage.peek(1024, 512), [3; 512]);
    });
}

#[test]
fn a_device_is_not_moved_without_its_section_nor_to_another_size_nor_where_it_has_no_right() {
    on_main(|graph| async move {
        let (_a, node) = disk(&graph, "a");
        let (_b, other) = disk(&graph, "b");
        let small = TestStorage::new(SIZE / 2);
        let small = graph
            .add_node(Some("small"), small.driver(), options())
            .unwrap();
        let read_only = TestStorage::new(SIZE).driver();
        let read_only = graph
            .add_node(
                Some("ro"),
                read_only,
                NodeOptions {
                    read_only: true,
                    ..options()
                },
            )
            .unwrap();
        let (_c, taken) = disk(&graph, "c");
        let alone = Permissions {
            need: Perm::NONE,
            share: Perm::NONE,
        };
        let _owner = graph.attach("owner", &taken, alone, None).unwrap();
        let device = attach(&graph, "vda", &node);

        let elsewhere = graph.drain(&other, &[]).await.unwrap();
        let refused = graph.move_backend(&device, &other, &elsewhere);
        assert!(matches!(refused, Err(GraphError::NotDrained { .. })));
        let drained = graph.drain(&node, &[]).await.unwrap();
        let refusal = |to: &Arc<Node>| {
            let refused = graph.move_backend(&device, to, &drained);
            refused.unwrap_err().to_string()
        };
        assert!(
            refusal(&small).contains("524288 bytes"),
            "{}",
            refusal(&small)
        );
        assert_eq!(refusal(&read_only), "Block node is read-only");
        assert!(refusal(&taken).starts_with("Permission conflict on node 'c'"));
        graph.blockdev_del("b").await.unwrap();
        assert!(refusal(&other).contains("Cannot find device"));
        assert_eq!(device.root().id(), node.id());
        drop((drained, elsewhere));
        write(&device, 0, 1).await.unwrap();
    });
}

#[test]
fn a_moved_device_stays_above_the_filters_of_jobs() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let (_b, other) = disk(&graph, "b");
        let device = attach(&graph, "vda", &node);
        let drained = graph.drain_all().await.unwrap();
        let filter = graph
            .insert_filter(Some("job"), &node, &[], &drained, PassThrough::boxed)
            .unwrap();
        // Above the filter it may go, but not past it to the node below.
        let above = user_filter(&graph, "above", "job").await;
        graph.move_backend(&device, &above, &drained).unwrap();
        assert_eq!(device.root().id(), above.id());
        graph.move_backend(&device, &node, &drained).unwrap();
        assert_eq!(device.root().id(), filter.id());
        graph.move_backend(&device, &above, &drained).unwrap();
        for from in [&above, &filter] {
            let refused = graph.move_backend(&device, &other, &drained);
            let Err(GraphError::LeavesFilter { filter: left, .. }) = refused else {
                panic!("{refused:?}");
            };
            assert_eq!(left, "job", "from {}", from.name());
            graph.move_backend(&device, &filter, &drained).unwrap();
        }
        // Past another one, it is above that.
        graph.remove_filter(&filter, &drained).unwrap();
        let upper = graph
            .insert_filter(Some("of-b"), &other, &[], &drained, PassThrough::boxed)
            .unwrap();
        graph.move_backend(&device, &other, &drained).unwrap();
        assert_eq!(device.root().id(), upper.id());
        graph.move_backend(&device, &node, &drained).unwrap_err();
        graph.remove_filter(&upper, &drained).unwrap();
        graph.move_backend(&device, &node, &drained).unwrap();
        drop(drained);
        write(&device, 0, 7).await.unwrap();
        assert_eq!(storage.peek(0, 512), [7; 512]);
    });
}

#[test]
fn a_jobs_filter_can_be_written_once_the_node_below_can() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let set = |read_only| {
            let mut topology = graph.topology.borrow().clone();
            let entry = topology.node_mut(node.id()).unwrap();
            entry.options.read_only = read_only;
            drop(graph.commit(topology).unwrap());
        };
        set(true);
        let drained = graph.drain_all().await.unwrap();
        let filter = graph.insert_filter(Some("f"), &node, &[], &drained, PassThrough::boxed);
        filter.unwrap();
        drop(drained);
        assert!(graph.attach("vda", &node, writer(), None).is_err());
        set(false);
        write(&attach(&graph, "vda", &node), 0, 1).await.unwrap();
        // Not under a writer.
        let mut topology = graph.topology.borrow().clone();
        topology.node_mut(node.id()).unwrap().options.read_only = true;
        assert!(graph.commit(topology).is_err());
    });
}
