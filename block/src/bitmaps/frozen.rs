//! Who uses a bitmap: exports hold it, backups freeze it.

use std::sync::Arc;

use super::{NamedBitmap, NamedBitmapError, Usage};
use crate::dirty_bitmap::DirtyBitmap;

/// A bitmap that is busy, and goes on recording if it did, until this is dropped (on
/// any thread).
#[derive(Debug)]
pub struct BitmapHold {
    bitmap: Arc<NamedBitmap>,
}

impl BitmapHold {
    /// The bitmap.
    pub fn bitmap(&self) -> &Arc<NamedBitmap> {
        &self.bitmap
    }
}

impl Drop for BitmapHold {
    fn drop(&mut self) {
        self.bitmap.lock().usage = Usage::Free;
    }
}

/// A bitmap whose bits stay as they were when a job froze it: they are called P in
/// what follows. Writes since then are recorded in a successor: S. It is busy.
///
/// Whoever has it says in the end what the bitmap is to be; dropping it is
/// [`reclaim`](Self::reclaim), with which nothing is ever missed. It may end on any
/// thread.
#[derive(Debug)]
#[must_use = "dropped, the bitmap is as if it had never been frozen"]
pub struct FrozenBitmap {
    bitmap: Arc<NamedBitmap>,
    /// P.
    bits: Arc<DirtyBitmap>,
    /// It has been said what is to become of it.
    settled: bool,
}

impl FrozenBitmap {
    /// The bits as they were: P. Nobody changes them.
    pub fn bits(&self) -> &Arc<DirtyBitmap> {
        &self.bits
    }

    /// The bitmap.
    pub fn bitmap(&self) -> &Arc<NamedBitmap> {
        &self.bitmap
    }

    /// The bitmap has what was written since: S.
    pub fn abdicate(self) {
        self.succeed(None);
    }

    /// The bitmap has what was written since, and what is dirty in `also` (of the same
    /// disk, of any granularity): S + `also`.
    pub fn abdicate_with(self, also: &DirtyBitmap) {
        self.succeed(Some(also));
    }

    /// The bitmap has what it had, and what was written since: P + S.
    pub fn reclaim(self) {
        drop(self);
    }

    fn succeed(mut self, also: Option<&DirtyBitmap>) {
        self.settled = true;
        let mut state = self.bitmap.lock();
        if let Usage::Frozen { successor } = std::mem::replace(&mut state.usage, Usage::Free) {
            // It has been recording, if anything has.
            state.bits = successor;
            if let Some(also) = also {
                state.bits.merge(also);
            }
        }
        drop(state);
        if let Some(node) = self.bitmap.node().filter(|_| self.bitmap.is_persistent()) {
            // Until that is durable, a crash leaves what reclaiming leaves: more.
            node.store_bitmaps_soon();
        }
    }
}

impl Drop for FrozenBitmap {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let mut state = self.bitmap.lock();
        if let Usage::Frozen { successor } = std::mem::replace(&mut state.usage, Usage::Free) {
            // In this order, so that a write that ends meanwhile is in one of them.
            self.bitmap.attach(&state);
            self.bitmap.detach(&successor);
            state.bits.merge(&successor);
        }
    }
}

impl NamedBitmap {
    /// Makes it busy, for an export. Fails if it is, or is inconsistent.
    pub fn hold(self: &Arc<Self>) -> Result<BitmapHold, NamedBitmapError> {
        let mut state = self.lock();
        self.check(&state, false)?;
        state.usage = Usage::Held;
        Ok(BitmapHold {
            bitmap: Arc::clone(self),
        })
    }

    /// Freezes it, for a job that takes the bits as they are at this moment. Writes
    /// go to a successor from now on, if they were recorded: those that end meanwhile
    /// may be recorded in both. In a drained section there are none.
    ///
    /// Fails if it is busy or inconsistent, or if there is not enough memory.
    pub fn freeze(self: &Arc<Self>) -> Result<FrozenBitmap, NamedBitmapError> {
        let mut state = self.lock();
        self.check(&state, false)?;
        let bits = Arc::clone(&state.bits);
        let successor = Arc::new(DirtyBitmap::new(bits.size(), bits.granularity())?);
        state.usage = Usage::Frozen { successor };
        self.attach(&state);
        self.detach(&bits);
        Ok(FrozenBitmap {
            bitmap: Arc::clone(self),
            bits,
            settled: false,
        })
    }
}
