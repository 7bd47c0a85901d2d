//! Named bitmaps of a node that is written, over the test storage.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{BitmapChange, MAX_NAME, NamedBitmap, NamedBitmapError, NewBitmap};
use crate::buffer::AlignedBuffer;
use crate::dirty_bitmap::DirtyBitmap;
use crate::driver::{Limits, WriteFlags};
use crate::error::IoOp;
use crate::graph::{Graph, GraphError};
use crate::node::{Node, NodeOptions};
use crate::runtime::{EventLoop, spawn_local};
use crate::test_storage::{HoldAt, Match, TestStorage};

const SIZE: u64 = 1 << 20;
const CHUNK: u32 = 4096;

fn on_main<F: Future<Output = ()>>(test: impl FnOnce(Rc<Graph>, Arc<Node>, TestStorage) -> F) {
    let main = EventLoop::new("test").expect("an event loop");
    let graph = Graph::new();
    let storage = TestStorage::new(SIZE);
    let node = graph
        .add_node(Some("a"), storage.driver(), NodeOptions::default())
        .expect("a free name");
    main.block_on(test(graph, node, storage));
}

fn add(node: &Arc<Node>, name: &str) -> Arc<NamedBitmap> {
    node.add_bitmap(&new(name)).expect("a free name")
}

fn new(name: &str) -> NewBitmap<'_> {
    NewBitmap {
        name,
        granularity: Some(CHUNK),
        persistent: false,
        enabled: true,
    }
}

/// Writes one sector of each of `chunks`.
async fn write(node: &Node, chunks: impl IntoIterator<Item = u64>) {
    let iov = AlignedBuffer::new(512).io_vec(512);
    for chunk in chunks {
        let offset = chunk * u64::from(CHUNK);
        node.write(offset, iov.clone(), WriteFlags::default())
            .await
            .expect("nothing fails here");
    }
}

/// The numbers of the dirty chunks.
fn dirty(bits: &DirtyBitmap) -> Vec<u64> {
    let chunk = u64::from(CHUNK);
    let chunks = 0..bits.size().div_ceil(chunk);
    chunks.filter(|at| bits.is_dirty(at * chunk)).collect()
}

fn shown(bitmap: &NamedBitmap) -> (Vec<u64>, bool, bool) {
    let bits = dirty(&bitmap.bits());
    (bits, bitmap.is_recording(), bitmap.is_busy())
}

#[test]
fn a_bitmap_records_while_it_is_enabled() {
    on_main(|_graph, node, _storage| async move {
        let bitmap = add(&node, "b");
        write(&node, [1]).await;
        BitmapChange::disable(&bitmap).unwrap().commit();
        write(&node, [2]).await;
        assert_eq!(shown(&bitmap), (vec![1], false, false));
        BitmapChange::enable(&bitmap).unwrap().commit();
        write(&node, [3]).await;
        assert_eq!(shown(&bitmap), (vec![1, 3], true, false));
        BitmapChange::clear(&bitmap).unwrap().commit();
        assert_eq!(shown(&bitmap), (vec![], true, false));
        write(&node, [4]).await;
        BitmapChange::remove(&bitmap).unwrap().commit();
        write(&node, [5]).await;
        assert_eq!(shown(&bitmap), (vec![4], false, false));
        assert!(node.named_bitmap("b").is_none());
        assert!(node.bitmaps().is_empty());
    });
}

#[test]
fn bad_names_and_granularities_are_refused() {
    on_main(|_graph, node, _storage| async move {
        let refused = |new: NewBitmap<'_>| node.add_bitmap(&new).unwrap_err().to_string();
        assert_eq!(refused(new("")), "Bitmap name cannot be empty");
        let long = "x".repeat(MAX_NAME + 1);
        assert_eq!(refused(new(&long)), format!("Bitmap name too long: {long}"));
        let _longest = add(&node, &long[..MAX_NAME]);
        let _b = add(&node, "b");
        assert_eq!(refused(new("b")), "Bitmap already exists: b");
        for granularity in [0, 1, 256, 513, 4097, u32::MAX] {
            let bad = NewBitmap {
                granularity: Some(granularity),
                ..new("c")
            };
            assert_eq!(
                refused(bad),
                "Granularity must be power of 2 and at least 512"
            );
        }
        // The granularity is looked at before the name is looked for, as in QEMU, and
        // where it is to be kept in between.
        let kept = NewBitmap {
            persistent: true,
            ..new("b")
        };
        assert_eq!(
            refused(kept.clone()),
            "Can't store persistent bitmaps to a: Operation not supported"
        );
        let bad = NewBitmap {
            granularity: Some(3),
            ..kept
        };
        assert_eq!(
            refused(bad),
            "Granularity must be power of 2 and at least 512"
        );
        assert_eq!(node.named_bitmaps().len(), 2);
    });
}

