//! Named dirty bitmaps: what users make to know which parts of a node were written
//! since then. Their states, who may use them when, and changes that can be undone.
//!
//! The bits themselves are [`DirtyBitmap`]'s business, and recording them is the
//! node's. Keeping bitmaps over restarts is that of `kept`. What backups make of them does
//! not live here.
//!
//! # Life of a bitmap
//!
//! [`Node::add_bitmap`] makes one, [`BitmapChange::remove`] removes it; if the node
//! goes, it goes. While it is *enabled* the node's writes are recorded in it.
//!
//! Who needs the bits to stay as they are makes it *busy*: an export by
//! [`NamedBitmap::hold`], a backup by [`NamedBitmap::freeze`]. In the latter case
//! writes go to a *successor* without a name, and the backup says in the end what
//! becomes of both.
//!
//! # Threads
//!
//! Bitmaps are looked up, changed and frozen on main; holds and frozen bitmaps may end
//! on any thread. Each bitmap has a leaf lock around its state, which no request takes.

mod change;
mod error;
mod frozen;
pub(crate) mod kept;
mod list;
#[cfg(all(test, not(shuttle)))]
mod tests;

use std::sync::{Arc, Weak};

use crate::dirty_bitmap::{BitmapError, DirtyBitmap};
use crate::node::Node;
use crate::sync::{Mutex, MutexGuard, lock};

use self::kept::BitmapState;

pub use change::BitmapChange;
pub use error::NamedBitmapError;
pub use frozen::{BitmapHold, FrozenBitmap};
pub use kept::{KeptError, bitmap_file_beside};
pub(crate) use list::NamedBitmaps;

/// Longest name in bytes.
const MAX_NAME: usize = 1023;

/// A bitmap to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBitmap<'a> {
    /// Unique among those of the node; 1 to 1023 bytes.
    pub name: &'a str,
    /// Chunk size in bytes: a power of two, at least 512. `None`: as large as the
    /// node's clusters, at least 4 KiB; 64 KiB without clusters.
    pub granularity: Option<u32>,
    /// Whether it is to be kept when the node is closed, and after a crash: what
    /// [`Graph::prepare_bitmap`](crate::Graph::prepare_bitmap) makes possible.
    pub persistent: bool,
    /// Whether it records from the beginning.
    pub enabled: bool,
}

/// A dirty bitmap of a node that has a name.
#[derive(Debug)]
pub struct NamedBitmap {
    name: String,
    /// The node that has it. Once that has gone nothing is recorded any more.
    node: Weak<Node>,
    persistent: bool,
    /// A leaf lock.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bits: Arc<DirtyBitmap>,
    /// Whether writes are to be recorded.
    enabled: bool,
    /// Writes may be missing in it: good for nothing but to be removed.
    inconsistent: bool,
    usage: Usage,
}

/// Who uses a bitmap.
#[derive(Debug)]
enum Usage {
    Free,
    /// An export, or a removal that may be undone.
    Held,
    /// A backup: writes go to the successor.
    Frozen {
        successor: Arc<DirtyBitmap>,
    },
}

impl State {
    /// What the node is to record in, if in anything.
    fn recorder(&self) -> Option<&Arc<DirtyBitmap>> {
        if !self.enabled || self.inconsistent {
            return None;
        }
        match &self.usage {
            Usage::Frozen { successor } => Some(successor),
            _ => Some(&self.bits),
        }
    }
}

impl NamedBitmap {
    fn new(
        node: &Arc<Node>,
        new: &NewBitmap<'_>,
        granularity: u64,
    ) -> Result<Arc<Self>, NamedBitmapError> {
        let bits = Arc::new(DirtyBitmap::new(node.size(), granularity)?);
        Ok(Arc::new(Self::with_bits(node, new, bits, false)))
    }

