//! Resizing under running requests, and what drivers are told of sections.

use super::*;
use crate::dirty_bitmap::DirtyBitmap;
use crate::driver::CancelReach;
use crate::options::{BlockdevOptions, BlockdevRef, DriverOptions, FileOptions, RawOptions};

/// Node `r`: a part of another.
fn window(file: BlockdevRef, offset: u64, size: Option<u64>) -> BlockdevOptions {
    BlockdevOptions {
        node_name: Some("r".to_owned()),
        ..BlockdevOptions::new(DriverOptions::Raw(RawOptions { file, offset, size }))
    }
}

fn on_a() -> BlockdevRef {
    BlockdevRef::Name("a".to_owned())
}

/// Counts how often it was told of a new size.
#[derive(Default)]
struct Told {
    sizes: Mutex<Vec<u64>>,
    backend: Mutex<Option<Arc<Backend>>>,
}

impl BackendUser for Told {
    fn resized(&self) {
        let backend = self.backend.lock().unwrap();
        let backend = backend.as_ref().expect("attached");
        assert!(backend.is_drained());
        self.sizes.lock().unwrap().push(backend.size());
    }
    fn describe(&self) -> String {
        "device 'vda'".to_owned()
    }
}

#[test]
fn a_resize_waits_for_requests_and_tells_all_above() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let told = Arc::new(Told::default());
        let backend = graph
            .attach("vda", &node, writer(), Some(told.clone()))
            .unwrap();
        *told.backend.lock().unwrap() = Some(Arc::clone(&backend));
        let drained = graph.drain(&node, &[]).await.unwrap();
        let filter = graph
            .insert_filter(Some("f"), &node, &[], &drained, PassThrough::boxed)
            .unwrap();
        drop(drained);

        storage.hold(Match::op(IoOp::Write));
        let last = SIZE - 512;
        let held = spawn_local({
            let backend = Arc::clone(&backend);
            async move { write(&backend, last, 1).await }
        });
        storage.wait_held(1).await;
        let mut resize = Box::pin(graph.resize(&node, SIZE / 2));
        assert!(poll_once(&mut resize).await.is_none());
        assert_eq!(node.size(), SIZE);
        storage.release_all();
        resize.await.unwrap();
        held.await.unwrap();
        assert_eq!(*told.sizes.lock().unwrap(), [SIZE / 2]);
        assert_eq!((node.size(), filter.size()), (SIZE / 2, SIZE / 2));
        let error = write(&backend, last, 1).await.unwrap_err();
        assert_eq!(error.errno, libc::ENOSPC);

        // A filter passes it down. What is new reads as zeroes.
        graph.resize(&filter, SIZE).await.unwrap();
        assert_eq!(storage.size(), SIZE);
        let iov = bytes(512, 7);
        backend.read(last, iov.clone()).await.unwrap();
        assert!(iov.is_zero());
        assert_eq!(graph.backends().len(), 1);
    });
}

#[test]
fn a_resize_is_refused_where_a_user_or_a_bitmap_forbids_it() {
    on_main(|graph| async move {
        let (storage, node) = disk(&graph, "a");
        let fixed = Permissions {
            need: Perm::CONSISTENT_READ,
            share: !Perm::RESIZE,
        };
        let backend = graph.attach("vda", &node, fixed, None).unwrap();
        let error = graph.resize(&node, 0).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "Permission conflict on node 'a': permissions 'resize' are both required by an unnamed \
             block device (uses node 'a' as 'root' child) and unshared by block device 'vda' (uses \
             node 'a' as 'root' child)."
        );
        graph.detach(&backend);
        let bitmap = Arc::new(DirtyBitmap::new(SIZE, 4096).unwrap());
        node.attach_bitmap(&bitmap);
        let Err(GraphError::Resize(error)) = graph.resize(&node, 0).await else {
            panic!("resized under a bitmap");
        };
        assert_eq!(error.errno, libc::EBUSY);
        node.detach_bitmap(&bitmap);
        storage.fail_once(Match::op(IoOp::Truncate), libc::ENOSPC);
        let error = graph.resize(&node, 2 * SIZE).await.unwrap_err();
        let text = "Could not resize file: No space left on device";
        assert_eq!(error.to_string(), text);
        assert!(graph.resize(&node, u64::MAX).await.is_err());
        assert_eq!((storage.size(), graph.backends().len()), (SIZE, 0));
    });
}

