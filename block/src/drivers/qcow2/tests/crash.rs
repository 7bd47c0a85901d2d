//! Images are consistent, and lose nothing that was flushed, wherever the process or
//! the machine stops.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::check::Image;
use super::recorder::{Event, Recorder};
use super::{Layout, on_main, open_on};
use crate::buffer::AlignedBuffer;
use crate::driver::{WriteFlags, ZeroFlags};
use crate::node::{Node, NodeOptions};
use crate::options::{BackingRef, BlockdevRef, DiscardMode};
use crate::runtime::spawn_local;
use crate::test_storage::TestStorage;

struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A change of some sectors: events before it began and ended.
struct Change {
    began: usize,
    ended: usize,
    value: u8,
}

/// What was asked of the disk.
struct History {
    /// There is a backing image, which shows through at first.
    backed: bool,
    /// By sector. One task changes a sector, so these follow each other.
    changes: Vec<Vec<Change>>,
    /// Events before each flush began and ended.
    flushes: Vec<(usize, usize)>,
}

/// First byte of each sector of the backing image.
fn below(backed: bool, sector: usize) -> u8 {
    match backed {
        true => 200 + (sector % 50) as u8,
        false => 0,
    }
}

/// Every so many events the process stops.
const STRIDE: u64 = 7;
/// How often the machine stops.
const MACHINE_STOPS: usize = 100;
const TASKS: u64 = 6;
/// Sectors of a task lie together in stretches of this many, so that tasks share
/// tables, and now and then clusters.
const STRETCH: u64 = 24;

async fn one_request(
    node: &Node,
    recorder: &Recorder,
    history: &RefCell<History>,
    random: &mut Random,
    task: u64,
    value: u8,
) {
    let sectors = node.size() / 512;
    let stretch = random.below(sectors / (STRETCH * TASKS)) * TASKS + task;
    let from = random.below(STRETCH);
    let len = 1 + random.below(STRETCH - from);
    let first = stretch * STRETCH + from;
    let (offset, bytes) = (first * 512, len * 512);
    let began = recorder.position();
    let kind = random.below(20);
    let value = match kind {
        0..11 => {
            let iov = AlignedBuffer::new(bytes as usize).io_vec(bytes as usize);
            iov.fill(value);
            let flags = WriteFlags {
                fua: kind == 0,
                ..WriteFlags::default()
            };
            node.write(offset, iov, flags).await.unwrap();
            value
        }
        11..14 => {
            let flags = ZeroFlags {
                may_unmap: kind == 11,
                ..ZeroFlags::default()
            };
            node.write_zeroes(offset, bytes, flags).await.unwrap();
            0
        }
        14..17 => {
            // Whole clusters only: what a discard does with others is its choice.
            let cluster = u64::from(node.limits().cluster_size.unwrap());
            let start = offset.next_multiple_of(cluster);
            let end = (offset + bytes) / cluster * cluster;
            if start < end {
                if history.borrow().backed {
                    // What is not there is not discarded: the backing image still shows.
                    let flags = ZeroFlags {
                        may_unmap: true,
                        ..ZeroFlags::default()
                    };
                    let zeroed = node.write_zeroes(start, end - start, flags).await;
                    zeroed.unwrap();
                } else {
                    node.discard(start, end - start).await.unwrap();
                }
                let ended = recorder.position();
                for sector in start / 512..end / 512 {
                    history.borrow_mut().changes[sector as usize].push(Change {
                        began,
                        ended,
                        value: 0,
                    });
                }
            }
            return;
        }
        17..19 => {
            let iov = AlignedBuffer::new(bytes as usize).io_vec(bytes as usize);
            node.read(offset, iov.clone()).await.unwrap();
            for (i, sector) in (first..first + len).enumerate() {
                let mut byte = [0];
                iov.copy_to(i * 512, &mut byte);
                let sector = sector as usize;
                let last = history.borrow().changes[sector].last().map(|c| c.value);
                let expected = last.unwrap_or_else(|| below(history.borrow().backed, sector));
                assert_eq!(byte[0], expected, "sector {sector}");
            }
            return;
        }
        _ => {
            node.flush().await.unwrap();
            let ended = recorder.position();
            history.borrow_mut().flushes.push((began, ended));
            return;
        }
    };
    let ended = recorder.position();
    for sector in first..first + len {
        history.borrow_mut().changes[sector as usize].push(Change {
            began,
            ended,
            value,
        });
    }
}

