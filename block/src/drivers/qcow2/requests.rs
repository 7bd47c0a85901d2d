//! Reads, writes, flushes and block status.

use std::sync::atomic::Ordering;

use imago::ShallowMapping;
use imago::format::drivers::FormatDriverInstance;
use imago::io_buffers::IoVectorMut;

use super::file::read_or_zero;
use super::{Image, Qcow2Driver};
use crate::buffer::IoVec;
use crate::driver::{Extent, ExtentFlags};
use crate::error::{IoError, IoOp};

/// Most runs of clusters that one look at the block status goes through: whoever asks for
/// the status of a large disk must not keep others waiting.
const MAX_PLACES: usize = 4096;

/// Where a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the image's data.
    Data {
        /// First byte there.
        at: u64,
        /// Whether it may be written there: nobody else uses the cluster.
        writable: bool,
    },
    /// Compressed.
    Compressed,
    /// Reads as zeroes, by the image's own word.
    Zero,
    /// Nowhere in this image.
    Unallocated,
}

impl Qcow2Driver {
    /// Where the bytes from `offset` are, and how many, at most `len`.
    pub(super) async fn place(
        &self,
        image: &Image,
        request: (IoOp, u64, u64),
        offset: u64,
        len: u64,
    ) -> Result<(Place, u64), IoError> {
        let found = async {
            let (mapping, found) = image.get_mapping(offset, len).await?;
            let place = match mapping {
                ShallowMapping::Raw {
                    offset, writable, ..
                } => Place::Data {
                    at: offset,
                    writable,
                },
                ShallowMapping::Zero { explicit: true, .. } => Place::Zero,
                ShallowMapping::Special { .. } => Place::Compressed,
                _ => Place::Unallocated,
            };
            Ok((place, found.min(len)))
        };
        let (place, found) = self.run(request, found).await?;
        if found == 0 {
            // Past the end: nodes have checked that before.
            return Err(self.error(request.0, offset, len, libc::EIO));
        }
        Ok((place, found))
    }

    pub(super) async fn read_all(&self, offset: u64, iov: &IoVec) -> Result<(), IoError> {
        let request = (IoOp::Read, offset, iov.len() as u64);
        // Nobody frees a cluster while it is read.
        let image = self.image.read().await;
        let mut done = 0;
        while done < iov.len() {
            let at = offset + done as u64;
            let left = (iov.len() - done) as u64;
            let (place, found) = self.place(&image, request, at, left).await?;
            let part = iov.slice(done, found as usize);
            match place {
                Place::Data { at, .. } => self.data().read(at, part).await?,
                Place::Zero => part.fill(0),
                Place::Compressed => {
                    // Not for writers, but each reader pins a table in the cache as
                    // they do.
                    let _bounded = self.tables.read().await;
                    done += self.unpack(&image, request, at, &part).await?;
                    continue;
                }
                Place::Unallocated => match self.backing.load_full() {
                    Some(backing) => read_or_zero(&backing.node(), at, part).await?,
                    None => part.fill(0),
                },
            }
            done += found as usize;
        }
        Ok(())
    }

    /// Reads from a compressed cluster, and gives how many bytes: none if it is not
    /// compressed any more. The caller holds `image` and `tables`.
    pub(super) async fn unpack(
        &self,
        image: &Image,
        request: (IoOp, u64, u64),
        at: u64,
        into: &IoVec,
    ) -> Result<usize, IoError> {
        let to_end = self.cluster_size - at % self.cluster_size;
        let len = into.len().min(to_end as usize);
        let mut bytes = vec![0; len];
        let read = async {
            let rest = image
                .try_readv_special(IoVectorMut::from(&mut bytes[..]), at)
                .await?;
            // Not compressed any more: a write came first.
            Ok(rest.is_none())
        };
        if !self.run(request, read).await? {
            return Ok(0);
        }
        into.slice(0, len).copy_from(0, &bytes);
        Ok(len)
    }