#[test]
fn drivers_on_the_way_of_held_requests_are_told_of_a_section() {
    on_main(|graph| async move {
        let (below, node) = disk(&graph, "a");
        let (other, _) = disk(&graph, "b");
        let _vda = attach(&graph, "vda", &node);
        let drained = graph.drain(&node, &[]).await.unwrap();
        assert_eq!((below.sections(), other.sections()), (1, 0));
        let nested = graph.drain_all().await.unwrap();
        assert_eq!(below.sections(), 2);
        drop(drained);
        drop(nested);
        assert_eq!(below.sections(), 0);
        // A section of a node tells those below it, too.
        let drained = graph.drain(&node, &[]).await.unwrap();
        let filter = graph
            .insert_filter(None, &node, &[], &drained, PassThrough::boxed)
            .unwrap();
        drop(drained);
        let drained = graph.drain(&filter, &[]).await.unwrap();
        assert_eq!(below.sections(), 1);
        drop(drained);
        assert_eq!(below.sections(), 0);
        filter.cancel_in_flight(CancelReach::Waiting);
        assert_eq!(below.cancels(), 1);
    });
}

#[test]
fn a_file_grows_with_zeroes_and_shrinks() {
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), [1; 4096]).unwrap();
    let path = image.path().to_owned();
    on_main(|graph| async move {
        let file = BlockdevOptions::new(DriverOptions::File(FileOptions {
            filename: path.clone(),
            locking: None,
            host_device: false,
            bitmap_file: None,
        }));
        let raw = |size| window(BlockdevRef::Inline(Box::new(file.clone())), 1024, size);
        let node = graph.blockdev_add(raw(None)).await.unwrap();
        graph.resize(&node, 512).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [1; 1536]);
        graph.resize(&node, 1024).await.unwrap();
        assert_eq!(
            std::fs::read(&path).unwrap(),
            [[1; 1536].as_slice(), &[0; 512]].concat()
        );
        assert_eq!(node.size(), 1024);
        assert!(graph.resize(&node, i64::MAX as u64).await.is_err());
        drop(node);
        graph.blockdev_del("r").await.unwrap();

        let node = graph.blockdev_add(raw(Some(512))).await.unwrap();
        let error = graph.resize(&node, 1024).await.unwrap_err();
        assert_eq!(error.to_string(), "Cannot resize fixed-size raw disks");
    });
}

#[test]
fn the_newest_user_that_forbids_it_is_named() {
    on_main(|graph| async move {
        let (_storage, node) = disk(&graph, "a");
        let fixed = Permissions {
            need: Perm::CONSISTENT_READ,
            share: !Perm::RESIZE,
        };
        let _older = graph.attach("vda", &node, fixed, None).unwrap();
        graph.blockdev_add(window(on_a(), 512, None)).await.unwrap();
        let error = graph.resize(&node, 512).await.unwrap_err().to_string();
        assert!(error.contains("unshared by node 'r'"), "{error}");
        let _newest = graph.attach("vdb", &node, fixed, None).unwrap();
        let error = graph.resize(&node, 512).await.unwrap_err().to_string();
        assert!(error.contains("unshared by block device 'vdb'"), "{error}");
    });
}

#[test]
fn a_window_does_not_take_its_file_past_the_largest_size() {
    on_main(|graph| async move {
        let (storage, _node) = disk(&graph, "a");
        let node = graph.blockdev_add(window(on_a(), 512, None)).await.unwrap();
        let most = 9_223_372_035_781_033_984;
        let error = graph.resize(&node, most).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "offset(9223372035781034496) exceeds maximum(9223372035781033984)"
        );
        assert_eq!(storage.size(), SIZE);
    });
}
