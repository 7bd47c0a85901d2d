//! A file that can be opened anew while it is in use: writable or not, with or
//! without O_DIRECT.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

use super::{FileDriver, OpenFlags, open};
use crate::bitmaps::kept::ImageFile;
use crate::buffer::IoVec;
use crate::copy_source::{CopySource, FileRange};
use crate::driver::{
    BlockDriver, BoxFuture, Extent, Limits, Reopen, Reopened, WriteFlags, ZeroFlags,
};
use crate::drivers::{OpenError, ReopenError};
use crate::error::{IoError, IoOp};
use crate::options::{DriverOptions, FileOptions};
use crate::permissions::{PermissionError, Permissions};
use crate::runtime;

/// The driver of `file` and `host_device` nodes: a [`FileDriver`] that
/// `blockdev-reopen` puts another in place of.
pub struct FileNode {
    options: FileOptions,
    /// Replaced on main with no request in flight.
    current: ArcSwap<FileDriver>,
    /// The one that was prepared to come next. Main only.
    next: Mutex<Option<Arc<FileDriver>>>,
    /// It is about to come. Main only.
    reopening: AtomicBool,
}

impl FileNode {
    /// A node of `file`, which was opened as `options` say.
    pub fn new(file: FileDriver, options: FileOptions) -> Self {
        Self {
            options,
            current: ArcSwap::from_pointee(file),
            next: Mutex::default(),
            reopening: AtomicBool::new(false),
        }
    }

    fn next(&self) -> MutexGuard<'_, Option<Arc<FileDriver>>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_own_options(&self, new: &DriverOptions) -> Result<(), ReopenError> {
        let DriverOptions::File(new) = new else {
            return Err(ReopenError::CannotChange("driver".to_owned()));
        };
        if new.locking != self.options.locking && new.locking.is_none() {
            return Err(ReopenError::CannotReset("locking".to_owned()));
        }
        if new.bitmap_file != self.options.bitmap_file && new.bitmap_file.is_none() {
            return Err(ReopenError::CannotReset("bitmap-file".to_owned()));
        }
        let changed = if new.host_device != self.options.host_device {
            "driver"
        } else if new.filename.as_os_str() != self.options.filename.as_os_str() {
            // As it is written: `./a` is another name than `a`.
            "filename"
        } else if new.locking != self.options.locking {
            "locking"
        } else if new.bitmap_file != self.options.bitmap_file {
            "bitmap-file"
        } else {
            return Ok(());
        };
        Err(ReopenError::CannotChange(changed.to_owned()))
    }
}

impl FileDriver {
    fn is_open_as(&self, flags: OpenFlags) -> bool {
        self.read_only == flags.read_only
            && self.direct.is_some() == flags.cache.direct
            && self.no_flush == flags.cache.no_flush
    }

    /// Opens the same file again. What is known of it, of writes under way and of
    /// lost data stays. Blocks.
    fn reopened(&self, options: &FileOptions, flags: OpenFlags) -> Result<Self, ReopenError> {
        let opened = open(&self.node, options, flags)?;
        let same = identity(&self.file)
            .and_then(|old| Ok(old == identity(&opened.file)?))
            .map_err(|source| OpenError::Probe {
                path: options.filename.clone(),
                what: "the identity",
                source,
            })?;
        if !same {
            return Err(ReopenError::AnotherFile {
                path: options.filename.clone(),
                node: self.node.to_string(),
            });
        }
        Ok(Self {
            size: Arc::clone(&self.size),
            resizing: self.resizing.clone(),
            writing: Arc::clone(&self.writing),
            flushes: Arc::clone(&self.flushes),
            ..opened
        })
    }
}

/// What makes two open files the same.
fn identity(file: &File) -> io::Result<(u64, u64, u64)> {
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino(), metadata.rdev()))
}

/// Closes a file where that may block.
fn close(file: Option<Arc<FileDriver>>) {
    if let Some(file) = file {
        runtime::unblock_detached(move || drop(file));
    }
}

impl Drop for FileNode {
    /// Whoever held the node last may be a loop.
    fn drop(&mut self) {
        if runtime::current().is_some() {
            close(Some(self.current.load_full()));
            close(self.next().take());
        }
    }
}

