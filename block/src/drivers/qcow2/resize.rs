//! Changing the size of an image.

use std::sync::atomic::Ordering;

use imago::format::PreallocateMode;
use imago::format::drivers::FormatDriverInstance;

use super::header::MAX_L1_ENTRIES;
use super::requests::Place;
use super::{Image, Qcow2Driver};
use crate::buffer::AlignedBuffer;
use crate::driver::BlockDriver;
use crate::error::{IoError, IoOp};
use crate::node::SECTOR_SIZE;

impl Qcow2Driver {
    /// See [`BlockDriver::resize`]. `EFBIG`: the first level table cannot be so long.
    pub(super) async fn set_size(&self, size: u64) -> Result<(), IoError> {
        let request = (IoOp::Truncate, size, 0);
        let old = self.size.load(Ordering::Relaxed);
        if self.snapshots {
            // They have a size of their own, and version 2 cannot say so.
            return Err(self.error(request.0, size, 0, libc::EOPNOTSUPP));
        }
        let per_entry = self.cluster_size * (self.cluster_size / 8);
        if size.div_ceil(per_entry) > MAX_L1_ENTRIES {
            return Err(self.error(request.0, size, 0, libc::EFBIG));
        }
        let mut image = self.image.write().await;
        let _alone = self.tables.write().await;
        self.write_out(&image, request).await?;
        if size > old {
            self.clear_end(&image, request).await?;
            self.changed.store(true, Ordering::Release);
            let backing = self.backing.load_full();
            let shows = backing.is_some_and(|b| b.node().size() > old);
            // What is new reads as zeroes, whatever the backing image has there.
            let mode = match shows {
                true => PreallocateMode::Zero,
                false => PreallocateMode::None,
            };
            self.run(request, image.resize_grow(size, mode)).await?;
        } else {
            self.changed.store(true, Ordering::Release);
            self.free_end(&mut image, request, old).await?;
            self.run(request, image.resize_shrink(size)).await?;
        }
        self.size.store(size, Ordering::Relaxed);
        self.write_out(&image, request).await?;
        self.file.flush().await
    }

    /// Gives up all clusters that a smaller disk has no part of. `imago` does so by
    /// itself, but what it could not free would come back when the disk grows again.
    async fn free_end(
        &self,
        image: &mut Image,
        request: (IoOp, u64, u64),
        old: u64,
    ) -> Result<(), IoError> {
        let mut at = request.1.next_multiple_of(self.cluster_size);
        while at < old {
            let freed = self.run(request, image.discard_to_backing(at, old - at));
            match freed.await? {
                (start, len) if start == at && len > 0 => at += len,
                _ => return Err(self.error(request.0, request.1, 0, libc::EIO)),
            }
        }
        Ok(())
    }

    /// Zeroes what the last cluster has past the end of the disk: what was there before
    /// the disk was made smaller.
    ///
    /// The caller holds both locks alone, and all tables are in the file.
    async fn clear_end(&self, image: &Image, request: (IoOp, u64, u64)) -> Result<(), IoError> {
        let end = self.size();
        let used = end % self.cluster_size;
        if used == 0 {
            // Also of a disk of less than a sector: it has no data.
            return Ok(());
        }
        let sector = end - SECTOR_SIZE;
        let (mut place, _) = self.place(image, request, sector, SECTOR_SIZE).await?;
        let data = AlignedBuffer::new(SECTOR_SIZE as usize).io_vec(SECTOR_SIZE as usize);
        let shared = match place {
            Place::Compressed => {
                self.unpack(image, request, sector, &data).await?;
                true
            }
            Place::Data {
                at,
                writable: false,
            } => {
                self.data().read(at, data.clone()).await?;
                true
            }
            _ => false,
        };
        if shared {
            // As it is, in a cluster that may be written.
            self.write_new(image, request, sector, &data).await?;
            self.write_out(image, request).await?;
            (place, _) = self.place(image, request, sector, SECTOR_SIZE).await?;
        }
        let Place::Data { at, .. } = place else {
            // Zeroes, or the backing image's, of which nothing new shows.
            return Ok(());
        };
        let at = at + SECTOR_SIZE;
        let len = (self.cluster_size - used).min(self.data().node().size().saturating_sub(at));
        if len > 0 {
            self.data().write_zeroes(at, len).await?;
            // Before the header says that this is part of the disk.
            self.data().flush().await?;
        }
        Ok(())
    }
}
