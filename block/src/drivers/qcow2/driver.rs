//! The image as nodes see it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;

use super::{Qcow2Driver, backing_of, file_permissions};
use crate::bitmaps::kept::ImageFile;
use crate::buffer::IoVec;
use crate::driver::{
    BlockDriver, BoxFuture, CancelReach, ChildRole, Extent, ImageDetails, Limits, Reopen, Reopened,
    WriteFlags, ZeroFlags,
};
use crate::drivers::ReopenError;
use crate::error::IoError;
use crate::node::{Child, Node, SECTOR_SIZE};
use crate::permissions::{Perm, Permissions};
use crate::runtime::EventLoop;

impl BlockDriver for Qcow2Driver {
    fn name(&self) -> &'static str {
        "qcow2"
    }

    fn image_file(&self) -> Option<ImageFile> {
        self.file.node().driver().image_file()
    }

    fn bitmap_layer(&self) -> Option<String> {
        Some("qcow2".to_owned())
    }

    /// A part of a sector at the end cannot be reached, as in QEMU.
    fn size(&self) -> u64 {
        let size = self.size.load(Ordering::Relaxed);
        size - size % SECTOR_SIZE
    }

    fn limits(&self) -> Limits {
        Limits {
            zero_alignment: self.cluster_size as u32,
            cluster_size: Some(self.cluster_size as u32),
            can_zero_fast: self.version >= 3,
            ..Limits::default()
        }
    }

    fn filename(&self) -> String {
        self.file.node().driver().filename()
    }

    fn image_details(&self) -> Option<ImageDetails> {
        Some(self.details.clone())
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.read_all(offset, &iov).await })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.write_all(offset, &iov).await?;
            match flags.fua {
                // Durable data is lost without its tables.
                true => self.flush_all().await,
                false => Ok(()),
            }
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.zero_all(offset, len, flags).await?;
            match flags.fua {
                true => self.flush_all().await,
                false => Ok(()),
            }
        })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.discard_all(offset, len).await })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(self.flush_all())
    }

    fn flushes_below(&self) -> bool {
        true
    }

    fn is_dirty(&self) -> bool {
        !self.is_read_only() && self.changed.load(Ordering::Acquire)
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(self.status(offset, len))
    }

    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(self.set_size(size))
    }

    fn backing(&self) -> Option<Arc<Node>> {
        self.backing.load().as_ref().map(|backing| backing.node())
    }

    fn cancel_in_flight(&self, reach: CancelReach) {
        self.file.node().cancel_in_flight(reach);
        if let Some(data_file) = &self.data_file {
            data_file.node().cancel_in_flight(reach);
        }
        if let Some(backing) = self.backing.load_full() {
            // Others may read it, too: they go on waiting for a server that is silent.
            backing.node().cancel_in_flight(CancelReach::Waiting);
        }
    }

    fn child_permissions(&self, role: ChildRole, users: Permissions) -> Permissions {
        match role {
            ChildRole::File | ChildRole::DataFile => {
                let next = match self.reopening.load(Ordering::Relaxed) {
                    true => self.next().as_ref().map(|next| next.read_only),
                    false => None,
                };
                file_permissions(next.unwrap_or_else(|| self.is_read_only()), users)
            }
            _ => Permissions {
                need: users.need & Perm::CONSISTENT_READ,
                share: Perm::CONSISTENT_READ
                    | Perm::WRITE_UNCHANGED
                    | match users.share.contains(Perm::WRITE) {
                        true => Perm::WRITE | Perm::RESIZE,
                        false => Perm::NONE,
                    },
            },
        }
    }

    fn has_layers(&self) -> bool {
        true
    }

    fn reopen_prepare<'a>(
        &'a self,
        to: Reopen<'a>,
    ) -> BoxFuture<'a, Result<Reopened, ReopenError>> {
        Box::pin(async move { self.prepare(&to).await })
    }

    fn reopen_begin(&self) {
        self.reopening.store(true, Ordering::Relaxed);
    }

    fn reopen_commit(&self) {
        self.reopening.store(false, Ordering::Relaxed);
        let next = self.next().take();
        let Some(next) = next else {
            return;
        };
        self.read_only.store(next.read_only, Ordering::Relaxed);
        self.pass_discard
            .store(next.pass_discard, Ordering::Relaxed);
        if let Some(image) = next.image {
            self.change_image(|current| *current = image);
            self.writable.store(true, Ordering::Relaxed);
        }
    }

    fn reopen_abort(&self) {
        self.reopening.store(false, Ordering::Relaxed);
        let next = self.next().take();
        drop(next);
    }

    fn set_backing(&self, backing: Option<Child>) {
        let storage = backing.as_ref().map(|backing| {
            // It asks for the size of the node and waits for nothing.
            backing_of(backing).now_or_never().and_then(Result::ok)
        });
        self.backing.store(backing.map(Arc::new));
        match storage {
            None => self.change_image(|image| image.set_backing(None)),
            Some(Some(storage)) => self.change_image(|image| image.set_backing(Some(storage))),
            Some(None) => {
                self.broken.store(true, Ordering::Release);
                tracing::error!(node = &*self.node, "The backing image cannot be used");
            }
        }
    }

    /// Writes out what is left.
    fn close(&self) {
        if !self.is_dirty() {
            return;
        }
        let flushed =
            EventLoop::new("qcow2-close").map(|event_loop| event_loop.block_on(self.flush_all()));
        match flushed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(node = &*self.node, %error, "Image was not written out");
            }
            Err(error) => {
                tracing::error!(node = &*self.node, %error, "Image was not written out");
            }
        }
    }
}

impl Drop for Qcow2Driver {
    fn drop(&mut self) {
        if self.changed.load(Ordering::Acquire) {
            tracing::warn!(
                node = &*self.node,
                "image is dropped with changes not written"
            );
        }
    }
}
