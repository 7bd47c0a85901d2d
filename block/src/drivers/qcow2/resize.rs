//! Changing the size of an image.

use std::sync::atomic::Ordering;

use imago::format::PreallocateMode;
use imago::format::drivers::FormatDriverInstance;

use super::Qcow2Driver;
use crate::error::{IoError, IoOp};

impl Qcow2Driver {
    pub(super) async fn set_size(&self, size: u64) -> Result<(), IoError> {
        let request = (IoOp::Truncate, size, 0);
        let old = self.size.load(Ordering::Relaxed);
        if self.snapshots {
            // They have a size of their own, and version 2 cannot say so.
            return Err(self.error(request.0, size, 0, libc::EOPNOTSUPP));
        }
        let mut image = self.image.write().await;
        let _alone = self.tables.write().await;
        self.changed.store(true, Ordering::Release);
        if size > old {
            let backing = self.backing.load_full();
            let shows = backing.is_some_and(|b| b.node().size() > old);
            // What is new reads as zeroes, whatever the backing image has there.
            let mode = match shows {
                true => PreallocateMode::Zero,
                false => PreallocateMode::None,
            };
            self.run(request, image.resize_grow(size, mode)).await?;
        } else {
            self.write_out(&image, request).await?;
            self.changed.store(true, Ordering::Release);
            self.run(request, image.resize_shrink(size)).await?;
        }
        self.size.store(size, Ordering::Relaxed);
        self.write_out(&image, request).await?;
        self.file.flush().await
    }
}
