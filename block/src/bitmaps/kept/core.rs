//! What the keeper does, step by step: marks regions hot, saves bits, cools regions.
//!
//! No thread and no clock live here (`keeper`), nor what the blocks of the file look like
//! (`store`).
//!
//! # What must be true at every instant
//!
//! For each write that was acknowledged, and each bitmap that recorded it: the durable
//! state has the bit, or the region is marked in the durable intent, or the bitmap is
//! inconsistent there. So a region is marked before a write to it begins; and its mark
//! goes only after a commit that began when no writer was left who did not see it idle.
//!
//! # When the file cannot be written
//!
//! A region that cannot be marked must not be written, so bitmaps are given up for the guest:
//! the file is marked *broken*, durably; or if that fails too, it is removed, durably.
//! If not even that can be done, the guest's write fails. Bits that cannot be saved stay in
//! memory, with their regions marked.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};

use super::format::{Stamp, Use};
use super::intent::{GracePeriod, Intent};
use super::room::Rooms;
use super::store::{BitmapState, Changed, Disk, Storage, Store, Version};
use crate::dirty_bitmap::DirtyBitmap;
use crate::error::os_text;

/// The bitmaps that are kept.
pub(super) trait Source: Send + 'static {
    /// What they are at one moment.
    fn bitmaps(&self) -> Snapshot;

    /// Size of the disk in bytes.
    fn size(&self) -> u64;

    /// They cannot be kept any more: they are inconsistent from now on.
    fn spoil(&self, why: &str);

    /// What the image is by now; `None` if that tells nothing of who wrote it.
    fn stamp(&self, sync: bool) -> io::Result<Option<Stamp>>;
}

/// What a [`Source`] has.
#[derive(Debug)]
pub(super) enum Snapshot {
    Bitmaps(Vec<BitmapState>),
    /// Somebody is changing them, and may take that back: look again in a moment.
    Changing,
    /// The node is gone.
    Gone,
}

/// Why bitmaps are not durable.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The file cannot be written.
    #[error("the file of the bitmaps cannot be written: {}", os_text(.0))]
    Write(io::Error),
    /// There is no room in it.
    #[error("there is no room for them in their file: {}", os_text(.0))]
    Room(io::Error),
    /// It could not be written before.
    #[error("they were given up when their file could not be written; remove them first")]
    GivenUp,
    /// The node has gone.
    #[error("the node has gone")]
    Gone,
}

/// What is to be said of the file as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Good,
    /// It says itself that it is good for nothing.
    Broken,
    /// There is none any more.
    Removed,
}

/// What a bitmap was when it was saved last.
#[derive(Debug)]
struct Saved {
    name: String,
    enabled: bool,
    inconsistent: bool,
    bits: Weak<DirtyBitmap>,
}

#[derive(Debug)]
struct Cooling {
    regions: Vec<u32>,
    period: GracePeriod,
}

/// The keeper's state. One thread's.
pub(super) struct Core<S, B> {
    store: Store<S>,
    source: B,
    intent: Arc<Intent>,
    rooms: Arc<Rooms>,
    identity: String,
    layer: String,
    /// A change of the disk's size is under way.
    resizing: bool,
    saved: Vec<Saved>,
    cooling: Option<Cooling>,
    health: Health,
    ended: bool,
}

impl<S: Storage, B: Source> Core<S, B> {
    /// Of an open file, the bitmaps of which are in `source` already, as they were loaded or
    /// with more bits.
    pub(super) fn new(
        store: Store<S>,
        source: B,
        intent: Arc<Intent>,
        identity: String,
        layer: String,
    ) -> Self {
        Self {
            store,
            source,
            intent,
            rooms: Arc::default(),
            identity,
            layer,
            resizing: false,
            saved: Vec::new(),
            cooling: None,
            health: Health::Good,
            ended: false,
        }
    }

    /// Who has room in the file.
    pub(super) fn rooms(&self) -> &Arc<Rooms> {
        &self.rooms
    }