    pub(super) async fn write_all(&self, offset: u64, iov: &IoVec) -> Result<(), IoError> {
        let request = (IoOp::Write, offset, iov.len() as u64);
        let mut done = 0;
        while done < iov.len() {
            let at = offset + done as u64;
            let left = (iov.len() - done) as u64;
            let image = self.image.read().await;
            let (place, found) = self.place(&image, request, at, left).await?;
            let part = iov.slice(done, found as usize);
            done += match place {
                Place::Data { at, writable: true } => {
                    self.data().write(at, part).await?;
                    found as usize
                }
                Place::Compressed => {
                    drop(image);
                    self.replace_compressed(request, at, &part).await?
                }
                _ => {
                    let _changing = self.tables.read().await;
                    self.write_new(&image, request, at, &part).await?
                }
            };
        }
        Ok(())
    }

    /// Writes where there is no cluster of this image alone yet; gives how many
    /// bytes. The caller holds `image` and `tables`.
    pub(super) async fn write_new(
        &self,
        image: &Image,
        request: (IoOp, u64, u64),
        at: u64,
        iov: &IoVec,
    ) -> Result<usize, IoError> {
        self.changed.store(true, Ordering::Release);
        let len = iov.len() as u64;
        let prepared = self
            .run(request, image.prepare_data_mapping(at, len, true))
            .await?;
        let written = prepared.length().min(len) as usize;
        self.data()
            .write(prepared.offset(), iov.slice(0, written))
            .await?;
        // The data is there before anybody finds it.
        self.run(request, image.commit_data_mapping(prepared))
            .await?;
        Ok(written)
    }

    /// Writes over compressed clusters, whose space is free then; gives how many
    /// bytes.
    async fn replace_compressed(
        &self,
        request: (IoOp, u64, u64),
        at: u64,
        iov: &IoVec,
    ) -> Result<usize, IoError> {
        let image = self.image.write().await;
        let _changing = self.tables.write().await;
        self.write_out(&image, request).await?;
        let written = self.write_new(&image, request, at, iov).await?;
        self.write_out(&image, request).await?;
        Ok(written)
    }

    /// Brings all changed tables to the storage; they need not be durable. The
    /// caller holds `tables` alone.
    pub(super) async fn write_out(
        &self,
        image: &Image,
        request: (IoOp, u64, u64),
    ) -> Result<(), IoError> {
        if !self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.run(request, image.flush()).await?;
        // Not before: a flush that finds nothing changed does not wait.
        self.changed.store(false, Ordering::Release);
        Ok(())
    }

    pub(super) async fn flush_all(&self) -> Result<(), IoError> {
        if self.is_read_only() {
            return Ok(());
        }
        if self.changed.load(Ordering::Acquire) {
            let image = self.image.read().await;
            let _alone = self.tables.write().await;
            self.write_out(&image, (IoOp::Flush, 0, 0)).await?;
        }
        if let Some(data_file) = &self.data_file {
            data_file.flush().await?;
        }
        self.file.flush().await
    }

    pub(super) async fn status(&self, offset: u64, len: u64) -> Result<Extent, IoError> {
        let request = (IoOp::BlockStatus, offset, len);
        let image = self.image.read().await;
        let (place, mut found) = self.place(&image, request, offset, len).await?;
        // Places of one kind need not follow each other in the file.
        for _ in 1..MAX_PLACES {
            if found == len {
                break;
            }
            let (next, more) = self
                .place(&image, request, offset + found, len - found)
                .await?;
            if self.flags(next) != self.flags(place) {
                break;
            }
            found += more;
        }
        Ok(Extent {
            len: found,
            flags: self.flags(place),
        })
    }

    pub(super) fn flags(&self, place: Place) -> ExtentFlags {
        match place {
            Place::Data { .. } | Place::Compressed => ExtentFlags {
                data: true,
                zero: false,
                allocated: true,
            },
            Place::Zero => ExtentFlags {
                data: false,
                zero: true,
                allocated: true,
            },
            Place::Unallocated => ExtentFlags {
                data: false,
                zero: self.backing.load().is_none(),
                allocated: false,
            },
        }
    }
}
