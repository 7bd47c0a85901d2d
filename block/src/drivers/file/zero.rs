//! Zeroes and discards without writing data, as far as the storage can.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::FileDriver;
use super::open::Kind;
use super::sys;
use crate::buffer::AlignedBuffer;
use crate::driver::ZeroFlags;
use crate::runtime::{self, current_ring};
use crate::uring::{self, Hold};

/// Zeroes that are written as data go out in pieces of this many bytes.
const ZERO_CHUNK: u64 = 1 << 20;

/// What has not been refused so far. Each flag only ever goes from `true` to
/// `false`; any thread.
#[derive(Debug)]
pub(super) struct Support {
    punch_hole: AtomicBool,
    zero_range: AtomicBool,
    allocate: AtomicBool,
    discard: AtomicBool,
}

impl Support {
    pub(super) fn all() -> Self {
        Self {
            punch_hole: AtomicBool::new(true),
            zero_range: AtomicBool::new(true),
            allocate: AtomicBool::new(true),
            discard: AtomicBool::new(true),
        }
    }

    /// As on storage that has refused everything.
    #[cfg(all(test, not(shuttle)))]
    pub(super) fn none() -> Self {
        Self {
            punch_hole: AtomicBool::new(false),
            zero_range: AtomicBool::new(false),
            allocate: AtomicBool::new(false),
            discard: AtomicBool::new(false),
        }
    }

    #[cfg(all(test, not(shuttle)))]
    pub(super) fn has_zero_range(&self) -> bool {
        self.zero_range.load(Ordering::Relaxed)
    }
}

/// Whether the storage says that it cannot do something at all.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY)
    )
}

fn unsupported() -> io::Error {
    io::Error::from_raw_os_error(libc::EOPNOTSUPP)
}

impl FileDriver {
    /// `fallocate` with `mode`, unless `flag` remembers that it is refused.
    async fn fallocate(
        &self,
        flag: &AtomicBool,
        mode: i32,
        offset: u64,
        len: u64,
        hold: Option<&Rc<dyn Hold>>,
    ) -> io::Result<()> {
        if !flag.load(Ordering::Relaxed) {
            return Err(unsupported());
        }
        // Reads past the end give zeroes, so the file need not grow.
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        let ring = current_ring();
        let result = uring::fallocate(&ring, &self.file, mode, offset, len, hold).await;
        self.data_runs.forget(offset..offset + len);
        match result {
            Err(error) if is_unsupported(&error) => {
                flag.store(false, Ordering::Relaxed);
                Err(unsupported())
            }
            result => result,
        }
    }

