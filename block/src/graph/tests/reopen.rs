//! `blockdev-reopen`: all of a list takes effect, or nothing of it does.

use std::path::Path;

use super::*;
use crate::drivers::{OpenError, ReopenError};
use crate::options::{
    BlockdevOptions, BlockdevRef, DetectZeroes, DriverOptions, FileOptions, NullCoOptions,
    RawOptions,
};

struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, byte) in [("a", 1), ("b", 2)] {
            std::fs::write(dir.path().join(name), vec![byte; SIZE as usize]).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, node: &str, name: &str) -> BlockdevOptions {
        named(node, file(&self.path(name)))
    }
}

fn named(node: &str, driver: DriverOptions) -> BlockdevOptions {
    BlockdevOptions {
        node_name: Some(node.to_owned()),
        ..BlockdevOptions::new(driver)
    }
}

fn file(path: &Path) -> DriverOptions {
    DriverOptions::File(FileOptions {
        filename: path.to_owned(),
        locking: None,
        host_device: false,
        bitmap_file: None,
    })
}

fn raw_options(node: &str, file: BlockdevRef, offset: u64, size: Option<u64>) -> BlockdevOptions {
    named(node, DriverOptions::Raw(RawOptions { file, offset, size }))
}

fn raw(node: &str, file: &str) -> BlockdevOptions {
    raw_options(node, BlockdevRef::Name(file.to_owned()), 0, None)
}

fn read_only(options: BlockdevOptions, read_only: bool) -> BlockdevOptions {
    BlockdevOptions {
        read_only: Some(read_only),
        ..options
    }
}

async fn add(graph: &Graph, options: BlockdevOptions) -> Arc<Node> {
    graph.blockdev_add(options).await.unwrap()
}

async fn first_byte(node: &Node) -> u8 {
    let iov = bytes(512, 0);
    node.read(0, iov.clone()).await.unwrap();
    let mut byte = [0];
    iov.copy_to(0, &mut byte);
    byte[0]
}

/// Node and children of each node, with its rights.
fn shape(graph: &Graph) -> Vec<(String, bool, Vec<String>)> {
    let nodes = graph.nodes();
    let children = |node: &crate::NodeInfo| node.children.iter().map(|c| c.node.clone()).collect();
    nodes
        .iter()
        .map(|node| (node.name.clone(), node.read_only, children(node)))
        .collect()
}

#[test]
fn a_child_is_replaced_under_running_requests() {
    let images = Images::new();
    on_main(|graph| async move {
        add(&graph, images.file("a", "a")).await;
        add(&graph, images.file("b", "b")).await;
        let node = add(&graph, raw("r", "a")).await;
        let backend = attach(&graph, "vda", &node);
        let writes = spawn_local({
            let backend = Arc::clone(&backend);
            async move {
                for _ in 0..100 {
                    write(&backend, 512, 9).await.unwrap();
                    crate::runtime::yield_now().await;
                }
            }
        });
        graph.reopen(vec![raw("r", "b")]).await.unwrap();
        assert_eq!(first_byte(&node).await, 2);
        write(&backend, 0, 7).await.unwrap();
        writes.await;
        assert_eq!(std::fs::read(images.path("a")).unwrap()[0], 1);
        assert_eq!(std::fs::read(images.path("b")).unwrap()[0], 7);
        // What it stood on is free.
        graph.blockdev_del("a").await.unwrap();
        assert!(graph.blockdev_del("b").await.is_err());
    });
}

