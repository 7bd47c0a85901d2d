//! The named bitmaps of a node.

use std::sync::Arc;

use super::kept::{BitmapState, MAX_BITMAPS, MAX_BITS};
use super::{MAX_NAME, NamedBitmap, NamedBitmapError, NewBitmap, Usage, default_granularity};
use crate::dirty_bitmap::{BitmapError, DirtyBitmap};
use crate::graph::Graph;
use crate::node::Node;
use crate::sync::atomic::{AtomicU64, Ordering::SeqCst};
use crate::sync::{Mutex, lock};

/// The named bitmaps of a node, in the order in which they were made.
#[derive(Debug, Default)]
pub(crate) struct NamedBitmaps {
    /// A leaf lock. Changed on main only.
    all: Mutex<Vec<Arc<NamedBitmap>>>,
    /// Changes that may still be undone, and those that were ever begun. Changed on main;
    /// read by the keeper, which does not store what is not settled.
    unsettled: AtomicU64,
    begun: AtomicU64,
}

/// A change that may still be undone, of the bitmaps of a node.
#[derive(Debug)]
pub(super) struct Unsettled(Option<Arc<Node>>);

impl Unsettled {
    pub(super) fn new(node: &Arc<Node>) -> Self {
        node.named_bitmaps.begun.fetch_add(1, SeqCst);
        node.named_bitmaps.unsettled.fetch_add(1, SeqCst);
        Self(Some(Arc::clone(node)))
    }

    pub(super) fn of(bitmap: &NamedBitmap) -> Self {
        bitmap.node().map_or(Self(None), |node| Self::new(&node))
    }
}

impl Drop for Unsettled {
    fn drop(&mut self) {
        if let Some(node) = &self.0 {
            node.named_bitmaps.unsettled.fetch_sub(1, SeqCst);
        }
    }
}

impl Node {
    /// Makes a bitmap. What is written from now on is recorded in it, if it is enabled.
    ///
    /// Fails if the name is bad or taken, if the granularity is no power of two of at
    /// least 512, if it is to be kept and nobody has [room](crate::BitmapRoom) for it, or for
    /// lack of memory.
    pub fn add_bitmap(
        self: &Arc<Self>,
        new: &NewBitmap<'_>,
    ) -> Result<Arc<NamedBitmap>, NamedBitmapError> {
        let granularity = self.check_new_bitmap(new)?;
        // What is added while the file is closed is there when that looks, or is refused.
        let _unsettled = new.persistent.then(|| Unsettled::new(self));
        let _room = match new.persistent.then(|| self.share_room()) {
            Some(None) => return Err(NamedBitmapError::NotKept(self.name().to_owned())),
            room => room,
        };
        let bitmap = NamedBitmap::new(self, new, granularity)?;
        lock(&self.named_bitmaps.all).push(Arc::clone(&bitmap));
        bitmap.attach(&bitmap.lock());
        Ok(bitmap)
    }

    /// The granularity that it would have. Fails as [`add_bitmap`](Self::add_bitmap) does,
    /// but does not look whether it can be kept.
    pub(crate) fn check_new_bitmap(&self, new: &NewBitmap<'_>) -> Result<u64, NamedBitmapError> {
        if new.name.is_empty() {
            return Err(NamedBitmapError::EmptyName);
        }
        let granularity = match new.granularity {
            Some(granularity) => granularity.into(),
            None => default_granularity(self),
        };
        if !granularity.is_power_of_two() || granularity < DirtyBitmap::MIN_GRANULARITY {
            return Err(BitmapError::Granularity(granularity).into());
        }
        if new.persistent && self.driver().bitmap_layer().is_none() {
            return Err(NamedBitmapError::NotKept(self.name().to_owned()));
        }
        if self.named_bitmap(new.name).is_some() {
            return Err(NamedBitmapError::Exists(new.name.to_owned()));
        }
        if new.name.len() > MAX_NAME {
            return Err(NamedBitmapError::NameTooLong(new.name.to_owned()));
        }
        if new.persistent {
            let kept = self.named_bitmaps().into_iter();
            let kept: Vec<_> = kept.filter(|bitmap| bitmap.is_persistent()).collect();
            let memory = |granularity: u64| self.size().div_ceil(granularity) / 8;
            let all = kept
                .iter()
                .map(|bitmap| memory(bitmap.granularity()))
                .fold(memory(granularity), u64::saturating_add);
            if kept.len() >= MAX_BITMAPS || all > MAX_BITS {
                return Err(NamedBitmapError::TooMany(self.name().to_owned()));
            }
        }
        Ok(granularity)
    }