    pub(super) async fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let hold = self.lock_range(offset, len).await;
        match self.kind {
            Kind::Regular => {
                let result = self.zero_in_file(offset, len, flags, hold.as_ref()).await;
                self.or_as_data(result, offset, len, flags, hold.as_ref())
                    .await?;
            }
            Kind::Device { sector } => {
                let sector = u64::from(sector);
                let end = offset + len;
                let first = offset.next_multiple_of(sector).min(end);
                let last = (end - end % sector).max(first);
                for (from, to) in [(offset, first), (last, end)] {
                    // Less than a sector each.
                    if from < to {
                        self.zero_as_data(from, to - from, hold.as_ref()).await?;
                    }
                }
                if first < last {
                    let len = last - first;
                    let result = self.zero_on_device(first, len, flags, hold.as_ref()).await;
                    self.or_as_data(result, first, len, flags, hold.as_ref())
                        .await?;
                }
            }
        }
        if flags.fua {
            self.make_durable().await?;
        }
        Ok(())
    }

    /// Writes zeroes where `result` says that there is no better way.
    async fn or_as_data(
        &self,
        result: io::Result<()>,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
        hold: Option<&Rc<dyn Hold>>,
    ) -> io::Result<()> {
        match result {
            Err(error) if is_unsupported(&error) && !flags.no_fallback => {
                self.zero_as_data(offset, len, hold).await
            }
            result => result,
        }
    }

    async fn zero_in_file(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
        hold: Option<&Rc<dyn Hold>>,
    ) -> io::Result<()> {
        let support = &self.support;
        let punch = libc::FALLOC_FL_PUNCH_HOLE;
        if flags.may_unmap {
            match self
                .fallocate(&support.punch_hole, punch, offset, len, hold)
                .await
            {
                Err(error) if is_unsupported(&error) => {}
                result => return result,
            }
        }
        let zero = libc::FALLOC_FL_ZERO_RANGE;
        match self
            .fallocate(&support.zero_range, zero, offset, len, hold)
            .await
        {
            Err(error) if is_unsupported(&error) => {}
            result => return result,
        }
        // A hole that is then filled: what tmpfs has instead.
        if flags.may_unmap || !support.allocate.load(Ordering::Relaxed) {
            return Err(unsupported());
        }
        self.fallocate(&support.punch_hole, punch, offset, len, hold)
            .await?;
        self.fallocate(&support.allocate, 0, offset, len, hold)
            .await
    }

    /// `offset` and `len` are whole sectors. The kernel's fallocate on a block
    /// device is its BLKZEROOUT: with a hole it may unmap, and refuses to write
    /// zeroes itself; without, it writes them if the device has nothing better.
    async fn zero_on_device(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
        hold: Option<&Rc<dyn Hold>>,
    ) -> io::Result<()> {
        let support = &self.support;
        if flags.may_unmap {
            let punch = libc::FALLOC_FL_PUNCH_HOLE;
            match self
                .fallocate(&support.punch_hole, punch, offset, len, hold)
                .await
            {
                Err(error) if is_unsupported(&error) => {}
                result => return result,
            }
        }
        if flags.no_fallback {
            return Err(unsupported());
        }
        let zero = libc::FALLOC_FL_ZERO_RANGE;
        self.fallocate(&support.zero_range, zero, offset, len, hold)
            .await
    }

    /// Writes zeroes as data; the range is locked by the caller.
    async fn zero_as_data(
        &self,
        offset: u64,
        len: u64,
        hold: Option<&Rc<dyn Hold>>,
    ) -> io::Result<()> {
        let mut at = offset;
        let end = offset + len;
        // At most ZERO_CHUNK, so it fits.
        let zeroes = AlignedBuffer::new(len.min(ZERO_CHUNK) as usize);
        while at < end {
            // To a chunk's border, so that what follows is aligned.
            let chunk = (ZERO_CHUNK - at % ZERO_CHUNK)
                .min(end - at)
                .min(len.min(ZERO_CHUNK));
            let iov = zeroes.io_vec(chunk as usize);
            self.write_locked(at, iov, hold).await?;
            at += chunk;
        }
        Ok(())
    }

    pub(super) async fn discard_range(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 || !self.support.discard.load(Ordering::Relaxed) {
            return Ok(());
        }
        let hold = self.lock_range(offset, len).await;
        let result = match self.kind {
            Kind::Regular => {
                let punch = libc::FALLOC_FL_PUNCH_HOLE;
                self.fallocate(&self.support.punch_hole, punch, offset, len, hold.as_ref())
                    .await
            }
            Kind::Device { sector } => {
                let sector = u64::from(sector);
                let first = offset.next_multiple_of(sector);
                let last = (offset + len) / sector * sector;
                if first >= last {
                    return Ok(());
                }
                let file = Arc::clone(&self.file);
                // The ioctl goes on when this future is dropped, and so does
                // what it covers: a discarded range has no content to protect.
                runtime::unblock(move || sys::device_discard(&file, first, last - first)).await
            }
        };
        match result {
            // A hint that is not understood.
            Err(error) if is_unsupported(&error) => {
                self.support.discard.store(false, Ordering::Relaxed);
                Ok(())
            }
            result => result,
        }
    }
}
