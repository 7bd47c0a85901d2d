//! Changing the size of a file.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::open::Kind;
use super::{FileDriver, SECTOR, sys};
use crate::runtime;

impl FileDriver {
    /// Makes a regular file `size` bytes long. A device has the size it has, which
    /// may have changed since it was opened: what it has is used, if it is not
    /// smaller.
    ///
    /// Cancel: it is done all the same, or not at all; the next resize waits for that.
    pub(super) async fn set_size(&self, size: u64) -> io::Result<()> {
        let nodes_size = size
            .checked_next_multiple_of(u64::from(SECTOR))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
        if !nodes_size.is_multiple_of(self.request_alignment()) {
            // Writing the last block would make the file longer.
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let guard = self.resizing.lock(0..1).await;
        let (file, kind) = (Arc::clone(&self.file), self.kind);
        let known = Arc::clone(&self.size);
        let resized = runtime::unblock(move || {
            let _guard = guard;
            let now = match kind {
                Kind::Regular => {
                    file.set_len(size)?;
                    size
                }
                Kind::Device { .. } => {
                    let has = sys::device_size(&file)?;
                    if size > has {
                        return Err(io::Error::from_raw_os_error(libc::EINVAL));
                    }
                    has
                }
            };
            known.store(now, Ordering::Relaxed);
            Ok(())
        })
        .await;
        // What is cut off is a hole if the file grows again. Nobody asks meanwhile.
        self.data_runs.forget(0..u64::MAX);
        resized
    }
}
