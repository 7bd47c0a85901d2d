//! Writers, and everything that is done to bitmaps, on a disk whose power is cut at each
//! flush and write of the side-car file: no bit is ever lost.
//!
//! All is one thread's, in an order that a seed decides: what threads do to each other at the
//! intent is the model's business (`intent`). `POWER_CUT_ROUNDS` says how many seeds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::super::core::Core;
use super::super::format::Use;
use super::super::intent::{Intent, Writing};
use super::super::room::Room;
use super::super::store::{Disk, Store};
use super::super::take_over;
use super::{Lie, OfTestNode, Random, Recorder, Sized};
use crate::bitmaps::{BitmapChange, FrozenBitmap, NamedBitmap};
use crate::dirty_bitmap::DirtyBitmap;
use crate::node::{Node, NodeOptions};

/// Size of a region.
const SHIFT: u32 = 20;
const REGIONS: u64 = 12;
const SIZES: [u64; 3] = [
    REGIONS << SHIFT,
    (REGIONS - 5) << SHIFT,
    (REGIONS + 9) << SHIFT,
];

/// What a bitmap has to have after a crash: the first bytes of sectors that were written,
/// each of which some chunk has to cover.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Wanted {
    sectors: BTreeSet<u64>,
    /// Those written since it was frozen.
    since: BTreeSet<u64>,
}

/// What has to be found if the power is cut now, by the names of bitmaps; and the sizes that
/// the disk may have.
#[derive(Clone, Debug, Default)]
struct Expected {
    bitmaps: BTreeMap<String, Wanted>,
    /// Submitted, and not acknowledged: the disk may have them.
    in_flight: BTreeSet<u64>,
}

struct Write {
    offset: u64,
    len: u64,
    /// `None` until its regions are hot. The intent lives as long as the life.
    writing: Option<Writing<'static>>,
}

struct Life {
    random: Random,
    storage: Recorder,
    node: Arc<Node>,
    size: Arc<AtomicU64>,
    intent: &'static Intent,
    core: Core<Recorder, OfTestNode>,
    writes: Vec<Write>,
    frozen: Vec<FrozenBitmap>,
    cooling: bool,
    expected: Expected,
    /// What was expected from some length of the log on, with the size of the disk.
    history: Vec<(usize, Expected, u64)>,
    /// Of who prepares a bitmap: what keeps the file.
    room: Option<Room>,
    /// No more is done: nothing is kept any more, or it has failed.
    over: bool,
}

/// What a crash left, and what is expected of it.
struct Left {
    storage: Recorder,
    expected: Expected,
    size: u64,
}

/// What is found after a crash.
struct Found {
    store: Store<Recorder>,
    bitmaps: Vec<super::super::Loaded>,
}

fn load(storage: Recorder, size: u64) -> Found {
    let mut store = Store::open(storage).expect("there is a whole state at each moment");
    let directory_size = store.directory().size;
    assert!(
        directory_size == size || store.directory().resizing,
        "the file knows the disk's size: {directory_size}, not {size}"
    );
    assert!(!store.is_broken());
    let bitmaps = store.load(true).expect("memory can be read");
    let hot = store.load_hot().expect("memory can be read");
    let hot = hot.expect("the intent is not newer than the superblock");
    let hot = hot.ranges(size);
    let bitmaps = bitmaps
        .into_iter()
        .map(|bitmap| take_over(bitmap, &hot, size))
        .collect();
    Found { store, bitmaps }
}

