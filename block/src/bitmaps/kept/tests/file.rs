//! Side-car files on a real file system, and hostile ones.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use super::super::BLOCK;
use super::super::format::{
    Directory, Entry, Extent, Hot, INTENT, SUPERBLOCKS, Superblock, Use, encode_intent,
};
use super::super::image::{Access, ImageFile, SideCar};
use super::super::intent::Intent;
use super::super::store::{BitmapState, Changed, Disk, LoadError, Storage as _, Store};
use super::super::take_over;
use super::{Random, Recorder};
use crate::dirty_bitmap::DirtyBitmap;

const SIZE: u64 = 64 << 20;

fn disk() -> Disk {
    Disk {
        identity: "image".to_owned(),
        layer: "raw".to_owned(),
        size: SIZE,
        resizing: false,
        usage: Use::Open,
    }
}

fn state(name: &str, granularity: u64, dirty: &[u64]) -> BitmapState {
    let bits = DirtyBitmap::new(SIZE, granularity).unwrap();
    for offset in dirty {
        bits.set(*offset, 512);
    }
    BitmapState {
        name: name.to_owned(),
        enabled: true,
        inconsistent: false,
        bits: Arc::new(bits),
        successor: None,
    }
}

#[test]
fn bits_and_names_come_back_from_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.bitmaps");
    let side_car = SideCar::create(&path).unwrap();
    let mut store = Store::create(side_car, &disk()).unwrap();
    store.storage.put_in_place(&path).unwrap();
    let bitmaps = [
        (state("coarse", 65536, &[0, SIZE - 512]), Changed::All),
        (state("fine", 512, &[5 << 20, 48 << 20]), Changed::All),
        (state("clean", 4096, &[]), Changed::All),
    ];
    store.commit(&disk(), &bitmaps).unwrap();
    // Nobody else gets it meanwhile.
    let error = SideCar::open(&path, Access::Read).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    drop(store);
    let side_car = SideCar::open(&path, Access::Read).unwrap().unwrap();
    let mut store = Store::open(side_car).unwrap();
    let loaded = store.load(true).unwrap();
    assert_eq!(loaded.len(), 3);
    for (loaded, (saved, _)) in loaded.iter().zip(&bitmaps) {
        assert_eq!(loaded.name, saved.name);
        let bits = loaded.bits.as_ref().unwrap();
        assert!(bits.words().eq(saved.bits.words()));
        assert_eq!(bits.count_bytes(), saved.bits.count_bytes());
    }
}

#[test]
fn a_file_that_got_its_name_meanwhile_is_not_emptied() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.bitmaps");
    // Opened by one who comes late.
    let late = SideCar::open_new(&path).unwrap();
    let side_car = SideCar::create(&path).unwrap();
    let mut store = Store::create(side_car, &disk()).unwrap();
    store.storage.put_in_place(&path).unwrap();
    drop(store);
    let before = std::fs::read(&path).unwrap();
    let error = late.claimed().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    assert!(std::fs::read(&path).unwrap() == before && !before.is_empty());
}

#[test]
fn a_file_that_was_taken_away_does_not_come_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.bitmaps");
    let elsewhere = directory.path().join("elsewhere");
    let make = || {
        let _ = std::fs::remove_file(&elsewhere);
        let side_car = SideCar::create(&path).unwrap();
        let mut store = Store::create(side_car, &disk()).unwrap();
        store.storage.put_in_place(&path).unwrap();
        store
    };
    let store = make();
    std::fs::hard_link(&path, &elsewhere).unwrap();
    store.storage.remove().unwrap();
    assert!(!path.exists());
    assert_eq!(std::fs::metadata(&elsewhere).unwrap().len(), 0);
    let store = make();
    std::fs::rename(&path, &elsewhere).unwrap();
    // Somebody else's file is there now.
    std::fs::write(&path, "theirs").unwrap();
    store.storage.remove().unwrap();
    assert_eq!(std::fs::metadata(&elsewhere).unwrap().len(), 0);
    assert_eq!(std::fs::read(&path).unwrap(), b"theirs");
}

