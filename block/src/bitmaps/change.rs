//! Changes of named bitmaps that can be undone, as a transaction needs them.

use std::sync::Arc;

use super::list::Unsettled;
use super::{NamedBitmap, NamedBitmapError, NewBitmap, Usage};
use crate::dirty_bitmap::DirtyBitmap;
use crate::node::Node;

/// A change that has been made, and lasts if it is [committed](Self::commit). Dropped,
/// it is undone: the bitmap is as it was, with the writes recorded since.
///
/// What the change makes of a persistent bitmap is durable only after
/// [`Graph::store_bitmaps`](crate::Graph::store_bitmaps).
///
/// Several are committed in any order, and undone in the reverse order of that in which
/// they were made. On main.
#[derive(Debug)]
#[must_use = "dropped, the change is undone"]
pub struct BitmapChange {
    bitmap: Arc<NamedBitmap>,
    before: Option<Before>,
    /// Goes last: what is not settled is not stored.
    _unsettled: Unsettled,
}

/// What it takes to undo a change.
///
/// Bits that are not recorded in any more go on being recorded in until it is certain
/// that they are not needed again.
#[derive(Debug)]
enum Before {
    Absent,
    /// It has other bits now.
    Bits(Arc<DirtyBitmap>),
    /// It is disabled now: what it had.
    Enabled(Arc<DirtyBitmap>),
    Disabled,
    /// It is busy now, and goes with the commit.
    Present,
}

impl BitmapChange {
    /// Adds a bitmap to `node`. Fails if the name is bad or taken, if the granularity
    /// is no power of two of at least 512, or for lack of memory.
    pub fn add(node: &Arc<Node>, new: &NewBitmap<'_>) -> Result<Self, NamedBitmapError> {
        let unsettled = Unsettled::new(node);
        let bitmap = node.add_bitmap(new)?;
        Ok(Self {
            bitmap,
            before: Some(Before::Absent),
            _unsettled: unsettled,
        })
    }

    /// Clears it. Fails if it is busy, read-only or inconsistent, or for lack of memory.
    ///
    /// A write that ends meanwhile is in it afterwards or not; in a drained section
    /// there is none.
    pub fn clear(bitmap: &Arc<NamedBitmap>) -> Result<Self, NamedBitmapError> {
        bitmap.check_changeable()?;
        let bits = bitmap.bits();
        let clean = DirtyBitmap::new(bits.size(), bits.granularity())?;
        Ok(Self::with_bits(bitmap, clean))
    }

    /// Adds what is dirty in `from`, of nodes of the same size, with any granularity.
    ///
    /// Fails if it or one of them is busy or inconsistent, if it is read-only, if a size
    /// differs, or for lack of memory; and with the first error of `from` itself.
    pub fn merge(
        bitmap: &Arc<NamedBitmap>,
        from: impl IntoIterator<Item = Result<Arc<NamedBitmap>, NamedBitmapError>>,
    ) -> Result<Self, NamedBitmapError> {
        let bits = bitmap.bits();
        let sum = DirtyBitmap::new(bits.size(), bits.granularity())?;
        // A source that is not there is told before anything else, as QEMU does.
        for source in from {
            let source = source?;
            bitmap.check_changeable()?;
            source.check_usable()?;
            let source = source.bits();
            if source.size() != bits.size() {
                return Err(NamedBitmapError::Sizes {
                    target: bits.size(),
                    from: source.size(),
                });
            }
            sum.merge(&source);
        }
        bitmap.check_changeable()?;
        let change = Self::with_bits(bitmap, sum);
        // Writes that have ended before the new bits were attached are in here.
        bitmap.bits().merge(&bits);
        Ok(change)
    }

    /// Lets it record. Fails if it is busy or inconsistent.
    pub fn enable(bitmap: &Arc<NamedBitmap>) -> Result<Self, NamedBitmapError> {
        let unsettled = Unsettled::of(bitmap);
        let mut state = bitmap.lock();
        bitmap.check(&state, false)?;
        let before = match std::mem::replace(&mut state.enabled, true) {
            true => None,
            false => Some(Before::Disabled),
        };
        bitmap.attach(&state);
        Ok(Self {
            bitmap: Arc::clone(bitmap),
            before,
            _unsettled: unsettled,
        })
    }

    /// Lets it record no more. Fails if it is busy or inconsistent.
    pub fn disable(bitmap: &Arc<NamedBitmap>) -> Result<Self, NamedBitmapError> {
        let unsettled = Unsettled::of(bitmap);
        let mut state = bitmap.lock();
        bitmap.check(&state, false)?;
        let before = match std::mem::replace(&mut state.enabled, false) {
            true => Some(Before::Enabled(Arc::clone(&state.bits))),
            false => None,
        };
        Ok(Self {
            bitmap: Arc::clone(bitmap),
            before,
            _unsettled: unsettled,
        })
    }

    /// Removes it from its node: with the commit, and until then it is busy. Fails if
    /// it is busy or read-only.
    pub fn remove(bitmap: &Arc<NamedBitmap>) -> Result<Self, NamedBitmapError> {
        let unsettled = Unsettled::of(bitmap);
        let mut state = bitmap.lock();
        bitmap.check(&state, true)?;
        bitmap.check_read_only()?;
        state.usage = Usage::Held;
        drop(state);
        Ok(Self {
            bitmap: Arc::clone(bitmap),
            before: Some(Before::Present),
            _unsettled: unsettled,
        })
    }

    /// The bitmap.
    pub fn bitmap(&self) -> &Arc<NamedBitmap> {
        &self.bitmap
    }

    /// The change lasts.
    pub fn commit(mut self) {
        match self.before.take() {
            Some(Before::Bits(bits) | Before::Enabled(bits)) => self.bitmap.tidy(&bits),
            Some(Before::Present) => self.bitmap.leave_node(),
            Some(Before::Absent | Before::Disabled) | None => {}
        }
    }

    fn with_bits(bitmap: &Arc<NamedBitmap>, bits: DirtyBitmap) -> Self {
        let unsettled = Unsettled::of(bitmap);
        let mut state = bitmap.lock();
        let before = std::mem::replace(&mut state.bits, Arc::new(bits));
        bitmap.attach(&state);
        Self {
            bitmap: Arc::clone(bitmap),
            before: Some(Before::Bits(before)),
            _unsettled: unsettled,
        }
    }
}

impl Drop for BitmapChange {
    fn drop(&mut self) {
        let Some(before) = self.before.take() else {
            return;
        };
        let bitmap = &self.bitmap;
        match before {
            Before::Absent => bitmap.leave_node(),
            Before::Bits(bits) => {
                let mut state = bitmap.lock();
                let undone = std::mem::replace(&mut state.bits, bits);
                bitmap.attach(&state);
                drop(state);
                bitmap.tidy(&undone);
            }
            Before::Enabled(_) => {
                let mut state = bitmap.lock();
                state.enabled = true;
                bitmap.attach(&state);
            }
            Before::Disabled => {
                let mut state = bitmap.lock();
                state.enabled = false;
                let bits = Arc::clone(&state.bits);
                drop(state);
                bitmap.tidy(&bits);
            }
            Before::Present => bitmap.lock().usage = Usage::Free,
        }
    }
}