impl Life {
    fn begin(seed: u64, left: Option<Left>, lie: Lie) -> Self {
        let random = Random::new(seed);
        let size = left.as_ref().map_or(SIZES[0], |left| left.size);
        let bytes = Arc::new(AtomicU64::new(size));
        let driver = Box::new(Sized(Arc::clone(&bytes)));
        let node = Node::new("disk", driver, NodeOptions::default());
        let intent = Arc::new(Intent::with_shift(SHIFT));
        // Tests may leak: guards of writes refer to it.
        let leaked: &'static Intent = Box::leak(Box::new(Arc::clone(&intent)));
        let (store, expected, recover) = match left {
            None => {
                let disk = Disk {
                    identity: "image".to_owned(),
                    layer: "test".to_owned(),
                    size,
                    resizing: false,
                    usage: Use::Open,
                };
                let storage = Recorder::lying(lie);
                let store = Store::create(storage, &disk).expect("nothing fails here");
                (store, Expected::default(), false)
            }
            Some(left) => {
                let found = load(left.storage, size);
                for bitmap in &found.bitmaps {
                    let (name, granularity) = (&bitmap.name, bitmap.granularity);
                    node.add_loaded(name, granularity, bitmap.enabled, bitmap.bits.as_ref());
                }
                let mut expected = left.expected;
                for wanted in expected.bitmaps.values_mut() {
                    wanted.since.clear();
                }
                expected.in_flight.clear();
                // One whose making was not acknowledged may be there.
                for bitmap in &found.bitmaps {
                    expected.bitmaps.entry(bitmap.name.clone()).or_default();
                }
                (found.store, expected, true)
            }
        };
        let storage = store.storage.clone();
        let mut core = Core::new(
            store,
            OfTestNode(Arc::clone(&node)),
            intent,
            "image".to_owned(),
            "test".to_owned(),
        );
        let mut expected = expected;
        let history = vec![(0, expected.clone(), size)];
        if recover {
            core.recover().expect("nothing fails here");
        }
        leaked.all_are_counted(leaked.arm());
        expected.in_flight.clear();
        Self {
            random,
            storage,
            node,
            size: bytes,
            intent: leaked,
            core,
            writes: Vec::new(),
            frozen: Vec::new(),
            cooling: false,
            expected,
            history,
            room: None,
            over: false,
        }
    }

    /// From now on the present expectation holds.
    fn note(&mut self) {
        let now = (
            self.storage.log_len(),
            self.expected.clone(),
            self.size.load(SeqCst),
        );
        self.history.push(now);
    }

    fn pick(&mut self) -> Option<Arc<NamedBitmap>> {
        let all = self.node.named_bitmaps();
        (!all.is_empty()).then(|| {
            let index = self.random.below(all.len() as u64) as usize;
            Arc::clone(&all[index])
        })
    }

    fn commit(&mut self) {
        self.core.commit().expect("nothing fails here");
        self.over |= self.core.has_ended();
    }

    fn step(&mut self) {
        match self.random.below(31) {
            0..=6 => self.submit(),
            7..=12 => self.acknowledge(),
            13..=16 => self.core.serve_writers(),
            17 => self.cooling |= self.core.tick(),
            18..=20 if self.cooling => self.cooling = self.core.cool(),
            21 => self.clear(),
            22 => self.merge(),
            23 => self.enable_or_disable(),
            24 => self.add(),
            25 if self.random.one_in(3) => self.remove(),
            26 => self.freeze(),
            27 => self.settle(),
            28 if self.random.one_in(3) => self.resize(),
            30 => self.make_or_leave_room(),
            29 if self.random.one_in(4) && self.writes.is_empty() => {
                self.core.close().expect("nothing fails here");
                self.over |= self.core.has_ended();
            }
            _ => {}
        }
        // Whatever looked at the bitmaps: a life may begin with a file that has none.
        self.over |= self.core.has_ended();
        // Writers that wait look again.
        let mut waiting = std::mem::take(&mut self.writes);
        for write in &mut waiting {
            self.try_begin(write);
        }
        self.writes = waiting;
        self.note();
    }

    fn try_begin(&mut self, write: &mut Write) {
        if write.writing.is_some() {
            return;
        }
        match self.intent.try_enter(write.offset, write.len) {
            Ok(writing) => {
                write.writing = Some(writing);
                self.expected.in_flight.insert(write.offset);
                self.expected
                    .in_flight
                    .insert(write.offset + write.len - 512);
            }
            Err(cold) => self.intent.ask(&cold),
        }
    }