#[test]
fn a_copy_of_a_file_is_another_one() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk");
    std::fs::write(&image, [0; 512]).unwrap();
    let image = ImageFile {
        file: Arc::new(File::open(&image).unwrap()),
        path: image,
        bitmap_file: None,
    };
    let image = image.watch().unwrap();
    let path = directory.path().join("disk.bitmaps");
    let copy = directory.path().join("copy");
    let side_car = SideCar::create(&path).unwrap();
    let mut store = Store::create(side_car, &disk()).unwrap();
    let new = image.with(&store.storage).unwrap();
    store.storage.put_in_place(&path).unwrap();
    drop(store);
    std::fs::copy(&path, &copy).unwrap();
    let open = |path| SideCar::open(path, Access::Read).unwrap().unwrap();
    assert_eq!(image.with(&open(&path)).unwrap(), new);
    assert_ne!(image.with(&open(&copy)).unwrap(), new);
}

#[test]
fn a_second_name_or_a_link_leads_to_no_other_file() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk");
    std::fs::write(&image, [0; 512]).unwrap();
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    let file = |path: &std::path::PathBuf| ImageFile {
        file: Arc::new(File::open(path).unwrap()),
        path: path.clone(),
        bitmap_file: None,
    };
    assert_eq!(
        file(&image).side_car().unwrap(),
        file(&link).side_car().unwrap()
    );
    // A copy is another image.
    let copy = directory.path().join("copy");
    std::fs::copy(&image, &copy).unwrap();
    let identity = |path| file(path).watch().unwrap().identity;
    assert_eq!(identity(&image), identity(&link));
    assert_ne!(identity(&image), identity(&copy));
    // A link in the place of the side-car file is not followed.
    let trap = directory.path().join("trap");
    std::os::unix::fs::symlink(&image, &trap).unwrap();
    SideCar::open(&trap, Access::Write).unwrap_err();
}

#[test]
fn no_file_content_hurts() {
    let storage = Recorder::default();
    let mut store = Store::create(storage.clone(), &disk()).unwrap();
    let bitmaps = [
        (state("coarse", 65536, &[0, SIZE - 512]), Changed::All),
        (state("fine", 512, &[5 << 20, 48 << 20]), Changed::All),
    ];
    store.commit(&disk(), &bitmaps).unwrap();
    store.write_hot(20, &[6], true).unwrap();
    let mut random = Random::new(1);
    let len = 40;
    for _ in 0..3000 {
        let copy = storage
            .after_power_cut(storage.log_len(), &mut random)
            .unwrap();
        for _ in 0..=random.below(3) {
            let block = random.below(len) as u32;
            let mut bytes = [0; BLOCK];
            super::Storage::read(&copy, block, &mut bytes).unwrap();
            for _ in 0..=random.below(8) {
                // The fields are at the beginning.
                let most = if random.one_in(2) { 96 } else { BLOCK as u64 };
                let at = random.below(most) as usize;
                bytes[at] = random.below(256) as u8;
            }
            super::Storage::write(&copy, block, &bytes).unwrap();
        }
        match Store::open(copy) {
            Ok(mut store) => {
                for loaded in store.load(true).unwrap() {
                    // Whatever was damaged counts as dirty.
                    let saved = bitmaps.iter().find(|(saved, _)| saved.name == loaded.name);
                    if let (Some(bits), Some((saved, _))) = (loaded.bits, saved) {
                        let mut pairs = bits.words().zip(saved.bits.words());
                        assert!(pairs.all(|(found, saved)| found & saved == saved));
                    }
                }
                if let Some(hot) = store.load_hot().unwrap() {
                    let ranges = hot.ranges(SIZE);
                    assert!(hot == Hot::All || ranges.contains(&((1 << 20)..(2 << 20))));
                }
            }
            Err(LoadError::Format(_)) => {}
            Err(LoadError::Read(error)) => panic!("{error}"),
        }
    }
}

