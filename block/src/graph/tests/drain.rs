//! Drained sections, with held requests.

use std::time::Duration;

use super::*;
use crate::runtime::Iothread;

#[test]
fn drain_waits_for_a_write_in_flight_and_holds_the_next_one() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let backend = attach(&graph, "vda", &node);
        storage.hold(Match::op(IoOp::Write));
        let first = spawn_local({
            let backend = Arc::clone(&backend);
            async move { write(&backend, 0, 1).await }
        });
        storage.wait_held(1).await;

        let mut drain = Box::pin(graph.drain(&node, &[]));
        assert!(
            poll_once(&mut drain).await.is_none(),
            "a write is in flight"
        );
        let second = spawn_local({
            let backend = Arc::clone(&backend);
            async move { write(&backend, 512, 2).await }
        });
        settle().await;
        assert_eq!(storage.held_requests(), [(IoOp::Write, 0)]);
        assert_eq!(backend.in_flight(), 1);

        storage.release_all();
        let drained = drain.await.unwrap();
        first.await.unwrap();
        assert_eq!(backend.in_flight(), 0);
        assert!(!second.is_finished());
        assert!(backend.try_enter().is_none());

        drop(drained);
        second.await.unwrap();
        assert_eq!(storage.peek(0, 1024), [[1; 512], [2; 512]].concat());
    });
}

#[test]
fn nested_sections_of_two_holders_release_at_the_last_end() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let user = Arc::new(User::new(AttachmentKind::Root));
        let backend = graph
            .attach("vda", &node, writer(), Some(user.clone()))
            .unwrap();
        let first = graph.drain(&node, &[]).await.unwrap();
        let second = graph.drain_all().await.unwrap();
        assert_eq!(user.sections(), 2);
        let held = spawn_local({
            let backend = Arc::clone(&backend);
            async move { write(&backend, 0, 1).await }
        });
        drop(first);
        settle().await;
        assert!(!held.is_finished());
        // Ended on another thread.
        std::thread::spawn(move || drop(second)).join().unwrap();
        held.await.unwrap();
        assert_eq!(user.sections(), 0);
    });
}

#[test]
fn a_section_holds_those_whose_requests_wait_for_others_to_the_node() {
    on_main(|graph| async move {
        let ((_, source), (_, target), (_, last)) =
            (disk(&graph, "a"), disk(&graph, "b"), disk(&graph, "c"));
        let guest = attach(&graph, "vda", &source);
        let serving = |node: &Arc<Node>| {
            Arc::new(User {
                holds: false,
                serves: Some(Serves {
                    node: node.id(),
                    patience: None,
                }),
                ..User::new(AttachmentKind::Job)
            })
        };
        // Saved twice: on one disk, and what is there on another one.
        for (node, of) in [(&target, &source), (&last, &target)] {
            let user: Arc<dyn BackendUser> = serving(of);
            graph
                .attach("", node, Permissions::IDLE, Some(user))
                .unwrap();
        }
        let other = attach(&graph, "vdb", &disk(&graph, "d").1);
        for node in [&source, &target, &last] {
            let drained = graph.drain(node, &[]).await.unwrap();
            assert!(guest.is_drained(), "{}", node.name());
            assert!(!other.is_drained());
            drop(drained);
            assert!(!guest.is_drained());
        }
        // Whoever comes during the section is held, too.
        let drained = graph.drain(&last, &[]).await.unwrap();
        let second = attach(&graph, "vdc", &target);
        assert!(second.is_drained());
        drop(drained);
        assert!(!second.is_drained());
        // The other way round nobody waits.
        let drained = graph.drain(&other.root(), &[]).await.unwrap();
        assert!(!guest.is_drained() && !second.is_drained());
        drop(drained);
    });
}

#[test]
fn a_dropped_drain_future_releases_everything() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let user = Arc::new(User::new(AttachmentKind::Root));
        let backend = graph
            .attach("vda", &node, writer(), Some(user.clone()))
            .unwrap();
        storage.hold(Match::any().range(0..512));
        let held = spawn_local({
            let backend = Arc::clone(&backend);
            async move { write(&backend, 0, 1).await }
        });
        storage.wait_held(1).await;
        {
            let mut drain = Box::pin(graph.drain(&node, &[]));
            assert!(poll_once(&mut drain).await.is_none());
            assert!(backend.is_drained());
        }
        assert!(!backend.is_drained());
        assert_eq!(user.sections(), 0);
        write(&backend, 512, 2).await.unwrap();
        storage.release_all();
        held.await.unwrap();
    });
}