    fn submit(&mut self) {
        if self.writes.len() >= 6 {
            return;
        }
        let sectors = self.size.load(SeqCst) / 512;
        let first = self.random.below(sectors);
        let longest = match self.random.one_in(4) {
            true => 8192,
            false => 16,
        };
        let count = (1 + self.random.below(longest)).min(sectors - first);
        self.writes.push(Write {
            offset: first * 512,
            len: count * 512,
            writing: None,
        });
    }

    fn acknowledge(&mut self) {
        let ready: Vec<usize> = (0..self.writes.len())
            .filter(|index| self.writes[*index].writing.is_some())
            .collect();
        if ready.is_empty() {
            return;
        }
        let which = ready[self.random.below(ready.len() as u64) as usize];
        let write = self.writes.swap_remove(which);
        // As `Node::write` does: the bitmaps, then the count.
        for bits in self.node.bitmaps() {
            bits.set(write.offset, write.len);
        }
        drop(write.writing);
        let sectors = [write.offset, write.offset + write.len - 512];
        for bitmap in self.node.named_bitmaps() {
            if bitmap.is_recording() {
                let wanted = self
                    .expected
                    .bitmaps
                    .entry(bitmap.name().to_owned())
                    .or_default();
                wanted.sectors.extend(sectors);
                wanted.since.extend(sectors);
            }
        }
        let left = self.writes.iter().filter(|write| write.writing.is_some());
        self.expected.in_flight = left
            .flat_map(|write| [write.offset, write.offset + write.len - 512])
            .collect();
    }

    fn clear(&mut self) {
        let Some(bitmap) = self.pick() else { return };
        if let Ok(change) = BitmapChange::clear(&bitmap) {
            if self.random.one_in(4) {
                drop(change);
            } else {
                change.commit();
                self.expected
                    .bitmaps
                    .insert(bitmap.name().to_owned(), Wanted::default());
                self.note();
            }
            self.commit();
        }
    }

    fn merge(&mut self) {
        let (Some(target), Some(source)) = (self.pick(), self.pick()) else {
            return;
        };
        let merged = BitmapChange::merge(&target, [Ok(Arc::clone(&source))]);
        if let Ok(change) = merged {
            change.commit();
            self.commit();
            let from = self.expected.bitmaps.get(source.name()).cloned();
            let into = self
                .expected
                .bitmaps
                .entry(target.name().to_owned())
                .or_default();
            into.sectors.extend(from.unwrap_or_default().sectors);
        }
    }

    fn enable_or_disable(&mut self) {
        let Some(bitmap) = self.pick() else { return };
        let change = match bitmap.is_recording() {
            true => BitmapChange::disable(&bitmap),
            false => BitmapChange::enable(&bitmap),
        };
        if let Ok(change) = change {
            if self.random.one_in(4) {
                drop(change);
            } else {
                change.commit();
            }
            self.commit();
        }
    }

    fn add(&mut self) {
        let all = self.node.named_bitmaps();
        if all.len() >= 4 {
            return;
        }
        let name = format!("b{}", self.random.below(6));
        if self.node.named_bitmap(&name).is_some() {
            return;
        }
        let granularity = [512, 4096, 65536, 4 << 20][self.random.below(4) as usize];
        let bits = DirtyBitmap::new(self.size.load(SeqCst), granularity).expect("it is small");
        let enabled = !self.random.one_in(5);
        self.node
            .add_loaded(&name, granularity, enabled, Some(&Arc::new(bits)));
        self.commit();
        self.expected.bitmaps.insert(name, Wanted::default());
    }

    fn make_or_leave_room(&mut self) {
        if self.room.take().is_none() {
            self.core.reserve(&[1]).expect("nothing fails here");
            self.room = self.core.rooms().give(vec![1]);
            return;
        }
        // As the last one's drop asks for.
        self.core.tidy().expect("nothing fails here");
        self.over |= self.core.has_ended();
        assert_eq!(self.over, self.node.named_bitmaps().is_empty());
    }

