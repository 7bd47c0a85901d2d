//! `blockdev-add` and `blockdev-del` over real files.

use std::path::PathBuf;

use super::*;
use crate::graph::topology::MAX_DEPTH;
use crate::options::{
    BlockdevOptions, BlockdevRef, DetectZeroes, DriverOptions, FileOptions, NullCoOptions,
    RawOptions,
};

fn blockdev(name: Option<&str>, driver: DriverOptions) -> BlockdevOptions {
    BlockdevOptions {
        node_name: name.map(str::to_owned),
        ..BlockdevOptions::new(driver)
    }
}

fn file(path: PathBuf) -> DriverOptions {
    DriverOptions::File(FileOptions {
        filename: path,
        locking: None,
        host_device: false,
        bitmap_file: None,
    })
}

fn raw(file: BlockdevRef) -> DriverOptions {
    DriverOptions::Raw(RawOptions {
        file,
        offset: 0,
        size: None,
    })
}

fn null(size: u64) -> DriverOptions {
    DriverOptions::NullCo(NullCoOptions {
        aio: false,
        size,
        latency_ns: 0,
        read_zeroes: true,
    })
}

fn inline(options: BlockdevOptions) -> BlockdevRef {
    BlockdevRef::Inline(Box::new(options))
}

fn image(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(SIZE).unwrap();
    path
}

#[test]
fn a_raw_node_on_an_inline_file_reads_and_writes_and_goes_with_it() {
    on_main(|graph| async move {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a.img");
        let node = graph
            .blockdev_add(blockdev(
                Some("r"),
                raw(inline(blockdev(None, file(path.clone())))),
            ))
            .await
            .unwrap();
        assert_eq!(node.size(), SIZE);
        let nodes = graph.nodes();
        let drivers: Vec<_> = nodes.iter().map(|n| n.driver).collect();
        assert_eq!(drivers, ["file", "raw"]);
        let shown = path.to_str().unwrap();
        assert_eq!(nodes[1].filename, shown);
        assert_eq!(nodes[1].children[0].node, nodes[0].name);
        assert!(nodes[1].monitor_owned && !nodes[0].monitor_owned);
        let below = nodes[0].name.clone();
        assert_eq!(
            graph.blockdev_del(&below).await.unwrap_err().to_string(),
            format!("Node {below} is not owned by the monitor")
        );

        let device = attach(&graph, "vda", &node);
        write(&device, 4096, 7).await.unwrap();
        device.flush().await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[4096..4608], [7; 512]);
        assert_eq!(
            graph.blockdev_del("r").await.unwrap_err().to_string(),
            "Node r is in use"
        );
        graph.detach(&device);
        graph.blockdev_del("r").await.unwrap();
        assert!(graph.nodes().is_empty());
    });
}

#[test]
fn bad_options_are_refused_and_leave_no_node_and_no_name() {
    on_main(|graph| async move {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a.img");
        let missing = dir.path().join("none.img");
        let refused = async |options| graph.blockdev_add(options).await.unwrap_err().to_string();
        graph
            .blockdev_add(blockdev(Some("f"), file(path.clone())))
            .await
            .unwrap();
        assert_eq!(
            refused(blockdev(Some("f"), raw(BlockdevRef::Name("f".into())))).await,
            "Duplicate nodes with node-name='f'"
        );
        assert_eq!(
            refused(blockdev(Some("r"), raw(BlockdevRef::Name("nosuch".into())))).await,
            "Cannot find device='nosuch' nor node-name='nosuch'"
        );
        assert_eq!(
            refused(blockdev(None, null(512))).await,
            "'node-name' must be specified for the root node"
        );
        let not_there = blockdev(Some("x"), file(missing.clone()));
        let text = format!(
            "Could not open '{}': No such file or directory",
            missing.display()
        );
        assert_eq!(refused(not_there.clone()).await, text);
        assert_eq!(
            refused(blockdev(Some("y"), raw(inline(not_there)))).await,
            text
        );
        let twice = blockdev(
            Some("r"),
            raw(inline(blockdev(Some("r"), file(path.clone())))),
        );
        assert_eq!(refused(twice).await, "Duplicate nodes with node-name='r'");
        let mut detect = blockdev(Some("z"), null(512));
        detect.detect_zeroes = DetectZeroes::Unmap;
        assert_eq!(
            refused(detect).await,
            "setting detect-zeroes to unmap is not allowed without setting discard operation to \
             unmap"
        );
        assert_eq!(graph.nodes().len(), 1);
        // Their names are free.
        for name in ["r", "x", "y", "z"] {
            graph
                .blockdev_add(blockdev(Some(name), null(512)))
                .await
                .unwrap();
        }
    });
}