    /// Marks the regions that writers have asked for, and lets them go on.
    pub(super) fn serve_writers(&mut self) {
        let asked = self.intent.take_asked();
        if asked.is_empty() || !self.intent.is_armed() {
            return;
        }
        if let Err(why) = self.check_untouched() {
            self.give_up(&why);
            return;
        }
        let words = self.intent.words(&asked);
        match self.store.write_hot(self.intent.shift(), &words, true) {
            Ok(()) => self.intent.heat(&asked),
            Err(error) => self.give_up(&format!("their file cannot be written: {error}")),
        }
    }

    /// Before the first write since the file was closed: whether the image is still what it
    /// was then.
    fn check_untouched(&self) -> Result<(), String> {
        let Use::Closed(stamp) = self.store.usage() else {
            return Ok(());
        };
        match self.source.stamp(false) {
            Ok(Some(now)) if now != stamp => Err("somebody else has written the image".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => Err(format!("the image cannot be looked at: {error}")),
        }
    }

    fn give_up(&mut self, why: &str) {
        self.source.spoil(why);
        let broken = self.store.write_broken();
        let removed = broken.is_err().then(|| self.store.storage.remove());
        match (broken, removed) {
            (Ok(()), _) => self.health = Health::Broken,
            (Err(_), Some(Ok(()))) => self.health = Health::Removed,
            (Err(error), _) => {
                tracing::error!(
                    %error,
                    "the file of the bitmaps can neither be marked nor removed: writes of the \
                     guest fail, since the bitmaps would miss them"
                );
                self.intent.refuse();
                return;
            }
        }
        self.cooling = None;
        self.intent.disarm();
    }

    /// Makes what the bitmaps are by now durable, and the list of them. If there are none
    /// any more, and none are to come, the file goes.
    ///
    /// Fails if it cannot: then they are inconsistent, here and there.
    pub(super) fn commit(&mut self) -> Result<(), KeepError> {
        // In this order: see `room`.
        let may_end = self.rooms.none_left();
        let bitmaps = self.snapshot()?;
        if bitmaps.is_empty() && (may_end || self.health == Health::Removed) {
            return match may_end {
                true => self.end(),
                false => Ok(()),
            };
        }
        let alive = bitmaps.iter().any(|bitmap| !bitmap.inconsistent);
        // It was given up while one was being added, which no write would be marked for.
        let unmarked = alive && !self.intent.is_complete();
        if self.health == Health::Removed || unmarked {
            self.source.spoil("they were given up before");
            return Err(KeepError::GivenUp);
        }
        match self.write(bitmaps, &[]) {
            Ok(()) => {
                self.health = Health::Good;
                Ok(())
            }
            Err(error) => {
                self.give_up(&format!("their file cannot be written: {error}"));
                Err(KeepError::Write(error))
            }
        }
    }

    /// There is nothing to be kept any more.
    fn end(&mut self) -> Result<(), KeepError> {
        if self.health != Health::Removed {
            self.store.storage.remove().map_err(KeepError::Write)?;
            self.health = Health::Removed;
        }
        self.cooling = None;
        self.ended = true;
        self.intent.disarm();
        Ok(())
    }

    /// Somebody had room and has none any more: if there are no bitmaps, and none are to come,
    /// the file goes.
    pub(super) fn tidy(&mut self) -> Result<(), KeepError> {
        let may_end = self.rooms.none_left();
        match self.snapshot() {
            Ok(bitmaps) if bitmaps.is_empty() && may_end => self.end(),
            // Its file is closed in a moment.
            Err(KeepError::Gone) => Ok(()),
            result => result.map(|_| ()),
        }
    }

    /// Whether nothing was left to be kept.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// What the file has by now.
    pub(super) fn version(&self) -> Version {
        self.store.version()
    }

    /// Gives everything up, since there is nobody to do it any more.
    pub(super) fn abandon(&mut self) {
        self.give_up("the thread that keeps them has ended");
    }

    /// Fails if there may be no room for all bitmaps, whatever they have, those that there is
    /// to be room for already, and new ones of so many `chunks` each.
    pub(super) fn reserve(&mut self, chunks: &[u64]) -> Result<(), KeepError> {
        if self.health == Health::Removed {
            return Err(KeepError::GivenUp);
        }
        self.reserve_for(0, chunks)
    }

    /// Room for the bitmaps of a disk of `size` bytes, if that is more than it has, and for
    /// new ones of so many `chunks` each.
    fn reserve_for(&self, size: u64, chunks: &[u64]) -> Result<(), KeepError> {
        let to_come = self.rooms.chunks();
        let bitmaps = self.snapshot()?;
        let known = bitmaps.iter().map(|bitmap| {
            let size = bitmap.bits.size().max(size);
            size.div_ceil(bitmap.bits.granularity())
        });
        let all = known.chain(to_come).chain(chunks.iter().copied());
        self.store.reserve(all).map_err(KeepError::Room)
    }

    /// The disk's size is about to become `to` bytes, or has changed, or not (`None`).
    pub(super) fn resize(&mut self, to: Option<u64>) -> Result<(), KeepError> {
        if self.health != Health::Good {
            self.resizing = to.is_some();
            return Ok(());
        }
        if let Some(size) = to {
            self.reserve_for(size, &[])?;
        }
        self.resizing = to.is_some();
        self.commit()
    }

    fn snapshot(&self) -> Result<Vec<BitmapState>, KeepError> {
        loop {
            match self.source.bitmaps() {
                Snapshot::Bitmaps(bitmaps) => return Ok(bitmaps),
                Snapshot::Gone => return Err(KeepError::Gone),
                // Changes are settled or undone within one step of main.
                #[cfg(not(shuttle))]
                Snapshot::Changing => std::thread::sleep(std::time::Duration::from_millis(1)),
                #[cfg(shuttle)]
                Snapshot::Changing => shuttle::thread::yield_now(),
            }
        }
    }

    /// Commits `bitmaps`: as a whole where they are other ones than were saved, else what is
    /// in `ranges`.
    fn write(&mut self, bitmaps: Vec<BitmapState>, ranges: &[Range<u64>]) -> io::Result<()> {
        let sizes = bitmaps.iter().filter(|bitmap| !bitmap.inconsistent);
        let size = sizes.map(|bitmap| bitmap.bits.size()).next();
        // What the image was when bitmaps were given up says nothing of those to come.
        let usage = match size.is_none() || self.health == Health::Broken {
            true => Use::Open,
            false => self.store.usage(),
        };
        let disk = Disk {
            identity: self.identity.clone(),
            layer: self.layer.clone(),
            size: size.unwrap_or_else(|| self.source.size()),
            resizing: self.resizing,
            usage,
        };
        let bitmaps: Vec<_> = bitmaps
            .into_iter()
            .map(|bitmap| {
                let changed = match self.is_as_saved(&bitmap) {
                    true => Changed::In(ranges),
                    false => Changed::All,
                };
                (bitmap, changed)
            })
            .collect();
        self.store.commit(&disk, &bitmaps)?;
        let saved = bitmaps.into_iter().map(|(bitmap, _)| Saved {
            bits: Arc::downgrade(&bitmap.bits),
            name: bitmap.name,
            enabled: bitmap.enabled,
            inconsistent: bitmap.inconsistent,
        });
        self.saved = saved.collect();
        Ok(())
    }

    /// Whether it is the one that was saved, except for what was written since.
    fn is_as_saved(&self, bitmap: &BitmapState) -> bool {
        self.saved.iter().any(|saved| {
            saved.name == bitmap.name
                && saved.enabled == bitmap.enabled
                && saved.inconsistent == bitmap.inconsistent
                && std::ptr::eq(saved.bits.as_ptr(), Arc::as_ptr(&bitmap.bits))
        })
    }

    /// Takes over what was found after a crash: the bits of `hot` regions are in the bitmaps,
    /// and become durable before anything takes the marks away.
    pub(super) fn recover(&mut self) -> Result<(), KeepError> {
        let bitmaps = self.snapshot()?;
        self.write(bitmaps, &[]).map_err(KeepError::Write)?;
        self.store
            .write_cold(self.intent.shift())
            .map_err(KeepError::Write)
    }

    /// To be called every now and then: regions that were not written between two calls
    /// are cooled. Gives whether [`cool`](Self::cool) has something to do.
    pub(super) fn tick(&mut self) -> bool {
        if self.health != Health::Good {
            return false;
        }
        if self.cooling.is_none() {
            let regions = self.intent.take_idle();
            if !regions.is_empty() {
                let period = self.intent.grace_period();
                self.cooling = Some(Cooling { regions, period });
            }
        }
        self.cooling.is_some()
    }

    /// Goes on cooling, as far as that is possible by now. Gives whether it is to be called
    /// again, in a moment.
    pub(super) fn cool(&mut self) -> bool {
        let Some(cooling) = &mut self.cooling else {
            return false;
        };
        if !self.intent.has_passed(&mut cooling.period) {
            return true;
        }
        let bitmaps = match self.source.bitmaps() {
            Snapshot::Bitmaps(bitmaps) => bitmaps,
            Snapshot::Changing => return true,
            Snapshot::Gone => {
                self.cooling = None;
                return false;
            }
        };
        let Some(Cooling { regions, .. }) = self.cooling.take() else {
            return false;
        };
        if let Err(error) = self.save(bitmaps, &regions) {
            tracing::warn!(
                %error,
                "bits could not be saved: after a crash, what was written lately counts as dirty \
                 in large regions"
            );
        }
        false
    }

    /// Saves the bits of these regions, which are idle and were waited for, and takes back
    /// the marks of those that still are.
    fn save(&mut self, bitmaps: Vec<BitmapState>, regions: &[u32]) -> io::Result<()> {
        let size = self.source.size();
        let ranges: Vec<_> = regions
            .iter()
            .map(|region| self.intent.range(*region, size))
            .filter(|range| !range.is_empty())
            .collect();
        self.write(bitmaps, &ranges)?;
        if self.intent.cool(regions) > 0 {
            let words = self.intent.words(&[]);
            // Too many marks do no harm: it becomes durable with the next sync.
            self.store.write_hot(self.intent.shift(), &words, false)?;
        }
        Ok(())
    }

    /// Saves everything, and notes what the image is: who loads the bitmaps when it is still
    /// that, knows all. For the end, when nobody writes; the next write opens it again.
    ///
    /// If writes are still under way, or it fails, the file stays as after a crash.
    pub(super) fn close(&mut self) -> Result<(), KeepError> {
        if self.health != Health::Good {
            return Ok(());
        }
        let may_end = self.rooms.none_left();
        let bitmaps = self.snapshot()?;
        if bitmaps.is_empty() && may_end {
            return self.end();
        }
        self.cooling = None;
        // The first call makes them idle.
        self.intent.take_idle();
        let regions = self.intent.take_idle();
        let mut period = self.intent.grace_period();
        if !self.intent.has_passed(&mut period) {
            tracing::warn!("writes are under way at the end: their regions stay marked");
            return Ok(());
        }
        let same = bitmaps.len() == self.saved.len()
            && bitmaps.iter().all(|bitmap| self.is_as_saved(bitmap));
        if let Use::Closed(_) = self.store.usage() {
            // Nobody has written; and what others did to the image meanwhile still counts.
            return match same {
                true => Ok(()),
                false => self.write(bitmaps, &[]).map_err(KeepError::Write),
            };
        }
        let stamp = self.source.stamp(true).map_err(KeepError::Write)?;
        let stamp = Use::Closed(stamp.unwrap_or_default());
        self.save(bitmaps, &regions).map_err(KeepError::Write)?;
        if self.intent.any_warm() {
            return Ok(());
        }
        self.store
            .write_closed(stamp, self.intent.shift())
            .map_err(KeepError::Write)
    }
}