    fn remove(&mut self) {
        let Some(bitmap) = self.pick() else { return };
        if self.node.named_bitmaps().len() == 1 && !self.random.one_in(4) {
            return;
        }
        if let Ok(change) = BitmapChange::remove(&bitmap) {
            change.commit();
            self.expected.bitmaps.remove(bitmap.name());
            self.note();
            self.commit();
        }
    }

    fn freeze(&mut self) {
        let Some(bitmap) = self.pick() else { return };
        if let Ok(frozen) = bitmap.freeze() {
            if let Some(wanted) = self.expected.bitmaps.get_mut(bitmap.name()) {
                wanted.since.clear();
            }
            self.frozen.push(frozen);
        }
    }

    fn settle(&mut self) {
        if self.frozen.is_empty() {
            return;
        }
        let which = self.random.below(self.frozen.len() as u64) as usize;
        let frozen = self.frozen.swap_remove(which);
        let name = frozen.bitmap().name().to_owned();
        if self.random.one_in(2) {
            frozen.reclaim();
            return;
        }
        frozen.abdicate();
        if let Some(wanted) = self.expected.bitmaps.get_mut(&name) {
            wanted.sectors = std::mem::take(&mut wanted.since);
        }
        self.note();
        if self.random.one_in(2) {
            self.commit();
        }
    }

    fn resize(&mut self) {
        if !self.writes.is_empty() || !self.frozen.is_empty() {
            return;
        }
        let size = SIZES[self.random.below(3) as usize];
        self.core.resize(Some(size)).expect("nothing fails here");
        if self.random.one_in(3) {
            // It fails.
            self.core.resize(None).expect("nothing fails here");
            return;
        }
        for wanted in self.expected.bitmaps.values_mut() {
            wanted.sectors.retain(|sector| *sector < size);
            wanted.since.retain(|sector| *sector < size);
        }
        self.size.store(size, SeqCst);
        self.note();
        self.node.fit_bitmaps();
        self.core.resize(None).expect("nothing fails here");
    }

    /// What is left after a power cut behind the first `count` steps of the file; `None` if
    /// it is rightly gone, or was not made yet.
    fn cut(&mut self, count: usize) -> Option<Left> {
        let latest = self
            .history
            .iter()
            .rev()
            .find(|(from, ..)| *from <= count)?;
        let (_, expected, size) = latest.clone();
        match self.storage.after_power_cut(count, &mut self.random) {
            Some(storage) => Some(Left {
                storage,
                expected,
                size,
            }),
            None => {
                assert!(
                    expected.bitmaps.is_empty(),
                    "the file has gone with bitmaps in it"
                );
                None
            }
        }
    }
}

/// Fails if what is found after a crash misses something.
fn check(left: &Left) {
    let found = load(left.storage.clone(), left.size);
    for (name, wanted) in &left.expected.bitmaps {
        let bitmap = found.bitmaps.iter().find(|bitmap| bitmap.name == *name);
        let bitmap = bitmap.unwrap_or_else(|| panic!("bitmap {name} has gone"));
        let bits = bitmap.bits.as_ref();
        let bits = bits.unwrap_or_else(|| panic!("bitmap {name} is inconsistent"));
        for sector in &wanted.sectors {
            assert!(bits.is_dirty(*sector), "bitmap {name} misses {sector:#x}");
        }
        for sector in left.expected.in_flight.iter().filter(|_| bitmap.enabled) {
            assert!(
                bits.is_dirty(*sector),
                "bitmap {name} misses {sector:#x}, which was on its way"
            );
        }
    }
}

