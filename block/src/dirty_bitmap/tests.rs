#[cfg(not(shuttle))]
use std::collections::BTreeSet;
#[cfg(not(shuttle))]
use std::ops::Range;
use std::sync::Arc;

use super::*;

/// Two levels from 65 chunks on, three from 4097.
fn bitmap(size: u64, granularity: u64) -> DirtyBitmap {
    DirtyBitmap::with_top_words(size, granularity, 1).expect("a sensible size")
}

/// The model: a set of chunks.
#[cfg(not(shuttle))]
struct Model {
    size: u64,
    granularity: u64,
    dirty: BTreeSet<u64>,
}

#[cfg(not(shuttle))]
impl Model {
    fn chunks(&self) -> u64 {
        self.size.div_ceil(self.granularity)
    }

    fn set(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        if offset < end {
            let last = (end - 1) / self.granularity;
            self.dirty.extend(offset / self.granularity..=last);
        }
    }

    /// Chunks that lie wholly inside, the last one being as short as the disk.
    fn clear(&mut self, offset: u64, len: u64) -> Vec<Range<u64>> {
        let end = offset.saturating_add(len);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let inside = |range: &Range<u64>| range.start >= offset && range.end <= end;
        let gone: Vec<u64> = self
            .dirty
            .iter()
            .copied()
            .filter(|chunk| inside(&self.range(*chunk)))
            .collect();
        for chunk in gone {
            self.dirty.remove(&chunk);
            let range = self.range(chunk);
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    fn range(&self, chunk: u64) -> Range<u64> {
        chunk * self.granularity..((chunk + 1) * self.granularity).min(self.size)
    }

    fn next_dirty(&self, from: u64) -> Option<Range<u64>> {
        let first = *self
            .dirty
            .range(from / self.granularity..)
            .next()
            .filter(|_| from < self.size)?;
        let mut end = first;
        while self.dirty.contains(&end) {
            end += 1;
        }
        Some(self.range(first).start..self.range(end - 1).end)
    }

    fn next_clean(&self, range: &Range<u64>) -> Option<u64> {
        let end = range.end.div_ceil(self.granularity).min(self.chunks());
        (range.start / self.granularity..end)
            .find(|chunk| !self.dirty.contains(chunk))
            .map(|chunk| chunk * self.granularity)
    }
}

#[cfg(not(shuttle))]
mod against_the_model {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Set(u64, u64),
        Clear(u64, u64),
        Take(u64, u64),
        SetAll,
        ClearAll,
    }

    fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
        // Borders of words (64 chunks of 512) and of level 2 are likely.
        let at = prop_oneof![
            0..=size + 1024,
            (0..=size / 32768).prop_map(|word| word * 32768),
            (0..=size / 32768).prop_map(|word| (word * 32768).saturating_sub(1)),
            Just(size),
        ];
        let len = prop_oneof![
            Just(0u64),
            Just(1),
            1..=2048u64,
            0..=size,
            Just(32768),
            Just(u64::MAX)
        ];
        let step = (0..20u8, at, len).prop_map(|(kind, at, len)| match kind {
            0..=8 => Step::Set(at, len),
            9..=13 => Step::Clear(at, len),
            14..=17 => Step::Take(at, len),
            18 => Step::SetAll,
            _ => Step::ClearAll,
        });
        prop::collection::vec(step, 1..24)
    }

    fn check(bitmap: &DirtyBitmap, model: &Model, from: &[u64]) {
        assert_eq!(bitmap.count_chunks(), model.dirty.len() as u64);
        assert_eq!(bitmap.is_clean(), model.dirty.is_empty());
        for from in from.iter().copied() {
            assert_eq!(bitmap.next_dirty(from), model.next_dirty(from), "{from}");
            if from < model.size {
                for end in [from, from + 1, from + 1500, u64::MAX] {
                    let range = from..end;
                    assert_eq!(
                        bitmap.next_clean(&range),
                        model.next_clean(&range),
                        "{range:?}"
                    );
                }
                let dirty = model.dirty.contains(&(from / model.granularity));
                assert_eq!(bitmap.is_dirty(from), dirty);
            }
            if let Some(area) = bitmap.next_dirty_area(from, 1500) {
                let all = model.next_dirty(from).expect("the same");
                let most = 1500u64.div_ceil(model.granularity) * model.granularity;
                assert_eq!(area, all.start..all.end.min(all.start + most));
            }
        }
        let mut found = BTreeSet::new();
        let mut at = 0;
        while let Some(range) = bitmap.next_dirty(at) {
            at = range.end;
            found.extend(range.start / model.granularity..range.end.div_ceil(model.granularity));
        }
        assert_eq!(found, model.dirty);
    }

