//! Disks that become larger, also after they were smaller, and disks that do not end
//! with a sector.

use std::sync::Arc;

use super::check::Image;
use super::recorder::Recorder;
use super::requests::{CLUSTER, LAYOUT, SIZE, filled, image, options, sectors, write};
use super::{Layout, on_main, open_on};
use crate::driver::{WriteFlags, ZeroFlags};
use crate::graph::Graph;
use crate::node::Node;
use crate::options::{BackingRef, BlockdevRef};

/// An image of these bytes, as node `a`.
async fn image_of(graph: &Graph, content: Vec<u8>) -> (Recorder, Arc<Node>) {
    let recorder = Recorder::new(content, 1);
    graph
        .add_node(Some("f"), recorder.driver(), options())
        .unwrap();
    let node = open_on(graph, "a", "f", BackingRef::None).await.unwrap();
    (recorder, node)
}

fn check(recorder: &Recorder) {
    let report = Image::new(&recorder.content()).check();
    assert!(report.errors.is_empty() && report.leaks == 0, "{report:?}");
}

#[test]
fn what_was_cut_off_does_not_come_back() {
    on_main(|graph| async move {
        let (recorder, node) = image(&graph, "a", BackingRef::None).await;
        write(&node, 0, SIZE, 1).await;
        graph.resize(&node, 8 * CLUSTER + 1024).await.unwrap();
        graph.resize(&node, SIZE).await.unwrap();
        let kept = 8 * CLUSTER + 1024;
        let before = sectors(&node, 0, kept).await;
        assert!(before.iter().all(|byte| *byte == 1));
        let after = sectors(&node, kept, SIZE - kept).await;
        assert!(after.iter().all(|byte| *byte == 0), "{after:?}");
        node.flush().await.unwrap();
        check(&recorder);
    });
}

#[test]
fn a_longer_backing_image_does_not_show_in_the_last_cluster() {
    for written in [false, true] {
        on_main(|graph| async move {
            let (_, base) = image(&graph, "base", BackingRef::None).await;
            write(&base, 0, SIZE, 1).await;
            let backing = BackingRef::Node(BlockdevRef::Name("base".into()));
            let (recorder, top) = image(&graph, "top", backing).await;
            graph.resize(&top, 2 * CLUSTER + 512).await.unwrap();
            if written {
                write(&top, 2 * CLUSTER, 512, 2).await;
            }
            graph.resize(&top, SIZE).await.unwrap();
            let last = sectors(&top, 2 * CLUSTER, CLUSTER).await;
            assert_eq!(last[0], 1 + u8::from(written));
            assert_eq!(last[1..], [0; 7]);
            let new = sectors(&top, 3 * CLUSTER, SIZE - 3 * CLUSTER).await;
            assert!(new.iter().all(|byte| *byte == 0));
            top.flush().await.unwrap();
            check(&recorder);
        });
    }
}

/// A disk of one cluster and a half, the second compressed and full of ones.
fn compressed() -> Vec<u8> {
    let layout = Layout {
        size: CLUSTER + CLUSTER / 2,
        ..LAYOUT
    };
    let mut content = layout.image();
    let used = content.len();
    // Second level table, then what is compressed: stored as it is, in two clusters.
    content.resize(used + 3 * CLUSTER as usize, 0);
    let mut put = |at: usize, value: &[u8]| content[at..at + value.len()].copy_from_slice(value);
    let (l1, refcounts) = (3 * CLUSTER as usize, 2 * CLUSTER as usize);
    put(l1, &(1 << 63 | used as u64).to_be_bytes());
    for cluster in 0..3 {
        let index = used / CLUSTER as usize + cluster;
        put(refcounts + 2 * index, &1u16.to_be_bytes());
    }
    let data = used + CLUSTER as usize;
    let more_sectors = 8u64;
    let entry = 1 << 62 | more_sectors << 58 | data as u64;
    put(used + 8, &entry.to_be_bytes());
    let len = CLUSTER as u16;
    put(data, &[1]);
    put(data + 1, &len.to_le_bytes());
    put(data + 3, &(!len).to_le_bytes());
    put(data + 5, &vec![1; len as usize]);
    content
}