/// One disk's story: lives that end in a power cut each, which is also tried at every
/// step before.
fn round(seed: u64, lie: Lie) {
    let mut left = None;
    for life in 0..3 {
        let created = left.is_none();
        let mut this = Life::begin(seed * 8 + life, left.take(), lie);
        let first = match created {
            // Before that it has not got its name.
            true => this.storage.log_len(),
            false => 0,
        };
        if created {
            this.add();
            this.note();
        }
        for _ in 0..60 {
            if this.over {
                break;
            }
            this.step();
        }
        let end = this.storage.log_len();
        for count in first..=end {
            if let Some(left) = this.cut(count) {
                check(&left);
            }
        }
        left = this.cut(end);
        for frozen in this.frozen.drain(..) {
            frozen.reclaim();
        }
        if left.is_none() {
            return;
        }
    }
}

fn rounds(default: u64) -> u64 {
    let rounds = std::env::var("POWER_CUT_ROUNDS").ok();
    rounds
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(default)
}

#[test]
fn no_power_cut_loses_a_bit() {
    for seed in 1..=rounds(25) {
        let failed = std::panic::catch_unwind(|| round(seed, Lie::None));
        assert!(failed.is_ok(), "seed {seed}");
    }
}

/// The checker would notice.
fn is_noticed(lie: Lie) -> bool {
    (1..=40).any(|seed| std::panic::catch_unwind(|| round(seed, lie)).is_err())
}

#[test]
fn an_intent_that_is_not_flushed_before_the_write_is_noticed() {
    assert!(is_noticed(Lie::IntentIsNotFlushed));
}

#[test]
fn pages_that_are_not_flushed_before_what_leads_to_them_are_noticed() {
    assert!(is_noticed(Lie::PagesAreNotFlushed));
}

#[test]
fn a_clear_is_whole_or_not_at_all() {
    for seed in 1..20 {
        let mut life = Life::begin(seed, None, Lie::None);
        life.add();
        let bitmap = life.pick().expect("it has been added");
        // In many pages, if there are many; no region is hot.
        let size = life.size.load(SeqCst);
        let dirty: Vec<u64> = (0..64).map(|i| i * (size / 64)).collect();
        for offset in &dirty {
            bitmap.bits().set(*offset, 512);
        }
        let all = bitmap.bits().count_bytes();
        life.core.recover().expect("nothing fails here");
        let before = life.storage.log_len();
        BitmapChange::clear(&bitmap).expect("it is free").commit();
        life.commit();
        for count in before..=life.storage.log_len() {
            let mut random = Random::new(seed + count as u64);
            let left = life.storage.after_power_cut(count, &mut random);
            let found = load(left.expect("it is there"), size);
            let bits = found.bitmaps[0].bits.as_ref().expect("it is consistent");
            let count = bits.count_bytes();
            assert!(count == 0 || count == all, "{count} of {all} bytes");
        }
    }
}

#[test]
fn a_file_that_cannot_be_written_is_given_up_before_the_guest_goes_on() {
    for good in 0..40 {
        let mut life = Life::begin(good + 1, None, Lie::None);
        life.add();
        life.storage.fail_after(good);
        for offset in (0..REGIONS).map(|region| region << SHIFT) {
            let mut write = Write {
                offset,
                len: 512,
                writing: None,
            };
            life.try_begin(&mut write);
            life.core.serve_writers();
            let begun = life.intent.try_enter(offset, 512);
            if begun.is_ok() && life.node.named_bitmaps()[0].is_inconsistent() {
                panic!("neither marked nor removed, and written all the same");
            }
        }
        // It is marked where it was written, and refused after that.
        let left = life.cut(life.storage.log_len()).expect("it is there");
        check(&left);
    }
}

#[test]
fn a_change_that_may_be_undone_is_not_stored() {
    let mut life = Life::begin(1, None, Lie::None);
    life.add();
    let bitmap = life.pick().expect("it has been added");
    assert!(life.node.kept_bitmaps().is_some());
    let change = BitmapChange::clear(&bitmap).expect("it is free");
    assert!(life.node.kept_bitmaps().is_none());
    let second = BitmapChange::disable(&bitmap).expect("it is free");
    change.commit();
    assert!(life.node.kept_bitmaps().is_none());
    drop(second);
    assert!(life.node.kept_bitmaps().is_some());
}
