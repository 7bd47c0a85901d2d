//! Runs of data that were found in a file.
//!
//! Finding where data ends takes some file systems (tmpfs) as long as the data is
//! long, and a copier asks at each step: copying a full image then takes time by
//! the square of its size. And asking takes a helper thread, which is woken for it. So
//! one look finds several runs, and they are remembered.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::pin;

use futures_util::future::{Either, select};

use crate::sync::{Mutex, lock};
use crate::wait::Waiters;

/// Looks that are remembered: copiers go on at several places, jump over long holes, and some
/// look at the whole disk first. With as many runs in each they take 64 KiB.
const MAX_LOOKS: usize = 64;
/// Holes made during a look that are told apart.
const MAX_FORGOTTEN: usize = 64;

/// Runs that are data as far as is known, and what lies between them. Any thread.
///
/// To take a hole for data is never wrong, only slower. Holes are not remembered:
/// others may be writing into them, other processes too.
#[derive(Default)]
pub(super) struct DataRuns {
    /// A leaf lock, held for a walk of the looks.
    known: Mutex<Known>,
    /// Who waits for what a look of another finds.
    waiting: Waiters,
}

/// What one look at a file has found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// Runs of data in the span, in order.
    pub(super) runs: Vec<Range<u64>>,
    /// What was looked at.
    pub(super) span: Range<u64>,
    /// Where the holes in it end was found at once.
    pub(super) quick: bool,
}

#[derive(Default)]
struct Known {
    /// The last to end first, which counts where several tell of the same place.
    looks: VecDeque<Look>,
    /// Looks that have not ended: as many as there are requests at most.
    under_way: Vec<UnderWay>,
    next: u64,
}

struct UnderWay {
    number: u64,
    /// What it will tell of, most likely; nothing if nobody is to wait for it.
    reach: Range<u64>,
    /// What was told to have become a hole since it began is in these.
    forgotten: Vec<Range<u64>>,
}

impl DataRuns {
    /// Bytes of data from `offset` on; 0 if that is not known.
    pub(super) fn data_at(&self, offset: u64) -> u64 {
        let known = lock(&self.known);
        let run = known.look_with(offset).and_then(|look| look.run_at(offset));
        run.map_or(0, |run| run.end - offset)
    }

    /// Whether the end of a hole at `offset` is likely to be found at once.
    pub(super) fn is_quick_at(&self, offset: u64) -> bool {
        let known = lock(&self.known);
        known.look_with(offset).is_some_and(|look| look.quick)
    }

    /// To be taken before the file is asked what there is in `reach`, by somebody who wants
    /// to know of its start. `None`: that has been looked at.
    ///
    /// Waits for looks of others that began before and may tell, until `patience` ends:
    /// copiers ask for many places that are close together at once. Cancel: nothing happens.
    pub(super) async fn look_at(
        &self,
        reach: Range<u64>,
        patience: impl Future<Output = ()>,
    ) -> Option<Looking<'_>> {
        let mut until = None;
        let looks = || {
            let mut known = lock(&self.known);
            if known.look_with(reach.start).is_some() {
                return Some(None);
            }
            // Most that begin later do so because the ones before did not tell.
            let until = *until.get_or_insert(known.next);
            let mut others = known.under_way.iter();
            let told =
                others.any(|other| other.number <= until && other.reach.contains(&reach.start));
            (!told).then(|| Some(known.begin(reach.clone())))
        };
        let number = match select(pin!(self.waiting.until(looks)), pin!(patience)).await {
            Either::Left((number, _)) => number?,
            Either::Right(((), _)) => lock(&self.known).begin(reach.clone()),
        };
        Some(Looking { runs: self, number })
    }

    /// The same for what has been looked at, but may have changed. Nobody waits for it.
    pub(super) fn look_again(&self) -> Looking<'_> {
        let number = lock(&self.known).begin(0..0);
        Looking { runs: self, number }
    }

    #[cfg(all(test, shuttle))]
    fn under_way(&self) -> usize {
        lock(&self.known).under_way.len()
    }

    /// How many looks there were.
    #[cfg(all(test, not(shuttle)))]
    pub(super) fn looks(&self) -> u64 {
        lock(&self.known).next
    }

    /// `range` has become a hole, or may have.
    pub(super) fn forget(&self, range: Range<u64>) {
        let touched = |run: &Range<u64>| range.start < run.end && run.start < range.end;
        let mut known = lock(&self.known);
        for look in known.looks.iter_mut().filter(|look| touched(&look.span)) {
            look.runs.retain(|run| !touched(run));
        }
        for UnderWay { forgotten, .. } in &mut known.under_way {
            let merged = match forgotten.len() == MAX_FORGOTTEN {
                true => forgotten.pop(),
                false => None,
            };
            forgotten.push(merged.map_or_else(
                || range.clone(),
                |last| last.start.min(range.start)..last.end.max(range.end),
            ));
        }
    }
}