#[test]
fn chunks_are_as_large_as_clusters_by_default() {
    let with_clusters = |cluster_size| {
        let limits = Limits {
            cluster_size,
            ..Limits::default()
        };
        let storage = TestStorage::with_limits(SIZE, limits);
        let node = Node::new("n", storage.driver(), NodeOptions::default());
        let bitmap = node.add_bitmap(&NewBitmap {
            granularity: None,
            ..new("b")
        });
        bitmap.unwrap().granularity()
    };
    assert_eq!(with_clusters(None), 65536);
    assert_eq!(with_clusters(Some(512)), 4096);
    assert_eq!(with_clusters(Some(16384)), 16384);
    assert_eq!(with_clusters(Some(2 << 20)), 2 << 20);
}

#[test]
fn what_is_frozen_stays_and_a_successor_records() {
    on_main(|graph, node, _storage| async move {
        let bitmap = add(&node, "b");
        let mut outcomes = Vec::new();
        for outcome in 0..4 {
            BitmapChange::clear(&bitmap).unwrap().commit();
            write(&node, [1, 2]).await;
            let frozen = bitmap.freeze().unwrap();
            write(&node, [2, 3]).await;
            assert_eq!(dirty(frozen.bits()), [1, 2]);
            assert_eq!(shown(&bitmap), (vec![1, 2], true, true));
            let info = graph.info(&node).unwrap().bitmaps;
            let names = info.iter().map(|info| (info.name.as_deref(), info.count));
            let chunk = u64::from(CHUNK);
            assert_eq!(
                names.collect::<Vec<_>>(),
                [(None, 2 * chunk), (Some("b"), 2 * chunk)]
            );
            match outcome {
                0 => frozen.abdicate(),
                1 => {
                    let left = DirtyBitmap::new(SIZE, 2 * chunk).unwrap();
                    left.set(8 * chunk, 1);
                    frozen.abdicate_with(&left);
                }
                2 => frozen.reclaim(),
                _ => drop(frozen),
            }
            write(&node, [5]).await;
            outcomes.push(shown(&bitmap));
            assert_eq!(node.bitmaps().len(), 1);
        }
        let bits = outcomes.iter().map(|(bits, ..)| bits.as_slice());
        let expected: [&[u64]; 4] = [&[2, 3, 5], &[2, 3, 5, 8, 9], &[1, 2, 3, 5], &[1, 2, 3, 5]];
        assert_eq!(bits.collect::<Vec<_>>(), expected);
        assert!(
            outcomes
                .iter()
                .all(|(_, recording, busy)| *recording && !busy)
        );
    });
}

#[test]
fn the_successor_of_a_disabled_bitmap_does_not_record() {
    on_main(|_graph, node, _storage| async move {
        let bitmap = add(&node, "b");
        write(&node, [1]).await;
        BitmapChange::disable(&bitmap).unwrap().commit();
        let frozen = bitmap.freeze().unwrap();
        write(&node, [2]).await;
        assert_eq!(shown(&bitmap), (vec![1], false, true));
        frozen.reclaim();
        write(&node, [3]).await;
        assert_eq!(shown(&bitmap), (vec![1], false, false));
    });
}