#[test]
fn a_refused_entry_leaves_all_others_as_they_were() {
    let images = Images::new();
    on_main(|graph| async move {
        add(&graph, images.file("a", "a")).await;
        add(&graph, images.file("b", "b")).await;
        let node = add(&graph, raw("r", "a")).await;
        let user = attach(&graph, "vda", &node);
        let before = shape(&graph);
        let refused = [
            raw("r", "nosuch"),
            raw("nosuch", "a"),
            raw("r", "r"),
            raw_options("r", BlockdevRef::Name("b".to_owned()), 2 * SIZE, None),
            raw_options("r", BlockdevRef::Name("b".to_owned()), 0, Some(1000)),
            read_only(raw("r", "b"), true),
            images.file("a", "b"),
            named("b", DriverOptions::NullCo(NullCoOptions::default())),
            BlockdevOptions {
                detect_zeroes: DetectZeroes::Unmap,
                ..raw("r", "b")
            },
            raw_options(
                "r",
                BlockdevRef::Inline(Box::new(images.file("x", "a"))),
                0,
                None,
            ),
        ];
        for bad in refused {
            let good = read_only(images.file("b", "b"), true);
            let shown = format!("{bad:?}");
            let error = graph.reopen(vec![good, bad]).await.unwrap_err();
            assert_eq!(shape(&graph), before, "{shown}: {error}");
            // Nothing holds requests back, and no lock is left behind.
            write(&user, 0, 1).await.unwrap();
        }
        let unnamed = BlockdevOptions {
            node_name: None,
            ..raw("r", "a")
        };
        let error = graph.reopen(vec![unnamed]).await.unwrap_err();
        assert_eq!(error.to_string(), "node-name not specified");
        graph.reopen(Vec::new()).await.unwrap();
    });
}

#[test]
fn rights_are_taken_and_given_up_with_the_file() {
    let images = Images::new();
    on_main(|graph| async move {
        let node = add(&graph, read_only(images.file("a", "a"), true)).await;
        let reader = Permissions {
            need: Perm::CONSISTENT_READ,
            share: Perm::ALL,
        };
        let backend = graph.attach("vda", &node, reader, None).unwrap();
        assert!(matches!(
            graph.set_permissions(&backend, writer()),
            Err(GraphError::Permission(PermissionError::ReadOnly))
        ));
        graph.reopen(vec![images.file("a", "a")]).await.unwrap();
        graph.set_permissions(&backend, writer()).unwrap();
        write(&backend, 0, 5).await.unwrap();
        assert_eq!(std::fs::read(images.path("a")).unwrap()[0], 5);

        // Another opening of the same file is as excluded as another process.
        let exclusive = Permissions {
            need: Perm::CONSISTENT_READ | Perm::WRITE,
            share: Perm::CONSISTENT_READ,
        };
        graph.set_permissions(&backend, exclusive).unwrap();
        let other = add(&graph, images.file("other", "a")).await;
        let cached = BlockdevOptions {
            cache: crate::CacheChoice {
                direct: None,
                no_flush: Some(true),
            },
            ..images.file("a", "a")
        };
        for options in [cached, images.file("a", "a")] {
            graph.reopen(vec![options]).await.unwrap();
            assert!(graph.attach("vdb", &other, writer(), None).is_err());
            write(&backend, 0, 6).await.unwrap();
        }

        let error = graph
            .reopen(vec![read_only(images.file("a", "a"), true)])
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "Read-only block node 'a' cannot support read-write users"
        );
        graph.set_permissions(&backend, reader).unwrap();
        graph
            .reopen(vec![read_only(images.file("a", "a"), true)])
            .await
            .unwrap();
        assert!(node.read_only());
        graph.attach("vdb", &other, writer(), None).unwrap();
    });
}

