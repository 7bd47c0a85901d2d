//! What a snapshot that is to be has: its bitmaps, before there is anything to copy.

use crate::dirty_bitmap::{BitmapError, DirtyBitmap};

/// The account of a snapshot that is to be: all of it is to be copied, and readable.
#[derive(Debug)]
pub struct SnapshotAccount {
    pub(super) todo: DirtyBitmap,
    pub(super) needed: DirtyBitmap,
    pub(super) pending: DirtyBitmap,
    pub(super) access: DirtyBitmap,
    /// See [`Snapshot`](super::Snapshot).
    pub(super) shown: u64,
}

impl SnapshotAccount {
    /// Of a disk of `size` bytes in clusters of `cluster` bytes (a power of two): of all
    /// of it, or of what `part` has set.
    ///
    /// Errors: bad or too small clusters for the size; not enough memory.
    pub fn new(size: u64, cluster: u64, part: Option<&DirtyBitmap>) -> Result<Self, BitmapError> {
        let new = || DirtyBitmap::new(size, cluster);
        let account = Self {
            todo: new()?,
            needed: new()?,
            pending: new()?,
            access: new()?,
            shown: cluster,
        };
        let all = [
            &account.access,
            &account.pending,
            &account.needed,
            &account.todo,
        ];
        match part {
            None => all.into_iter().for_each(DirtyBitmap::set_all),
            Some(part) => {
                let mut at = 0;
                while let Some(area) = part.next_dirty(at) {
                    for bitmap in all {
                        bitmap.set(area.start, area.end - area.start);
                    }
                    at = area.end;
                }
            }
        }
        Ok(account)
    }

    /// As `new`, but kept in clusters of `fine` bytes (no larger ones). Users do not see
    /// that: of the clusters that `part` touches all is in the snapshot, and they are
    /// discarded as a whole.
    ///
    /// Errors: as for `new`.
    pub fn fine(
        size: u64,
        cluster: u64,
        fine: u64,
        part: Option<&DirtyBitmap>,
    ) -> Result<Self, BitmapError> {
        let fine = fine.min(cluster);
        let account = match part {
            None => Self::new(size, fine, None)?,
            Some(part) => {
                let whole = DirtyBitmap::new(size, cluster)?;
                whole.merge(part);
                Self::new(size, fine, Some(&whole))?
            }
        };
        Ok(Self {
            shown: cluster,
            ..account
        })
    }
}