#[test]
fn a_busy_bitmap_is_left_alone() {
    on_main(|graph, node, _storage| async move {
        let bitmap = add(&node, "b");
        let other = add(&node, "o");
        let busy = NamedBitmapError::Busy("b".to_owned());
        let check = || {
            let refused = [
                bitmap.check_free().err(),
                bitmap.check_usable().err(),
                bitmap.hold().err(),
                bitmap.freeze().err(),
                BitmapChange::clear(&bitmap).err(),
                BitmapChange::enable(&bitmap).err(),
                BitmapChange::disable(&bitmap).err(),
                BitmapChange::remove(&bitmap).err(),
                BitmapChange::merge(&bitmap, []).err(),
                BitmapChange::merge(&other, [Ok(Arc::clone(&bitmap))]).err(),
            ];
            assert!(refused.iter().all(|error| error.as_ref() == Some(&busy)));
        };
        let hold = bitmap.hold().unwrap();
        check();
        assert!(matches!(
            graph.resize(&node, SIZE / 2).await,
            Err(GraphError::Bitmap(NamedBitmapError::Busy(_)))
        ));
        write(&node, [7]).await;
        assert_eq!(dirty(&hold.bitmap().bits()), [7]);
        drop(hold);
        let frozen = bitmap.freeze().unwrap();
        check();
        drop(frozen);
        let removal = BitmapChange::remove(&bitmap).unwrap();
        check();
        drop(removal);
        assert_eq!(shown(&bitmap), (vec![7], true, false));
    });
}