#[test]
fn a_lock_of_others_refuses_the_reopen_and_keeps_what_was_held() {
    let images = Images::new();
    on_main(|graph| async move {
        let node = add(&graph, read_only(images.file("a", "a"), true)).await;
        let other = add(&graph, images.file("other", "a")).await;
        let writes = attach(&graph, "vdb", &other);
        // A filter above asks for more than the file had.
        let upper = add(&graph, read_only(raw("r", "a"), true)).await;
        let exclusive = Permissions {
            need: Perm::CONSISTENT_READ,
            share: Perm::ALL,
        };
        let reads = graph.attach("vda", &upper, exclusive, None).unwrap();
        let error = graph
            .set_permissions(
                &reads,
                Permissions {
                    share: !Perm::WRITE,
                    ..exclusive
                },
            )
            .unwrap_err();
        assert!(matches!(error, GraphError::Permission(_)), "{error}");
        graph.reopen(vec![images.file("a", "a")]).await.unwrap();
        assert!(!node.read_only());
        write(&writes, 0, 3).await.unwrap();
        assert_eq!(first_byte(&upper).await, 3);
    });
}

#[test]
fn an_inline_child_inherits_anew() {
    let images = Images::new();
    on_main(|graph| async move {
        let inline = BlockdevRef::Inline(Box::new(BlockdevOptions {
            node_name: Some("f".to_owned()),
            ..BlockdevOptions::new(file(&images.path("a")))
        }));
        let node = add(&graph, raw_options("r", inline.clone(), 0, None)).await;
        let below = graph.find_node("f").unwrap();
        let states = || (node.read_only(), below.read_only());
        let by_name = BlockdevRef::Name("f".to_owned());
        let to = |child: &BlockdevRef, ro| read_only(raw_options("r", child.clone(), 0, None), ro);
        graph.reopen(vec![to(&by_name, true)]).await.unwrap();
        assert_eq!(states(), (true, true));
        graph.reopen(vec![to(&inline, false)]).await.unwrap();
        assert_eq!(states(), (false, false));
        // What it says itself counts, also later.
        let BlockdevRef::Inline(options) = &inline else {
            unreachable!();
        };
        let fixed = BlockdevRef::Inline(Box::new(read_only((**options).clone(), true)));
        graph.reopen(vec![to(&fixed, false)]).await.unwrap();
        assert_eq!(states(), (false, true));
        graph.reopen(vec![to(&by_name, false)]).await.unwrap();
        assert_eq!(states(), (false, true));
        assert_eq!(below.options().discard, DiscardMode::Unmap);
        // It is closed when it is not needed any more.
        add(&graph, images.file("b", "b")).await;
        drop(below);
        graph.reopen(vec![raw("r", "b")]).await.unwrap();
        assert!(graph.find_node("f").is_err());
    });
}

#[test]
fn windows_change_unless_their_size_was_promised() {
    let images = Images::new();
    on_main(|graph| async move {
        add(&graph, images.file("a", "a")).await;
        let node = add(&graph, raw("r", "a")).await;
        let a = || BlockdevRef::Name("a".to_owned());
        let to = |offset, size| vec![raw_options("r", a(), offset, size)];
        graph.reopen(to(512, Some(1024))).await.unwrap();
        assert_eq!(node.size(), 1024);
        let promised = Permissions {
            need: Perm::CONSISTENT_READ,
            share: !Perm::RESIZE,
        };
        let user = graph.attach("vda", &node, promised, None).unwrap();
        let error = graph.reopen(to(0, None)).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "Cannot change node 'r' from 1024 to {SIZE} bytes: its users do not share 'resize' \
                 on it"
            )
        );
        assert_eq!(node.size(), 1024);
        graph.reopen(to(1024, Some(1024))).await.unwrap();
        graph.detach(&user);
        graph.reopen(to(0, None)).await.unwrap();
        assert_eq!(node.size(), SIZE);
        let Err(GraphError::Reopen(ReopenError::Open(OpenError::OffsetPastEnd { .. }))) =
            graph.reopen(to(2 * SIZE, None)).await
        else {
            panic!("a window past the end");
        };
    });
}

