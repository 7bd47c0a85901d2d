//! Files that cannot be written, for a while or for ever: nothing that was promised is lost.

use std::os::unix::fs::MetadataExt as _;
use std::pin::pin;
use std::sync::Arc;

use futures_util::future::FutureExt as _;

use super::super::BLOCK;
use super::super::core::{Core, KeepError};
use super::super::format::{FormatError, INTENT, SUPERBLOCKS, Superblock, Use};
use super::super::image::SideCar;
use super::super::intent::{Intent, Refused};
use super::super::store::{Disk, LoadError, Storage, Store};
use super::super::{KeptError, take_over};
use super::{OfTestNode, Random, Recorder, sized_node};
use crate::dirty_bitmap::DirtyBitmap;
use crate::node::Node;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

struct Rig {
    storage: Recorder,
    node: Arc<Node>,
    intent: Arc<Intent>,
    core: Core<Recorder, OfTestNode>,
}

fn disk() -> Disk {
    Disk {
        identity: "image".to_owned(),
        layer: "test".to_owned(),
        size: SIZE,
        resizing: false,
        usage: Use::Open,
    }
}

impl Rig {
    fn new() -> Self {
        let storage = Recorder::default();
        let store = Store::create(storage.clone(), &disk()).unwrap();
        let node = sized_node(SIZE);
        let intent = Arc::new(Intent::with_shift(20));
        let core = Core::new(
            store,
            OfTestNode(Arc::clone(&node)),
            Arc::clone(&intent),
            disk().identity,
            disk().layer,
        );
        intent.keeper_is_there(Arc::new(|| ()));
        intent.all_are_counted(intent.arm());
        Self {
            storage,
            node,
            intent,
            core,
        }
    }

    fn add(&self, name: &str) {
        let bits = Arc::new(DirtyBitmap::new(SIZE, 512).unwrap());
        self.node.add_loaded(name, 512, true, Some(&bits));
    }

    fn remove(&self, name: &str) {
        let bitmap = self.node.named_bitmap(name).unwrap();
        crate::bitmaps::BitmapChange::remove(&bitmap)
            .unwrap()
            .commit();
    }

    fn is_inconsistent(&self, name: &str) -> bool {
        self.node.named_bitmap(name).unwrap().is_inconsistent()
    }

    /// A write that is acknowledged.
    fn write(&mut self, offset: u64) {
        let writing = match self.intent.try_enter(offset, 512) {
            Ok(writing) => writing,
            Err(cold) => {
                self.intent.ask(&cold);
                self.core.serve_writers();
                self.intent.try_enter(offset, 512).expect("it was served")
            }
        };
        for bits in self.node.bitmaps() {
            bits.set(offset, 512);
        }
        drop(writing);
    }

    /// Has all regions cooled that can be.
    fn cool(&mut self) {
        // Those that are idle, then those that were hot.
        for _ in 0..2 {
            self.core.tick();
            self.core.tick();
            while self.core.cool() {}
        }
    }

    /// Fails if a crash at this moment loses one of `written`, of a bitmap.
    fn check(&self, names: &[&str], written: &[u64], seed: u64) {
        let mut random = Random::new(seed);
        let left = self
            .storage
            .after_power_cut(self.storage.log_len(), &mut random);
        let mut store = Store::open(left.unwrap()).unwrap();
        assert!(!store.is_broken());
        let hot = store.load_hot().unwrap().unwrap().ranges(SIZE);
        let loaded = store.load(true).unwrap();
        let loaded: Vec<_> = loaded
            .into_iter()
            .map(|bitmap| take_over(bitmap, &hot, SIZE))
            .collect();
        for name in names {
            let found = loaded.iter().find(|bitmap| bitmap.name == *name).unwrap();
            let bits = found.bits.as_ref().expect("it is consistent");
            for offset in written {
                assert!(bits.is_dirty(*offset), "{name} misses {offset:#x}");
            }
        }
    }
}

#[test]
fn one_that_is_added_while_all_are_given_up_is_not_taken_for_good() {
    let mut rig = Rig::new();
    rig.add("old");
    rig.core.commit().unwrap();
    // There is room, and writes are marked: it may be added.
    rig.core.reserve(&[100]).unwrap();
    assert!(rig.intent.is_complete());
    rig.storage.break_blocks(&[INTENT]);
    let cold = rig.intent.try_enter(0, 512).unwrap_err();
    rig.intent.ask(&cold);
    rig.core.serve_writers();
    assert!(rig.is_inconsistent("old") && !rig.intent.is_armed());
    rig.storage.break_blocks(&[]);
    rig.add("new");
    let error = rig.core.commit().unwrap_err();
    assert!(matches!(error, KeepError::GivenUp), "{error}");
    assert!(rig.is_inconsistent("new"));
    // Whoever asks again has writes marked again.
    rig.remove("new");
    rig.remove("old");
    rig.intent.all_are_counted(rig.intent.arm());
    rig.add("new");
    rig.core.commit().unwrap();
    rig.write(5 * MIB);
    rig.check(&["new"], &[5 * MIB], 1);
}

