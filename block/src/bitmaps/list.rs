//! The named bitmaps of a node.

use std::sync::Arc;

use super::{MAX_NAME, NamedBitmap, NamedBitmapError, NewBitmap, Usage, default_granularity};
use crate::dirty_bitmap::{BitmapError, DirtyBitmap};
use crate::graph::Graph;
use crate::node::Node;
use crate::sync::{Mutex, lock};

/// The named bitmaps of a node, in the order in which they were made.
#[derive(Debug, Default)]
pub(crate) struct NamedBitmaps {
    /// A leaf lock. Changed on main only.
    all: Mutex<Vec<Arc<NamedBitmap>>>,
}

impl Node {
    /// Makes a bitmap. What is written from now on is recorded in it, if it is enabled.
    ///
    /// Fails if the name is bad or taken, if the granularity is no power of two of at
    /// least 512, if it is to be kept, or for lack of memory.
    pub fn add_bitmap(
        self: &Arc<Self>,
        new: &NewBitmap<'_>,
    ) -> Result<Arc<NamedBitmap>, NamedBitmapError> {
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
        if new.persistent {
            return Err(NamedBitmapError::NotKept(self.name().to_owned()));
        }
        if self.named_bitmap(new.name).is_some() {
            return Err(NamedBitmapError::Exists(new.name.to_owned()));
        }
        if new.name.len() > MAX_NAME {
            return Err(NamedBitmapError::NameTooLong(new.name.to_owned()));
        }
        let bitmap = NamedBitmap::new(self, new, granularity)?;
        lock(&self.named_bitmaps.all).push(Arc::clone(&bitmap));
        bitmap.attach(&bitmap.lock());
        Ok(bitmap)
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