#[test]
fn the_end_of_a_compressed_cluster_does_not_show() {
    on_main(|graph| async move {
        let (recorder, node) = image_of(&graph, compressed()).await;
        assert_eq!(sectors(&node, CLUSTER, CLUSTER / 2).await, [1; 4]);
        graph.resize(&node, 4 * CLUSTER).await.unwrap();
        let last = sectors(&node, CLUSTER, 3 * CLUSTER).await;
        assert_eq!(last[..4], [1; 4]);
        assert!(last[4..].iter().all(|byte| *byte == 0), "{last:?}");
        node.flush().await.unwrap();
        check(&recorder);
    });
}

#[test]
fn what_cannot_be_freed_keeps_the_disk_as_long_as_it_is() {
    for after in 0..6 {
        on_main(|graph| async move {
            let (recorder, node) = image(&graph, "a", BackingRef::None).await;
            write(&node, 0, SIZE, 1).await;
            node.flush().await.unwrap();
            recorder.fail_writes_after(after);
            let shrunk = graph.resize(&node, CLUSTER).await;
            recorder.heal();
            let size = node.size();
            assert!(size == CLUSTER || (size == SIZE && shrunk.is_err()));
            graph.resize(&node, CLUSTER).await.unwrap();
            graph.resize(&node, SIZE).await.unwrap();
            let new = sectors(&node, CLUSTER, SIZE - CLUSTER).await;
            assert!(new.iter().all(|byte| *byte == 0));
            node.flush().await.unwrap();
            let report = Image::new(&recorder.content()).check();
            assert!(report.errors.is_empty(), "{report:?}");
        });
    }
}

#[test]
fn a_part_of_a_sector_at_the_end_is_no_part_of_the_disk() {
    on_main(|graph| async move {
        let size = 9 * CLUSTER + 700;
        let (recorder, node) = image_of(&graph, Layout { size, ..LAYOUT }.image()).await;
        let size = 9 * CLUSTER + 512;
        assert_eq!(node.size(), size);
        write(&node, 0, size, 1).await;
        assert!(sectors(&node, 0, size).await.iter().all(|byte| *byte == 1));
        let past = node.write(size, filled(512, 1), WriteFlags::default());
        assert_eq!(past.await.unwrap_err().errno, libc::ENOSPC);
        let zero = ZeroFlags {
            may_unmap: true,
            ..ZeroFlags::default()
        };
        node.write_zeroes(8 * CLUSTER, CLUSTER + 512, zero)
            .await
            .unwrap();
        assert_eq!(sectors(&node, 8 * CLUSTER, CLUSTER + 512).await, [0; 9]);
        node.discard(0, size).await.unwrap();
        write(&node, size - 512, 512, 2).await;
        graph.resize(&node, 10 * CLUSTER).await.unwrap();
        let last = sectors(&node, 9 * CLUSTER, CLUSTER).await;
        assert_eq!(last, [2, 0, 0, 0, 0, 0, 0, 0]);
        graph.resize(&node, size).await.unwrap();
        assert_eq!(node.size(), size);
        node.flush().await.unwrap();
        check(&recorder);
    });
}

#[test]
fn a_disk_larger_than_its_first_level_table_can_be_is_refused() {
    on_main(|graph| async move {
        let (_, node) = image(&graph, "a", BackingRef::None).await;
        // 4 Mi entries of 2 MiB each.
        for size in [(8 << 40) + 512, 1 << 62] {
            let error = graph.resize(&node, size).await.unwrap_err();
            assert_eq!(
                error.to_string(),
                "Failed to grow the L1 table: File too large"
            );
        }
        assert_eq!(node.size(), SIZE);
        write(&node, 0, SIZE, 1).await;
    });
}