#[test]
fn no_number_in_a_file_with_the_right_checksums_hurts() {
    let mut random = Random::new(7);
    for _ in 0..100 {
        let storage = Recorder::default();
        Store::create(storage.clone(), &disk()).unwrap();
        let mut number = |most: u32| match random.below(4) {
            0 => random.below(1 << 10),
            1 => 1 << random.below(most.into()),
            2 => (1u64 << random.below(most.into())).wrapping_sub(random.below(3)),
            _ => random.below(u64::MAX >> (64 - most)),
        };
        let entries: Vec<_> = (0..3)
            .map(|name| Entry {
                name: name.to_string(),
                granularity: 1 << (number(8) % 64),
                enabled: true,
                inconsistent: false,
                table: Extent {
                    block: number(32) as u32,
                    len: number(20) as u32,
                    crc: number(32) as u32,
                },
            })
            .collect();
        let directory = Directory {
            size: number(64),
            resizing: true,
            entries,
            ..Directory::default()
        };
        let mut bytes = directory.encode();
        let extent = Extent {
            block: 10,
            len: bytes.len() as u32,
            crc: crc32fast::hash(&bytes),
        };
        bytes.resize(BLOCK, 0);
        storage.write(10, &bytes).unwrap();
        let superblock = Superblock {
            generation: number(63).max(2),
            directory: extent,
            usage: Use::Open,
            broken: false,
        };
        storage.write(SUPERBLOCKS[0], &superblock.encode()).unwrap();
        let shift = number(6) as u32;
        let intent = encode_intent(1, shift, &[number(64), number(64)]);
        storage.write(INTENT, &intent).unwrap();
        let size = number(33) / 512 * 512;
        let Ok(mut store) = Store::open(storage) else {
            continue;
        };
        let hot = store.load_hot().unwrap().unwrap_or(Hot::All).ranges(size);
        assert!(hot.iter().all(|range| range.end <= size));
        let loaded = store.load(true).unwrap();
        let mut states = Vec::new();
        for loaded in loaded {
            let loaded = take_over(loaded, &hot, size);
            let Some(bits) = loaded.bits else { continue };
            assert_eq!(bits.size(), size);
            for range in &hot {
                assert!(range.is_empty() || bits.is_dirty(range.end - 1));
            }
            let name = loaded.name;
            let enabled = loaded.enabled;
            states.push((
                BitmapState {
                    name,
                    enabled,
                    inconsistent: false,
                    bits,
                    successor: None,
                },
                Changed::All,
            ));
        }
        let _ = store.commit(&Disk { size, ..disk() }, &states);
    }
}

#[test]
fn sizes_in_a_file_ask_for_no_memory() {
    for size in [u64::MAX, 1 << 62, 1 << 43] {
        let storage = Recorder::default();
        let huge = Disk { size, ..disk() };
        let mut store = Store::create(storage.clone(), &huge).unwrap();
        let names: Vec<_> = (0..200).map(|i| i.to_string()).collect();
        let bitmaps: Vec<_> = names
            .iter()
            .map(|name| (state(name, 512, &[]), Changed::All))
            .collect();
        store.commit(&huge, &bitmaps).unwrap();
        let mut store = Store::open(storage).unwrap();
        // Each would need 2 GiB or more.
        let loaded = store.load(true).unwrap();
        let bits = loaded.iter().filter_map(|bitmap| bitmap.bits.as_ref());
        assert_eq!(bits.count(), 0);
    }
}

#[test]
fn what_is_left_of_an_unfinished_file_is_no_side_car_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.bitmaps");
    let file = File::create(&path).unwrap();
    file.write_all_at(&[0; 5 * BLOCK], 0).unwrap();
    let side_car = SideCar::open(&path, Access::Read).unwrap().unwrap();
    let error = Store::open(side_car).unwrap_err();
    assert!(matches!(error, LoadError::Format(_)), "{error}");
}

#[test]
fn regions_cover_a_disk_of_any_size() {
    for size in [
        1,
        512,
        1 << 20,
        1 << 30,
        1 << 41,
        u64::MAX / 2,
        u64::MAX - 4096,
    ] {
        let intent = Intent::new(size);
        let last = intent.try_enter(size - 1, 1);
        // It is not armed.
        assert!(last.is_ok());
        drop(last);
        let _ = intent.arm();
        let cold = intent.try_enter(0, size).unwrap_err();
        let mut end = 0;
        for region in cold {
            let range = intent.range(region, size);
            assert_eq!(range.start, end);
            end = range.end;
        }
        assert_eq!(end, size);
        // As large as it may become.
        let beyond = intent.try_enter(u64::MAX - 1, 1).unwrap_err();
        let range = intent.range(beyond[0], u64::MAX);
        assert!(range.contains(&(u64::MAX - 2)));
    }
}
