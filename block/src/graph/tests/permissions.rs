//! Who goes together, names, and the words of refusals.

use super::*;

/// A node that stands on `below`, as `raw` on a file: a filter made to look like
/// it was opened by name.
async fn stack(graph: &Graph, name: &str, below: &Arc<Node>) -> Arc<Node> {
    let drained = graph.drain_all().await.unwrap();
    graph
        .insert_filter(Some(name), below, &[], &drained, PassThrough::boxed)
        .unwrap()
}

#[test]
fn names_follow_qemus_rules_and_share_one_space_with_devices() {
    on_main(|graph| async move {
        let add = |name: &str| {
            graph
                .add_node(Some(name), TestStorage::new(SIZE).driver(), options())
                .map(|node| node.name().to_owned())
                .map_err(|error| error.to_string())
        };
        assert_eq!(add("f"), Ok("f".to_owned()));
        assert_eq!(
            add("f"),
            Err("Duplicate nodes with node-name='f'".to_owned())
        );
        for bad in ["", "1x", "a b", "#x", "-x", "ä"] {
            assert_eq!(add(bad), Err(format!("Invalid node-name: '{bad}'")));
        }
        assert_eq!(add("a-b.c_9").as_deref(), Ok("a-b.c_9"));
        let longest = "n".repeat(31);
        assert_eq!(add(&longest).as_deref(), Ok(longest.as_str()));
        assert_eq!(add(&"n".repeat(32)), Err("Node name too long".to_owned()));

        let node = graph.find("f").unwrap();
        attach(&graph, "vda", &node);
        assert_eq!(
            add("vda"),
            Err("node-name=vda is conflicting with a device id".to_owned())
        );
        let attach = |name: &str| {
            graph
                .attach(name, &node, Permissions::IDLE, None)
                .map(|_| ())
                .map_err(|error| error.to_string())
        };
        assert_eq!(
            attach("vda"),
            Err("Device with id 'vda' already exists".to_owned())
        );
        assert_eq!(
            attach("f"),
            Err("Device name 'f' conflicts with an existing node name".to_owned())
        );
        assert_eq!(attach("9"), Err("Invalid device name".to_owned()));
        // Names of exports and jobs are empty, and many have that.
        assert_eq!(attach(""), Ok(()));
        assert_eq!(attach(""), Ok(()));
    });
}

#[test]
fn devices_and_nodes_are_found_by_name() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let device = attach(&graph, "vda", &node);
        assert_eq!(graph.find("a").unwrap().id(), node.id());
        assert_eq!(graph.find("vda").unwrap().id(), node.id());
        assert_eq!(graph.find_backend("vda").unwrap().id(), device.id());
        assert_eq!(
            graph.find("nosuch").unwrap_err().to_string(),
            "Cannot find device='nosuch' nor node-name='nosuch'"
        );
        assert_eq!(
            graph.find_node("vda").unwrap_err().to_string(),
            "Cannot find device='' nor node-name='vda'"
        );
        assert!(graph.find("").is_err());
        assert!(graph.find_backend("").is_none());
    });
}

#[test]
fn two_users_that_do_not_go_together_are_told_so_in_qemus_words() {
    on_main(|graph| async move {
        let (_storage, file) = disk(&graph, "f");
        let source = stack(&graph, "src", &file).await;
        let reads = Permissions {
            need: Perm::CONSISTENT_READ,
            share: Perm::ALL,
        };
        let job = Arc::new(User::new(AttachmentKind::Job));
        graph.attach("", &source, reads, Some(job)).unwrap();
        // A mirror's target: shares nothing but unchanged writes. Attached to
        // the file itself, so a job's hold rather than a root.
        let target = Permissions {
            need: Perm::WRITE_UNCHANGED,
            share: Perm::WRITE_UNCHANGED,
        };
        let error = graph.attach("", &file, target, None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Permission conflict on node 'f': permissions 'consistent read' are both required by \
             node 'src' (uses node 'f' as 'file' child) and unshared by an unnamed block device \
             (uses node 'f' as 'root' child)."
        );
        assert_eq!(graph.backends().len(), 1);
    });
}

