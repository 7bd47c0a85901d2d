//! Zeroes and discards.

use std::ops::Range;
use std::sync::atomic::Ordering;

use imago::format::drivers::FormatDriverInstance;

use super::requests::Place;
use super::{Image, Qcow2Driver};
use crate::buffer::{AlignedBuffer, IoVec};
use crate::driver::ZeroFlags;
use crate::error::{IoError, IoOp};

/// Clusters that are freed at once, with nobody else in the image.
const MAX_FREED: u64 = 8192;

/// Who asks: what, where, how long.
type Request = (IoOp, u64, u64);

impl Qcow2Driver {
    /// The whole clusters of a range. The last one of the disk is whole if the
    /// range reaches its end.
    fn clusters(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset + len;
        let start = offset.next_multiple_of(self.cluster_size);
        let end = match end == self.size.load(Ordering::Relaxed) {
            true => end,
            false => end - end % self.cluster_size,
        };
        start..end.max(start)
    }

    pub(super) async fn zero_all(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        let request = (IoOp::WriteZeroes, offset, len);
        if self.version < 3 {
            return Err(self.error(request.0, offset, len, libc::EOPNOTSUPP));
        }
        let end = offset + len;
        let whole = self.clusters(offset, len);
        let (head, tail) = match whole.is_empty() {
            true => (offset..end, end..end),
            false => (offset..whole.start, whole.end..end),
        };
        for edge in [head, tail] {
            self.zero_edge(request, edge, flags).await?;
        }
        let mut at = whole.start;
        while at < whole.end {
            at = self.zero_some(request, at..whole.end, flags).await?;
        }
        Ok(())
    }

    /// Zeroes a part of a cluster, as data unless it reads as zeroes already.
    async fn zero_edge(
        &self,
        request: Request,
        range: Range<u64>,
        flags: ZeroFlags,
    ) -> Result<(), IoError> {
        if range.is_empty() || self.reads_as_zeroes(request, &range).await? {
            return Ok(());
        }
        if flags.no_fallback {
            return Err(self.error(request.0, request.1, request.2, libc::EOPNOTSUPP));
        }
        // Less than two clusters.
        let len = (range.end - range.start) as usize;
        let zeroes: IoVec = AlignedBuffer::new(len).io_vec(len);
        self.write_all(range.start, &zeroes).await
    }

    async fn reads_as_zeroes(&self, request: Request, range: &Range<u64>) -> Result<bool, IoError> {
        let image = self.image.read().await;
        let mut at = range.start;
        while at < range.end {
            let (place, found) = self.place(&image, request, at, range.end - at).await?;
            if !self.flags(place).zero {
                return Ok(false);
            }
            at += found;
        }
        Ok(true)
    }

    /// Makes whole clusters zero from the start of the range, and says how far.
    async fn zero_some(
        &self,
        request: Request,
        range: Range<u64>,
        flags: ZeroFlags,
    ) -> Result<u64, IoError> {
        let image = self.image.read().await;
        let len = range.end - range.start;
        let (place, found) = self.place(&image, request, range.start, len).await?;
        let end = range.start + found;
        let frees = match place {
            Place::Zero if !flags.may_unmap => return Ok(end),
            Place::Data { .. } | Place::Zero => flags.may_unmap,
            Place::Compressed => true,
            Place::Unallocated => false,
        };
        if frees {
            drop(image);
            return self.free(request, range.start..end).await;
        }
        let _changing = self.tables.read().await;
        self.changed.store(true, Ordering::Release);
        let zeroed = self
            .run(request, image.ensure_zero_mapping(range.start, found))
            .await?;
        match zeroed {
            (at, len) if at == range.start && len > 0 => Ok(at + len),
            _ => Err(self.error(request.0, range.start, found, libc::EIO)),
        }
    }

    pub(super) async fn discard_all(&self, offset: u64, len: u64) -> Result<(), IoError> {
        let request = (IoOp::Discard, offset, len);
        if self.version < 3 && self.backing.load().is_some() {
            // Version 2 cannot say that a cluster is zero and not the backing image's.
            return Ok(());
        }
        let whole = self.clusters(offset, len);
        let mut at = whole.start;
        while at < whole.end {
            let (place, found) = {
                let image = self.image.read().await;
                self.place(&image, request, at, whole.end - at).await?
            };
            at = match place {
                Place::Data { .. } | Place::Compressed => {
                    self.free(request, at..at + found).await?
                }
                // What is not there takes no space.
                Place::Zero | Place::Unallocated => at + found,
            };
        }
        Ok(())
    }

    /// Frees whole clusters from the start of the range, which read as zeroes then,
    /// and says how far.
    ///
    /// With nobody else in the image: a request under way must not end up in a
    /// cluster that belongs to somebody else by now. And nothing is allocated
    /// before the image's tables say so on the storage.
    async fn free(&self, request: Request, range: Range<u64>) -> Result<u64, IoError> {
        let most = range.start - range.start % self.cluster_size + MAX_FREED * self.cluster_size;
        let range = range.start..range.end.min(most);
        let mut image = self.image.write().await;
        let _alone = self.tables.write().await;
        self.write_out(&image, request).await?;
        let unused = match self.pass_discard.load(Ordering::Relaxed) {
            true => self.places_of(&image, request, &range).await?,
            false => Vec::new(),
        };
        self.changed.store(true, Ordering::Release);
        let mut at = range.start;
        while at < range.end {
            let len = range.end - at;
            let freed = match self.version {
                2 => self.run(request, image.discard_to_backing(at, len)).await?,
                _ => self.run(request, image.discard_to_zero(at, len)).await?,
            };
            match freed {
                (start, len) if start == at && len > 0 => at += len,
                _ => return Err(self.error(request.0, at, len, libc::EIO)),
            }
        }
        self.write_out(&image, request).await?;
        for Range { start, end } in unused {
            // A hint, as the discard itself.
            if let Err(error) = self.data().discard(start, end - start).await {
                tracing::debug!(node = &*self.node, %error, "space was not given back");
            }
        }
        Ok(at)
    }

    /// Places of the data in a range that nothing else uses, neighbours together.
    async fn places_of(
        &self,
        image: &Image,
        request: Request,
        range: &Range<u64>,
    ) -> Result<Vec<Range<u64>>, IoError> {
        let mut places: Vec<Range<u64>> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (place, found) = self.place(image, request, at, range.end - at).await?;
            if let Place::Data {
                at: start,
                writable: true,
            } = place
            {
                // The last cluster of a disk may be cut off, not that of the file.
                let len = found.next_multiple_of(self.cluster_size);
                match places.last_mut() {
                    Some(last) if last.end == start => last.end += len,
                    _ => places.push(start..start + len),
                }
            }
            at += found;
        }
        Ok(places)
    }
}
