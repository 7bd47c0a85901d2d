//! Room in the file for bitmaps that are still to come. While somebody has some, the file
//! does not go, and its keeper does not end; so what was prepared can be added.
//!
//! # The protocol
//!
//! Room is given by the keeper's thread only, or shared by who has some. The keeper looks
//! whether there is any, *then* at the bitmaps, and ends only if it finds neither: nobody can
//! get room between these looks, and who had some and has none any more has added his
//! bitmaps before. Who closes the file, whatever is kept, closes this first: nothing can be
//! added from then on, and who is adding just then has an unsettled change, which the keeper
//! waits for when it looks at the bitmaps.

use std::sync::Arc;

use super::intent::{Arming, Intent};
use crate::sync::{Mutex, lock};

/// The rooms in a file.
#[derive(Default)]
pub(super) struct Rooms {
    /// A leaf lock.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// A number for each, and the chunks of each of the bitmaps that it is for.
    held: Vec<(u64, Vec<u64>)>,
    next: u64,
    /// Nothing can be added any more.
    closed: bool,
    /// Tells the keeper that the last one has gone.
    wake: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// Room in a file. Dropped, on any thread, it is given back: the file goes then if there are
/// no bitmaps in it, and nobody else has room.
#[must_use = "dropped, the room goes again"]
pub(crate) struct Room {
    rooms: Arc<Rooms>,
    number: u64,
}

impl std::fmt::Debug for Rooms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rooms").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Room {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Room").finish_non_exhaustive()
    }
}

impl Rooms {
    /// `wake` is to be called when the last one has been given back.
    pub(super) fn keeper_is_there(&self, wake: Arc<dyn Fn() + Send + Sync>) {
        lock(&self.state).wake = Some(wake);
    }

    /// Gives room for bitmaps of so many chunks each; `None` if nothing can be added any more.
    /// The keeper's thread only.
    pub(super) fn give(self: &Arc<Self>, chunks: Vec<u64>) -> Option<Room> {
        let mut state = lock(&self.state);
        (!state.closed).then(|| state.add(self, chunks))
    }

    /// One more, for a moment, beside one that somebody has: so the keeper stays.
    pub(super) fn share(self: &Arc<Self>) -> Option<Room> {
        let mut state = lock(&self.state);
        let may = !state.closed && !state.held.is_empty();
        may.then(|| state.add(self, Vec::new()))
    }

    /// From now on nothing can be added.
    pub(super) fn close(&self) {
        let wake = {
            let mut state = lock(&self.state);
            state.closed = true;
            state.wake.take()
        };
        drop(wake);
    }

    /// Whether nothing can come any more but by new room. The keeper's thread only, before it
    /// looks at the bitmaps.
    pub(super) fn none_left(&self) -> bool {
        let state = lock(&self.state);
        state.closed || state.held.is_empty()
    }

    /// The chunks of each bitmap that there is to be room for.
    pub(super) fn chunks(&self) -> Vec<u64> {
        let state = lock(&self.state);
        let all = state.held.iter().flat_map(|(_, chunks)| chunks);
        all.copied().collect()
    }
}

impl State {
    fn add(&mut self, rooms: &Arc<Rooms>, chunks: Vec<u64>) -> Room {
        let number = self.next;
        self.next += 1;
        self.held.push((number, chunks));
        Room {
            rooms: Arc::clone(rooms),
            number,
        }
    }
}

impl Room {
    /// Arms the node's intent; `None` if nothing can be added any more, and writers would wait
    /// for a keeper that goes.
    pub(super) fn arm(&self, intent: &Intent) -> Option<Arming> {
        let state = lock(&self.rooms.state);
        // Under the lock, which who closes has to take first. It only stores words.
        (!state.closed).then(|| intent.arm())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let wake = {
            let mut state = lock(&self.rooms.state);
            state.held.retain(|(number, _)| *number != self.number);
            match state.held.is_empty() {
                true => state.wake.clone(),
                false => None,
            }
        };
        if let Some(wake) = wake {
            wake();
        }
    }
}

#[cfg(all(test, shuttle))]
mod tests {
    use shuttle::thread;

    use super::*;
    use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

    /// How the keeper looks whether it may end.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Looks {
        RoomFirst,
        BitmapsFirst,
    }

    #[derive(Default)]
    struct Model {
        rooms: Arc<Rooms>,
        /// Bitmaps, changes that are not settled, and whether the keeper has ended.
        bitmaps: AtomicU32,
        unsettled: AtomicU32,
        ended: AtomicBool,
    }

    impl Model {
        /// The bitmaps, when nobody is changing them.
        fn look(&self) -> u32 {
            while self.unsettled.load(SeqCst) != 0 {
                thread::yield_now();
            }
            self.bitmaps.load(SeqCst)
        }

        fn tidy(&self, looks: Looks) {
            let (none, bitmaps) = match looks {
                Looks::RoomFirst => {
                    let none = self.rooms.none_left();
                    (none, self.look())
                }
                Looks::BitmapsFirst => {
                    let bitmaps = self.look();
                    (self.rooms.none_left(), bitmaps)
                }
            };
            if none && bitmaps == 0 {
                self.rooms.close();
                self.ended.store(true, SeqCst);
            }
        }

        /// As `Node::add_bitmap` does.
        fn add(&self) -> bool {
            self.unsettled.fetch_add(1, SeqCst);
            let room = self.rooms.share();
            let may = room.is_some();
            if may {
                self.bitmaps.fetch_add(1, SeqCst);
            }
            drop(room);
            self.unsettled.fetch_sub(1, SeqCst);
            may
        }
    }

    fn one_adds_while_the_keeper_looks(looks: Looks) {
        let model = Arc::new(Model::default());
        let room = model.rooms.give(vec![1]).expect("it is open");
        let theirs = Arc::clone(&model);
        let adder = thread::spawn(move || {
            assert!(theirs.add(), "there is room");
            drop(room);
        });
        // Has none of his own: he may come too late, but not to no keeper.
        let theirs = Arc::clone(&model);
        let other = thread::spawn(move || theirs.add());
        for _ in 0..3 {
            model.tidy(looks);
        }
        adder.join().expect("it is right");
        let _ = other.join().expect("it is right");
        assert!(!model.ended.load(SeqCst), "it has ended, and has bitmaps");
    }

    #[test]
    fn shuttle_a_keeper_does_not_end_between_prepared_and_added() {
        shuttle::check_random(|| one_adds_while_the_keeper_looks(Looks::RoomFirst), 5_000);
    }

    #[test]
    #[should_panic]
    fn shuttle_a_keeper_that_looks_at_the_bitmaps_first_is_found_out() {
        let looks = Looks::BitmapsFirst;
        shuttle::check_random(move || one_adds_while_the_keeper_looks(looks), 20_000);
    }

    fn one_adds_while_the_file_is_closed() {
        let model = Arc::new(Model::default());
        let _room = model.rooms.give(vec![1]).expect("it is open");
        let theirs = Arc::clone(&model);
        let adder = thread::spawn(move || theirs.add());
        model.rooms.close();
        let seen = model.look();
        let added = adder.join().expect("it is right");
        assert_eq!(seen, u32::from(added));
        assert!(model.rooms.none_left() && model.rooms.give(vec![1]).is_none());
    }

    #[test]
    fn shuttle_nothing_comes_after_the_last_look_at_a_file_that_is_closed() {
        shuttle::check_random(one_adds_while_the_file_is_closed, 5_000);
    }
}