impl Look {
    fn run_at(&self, offset: u64) -> Option<&Range<u64>> {
        let next = self.runs.partition_point(|run| run.end <= offset);
        self.runs.get(next).filter(|run| run.start <= offset)
    }
}

impl Known {
    fn look_with(&self, offset: u64) -> Option<&Look> {
        self.looks.iter().find(|look| look.span.contains(&offset))
    }

    fn begin(&mut self, reach: Range<u64>) -> u64 {
        self.next += 1;
        self.under_way.push(UnderWay {
            number: self.next,
            reach,
            forgotten: Vec::new(),
        });
        self.next
    }

    fn end(&mut self, number: u64) -> Option<UnderWay> {
        let at = self.under_way.iter().position(|it| it.number == number)?;
        Some(self.under_way.swap_remove(at))
    }
}

/// A look at a file that is under way; once this is gone, others look for themselves.
pub(super) struct Looking<'a> {
    runs: &'a DataRuns,
    number: u64,
}

impl Looking<'_> {
    /// Remembers what the file said, but for what has changed since, and forgets the oldest
    /// of many looks.
    pub(super) fn has_found(self, mut look: Look) {
        let mut known = lock(&self.runs.known);
        if let Some(UnderWay { forgotten, .. }) = known.end(self.number) {
            look.runs.retain(|run| {
                let mut forgotten = forgotten.iter();
                forgotten.all(|range| range.start >= run.end || run.start >= range.end)
            });
            let span = &look.span;
            known
                .looks
                .retain(|old| old.span.start < span.start || old.span.end > span.end);
            known.looks.truncate(MAX_LOOKS - 1);
            known.looks.push_front(look);
        }
    }
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        lock(&self.runs.known).end(self.number);
        self.runs.waiting.wake();
    }
}

#[cfg(all(test, not(shuttle)))]
#[expect(clippy::single_range_in_vec_init, reason = "one run is many enough")]
mod tests {
    use std::future::{pending, ready};

    use futures_util::{FutureExt, poll};

    use super::*;
    use crate::runtime::EventLoop;

    fn look<const N: usize>(runs: [Range<u64>; N]) -> Look {
        Look {
            runs: runs.to_vec(),
            span: 0..1000,
            quick: true,
        }
    }

    fn knowing<const N: usize>(runs: [Range<u64>; N]) -> DataRuns {
        let known = DataRuns::default();
        known.look_again().has_found(look(runs));
        known
    }

    #[test]
    fn data_is_remembered_until_part_of_it_becomes_a_hole() {
        let known = DataRuns::default();
        assert_eq!(known.data_at(0), 0);
        let known = knowing([100..200, 300..400, 500..600]);
        let at = |known: &DataRuns| [99, 100, 199, 200, 299, 300, 550].map(|at| known.data_at(at));
        assert_eq!(at(&known), [0, 100, 1, 0, 0, 100, 50]);
        known.forget(200..300);
        assert_eq!(at(&known), [0, 100, 1, 0, 0, 100, 50]);
        known.forget(199..301);
        assert_eq!(at(&known), [0, 0, 0, 0, 0, 0, 50]);
        known.forget(0..u64::MAX);
        assert_eq!(at(&known), [0; 7]);
    }

    #[test]
    fn of_an_answer_from_before_a_hole_was_made_the_rest_is_remembered() {
        let known = DataRuns::default();
        let looking = known.look_again();
        known.forget(120..130);
        known.forget(310..320);
        // Data may be found past all that was to be looked at.
        known.forget(1500..1501);
        looking.has_found(Look {
            span: 0..2000,
            ..look([0..50, 100..200, 250..260, 300..400, 900..2000])
        });
        let at = [0, 125, 255, 300, 900].map(|at| known.data_at(at));
        assert_eq!(at, [50, 0, 5, 0, 0]);
        assert!(known.is_quick_at(125) && !known.is_quick_at(2000));
        let looked = known.look_at(125..200, pending()).now_or_never();
        assert!(looked.expect("nobody else looks").is_none());
        // Of more than can be told apart, nothing is missed.
        let looking = known.look_again();
        for hole in (0..MAX_FORGOTTEN as u64 + 10).map(|hole| hole * 10) {
            known.forget(hole..hole + 1);
        }
        looking.has_found(look([0..1, 640..641, 720..721, 731..740, 990..1000]));
        let at = [0, 640, 720, 731, 990].map(|at| known.data_at(at));
        assert_eq!(at, [0, 0, 0, 9, 10]);
    }