#[test]
fn rights_are_needed_through_filters_and_given_up_again() {
    on_main(|graph| async move {
        let (storage, file) = disk(&graph, "f");
        let top = stack(&graph, "top", &file).await;
        assert_eq!(storage.permissions(), []);
        let device = attach(&graph, "vda", &top);
        let held = storage.permissions();
        assert_eq!(held.last().unwrap().need, writer().need);
        graph.set_permissions(&device, Permissions::IDLE).unwrap();
        assert_eq!(storage.permissions().last(), Some(&Permissions::IDLE));
        let error = write(&device, 0, 1).await.unwrap_err();
        assert_eq!(error.errno, libc::EPERM);
        graph.set_permissions(&device, writer()).unwrap();
        write(&device, 0, 1).await.unwrap();
        graph.detach(&device);
        graph.detach(&device);
        assert_eq!(storage.permissions().last(), Some(&Permissions::IDLE));
        assert_eq!(graph.backends(), []);
        assert_eq!(write(&device, 0, 1).await.unwrap_err().errno, libc::EPERM);
    });
}

#[test]
fn a_read_only_node_refuses_writers_and_writes() {
    on_main(|graph| async move {
        let storage = TestStorage::new(SIZE);
        let read_only = NodeOptions {
            read_only: true,
            ..options()
        };
        let node = graph
            .add_node(Some("a"), storage.driver(), read_only)
            .unwrap();
        let error = graph.attach("vda", &node, writer(), None).unwrap_err();
        assert_eq!(error.to_string(), "Block node is read-only");
        let direct = node
            .write(0, bytes(512, 1), WriteFlags::default())
            .await
            .unwrap_err();
        assert_eq!(direct.errno, libc::EPERM);
        assert_eq!(storage.ended(), []);
    });
}

#[test]
fn an_image_lock_that_is_refused_takes_back_those_already_taken() {
    on_main(|graph| async move {
        // A filter over two images cannot be had here, so a change that raises
        // the rights of two nodes: a replacement under two users.
        let (old_storage, old) = disk(&graph, "old");
        let (new_storage, new) = disk(&graph, "new");
        let device = attach(&graph, "vda", &old);
        let drained = graph.drain_all().await.unwrap();
        let before = old_storage.permissions();
        new_storage.refuse_permissions(true);
        let error = graph.replace(&old, &new, &[], &drained).unwrap_err();
        assert_eq!(error.to_string(), "Failed to get \"write\" lock");
        assert_eq!(old_storage.permissions(), before, "taken back");
        assert_eq!(device.root().id(), old.id());
    });
}