    /// Adds one that was loaded; without bits it is inconsistent. Not if there is one of that
    /// name.
    pub(super) fn add_loaded(
        self: &Arc<Self>,
        name: &str,
        granularity: u64,
        enabled: bool,
        bits: Option<&Arc<DirtyBitmap>>,
    ) {
        let new = NewBitmap {
            name,
            granularity: None,
            persistent: true,
            enabled,
        };
        let (bits, inconsistent) = match bits {
            Some(bits) => (Arc::clone(bits), false),
            None => match DirtyBitmap::new(0, granularity)
                .or_else(|_| DirtyBitmap::new(0, DirtyBitmap::MIN_GRANULARITY))
            {
                Ok(bits) => (Arc::new(bits), true),
                // One without chunks takes no memory to speak of.
                Err(_) => return,
            },
        };
        if self.named_bitmap(name).is_some() {
            return;
        }
        let bitmap = Arc::new(NamedBitmap::with_bits(self, &new, bits, inconsistent));
        lock(&self.named_bitmaps.all).push(Arc::clone(&bitmap));
        bitmap.attach(&bitmap.lock());
    }

    /// Forgets the persistent bitmaps; those that are in use are inconsistent instead.
    pub(super) fn drop_loaded(&self) {
        let all = self.named_bitmaps();
        for bitmap in all.iter().filter(|bitmap| bitmap.is_persistent()) {
            match bitmap.is_busy() {
                true => bitmap.spoil(),
                false => bitmap.leave_node(),
            }
        }
    }

    /// What is to be kept at this moment; `None` while a change may still be undone.
    pub(crate) fn kept_bitmaps(&self) -> Option<Vec<BitmapState>> {
        let list = &self.named_bitmaps;
        let begun = list.begun.load(SeqCst);
        if list.unsettled.load(SeqCst) != 0 {
            return None;
        }
        let all = self.named_bitmaps();
        let kept = all.iter().filter(|bitmap| bitmap.is_persistent());
        let states: Vec<_> = kept.map(|bitmap| bitmap.kept_state()).collect();
        // Of different sizes while they are being resized, one after the other.
        let mut sizes = states.iter().filter(|state| !state.inconsistent);
        let size = sizes.next().map(|state| state.bits.size());
        let same = sizes.all(|state| Some(state.bits.size()) == size);
        (same && list.begun.load(SeqCst) == begun).then_some(states)
    }

    /// The bitmap of that name.
    pub fn named_bitmap(&self, name: &str) -> Option<Arc<NamedBitmap>> {
        let all = lock(&self.named_bitmaps.all);
        all.iter().find(|bitmap| bitmap.name() == name).cloned()
    }

    /// Its named bitmaps, in the order in which they were made.
    pub fn named_bitmaps(&self) -> Vec<Arc<NamedBitmap>> {
        lock(&self.named_bitmaps.all).clone()
    }

    /// The bitmaps that record writes and are none of the named ones: those of jobs.
    pub(crate) fn unnamed_bitmaps(&self) -> Vec<Arc<DirtyBitmap>> {
        let mut bitmaps = self.bitmaps();
        let named = self.named_bitmaps();
        bitmaps.retain(|bits| !named.iter().any(|bitmap| bitmap.has(bits)));
        bitmaps
    }

    /// Makes the named bitmaps as large as the node is by now. Any thread.
    pub(crate) fn fit_bitmaps(&self) {
        let size = self.size();
        for bitmap in self.named_bitmaps() {
            bitmap.fit(size);
        }
    }
}

impl Graph {
    /// The bitmap called `name` of the node, or the device on a node, called `node`.
    ///
    /// Fails with [`NamedBitmapError::NodeNotFound`] or
    /// [`NotFound`](NamedBitmapError::NotFound).
    pub fn find_bitmap(
        &self,
        node: &str,
        name: &str,
    ) -> Result<Arc<NamedBitmap>, NamedBitmapError> {
        let Ok(node) = self.find(node) else {
            return Err(NamedBitmapError::NodeNotFound(node.to_owned()));
        };
        let bitmap = node.named_bitmap(name);
        bitmap.ok_or_else(|| NamedBitmapError::NotFound(name.to_owned()))
    }
}

impl NamedBitmap {
    /// Its node has it no more. Nothing is recorded any more.
    pub(super) fn leave_node(&self) {
        if let Some(node) = self.node() {
            let mut all = lock(&node.named_bitmaps.all);
            all.retain(|bitmap| !std::ptr::eq(Arc::as_ptr(bitmap), self));
        }
        let mut state = self.lock();
        state.enabled = false;
        state.usage = Usage::Free;
        self.detach(&state.bits);
    }
}