#[test]
fn an_excepted_backend_goes_on() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let device = attach(&graph, "vda", &node);
        let job = attach(&graph, "", &node);
        let drained = graph.drain(&node, &[&job]).await.unwrap();
        assert!(device.try_enter().is_none());
        write(&job, 0, 1).await.unwrap();
        drop(drained);
        write(&device, 0, 1).await.unwrap();
    });
}

#[test]
fn draining_a_node_holds_those_who_reach_it_through_others_and_nobody_else() {
    on_main(|graph| async move {
        let (_a, below) = disk(&graph, "a");
        let (_b, other) = disk(&graph, "b");
        let device = attach(&graph, "vda", &below);
        let bystander = attach(&graph, "vdb", &other);
        let drained = graph.drain(&below, &[]).await.unwrap();
        graph
            .insert_filter(Some("f"), &below, &[], &drained, PassThrough::boxed)
            .unwrap();
        drop(drained);
        assert_eq!(device.root().name(), "f");
        let drained = graph.drain(&below, &[]).await.unwrap();
        assert!(device.is_drained());
        assert!(!bystander.is_drained());
        drop(drained);
    });
}

#[test]
fn a_backend_attached_to_a_drained_node_begins_drained() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let drained = graph.drain(&node, &[]).await.unwrap();
        let user = Arc::new(User::new(AttachmentKind::Root));
        let backend = graph
            .attach("vda", &node, writer(), Some(user.clone()))
            .unwrap();
        assert!(backend.try_enter().is_none());
        assert_eq!(user.sections(), 1);
        drop(drained);
        assert!(backend.try_enter().is_some());
        assert_eq!(user.sections(), 0);
    });
}

#[test]
fn a_section_that_cannot_begin_names_who_is_busy_and_lets_requests_go_on() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let backend = attach(&graph, "vda", &node);
        storage.hold(Match::op(IoOp::Write));
        let held: Vec<_> = (0..2)
            .map(|i| {
                let backend = Arc::clone(&backend);
                spawn_local(async move { write(&backend, i * 512, 1).await })
            })
            .collect();
        storage.wait_held(2).await;
        graph.set_drain_timeout(Duration::from_millis(20));
        let error = graph.drain(&node, &[]).await.unwrap_err();
        match &error {
            GraphError::DrainTimeout { busy, .. } => {
                assert_eq!(busy.len(), 1);
                assert_eq!(busy[0].user, "block device 'vda'");
                assert_eq!(busy[0].in_flight, 2);
                assert!(!busy[0].user_busy);
            }
            other => panic!("{other}"),
        }
        assert!(error.to_string().contains("block device 'vda' has 2"));
        assert!(!backend.is_drained());
        storage.release_all();
        for write in held {
            write.await.unwrap();
        }
    });
}

#[test]
fn a_busy_user_is_waited_for_and_may_say_when_it_is_idle() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let user = Arc::new(User::new(AttachmentKind::Job));
        user.busy.store(true, Ordering::SeqCst);
        let backend = graph
            .attach("", &node, Permissions::IDLE, Some(user.clone()))
            .unwrap();
        let mut drain = Box::pin(graph.drain(&node, &[]));
        assert!(poll_once(&mut drain).await.is_none());
        user.busy.store(false, Ordering::SeqCst);
        backend.notify_drain();
        drop(drain.await.unwrap());
    });
}

#[test]
fn requests_of_a_user_that_does_not_hold_are_counted_but_not_held() {
    // As in write-blocking mode: a device's write cannot end before the mirror's
    // write to the target has, while both are being drained.
    on_main(|graph| async move {
        let (_a, source) = disk(&graph, "a");
        let (target_storage, target) = disk(&graph, "b");
        let device = attach(&graph, "vda", &source);
        let user = User {
            holds: false,
            ..User::new(AttachmentKind::Root)
        };
        let mirror = graph
            .attach("", &target, writer(), Some(Arc::new(user)))
            .unwrap();
        target_storage.hold(Match::op(IoOp::Write));

        let in_flight = device.enter().await;
        let mut drain = Box::pin(graph.drain_all());
        assert!(poll_once(&mut drain).await.is_none());
        let active = spawn_local(async move {
            write(&mirror, 0, 1).await.unwrap();
            drop(in_flight);
        });
        target_storage.wait_held(1).await;
        assert!(poll_once(&mut drain).await.is_none());
        target_storage.release_all();
        active.await;
        drop(drain.await.unwrap());
    });
}