#[test]
fn merging_rounds_out_and_needs_equal_sizes() {
    on_main(|graph, node, _storage| async move {
        let fine = add(&node, "fine");
        let coarse = node
            .add_bitmap(&NewBitmap {
                granularity: Some(4 * CHUNK),
                enabled: false,
                ..new("coarse")
            })
            .unwrap();
        write(&node, [5, 255]).await;
        let sources = || [Ok(Arc::clone(&fine)), Ok(Arc::clone(&coarse))];
        BitmapChange::merge(&coarse, sources()).unwrap().commit();
        assert_eq!(shown(&coarse).0, [4, 5, 6, 7, 252, 253, 254, 255]);
        BitmapChange::merge(&fine, sources()).unwrap().commit();
        assert_eq!(shown(&fine).0, [4, 5, 6, 7, 252, 253, 254, 255]);
        write(&node, [9]).await;
        assert!(fine.bits().is_dirty(9 * 4096));

        let larger = TestStorage::new(2 * SIZE);
        let larger = graph.add_node(None, larger.driver(), NodeOptions::default());
        let larger = add(&larger.unwrap(), "larger");
        let before = shown(&fine);
        let error = BitmapChange::merge(&fine, [Ok(coarse), Ok(larger)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Bitmaps are of different sizes (destination size is 1048576, source size is 2097152) \
             and can't be merged"
        );
        assert_eq!(shown(&fine), before);
    });
}

#[test]
fn changes_that_are_dropped_were_never_made() {
    on_main(|_graph, node, _storage| async move {
        let a = add(&node, "a");
        let b = add(&node, "b");
        write(&node, [1]).await;
        BitmapChange::disable(&b).unwrap().commit();
        let before = (shown(&a), shown(&b));
        let mut changes = vec![
            BitmapChange::disable(&a).unwrap(),
            BitmapChange::clear(&a).unwrap(),
            BitmapChange::enable(&a).unwrap(),
            BitmapChange::add(&node, &new("c")).unwrap(),
            BitmapChange::enable(&b).unwrap(),
            BitmapChange::clear(&b).unwrap(),
            BitmapChange::disable(&b).unwrap(),
        ];
        let c = node.named_bitmap("c").unwrap();
        changes.push(BitmapChange::merge(&c, [Ok(Arc::clone(&a))]).unwrap());
        changes.push(BitmapChange::remove(&a).unwrap());
        changes.push(BitmapChange::remove(&c).unwrap());
        while changes.pop().is_some() {}
        assert_eq!((shown(&a), shown(&b)), before);
        assert!(node.named_bitmap("c").is_none());
        assert_eq!(node.bitmaps().len(), 1);
        write(&node, [2]).await;
        assert_eq!((shown(&a).0, shown(&b).0), (vec![1, 2], vec![1]));
    });
}

/// A write that is not held back (a mirror's to its target) while a change waits to be
/// committed or undone is missed in neither case.
#[test]
fn a_write_during_a_change_is_recorded_whatever_becomes_of_it() {
    type Make = fn(&Arc<NamedBitmap>) -> Result<BitmapChange, NamedBitmapError>;
    let makes: [(Make, &[u64], &[u64]); 3] = [
        (BitmapChange::clear, &[2, 3], &[1, 2, 3]),
        (BitmapChange::disable, &[1, 2], &[1, 2, 3]),
        (|b| BitmapChange::merge(b, []), &[1, 2, 3], &[1, 2, 3]),
    ];
    for (make, committed, undone) in makes {
        for commit in [true, false] {
            on_main(|_graph, node, _storage| async move {
                let bitmap = add(&node, "b");
                write(&node, [1]).await;
                let change = make(&bitmap).unwrap();
                write(&node, [2]).await;
                if commit {
                    change.commit();
                } else {
                    drop(change);
                }
                write(&node, [3]).await;
                let expected = if commit { committed } else { undone };
                assert_eq!(shown(&bitmap).0, expected);
                assert!(node.bitmaps().len() <= 1);
            });
        }
    }
}

#[test]
fn bitmaps_get_the_size_of_their_node() {
    on_main(|graph, node, _storage| async move {
        let bitmap = add(&node, "b");
        let off = add(&node, "off");
        write(&node, [1, 255]).await;
        BitmapChange::disable(&off).unwrap().commit();
        graph.resize(&node, 2 * SIZE).await.unwrap();
        write(&node, [256, 511]).await;
        assert_eq!(shown(&bitmap), (vec![1, 255, 256, 511], true, false));
        assert_eq!(shown(&off), (vec![1, 255], false, false));
        graph.resize(&node, SIZE / 2).await.unwrap();
        assert_eq!(shown(&bitmap).0, [1]);
        graph.resize(&node, SIZE).await.unwrap();
        assert_eq!((shown(&bitmap).0, shown(&off).0), (vec![1], vec![1]));
        assert_eq!(node.bitmaps().len(), 1);

        let small = NewBitmap {
            granularity: Some(512),
            ..new("small")
        };
        let _small = node.add_bitmap(&small).unwrap();
        let error = graph.resize(&node, 1 << 41).await.unwrap_err();
        assert!(error.to_string().contains("needs 4294967296 bits"));
        assert_eq!(node.size(), SIZE);
    });
}

#[test]
fn a_frozen_bitmap_follows_a_node_that_grows_by_itself() {
    on_main(|_graph, node, _storage| async move {
        let bitmap = add(&node, "b");
        write(&node, [1]).await;
        let frozen = bitmap.freeze().unwrap();
        // As a format's file grows when its clusters are allocated.
        node.resize(2 * SIZE).await.unwrap();
        write(&node, [300]).await;
        frozen.reclaim();
        write(&node, [301]).await;
        assert_eq!(shown(&bitmap), (vec![1, 300, 301], true, false));
        assert_eq!(node.bitmaps().len(), 1);
    });
}

#[test]
fn a_write_in_flight_is_recorded_by_whoever_records_when_it_ends() {
    on_main(|_graph, node, storage| async move {
        let bitmap = add(&node, "b");
        storage.hold_at(Match::op(IoOp::Write), HoldAt::End);
        let held = spawn_local({
            let node = Arc::clone(&node);
            async move { write(&node, [9]).await }
        });
        storage.wait_held(1).await;
        let frozen = bitmap.freeze().unwrap();
        storage.release_all();
        held.await;
        assert!(dirty(frozen.bits()).is_empty());
        frozen.abdicate();
        assert_eq!(shown(&bitmap).0, [9]);
    });
}

#[test]
fn no_write_is_missed_while_a_bitmap_is_frozen_and_reclaimed_again_and_again() {
    const SECTORS: u64 = 1 << 16;
    let storage = TestStorage::new(SECTORS * 512);
    let node = Node::new("n", storage.driver(), NodeOptions::default());
    let sectors = NewBitmap {
        granularity: Some(512),
        ..new("b")
    };
    let bitmap = node.add_bitmap(&sectors).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let main = EventLoop::new("writer").expect("an event loop");
            main.block_on(async {
                let iov = AlignedBuffer::new(512).io_vec(512);
                for sector in 0..SECTORS {
                    let written = node.write(sector * 512, iov.clone(), WriteFlags::default());
                    written.await.expect("nothing fails here");
                }
            });
            ended.store(true, Ordering::SeqCst);
        });
        while !ended.load(Ordering::SeqCst) {
            bitmap.freeze().unwrap().reclaim();
            drop(BitmapChange::clear(&bitmap).unwrap());
            BitmapChange::merge(&bitmap, []).unwrap().commit();
        }
    });
    let bits = bitmap.bits();
    let missed: Vec<u64> = (0..SECTORS).filter(|at| !bits.is_dirty(at * 512)).collect();
    assert!(missed.is_empty(), "{missed:?}");
}