#[test]
fn two_users_of_one_image_exclude_each_other_by_its_locks() {
    on_main(|graph| async move {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a.img");
        let mut nodes = Vec::new();
        for name in ["a", "b"] {
            let options = blockdev(Some(name), file(path.clone()));
            nodes.push(graph.blockdev_add(options).await.unwrap());
        }
        let alone = Permissions {
            need: Perm::CONSISTENT_READ | Perm::WRITE,
            share: Perm::CONSISTENT_READ,
        };
        let first = graph.attach("vda", &nodes[0], alone, None).unwrap();
        let error = graph.attach("vdb", &nodes[1], alone, None).unwrap_err();
        assert_eq!(error.to_string(), "Failed to get \"write\" lock");
        assert!(graph.find_backend("vdb").is_none());
        graph.detach(&first);
        graph.attach("vdb", &nodes[1], alone, None).unwrap();
    });
}

#[test]
fn inline_children_take_rights_and_cache_options_from_their_parent() {
    on_main(|graph| async move {
        let dir = tempfile::tempdir().unwrap();
        let path = image(&dir, "a.img");
        let mut options = blockdev(Some("r"), raw(inline(blockdev(Some("f"), file(path)))));
        options.read_only = Some(true);
        options.cache.no_flush = Some(true);
        graph.blockdev_add(options).await.unwrap();
        let file = graph.find("f").unwrap();
        assert!(file.read_only());
        assert!(file.options().cache.no_flush);
        assert_eq!(file.options().discard, DiscardMode::Unmap);
    });
}

#[test]
fn a_name_is_taken_while_its_node_is_being_opened_and_free_once_that_is_given_up() {
    on_main(|graph| async move {
        // What an opening holds. (An opening itself may be over too soon.)
        let reserved = graph.reserve_node_name(Some("f")).unwrap();
        let taken = graph.blockdev_add(blockdev(Some("f"), null(SIZE))).await;
        assert_eq!(
            taken.unwrap_err().to_string(),
            "Duplicate nodes with node-name='f'"
        );
        drop(reserved);
        graph
            .blockdev_add(blockdev(Some("f"), null(SIZE)))
            .await
            .unwrap();
    });
}

#[test]
fn nodes_are_closed_where_it_may_block_before_a_deletion_is_reported() {
    on_main(|graph| async move {
        let main = std::thread::current().id();
        let (_storage, below) = disk(&graph, "a");
        let (ends, told) = mpsc::channel();
        let driver = || {
            let child = Child::new(ChildRole::File, Arc::clone(&below));
            PassThrough::telling(child, End(ends.clone()))
        };
        let in_order = |first: (&'static str, ThreadId), second: (&'static str, ThreadId)| {
            assert_eq!((first.0, second.0), ("closed", "dropped"));
            assert!(first.1 != main && second.1 != main);
        };
        let node = graph.add_node(Some("b"), driver(), options()).unwrap();
        drop(node);
        graph.blockdev_del("b").await.unwrap();
        // Both are told of by now.
        in_order(told.try_recv().unwrap(), told.try_recv().unwrap());

        let drained = graph.drain_all().await.unwrap();
        let filter = graph
            .insert_filter(Some("f"), &below, &[], &drained, |child| {
                PassThrough::telling(child, End(ends.clone()))
            })
            .unwrap();
        graph.remove_filter(&filter, &drained).unwrap();
        assert_eq!(told.recv().unwrap().0, "closed");
        // Who still holds a node has it to the end.
        drop(filter);
        assert_eq!(told.recv().unwrap().0, "dropped");
    });
}

/// On a stack as large as that of a program's main thread.
fn on_a_large_stack(test: fn()) {
    let thread = std::thread::Builder::new().stack_size(8 << 20).spawn(test);
    thread.unwrap().join().unwrap();
}

#[test]
fn nodes_are_stacked_only_so_high_that_requests_can_pass_them() {
    on_a_large_stack(|| {
        on_main(|graph| async move {
            let nested = |levels: usize| {
                let bottom = blockdev(None, null(SIZE));
                let options =
                    (1..levels).fold(bottom, |below, _| blockdev(None, raw(inline(below))));
                BlockdevOptions {
                    node_name: Some("top".to_owned()),
                    ..options
                }
            };
            for levels in [MAX_DEPTH + 1, 3 * MAX_DEPTH] {
                let error = graph.blockdev_add(nested(levels)).await.unwrap_err();
                assert!(matches!(error, GraphError::TooDeep(_)), "{error}");
                assert!(graph.nodes().is_empty());
            }
            let top = graph.blockdev_add(nested(MAX_DEPTH)).await.unwrap();
            let device = attach(&graph, "vda", &top);
            write(&device, 0, 7).await.unwrap();

            // Neither by name.
            let over = |name: &str| blockdev(Some("more"), raw(BlockdevRef::Name(name.into())));
            let error = graph.blockdev_add(over("top")).await.unwrap_err();
            assert!(matches!(error, GraphError::TooDeep(_)), "{error}");
            assert_eq!(graph.nodes().len(), MAX_DEPTH);
        });
    });
}