    fn run(size: u64, granularity: u64, steps: Vec<Step>, from: Vec<u64>) {
        let bitmap = bitmap(size, granularity);
        let mut model = Model {
            size,
            granularity,
            dirty: BTreeSet::new(),
        };
        for step in steps {
            match step {
                Step::Set(at, len) => {
                    bitmap.set(at, len);
                    model.set(at, len);
                }
                Step::Clear(at, len) => {
                    let bytes = bitmap.clear(at, len);
                    let ranges = model.clear(at, len);
                    assert_eq!(bytes, ranges.iter().map(|r| r.end - r.start).sum::<u64>());
                }
                Step::Take(at, len) => assert_eq!(bitmap.take(at, len), model.clear(at, len)),
                Step::SetAll => {
                    bitmap.set_all();
                    model.set(0, u64::MAX);
                }
                Step::ClearAll => {
                    bitmap.clear_all();
                    model.dirty.clear();
                }
            }
            check(&bitmap, &model, &from);
        }
    }

    proptest! {
        #[test]
        fn small_disks((size, steps) in (0u64..70_000).prop_flat_map(|s| (Just(s), steps(s))),
                       shift in 9u32..13, from in prop::collection::vec(0u64..71_000, 4)) {
            run(size, 1 << shift, steps, from);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn disks_of_several_levels(size in 2_097_153u64..2_300_000,
                                   steps in steps(2_200_000),
                                   from in prop::collection::vec(0u64..2_310_000, 3)) {
            run(size, 512, steps, from);
        }
    }
}

#[test]
fn granularities_and_sizes_that_make_no_sense_are_refused() {
    for bad in [0, 1, 256, 513, 65535, 1 << 32, u64::MAX] {
        let error = DirtyBitmap::new(1 << 20, bad).unwrap_err();
        assert_eq!(error, BitmapError::Granularity(bad));
        assert_eq!(
            error.to_string(),
            "Granularity must be power of 2 and at least 512"
        );
    }
    let error = DirtyBitmap::new(u64::MAX, 512).unwrap_err();
    let BitmapError::TooLarge { remedy, .. } = error else {
        panic!("{error}");
    };
    assert!(remedy.is_power_of_two() && remedy <= DirtyBitmap::MAX_GRANULARITY * 4);
    assert!(
        error.to_string().contains("choose a granularity"),
        "{error}"
    );
}

#[cfg(not(shuttle))]
#[test]
fn a_huge_clean_disk_is_scanned_through_few_words() {
    let bitmap = DirtyBitmap::new(2 << 40, 65536).unwrap();
    let words: usize = bitmap.levels.iter().map(|level| level.len()).sum();
    // One bit per chunk, and the levels above less than 1/32 of that.
    assert_eq!(bitmap.levels[0].len() * 8, 4 << 20);
    assert!(words * 8 < (4 << 20) / 32 * 33);
    assert!(bitmap.levels.last().unwrap().len() <= TOP_WORDS);
    assert!(bitmap.is_clean());
    bitmap.set((2 << 40) - 1, 1);
    assert_eq!(bitmap.next_dirty(0), Some((2 << 40) - 65536..2 << 40));
    bitmap.clear((2 << 40) - 65536, 65536);
    // Pruned all the way up.
    let set = bitmap.levels.iter().flatten().any(|w| w.load(SeqCst) != 0);
    assert!(!set);
}

#[cfg(not(shuttle))]
#[test]
fn the_largest_disk_has_no_overflow_at_its_end() {
    let size = u64::MAX;
    let bitmap = bitmap(size >> 8, 1 << 31);
    bitmap.set(u64::MAX - 10, u64::MAX);
    assert!(bitmap.is_clean());
    bitmap.set((size >> 8) - 1, u64::MAX);
    let last = bitmap.next_dirty(0).unwrap();
    assert_eq!(last.end, size >> 8);
    assert_eq!(bitmap.count_chunks(), 1);
}

/// Setters and a clearer at once: whatever is set after the last clear of a
/// chunk began must be found in the end, and the count must be right.
#[cfg(not(shuttle))]
#[test]
fn nothing_set_is_lost_under_concurrent_clearing() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    const CHUNKS: u64 = 64 * 64 * 20;
    let bitmap = Arc::new(bitmap(CHUNKS * 512, 512));
    // What the "disk" holds, and what the copier has copied of it.
    let disk: Arc<Vec<AtomicU64>> = Arc::new((0..CHUNKS).map(|_| AtomicU64::new(0)).collect());
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3u64)
        .map(|writer| {
            let (bitmap, disk) = (Arc::clone(&bitmap), Arc::clone(&disk));
            std::thread::spawn(move || {
                let mut random = writer * 7919 + 1;
                for _ in 0..60_000 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let chunk = random % CHUNKS;
                    disk[chunk as usize].fetch_add(1, Ordering::SeqCst);
                    bitmap.set(chunk * 512, 512);
                    // What has just been set is in sight, or has been taken.
                    if bitmap.is_dirty(chunk * 512) {
                        let _ = bitmap.next_dirty(chunk * 512);
                    }
                }
            })
        })
        .collect();
    let copier = std::thread::spawn({
        let (bitmap, disk, stop) = (Arc::clone(&bitmap), Arc::clone(&disk), Arc::clone(&stop));
        move || {
            let mut copy = vec![0; CHUNKS as usize];
            loop {
                let last_round = stop.load(Ordering::SeqCst);
                let mut at = 0;
                while let Some(area) = bitmap.next_dirty_area(at, 64 * 512) {
                    at = area.end;
                    for range in bitmap.take(area.start, area.end - area.start) {
                        for chunk in range.start / 512..range.end / 512 {
                            copy[chunk as usize] = disk[chunk as usize].load(Ordering::SeqCst);
                        }
                    }
                }
                if last_round {
                    return copy;
                }
            }
        }
    });
    for writer in writers {
        writer.join().unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    let copy = copier.join().unwrap();
    assert!(bitmap.is_clean());
    assert_eq!(bitmap.count_bytes(), 0);
    let disk: Vec<u64> = disk.iter().map(|c| c.load(Ordering::SeqCst)).collect();
    assert_eq!(copy, disk);
}