#[test]
fn the_last_request_to_end_on_another_thread_wakes_the_drainer() {
    let iothread = Iothread::spawn("io").unwrap();
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let backend = attach(&graph, "vda", &node);
        for round in 0..200u64 {
            storage.hold(Match::op(IoOp::Write));
            iothread.handle().spawn({
                let backend = Arc::clone(&backend);
                move || async move { write(&backend, round * 512, 1).await.unwrap() }
            });
            storage.wait_held(1).await;
            let mut drain = Box::pin(graph.drain(&node, &[]));
            assert!(poll_once(&mut drain).await.is_none());
            storage.release_all();
            drop(drain.await.unwrap());
            assert_eq!(backend.in_flight(), 0);
        }
        iothread.stop();
    });
}

#[test]
fn a_held_request_that_is_given_up_does_not_hold_up_others() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let backend = attach(&graph, "vda", &node);
        let drained = graph.drain(&node, &[]).await.unwrap();
        let mut given_up = Box::pin(backend.enter());
        let mut waiting = Box::pin(backend.enter());
        assert!(poll_once(&mut given_up).await.is_none());
        assert!(poll_once(&mut waiting).await.is_none());
        drop(given_up);
        drop(drained);
        drop(waiting.await);
        assert_eq!(backend.in_flight(), 0);
    });
}

#[test]
fn a_handle_runs_functions_on_main_for_other_threads() {
    let iothread = Iothread::spawn("io").unwrap();
    on_main(|graph| async move {
        let (_storage, _node) = disk(&graph, "a");
        let handle = graph.handle();
        let name = iothread
            .handle()
            .call(move || async move {
                handle
                    .run(|graph| {
                        Box::pin(async move {
                            let node = graph.find("a").unwrap();
                            let _drained = graph.drain(&node, &[]).await.unwrap();
                            node.name().to_owned()
                        })
                    })
                    .await
            })
            .await
            .unwrap()
            .unwrap();
        assert_eq!(name, "a");
        let handle = graph.handle();
        drop(graph);
        let gone = handle.run(|_| Box::pin(async {})).await;
        assert!(matches!(gone, Err(GraphError::MainGone)));
        iothread.stop();
    });
}

#[test]
fn a_section_holds_those_whose_node_it_is_not_about_no_longer_than_they_would_wait() {
    on_main(|graph| async move {
        let ((_, source), (storage, target)) = (disk(&graph, "a"), disk(&graph, "b"));
        let guest = attach(&graph, "vda", &source);
        let serves = Serves {
            node: source.id(),
            patience: Some(Duration::from_millis(5)),
        };
        let user = Arc::new(User {
            holds: false,
            serves: Some(serves),
            ..User::new(AttachmentKind::Job)
        });
        let saves = graph.attach("", &target, writer(), Some(user)).unwrap();
        storage.hold(Match::op(IoOp::Write));
        let saved = spawn_local({
            let saves = Arc::clone(&saves);
            async move { write(&saves, 0, 1).await }
        });
        storage.wait_held(1).await;
        // The graph's own limit is never reached here.
        graph.set_drain_timeout(Duration::from_secs(3600));
        let error = graph.drain(&target, &[]).await.unwrap_err();
        let is_for_others = |error: &GraphError| match error {
            GraphError::DrainTimeout { for_others, .. } => *for_others,
            _ => false,
        };
        assert!(is_for_others(&error), "{error}");
        let text = error.to_string();
        assert!(text.contains("whose writes are saved there first are held no longer"));
        assert!(!guest.is_drained());
        // With them excepted nobody is held for it, and a shorter limit counts as ever.
        let limit = Duration::from_millis(20);
        for except in [&[&guest][..], &[]] {
            let limit = limit / (1 + 19 * u32::from(except.is_empty()));
            let error = graph.drain_within(&target, except, limit).await;
            assert!(!is_for_others(&error.unwrap_err()));
        }
        storage.release_all();
        saved.await.unwrap();
        let section = graph.drain(&target, &[]).await.unwrap();
        assert!(guest.is_drained() && section.held_until().is_some());
    });
}

#[test]
fn a_section_with_a_limit_of_its_own_gives_up_and_lets_requests_go_on() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let backend = attach(&graph, "vda", &node);
        storage.hold(Match::op(IoOp::Write));
        let first = spawn_local({
            let backend = Arc::clone(&backend);
            async move { write(&backend, 0, 1).await }
        });
        storage.wait_held(1).await;
        // The graph's own limit is never reached here.
        graph.set_drain_timeout(Duration::from_secs(3600));
        let limit = Duration::from_millis(5);
        let error = graph.drain_within(&node, &[], limit).await.unwrap_err();
        assert!(matches!(error, GraphError::DrainTimeout { waited, .. } if waited >= limit));
        assert!(backend.try_enter().is_some());
        // Nobody is waited for, so no time is needed.
        let none = Duration::ZERO;
        let drained = graph.drain_within(&node, &[&backend], none).await.unwrap();
        drop(drained);
        storage.release_all();
        first.await.unwrap();
    });
}