impl BlockDriver for FileNode {
    fn name(&self) -> &'static str {
        self.current.load().name()
    }

    fn size(&self) -> u64 {
        self.current.load().size()
    }

    fn limits(&self) -> Limits {
        self.current.load().limits()
    }

    fn filename(&self) -> String {
        self.current.load().filename()
    }

    fn image_file(&self) -> Option<ImageFile> {
        Some(ImageFile {
            file: Arc::clone(&self.current.load().file),
            path: self.options.filename.clone(),
            bitmap_file: self.options.bitmap_file.clone(),
        })
    }

    fn bitmap_layer(&self) -> Option<String> {
        Some("file".to_owned())
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        let file = self.current.load_full();
        Box::pin(async move {
            file.read_into(offset, &iov)
                .await
                .map_err(|error| file.error(IoOp::Read, offset, iov.len() as u64, &error))
        })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        let file = self.current.load_full();
        Box::pin(async move {
            let len = iov.len() as u64;
            file.write_from(offset, iov, flags.fua)
                .await
                .map_err(|error| file.error(IoOp::Write, offset, len, &error))
        })
    }

    fn file_range(&self, offset: u64, len: u64) -> Option<FileRange> {
        self.current.load().file_range(offset, len)
    }

    fn copy_from<'a>(&'a self, offset: u64, from: CopySource) -> BoxFuture<'a, bool> {
        let file = self.current.load_full();
        Box::pin(async move { file.copy_from(offset, from).await })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        let file = self.current.load_full();
        Box::pin(async move { file.write_zeroes(offset, len, flags).await })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        let file = self.current.load_full();
        Box::pin(async move { file.discard(offset, len).await })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        let file = self.current.load_full();
        Box::pin(async move { file.flush().await })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        let file = self.current.load_full();
        Box::pin(async move { file.block_status(offset, len).await })
    }

    fn resize<'a>(&'a self, size: u64) -> BoxFuture<'a, Result<(), IoError>> {
        let file = self.current.load_full();
        Box::pin(async move { file.resize(size).await })
    }

    /// Others are looked for with the locks of the open file, and what the next one
    /// will hold is then locked for it, too: at no moment is anything of it free.
    fn check_permissions(&self, wanted: Permissions) -> Result<(), PermissionError> {
        let current = self.current.load_full();
        let next = match self.reopening.load(Ordering::Relaxed) {
            true => self.next().clone(),
            false => None,
        };
        let Some(next) = next else {
            return current.check_permissions(wanted);
        };
        next.check_writable(wanted)?;
        current.check_locks(wanted)?;
        let taken = match &next.lock {
            Some(lock) => lock.take(wanted),
            None => Ok(()),
        };
        if taken.is_err() {
            current.abort_permissions();
        }
        taken
    }

    fn set_permissions(&self) {
        self.current.load().set_permissions();
    }

    fn abort_permissions(&self) {
        self.current.load().abort_permissions();
    }

    fn reopen_prepare<'a>(
        &'a self,
        to: Reopen<'a>,
    ) -> BoxFuture<'a, Result<Reopened, ReopenError>> {
        Box::pin(async move {
            self.check_own_options(to.driver)?;
            let flags = OpenFlags {
                read_only: to.options.read_only,
                auto_read_only: to.auto_read_only,
                cache: to.options.cache,
            };
            let current = self.current.load_full();
            if current.is_open_as(flags) {
                return Ok(Reopened {
                    read_only: flags.read_only,
                    size: None,
                });
            }
            let options = self.options.clone();
            let next = runtime::unblock(move || {
                let next = current.reopened(&options, flags);
                // The last one to hold it closes the file, and must not be main.
                drop(current);
                next
            })
            .await?;
            let read_only = next.read_only;
            let unused = self.next().replace(Arc::new(next));
            close(unused);
            Ok(Reopened {
                read_only,
                size: None,
            })
        })
    }

    fn reopen_begin(&self) {
        self.reopening.store(true, Ordering::Relaxed);
    }

    fn reopen_commit(&self) {
        self.reopening.store(false, Ordering::Relaxed);
        let next = self.next().take();
        if let Some(next) = next {
            let old = self.current.swap(next);
            if let Some(lock) = &old.lock {
                // Else it would be in the way of the new one's next check.
                lock.release();
            }
            close(Some(old));
        }
    }

    fn reopen_abort(&self) {
        self.reopening.store(false, Ordering::Relaxed);
        let next = self.next().take();
        if let Some(lock) = next.as_ref().and_then(|next| next.lock.as_ref()) {
            lock.release();
        }
        close(next);
    }

    fn allocated_size(&self) -> BoxFuture<'_, Option<u64>> {
        let file = Arc::clone(&self.current.load().file);
        Box::pin(async move {
            runtime::unblock(move || file.metadata().ok().map(|m| m.blocks() * 512)).await
        })
    }

    fn close(&self) {
        self.current.load().close();
    }
}