    #[test]
    fn several_looks_are_remembered_and_the_last_one_is_right() {
        let known = DataRuns::default();
        for start in (0..MAX_LOOKS as u64 + 1).map(|number| number * 1000) {
            let found = Look {
                runs: vec![start + 100..start + 200],
                span: start..start + 1000,
                quick: true,
            };
            known.look_again().has_found(found);
        }
        assert_eq!(known.data_at(100), 0);
        assert!(!known.is_quick_at(0) && known.is_quick_at(1000));
        let last = MAX_LOOKS as u64 * 1000;
        assert_eq!([1100, last + 150].map(|at| known.data_at(at)), [100, 50]);
        let slow = Look {
            runs: vec![1100..1900],
            span: 1000..2000,
            quick: false,
        };
        known.look_again().has_found(slow);
        assert!(known.data_at(1800) == 100 && !known.is_quick_at(1000));
        // Others have made a hole of it, which nobody has told.
        let hole = Look {
            runs: Vec::new(),
            span: 1500..1600,
            quick: true,
        };
        known.look_again().has_found(hole);
        let at = [1499, 1500, 1600].map(|at| known.data_at(at));
        assert_eq!(at, [401, 0, 300]);
        known.forget(1300..1301);
        assert_eq!(known.data_at(1800), 0);
        // What is looked at again and again takes the place of itself only.
        for _ in 0..2 * MAX_LOOKS {
            known.look_again().has_found(look([100..200]));
        }
        assert_eq!([100, 4100].map(|at| known.data_at(at)), [100, 100]);
    }

    #[test]
    fn who_asks_for_what_another_looks_at_waits_for_that() {
        EventLoop::new("test").unwrap().block_on(async {
            let known = DataRuns::default();
            // Of one that looks again nobody knows what it will tell.
            let again = known.look_again();
            let first = known.look_at(100..500, pending()).await.expect("not known");
            let mut same = Box::pin(known.look_at(200..600, pending()));
            let mut hasty = Box::pin(known.look_at(300..700, pending()));
            assert!(poll!(same.as_mut()).is_pending());
            assert!(poll!(hasty.as_mut()).is_pending());
            // Elsewhere, and before it: nothing that the other one will find.
            for start in [0, 500] {
                let looking = known.look_at(start..start + 1, pending()).await;
                assert!(looking.is_some());
            }
            // What has gone without an answer tells nothing, and one that began later is not
            // waited for, too.
            drop(first);
            let second = same.now_or_never().expect("it has gone");
            let second = second.expect("not known");
            let hasty = hasty.now_or_never().expect("it began later");
            assert!(hasty.is_some());
            let mut third = Box::pin(known.look_at(300..700, pending()));
            assert!(poll!(third.as_mut()).is_pending());
            // Whose patience is at an end looks for itself.
            assert!(known.look_at(300..700, ready(())).await.is_some());
            second.has_found(look([200..400]));
            assert!(third.await.is_none());
            assert_eq!(known.data_at(300), 100);
            drop(again);
        });
    }
}

#[cfg(all(test, shuttle))]
mod shuttle_tests {
    use std::future::pending;
    use std::sync::Arc;

    use shuttle::future::block_on;
    use shuttle::thread;

    use super::{DataRuns, Look};
    use crate::sync::atomic::{AtomicBool, Ordering::SeqCst};

    /// Two look at a file in which a third one makes a hole.
    fn two_looks_and_a_hole() {
        let shared = Arc::new((DataRuns::default(), AtomicBool::new(true)));
        let lookers = [0, 10].map(|start| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (runs, is_data) = &*shared;
                if let Some(looking) = block_on(runs.look_at(start..100, pending())) {
                    let found = is_data.load(SeqCst).then_some(20..30);
                    looking.has_found(Look {
                        runs: found.into_iter().collect(),
                        span: start..100,
                        quick: true,
                    });
                }
            })
        });
        let puncher = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                shared.1.store(false, SeqCst);
                shared.0.forget(20..30);
                assert_eq!(shared.0.data_at(20), 0);
            })
        };
        for thread in lookers.into_iter().chain([puncher]) {
            thread.join().unwrap();
        }
        assert_eq!(shared.0.data_at(20), 0);
        assert!(shared.0.is_quick_at(20) && shared.0.under_way() == 0);
    }

    #[test]
    fn shuttle_no_look_is_waited_for_in_vain_and_no_hole_is_taken_for_data() {
        shuttle::check_random(two_looks_and_a_hole, 5_000);
        shuttle::check_pct(two_looks_and_a_hole, 5_000, 3);
    }
}