/// Runs requests at random, some at once, and gives what happened.
fn run(layout: Layout, backed: bool, seed: u64, requests: u64) -> (Vec<u8>, Recorder, History) {
    let before = layout.image();
    let recorder = Recorder::new(before.clone(), seed);
    let history = Rc::new(RefCell::new(History {
        backed,
        changes: (0..layout.size / 512).map(|_| Vec::new()).collect(),
        flushes: Vec::new(),
    }));
    let (outer, kept) = (recorder.clone(), Rc::clone(&history));
    on_main(move |graph| async move {
        let options = NodeOptions {
            discard: DiscardMode::Unmap,
            ..NodeOptions::default()
        };
        let file = graph
            .add_node(Some("f"), recorder.driver(), options)
            .unwrap();
        let backing = match backed {
            false => BackingRef::None,
            true => {
                let base = TestStorage::new(layout.size);
                for sector in 0..(layout.size / 512) as usize {
                    base.poke(sector as u64 * 512, &[below(true, sector); 512]);
                }
                graph
                    .add_node(Some("base"), base.driver(), options)
                    .unwrap();
                BackingRef::Node(BlockdevRef::Name("base".to_owned()))
            }
        };
        let node = open_on(&graph, "q", "f", backing).await.unwrap();
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let (node, recorder) = (Arc::clone(&node), recorder.clone());
                let history = Rc::clone(&history);
                spawn_local(async move {
                    let mut random = Random(seed * 1000 + task);
                    for request in 0..requests {
                        let value = (1 + (request * TASKS + task) % 255) as u8;
                        one_request(&node, &recorder, &history, &mut random, task, value).await;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        drop((node, file));
        graph.blockdev_del("q").await.unwrap();
    });
    let history = Rc::into_inner(kept)
        .expect("all tasks have ended")
        .into_inner();
    (before, outer, history)
}

/// Sectors hold what was there at the last flush that had ended, or later values.
/// `anything`: a sector written since may hold whatever was in its place.
fn check_content(image: &[u8], history: &History, at: usize, anything: bool, what: &str) {
    let flushed = history
        .flushes
        .iter()
        .filter(|(_, ended)| *ended <= at)
        .map(|(began, _)| *began)
        .max()
        .unwrap_or(0);
    let below = |sector| below(history.backed, sector);
    let sectors = Image::new(image).sectors_over(below);
    for (sector, changes) in history.changes.iter().enumerate() {
        let begun = changes.iter().filter(|change| change.began < at);
        // At the same number the order is not known.
        let durable = changes.iter().rev().find(|change| change.ended < flushed);
        let mut later = begun.filter(|change| change.ended >= flushed).peekable();
        if anything && later.peek().is_some() {
            continue;
        }
        let value = sectors[sector];
        let fits = value == durable.map_or(below(sector), |change| change.value)
            || later.any(|change| change.value == value);
        assert!(
            fits,
            "{what} at {at}: sector {sector} holds {value}, flushed {flushed}: {:?}",
            changes
                .iter()
                .map(|c| (c.value, c.began, c.ended))
                .collect::<Vec<_>>(),
        );
    }
}

fn check_tables(image: &[u8], at: usize, what: &str) {
    let report = Image::new(image).check();
    assert!(
        report.errors.is_empty(),
        "{what} at {at}: {:#?}",
        &report.errors[..report.errors.len().min(10)]
    );
}

fn stop_anywhere(layout: Layout, backed: bool, seed: u64, requests: u64) {
    let (before, recorder, history) = run(layout, backed, seed, requests);
    let events = recorder.events();

    let mut image = before.clone();
    for (at, event) in events.iter().enumerate() {
        event.apply(&mut image);
        // Each seed looks at other points.
        if at as u64 % STRIDE != seed % STRIDE {
            continue;
        }
        check_tables(&image, at + 1, "the process stopped");
        if at % 5 == 0 {
            check_content(&image, &history, at + 1, false, "the process stopped");
        }
    }
    assert_eq!(Image::new(&recorder.content()).check().leaks, 0, "closed");

    // A machine that stops loses any of what was not flushed.
    let mut random = Random(seed);
    for _ in 0..MACHINE_STOPS {
        let at = 1 + random.below(events.len() as u64) as usize;
        let durable = events[..at]
            .iter()
            .filter_map(|event| match event {
                Event::Flush { covers } => Some(*covers),
                _ => None,
            })
            .max()
            .unwrap_or(0);
        let mut image = before.clone();
        let odds = 1 + random.below(4);
        for (index, event) in events[..at].iter().enumerate() {
            let resize = matches!(event, Event::Resize(_));
            if index < durable || resize || random.below(4) < odds {
                event.apply(&mut image);
            }
        }
        check_tables(&image, at, "the machine stopped");
        check_content(&image, &history, at, true, "the machine stopped");
    }
}

/// So many seeds, or as many as the environment says.
fn seeds(first: u64, count: u64) -> std::ops::Range<u64> {
    let wanted = std::env::var("DIPTYCH_SEEDS").ok();
    let count = wanted.and_then(|n| n.parse().ok()).unwrap_or(count);
    first..first + count
}

#[test]
fn small_clusters_and_many_tables() {
    // More tables than are cached, and the reference count table has to grow.
    let layout = Layout {
        cluster_bits: 9,
        refcount_order: 6,
        size: 6 << 20,
    };
    for seed in seeds(1, 2) {
        stop_anywhere(layout, false, seed, 60);
    }
}

#[test]
fn clusters_larger_than_requests() {
    let layout = Layout {
        cluster_bits: 12,
        refcount_order: 4,
        size: 2 << 20,
    };
    for seed in seeds(1001, 2) {
        stop_anywhere(layout, false, seed, 80);
    }
}

#[test]
fn clusters_that_are_copied_from_a_backing_image() {
    let layout = Layout {
        cluster_bits: 12,
        refcount_order: 4,
        size: 2 << 20,
    };
    for seed in seeds(2001, 2) {
        stop_anywhere(layout, true, seed, 60);
    }
}