#[test]
fn a_file_that_took_the_place_of_the_open_one_is_not_taken_for_it() {
    let images = Images::new();
    on_main(|graph| async move {
        let node = add(&graph, images.file("a", "a")).await;
        std::fs::rename(images.path("b"), images.path("a")).unwrap();
        let error = graph
            .reopen(vec![read_only(images.file("a", "a"), true)])
            .await
            .unwrap_err();
        assert!(
            matches!(error, GraphError::Reopen(ReopenError::AnotherFile { .. })),
            "{error}"
        );
        assert!(!node.read_only());
        assert_eq!(first_byte(&node).await, 1);
    });
}

#[test]
fn a_reopen_that_is_dropped_or_cannot_drain_changes_nothing() {
    on_main(|graph| async move {
        let images = Images::new();
        let node = add(&graph, read_only(images.file("a", "a"), true)).await;
        let mut reopen = Box::pin(graph.reopen(vec![images.file("a", "a")]));
        assert!(poll_once(&mut reopen).await.is_none(), "the file is opened");
        drop(reopen);
        assert!(node.read_only());

        let (storage, slow) = disk(&graph, "slow");
        let mut shown = raw("r", "a");
        shown.read_only = Some(true);
        let user = attach(&graph, "vdb", &slow);
        storage.hold(Match::op(IoOp::Write));
        let held = spawn_local(async move { write(&user, 0, 1).await });
        storage.wait_held(1).await;
        graph.set_drain_timeout(std::time::Duration::from_millis(20));
        // A node that others opened by hand cannot be reopened at all.
        let error = graph.reopen(vec![raw("slow", "a")]).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "Block format 'test' used by node 'slow' does not support reopening files"
        );
        let upper = add(&graph, raw("r", "slow")).await;
        graph
            .reopen(vec![raw("r", "slow")])
            .await
            .expect("nobody sends requests through it");
        let reads = attach(&graph, "vdc", &upper);
        storage.hold(Match::op(IoOp::Read));
        let read = spawn_local(async move { reads.read(0, bytes(512, 0)).await });
        storage.wait_held(2).await;
        let error = graph.reopen(vec![raw("r", "a")]).await.unwrap_err();
        assert!(matches!(error, GraphError::DrainTimeout { .. }), "{error}");
        assert_eq!(graph.child(&upper, ChildRole::File).unwrap().name(), "slow");
        storage.release_all();
        held.await.unwrap();
        read.await.unwrap();
    });
}

#[test]
fn nodes_swap_places_in_one_list_and_loops_are_named() {
    let images = Images::new();
    on_main(|graph| async move {
        add(&graph, images.file("a", "a")).await;
        add(&graph, raw("x", "a")).await;
        add(&graph, raw("y", "x")).await;
        let error = graph.reopen(vec![raw("x", "y")]).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "Making 'y' a file child of 'x' would create a cycle"
        );
        graph
            .reopen(vec![raw("y", "a"), raw("x", "y")])
            .await
            .unwrap();
        let x = graph.find_node("x").unwrap();
        assert_eq!(graph.child(&x, ChildRole::File).unwrap().name(), "y");
        // A later entry of a node counts, and keeps what it does not say.
        graph
            .reopen(vec![read_only(raw("x", "y"), true), raw("x", "a")])
            .await
            .unwrap();
        assert_eq!(graph.child(&x, ChildRole::File).unwrap().name(), "a");
        assert!(x.read_only());
    });
}

#[test]
fn what_is_to_be_flushed_for_a_reopen_does_not_hold_requests() {
    on_main(|graph| async move {
        let (storage, _node) = disk(&graph, "slow");
        let node = add(&graph, raw("r", "slow")).await;
        let user = attach(&graph, "vda", &node);
        storage.hold(Match::op(IoOp::Flush));
        let mut reopen = Box::pin(graph.reopen(vec![raw("r", "slow")]));
        assert!(poll_once(&mut reopen).await.is_none());
        assert_eq!(storage.held_requests(), [(IoOp::Flush, 0)]);
        write(&user, 0, 1).await.unwrap();
        storage.release_all();
        reopen.await.unwrap();
    });
}