#[test]
fn an_old_promise_that_all_are_counted_says_nothing_of_a_new_one() {
    let intent = Intent::with_shift(20);
    let first = intent.arm();
    intent.disarm();
    let second = intent.arm();
    intent.all_are_counted(first);
    assert!(!intent.is_complete());
    intent.all_are_counted(second);
    intent.all_are_counted(first);
    assert!(intent.is_complete());
    // It is the same one, as long as it is armed.
    intent.all_are_counted(intent.arm());
    assert!(intent.is_complete());
}

#[test]
fn a_writer_whose_question_was_thrown_away_asks_again() {
    let intent = Intent::with_shift(20);
    intent.keeper_is_there(Arc::new(|| ()));
    let _ = intent.arm();
    let mut enter = pin!(intent.enter(3 * MIB, 512));
    assert!((&mut enter).now_or_never().is_none());
    intent.disarm();
    let _ = intent.arm();
    assert!(intent.take_asked().is_empty());
    assert!((&mut enter).now_or_never().is_none());
    assert_eq!(intent.take_asked(), [3]);
    intent.keeper_is_gone();
    let refused = (&mut enter).now_or_never().expect("nobody answers");
    assert_eq!(refused.unwrap_err(), Refused);
}

#[test]
fn the_last_generation_of_all_is_none() {
    let storage = Recorder::default();
    let store = Store::create(storage.clone(), &disk()).unwrap();
    drop(store);
    for generation in [u64::MAX, u64::MAX / 2 + 1, u64::MAX / 2] {
        for place in SUPERBLOCKS {
            let mut block = [0; BLOCK];
            storage.read(place, &mut block).unwrap();
            if let Some(Ok(found)) = Superblock::decode(&block) {
                let made = Superblock {
                    generation,
                    ..found
                };
                storage.write(place, &made.encode()).unwrap();
            }
        }
        let opened = Store::open(storage.clone());
        if generation > u64::MAX / 2 {
            let error = opened.unwrap_err();
            let expected = FormatError::Generation(generation);
            assert!(matches!(error, LoadError::Format(why) if why == expected));
        } else {
            // There is a next one.
            opened.unwrap().commit(&disk(), &[]).unwrap();
        }
    }
}

#[test]
fn room_is_there_whatever_is_a_hole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.bitmaps");
    let side_car = SideCar::create(&path).unwrap();
    let mut store = Store::create(side_car, &disk()).unwrap();
    store.storage.put_in_place(&path).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(1 << 30).unwrap();
    store.reserve([SIZE / 512].into_iter()).unwrap();
    // Two states of it, of 4 KiB for 32768 bits.
    let pages = (SIZE / 512).div_ceil(32768);
    let blocks = file.metadata().unwrap().blocks() * 512;
    assert!(blocks >= 2 * pages * BLOCK as u64, "{blocks}");
}

#[test]
fn a_full_disk_loses_nothing_of_two_bitmaps() {
    for seed in 0..5 {
        let mut random = Random::new(seed + 1);
        let mut rig = Rig::new();
        rig.add("one");
        rig.core.commit().unwrap();
        rig.core.reserve(&[SIZE / 512]).unwrap();
        rig.add("two");
        rig.core.commit().unwrap();
        let names = ["one", "two"];
        let mut written = Vec::new();
        for round in 0..8 {
            // It is full in the midst of it, and not for ever.
            rig.storage.set_full((2..6).contains(&round));
            for _ in 0..random.below(6) {
                let offset = random.below(SIZE / 512) * 512;
                rig.write(offset);
                written.push(offset);
            }
            rig.check(&names, &written, seed + round);
            rig.cool();
            rig.check(&names, &written, seed + round);
            if random.one_in(3) {
                // What a command does: it has its room from the beginning.
                rig.core.commit().unwrap();
            }
            if random.one_in(4) {
                rig.core.close().unwrap();
            }
        }
        assert!(!rig.is_inconsistent("one") && !rig.is_inconsistent("two"));
        rig.cool();
        assert!(!rig.intent.any_warm());
        rig.check(&names, &written, seed);
    }
}

#[test]
fn a_disk_that_is_full_without_any_room_goes_on_being_marked() {
    let mut rig = Rig::new();
    rig.add("one");
    rig.add("two");
    rig.core.commit().unwrap();
    // Nobody has made room: it is full from now on.
    rig.storage.set_full(true);
    let written: Vec<_> = (0..20).map(|i| i * MIB + i * 4096).collect();
    for offset in &written {
        rig.write(*offset);
    }
    rig.cool();
    assert!(rig.intent.any_warm(), "they could not be saved");
    rig.check(&["one", "two"], &written, 1);
    // The guest's own writes go on, and nothing was given up.
    rig.write(31 * MIB);
    assert!(!rig.is_inconsistent("one") && !rig.is_inconsistent("two"));
    let error = rig.core.reserve(&[SIZE / 512]).unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    // So the disk cannot grow, and whoever wants that is told why; nothing is given up.
    let why = rig.core.resize(Some(2048 * SIZE)).unwrap_err();
    let node = "disk".to_owned();
    let error = KeptError::Store { node, why };
    assert_eq!(error.errno(), libc::ENOSPC);
    let text = "Could not store bitmaps of node 'disk': there is no room for them in their file: \
                No space left on device";
    assert_eq!(error.to_string(), text);
    rig.storage.set_full(false);
    rig.cool();
    assert!(!rig.intent.any_warm());
    rig.check(&["one", "two"], &written, 2);
}