#[test]
fn nodes_in_use_are_not_deleted() {
    on_main(|graph| async move {
        let (_storage, file) = disk(&graph, "f");
        let refused = async |name: &str| graph.blockdev_del(name).await.unwrap_err().to_string();
        assert_eq!(
            refused("nosuch").await,
            "Failed to find node with node-name='nosuch'"
        );
        assert_eq!(refused("").await, "Failed to find node with node-name=''");

        let device = attach(&graph, "", &file);
        assert_eq!(refused("f").await, "Node f is in use");
        graph.detach(&device);

        let user = User {
            blocker: Some("block device is in use by block job: mirror"),
            ..User::new(AttachmentKind::Job)
        };
        let job = graph
            .attach("", &file, Permissions::IDLE, Some(Arc::new(user)))
            .unwrap();
        assert_eq!(
            refused("f").await,
            "Node 'f' is busy: block device is in use by block job: mirror"
        );
        assert_eq!(
            graph.check_not_blocked(&file).unwrap_err().to_string(),
            "Node 'f' is busy: block device is in use by block job: mirror"
        );
        assert_eq!(
            graph.check_root_node(&file).unwrap_err().to_string(),
            "Need a root block node"
        );
        graph.detach(&job);
        graph.check_root_node(&file).unwrap();
        graph.check_not_blocked(&file).unwrap();

        // The target of a job is a root attachment, and no root node either.
        let user = User {
            blocker: Some("block device is in use by block job: mirror"),
            ..User::new(AttachmentKind::Root)
        };
        let target = graph
            .attach("", &file, Permissions::IDLE, Some(Arc::new(user)))
            .unwrap();
        assert!(graph.check_root_node(&file).is_err());
        assert_eq!(refused("f").await, "Node f is in use");
        graph.detach(&target);

        let top = stack(&graph, "top", &file).await;
        assert_eq!(refused("f").await, "Block device f is in use");
        assert_eq!(refused("top").await, "Node top is not owned by the monitor");
        assert!(graph.check_root_node(&file).is_err());
        let drained = graph.drain_all().await.unwrap();
        graph.remove_filter(&top, &drained).unwrap();
        graph.blockdev_del("f").await.unwrap();
        assert!(graph.nodes().is_empty());
    });
}

#[test]
fn a_driver_that_does_not_let_go_cannot_stop_a_detach() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let device = attach(&graph, "vda", &node);
        storage.refuse_permissions(true);
        graph.detach(&device);
        assert_eq!(graph.backends(), []);
        // It catches up with the next change.
        storage.refuse_permissions(false);
        let device = attach(&graph, "vda", &node);
        graph.detach(&device);
        assert_eq!(storage.permissions().last(), Some(&Permissions::IDLE));
    });
}

#[test]
fn a_filter_that_has_changed_its_mind_cannot_stop_a_detach() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let share = Arc::new(Mutex::new(Perm::ALL));
        let drained = graph.drain_all().await.unwrap();
        let filter = graph
            .insert_filter(Some("top"), &node, &[], &drained, |child| {
                Box::new(PassThrough {
                    child,
                    passed: Arc::default(),
                    share: Arc::clone(&share),
                    end: None,
                })
            })
            .unwrap();
        drop(drained);
        let user = User {
            blocker: Some("block device is in use by block job: mirror"),
            ..User::new(AttachmentKind::Job)
        };
        let job = graph
            .attach("", &node, writer(), Some(Arc::new(user)))
            .unwrap();
        let device = attach(&graph, "vda", &filter);
        // From now on no permissions go together, whatever is taken away.
        *share.lock().unwrap() = Perm::NONE;
        assert!(graph.refresh_permissions().is_err());
        graph.detach(&device);
        assert_eq!(graph.backends().len(), 1);
        graph.detach(&job);
        assert_eq!(graph.backends(), []);
        graph.check_not_blocked(&node).unwrap();
    });
}

#[test]
fn a_user_below_a_jobs_filter_does_not_begin_to_write() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let reads = Permissions {
            need: Perm::CONSISTENT_READ,
            share: Perm::ALL,
        };
        let export = graph.attach("vdb", &node, reads, None).unwrap();
        let job = Arc::new(User::new(AttachmentKind::Job));
        let hold = graph.attach("", &node, reads, Some(job)).unwrap();
        let drained = graph.drain_all().await.unwrap();
        let filter = graph
            .insert_filter(
                Some("top"),
                &node,
                &[&export, &hold],
                &drained,
                PassThrough::boxed,
            )
            .unwrap();
        let error = graph.set_permissions(&export, writer()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Cannot let block device 'vdb' write node 'a' below filter 'top' of a block job, which \
             would miss the writes: attach it to 'top', or wait until the job has ended"
        );
        assert_eq!(export.permissions(), reads);
        // The job knows what it does.
        graph.set_permissions(&hold, writer()).unwrap();
        graph.remove_filter(&filter, &drained).unwrap();
        graph.set_permissions(&export, writer()).unwrap();
    });
}