    fn with_bits(
        node: &Arc<Node>,
        new: &NewBitmap<'_>,
        bits: Arc<DirtyBitmap>,
        inconsistent: bool,
    ) -> Self {
        Self {
            name: new.name.to_owned(),
            node: Arc::downgrade(node),
            persistent: new.persistent,
            state: Mutex::new(State {
                bits,
                enabled: new.enabled,
                inconsistent,
                usage: Usage::Free,
            }),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its node; `None` if that has gone.
    pub fn node(&self) -> Option<Arc<Node>> {
        self.node.upgrade()
    }

    /// The bits at this moment. They are other ones after a change; while it is busy
    /// they stay.
    pub fn bits(&self) -> Arc<DirtyBitmap> {
        Arc::clone(&self.lock().bits)
    }

    /// Chunk size in bytes.
    pub fn granularity(&self) -> u64 {
        self.lock().bits.granularity()
    }

    /// Whether it, or its successor, is marked by writes.
    pub fn is_recording(&self) -> bool {
        self.lock().recorder().is_some()
    }

    /// Whether somebody uses it, so that it cannot be changed.
    pub fn is_busy(&self) -> bool {
        !matches!(self.lock().usage, Usage::Free)
    }

    /// Whether writes may be missing in it.
    pub fn is_inconsistent(&self) -> bool {
        self.lock().inconsistent
    }

    /// Whether it is kept when the node is closed, and after a crash.
    pub fn is_persistent(&self) -> bool {
        self.persistent
    }

    /// Whether it is one that is kept, and cannot be changed because its node is read-only.
    pub fn is_read_only(&self) -> bool {
        self.persistent && self.node().is_some_and(|node| node.read_only())
    }

    /// What is to be kept of it.
    fn kept_state(&self) -> BitmapState {
        let state = self.lock();
        let successor = match &state.usage {
            Usage::Frozen { successor } => Some(Arc::clone(successor)),
            Usage::Free | Usage::Held => None,
        };
        BitmapState {
            name: self.name.clone(),
            enabled: state.enabled,
            inconsistent: state.inconsistent,
            bits: Arc::clone(&state.bits),
            successor,
        }
    }

    /// It is not kept any more, if it was to be: inconsistent from now on.
    fn spoil(&self) {
        if !self.persistent {
            return;
        }
        let mut state = self.lock();
        let recorder = state.recorder().cloned();
        state.inconsistent = true;
        drop(state);
        if let Some(bits) = recorder {
            self.detach(&bits);
        }
    }

    /// The successor's bits, while it has one.
    pub(crate) fn successor(&self) -> Option<Arc<DirtyBitmap>> {
        match &self.lock().usage {
            Usage::Frozen { successor } => Some(Arc::clone(successor)),
            _ => None,
        }
    }

    /// Fails if it is busy.
    pub fn check_free(&self) -> Result<(), NamedBitmapError> {
        self.check(&self.lock(), true)
    }

    /// Fails if it is busy or inconsistent: for whoever would use what it says.
    pub fn check_usable(&self) -> Result<(), NamedBitmapError> {
        self.check(&self.lock(), false)
    }

    /// Fails if its bits cannot be changed: as [`check_usable`](Self::check_usable), and if
    /// it is read-only.
    fn check_changeable(&self) -> Result<(), NamedBitmapError> {
        let state = self.lock();
        self.check(&state, true)?;
        self.check_read_only()?;
        self.check(&state, false)
    }

    fn check_read_only(&self) -> Result<(), NamedBitmapError> {
        match self.is_read_only() {
            true => Err(NamedBitmapError::ReadOnly(self.name.clone())),
            false => Ok(()),
        }
    }

    /// Whether `bits`, which were its own when they were last looked at, must stay
    /// attached to the node is worked out again.
    fn tidy(&self, bits: &Arc<DirtyBitmap>) {
        let state = self.lock();
        if !state.recorder().is_some_and(|now| Arc::ptr_eq(now, bits)) {
            self.detach(bits);
        }
    }

    /// Lets the node record in what it is to record in, beside what it does already.
    fn attach(&self, state: &State) {
        if let (Some(node), Some(bits)) = (self.node.upgrade(), state.recorder()) {
            node.attach_bitmap(bits);
        }
    }

    fn detach(&self, bits: &Arc<DirtyBitmap>) {
        if let Some(node) = self.node.upgrade() {
            node.detach_bitmap(bits);
        }
    }

    fn check(&self, state: &State, may_be_inconsistent: bool) -> Result<(), NamedBitmapError> {
        if !matches!(state.usage, Usage::Free) {
            return Err(NamedBitmapError::Busy(self.name.clone()));
        }
        if state.inconsistent && !may_be_inconsistent {
            return Err(NamedBitmapError::Inconsistent(self.name.clone()));
        }
        Ok(())
    }

    /// Makes it as large as its node is by now. What is new is clean, what has gone is
    /// forgotten. Whoever uses it sees that, too. If there is not enough memory it is
    /// inconsistent from now on: it would miss writes.
    fn fit(&self, size: u64) {
        let mut state = self.lock();
        if state.inconsistent {
            return;
        }
        let fitted = fitted(&state.bits, size).and_then(|bits| match &state.usage {
            Usage::Frozen { successor } => Ok((bits, fitted(successor, size)?)),
            _ => Ok((bits, None)),
        });
        let before = state.recorder().cloned();
        match fitted {
            Ok((bits, successor)) => {
                let old_bits = bits.map(|new| std::mem::replace(&mut state.bits, new));
                let mut old_successor = None;
                if let (Usage::Frozen { successor: old }, Some(new)) = (&mut state.usage, successor)
                {
                    old_successor = Some(std::mem::replace(old, new));
                }
                // Attached before they are filled: writes may go on.
                self.attach(&state);
                if let Some(old) = old_bits {
                    state.bits.merge(&old);
                }
                if let (Usage::Frozen { successor }, Some(old)) = (&state.usage, old_successor) {
                    successor.merge(&old);
                }
            }
            Err(error) => {
                tracing::error!(
                    bitmap = self.name,
                    %error,
                    "the bitmap cannot be resized with its node, and is inconsistent from now on"
                );
                state.inconsistent = true;
            }
        }
        drop(state);
        if let Some(before) = before {
            self.tidy(&before);
        }
    }

    /// Fails if it could not follow its node to a size of `size` bytes: it is busy, or
    /// would take too much memory.
    pub(crate) fn check_resize(&self, size: u64) -> Result<(), NamedBitmapError> {
        let state = self.lock();
        self.check(&state, true)?;
        if !state.inconsistent {
            DirtyBitmap::new(size, state.bits.granularity())?;
        }
        Ok(())
    }

    /// Whether these are its bits, or its successor's.
    pub(crate) fn has(&self, bits: &Arc<DirtyBitmap>) -> bool {
        let state = self.lock();
        let successor = match &state.usage {
            Usage::Frozen { successor } => Arc::ptr_eq(successor, bits),
            _ => false,
        };
        successor || Arc::ptr_eq(&state.bits, bits)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// A clean bitmap like `bits`, of a disk of `size` bytes; `None` if that is its size.
fn fitted(bits: &DirtyBitmap, size: u64) -> Result<Option<Arc<DirtyBitmap>>, BitmapError> {
    if bits.size() == size {
        return Ok(None);
    }
    DirtyBitmap::new(size, bits.granularity()).map(|new| Some(Arc::new(new)))
}

/// QEMU's: chunks as large as clusters, since that is what a backup copies.
fn default_granularity(node: &Node) -> u64 {
    const LEAST: u64 = 4 << 10;
    const WITHOUT_CLUSTERS: u64 = 64 << 10;
    match node.limits().cluster_size {
        Some(cluster_size) => u64::from(cluster_size).max(LEAST),
        None => WITHOUT_CLUSTERS,
    }
}