#[cfg(shuttle)]
mod shuttle_tests {
    use shuttle::sync::atomic::{AtomicBool, Ordering};
    use shuttle::thread;

    use super::*;

    /// Three levels.
    const CHUNKS: u64 = WORD * (WORD + 1);
    const END: u64 = CHUNKS * 512;
    /// In the last word: a scan from 0 gets there by both summaries only.
    const AT: u64 = WORD * WORD * 512;

    #[test]
    fn shuttle_a_chunk_whose_set_has_returned_is_found_while_others_prune() {
        shuttle::check_random(
            || {
                let bitmap = Arc::new(bitmap(END, 512));
                assert_eq!(bitmap.levels.len(), 3);
                bitmap.set(AT, 512);
                let clearer = thread::spawn({
                    let bitmap = Arc::clone(&bitmap);
                    move || bitmap.clear(AT, 512)
                });
                let setter = thread::spawn({
                    let bitmap = Arc::clone(&bitmap);
                    move || {
                        // In the word that is being pruned.
                        bitmap.set(AT + 512, 512);
                        let found = bitmap.next_dirty(0).expect("it is dirty");
                        assert!(found.end == AT + 1024, "{found:?}");
                        assert!(!bitmap.is_clean());
                    }
                });
                clearer.join().unwrap();
                setter.join().unwrap();
                assert_eq!(bitmap.next_dirty(0), Some(AT + 512..AT + 1024));
                assert_eq!(bitmap.count_bytes(), 512);
            },
            5_000,
        );
    }

    #[test]
    fn shuttle_a_set_that_overtakes_another_of_the_same_word_is_found() {
        shuttle::check_random(
            || {
                let bitmap = Arc::new(bitmap(END, 512));
                let first = thread::spawn({
                    let bitmap = Arc::clone(&bitmap);
                    move || bitmap.set(AT, 512)
                });
                bitmap.set(AT + 512, 512);
                assert!(!bitmap.is_clean());
                first.join().unwrap();
                assert_eq!(bitmap.next_dirty(0), Some(AT..AT + 1024));
            },
            5_000,
        );
    }

    #[test]
    fn shuttle_a_cleared_and_set_chunk_is_copied_as_last_written() {
        shuttle::check_random(
            || {
                let bitmap = Arc::new(bitmap(END, 512));
                let data = Arc::new(AtomicBool::new(false));
                bitmap.set(AT, 512);
                let writer = thread::spawn({
                    let (bitmap, data) = (Arc::clone(&bitmap), Arc::clone(&data));
                    move || {
                        data.store(true, Ordering::SeqCst);
                        bitmap.set(AT, 512);
                    }
                });
                // Clears before it reads.
                let taken = bitmap.clear(AT, 512);
                assert_eq!(taken, 512);
                let copied = data.load(Ordering::SeqCst);
                writer.join().unwrap();
                assert!(copied || bitmap.is_dirty(AT), "a write was lost");
            },
            5_000,
        );
    }

    #[test]
    fn shuttle_two_setters_and_two_clearers_leave_count_and_summaries_right() {
        shuttle::check_random(
            || {
                let bitmap = Arc::new(bitmap(END, 512));
                let threads: Vec<_> = (0..4u64)
                    .map(|i| {
                        let bitmap = Arc::clone(&bitmap);
                        thread::spawn(move || match i {
                            0 => bitmap.set(AT, 1024),
                            1 => bitmap.set(AT + 512, 1024),
                            2 => drop(bitmap.take(AT, 1024)),
                            _ => drop(bitmap.clear(0, END)),
                        })
                    })
                    .collect();
                for thread in threads {
                    thread.join().unwrap();
                }
                let mut dirty = 0;
                let mut at = 0;
                while let Some(range) = bitmap.next_dirty(at) {
                    dirty += range.end - range.start;
                    at = range.end;
                }
                let leaves: u32 = bitmap.levels[0]
                    .iter()
                    .map(|word| word.load(SeqCst).count_ones())
                    .sum();
                assert_eq!(dirty, u64::from(leaves) * 512);
                assert_eq!(bitmap.count_bytes(), dirty);
            },
            5_000,
        );
    }
}
