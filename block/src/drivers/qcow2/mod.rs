//! `qcow2`: images of QEMU's own format, by the crate `imago`.
//!
//! `imago` keeps the tables: it finds out where data is, allocates and frees
//! clusters, copies on write, and unpacks compressed clusters. What guests read and
//! write goes from their memory to the nodes below at the place `imago` tells,
//! without being copied.
//!
//! - `header`: what is checked before `imago` sees an image;
//! - `storage`: how `imago` reaches nodes;
//! - `order`: barriers between writes of tables;
//! - `file`: a file that grows;
//! - `zero`: zeroes and discards;
//! - `backing_file`: which backing files a header may name.
//!
//! # Locks
//!
//! Both are for tasks (held across awaits, waking whoever waits on any thread), in
//! this order:
//!
//! 1. `image`: shared by all who use places in the file; alone for whoever frees
//!    clusters, so that no place changes its owner under a request.
//! 2. `tables`: shared by all who change tables; alone for whoever writes them out,
//!    so that what is written is consistent. The number of those who share it is
//!    bounded, since each pins a table in `imago`'s cache.
//!
//! `imago`'s own locks are taken under these. They are released by the end of a
//! request below, never by one that waits for the locks above.

mod backing_file;
mod driver;
mod file;
mod header;
mod order;
mod storage;
#[cfg(all(test, not(shuttle)))]
mod tests;
mod zero;

use std::any::Any;
use std::future::Future;
use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;
use futures_util::FutureExt;
use imago::format::PreallocateMode;
use imago::format::drivers::FormatDriverInstance;
use imago::io_buffers::IoVectorMut;
use imago::raw::Raw;
use imago::{FormatAccess, ShallowMapping};
use tokio::sync::RwLock;

pub use self::backing_file::BackingFileError;
pub(crate) use self::backing_file::resolve;
pub(crate) use self::header::is_qcow2;
pub use self::header::{Header, HeaderError};

use self::file::{GrowingFile, read_or_zero};
use self::order::WriteOrder;
use self::storage::NodeStorage;
use crate::buffer::IoVec;
use crate::driver::{ChildRole, Extent, ExtentFlags, Reopen, Reopened};
use crate::drivers::{OpenError, ReopenError};
use crate::error::{IoError, IoOp};
use crate::node::{Child, Node};
use crate::options::DriverOptions;
use crate::permissions::{Perm, Permissions};

/// Requests that change tables at once: half of the tables that `imago` caches.
const MAX_CHANGES: u32 = 64;

type Image = imago::qcow2::Qcow2<NodeStorage>;

/// Nodes that an image stands on.
#[derive(Debug)]
pub struct Children {
    /// The image itself.
    pub file: Child,
    /// Its data, if that is not in the image.
    pub data_file: Option<Child>,
    /// What shows through.
    pub backing: Option<Child>,
}

/// An open image.
pub struct Qcow2Driver {
    /// Name of the node, for errors.
    node: Arc<str>,
    file: Arc<GrowingFile>,
    /// `None`: the data is in `file`.
    data_file: Option<Arc<GrowingFile>>,
    /// Replaced on main with no request in flight.
    backing: ArcSwapOption<Child>,
    image: RwLock<Image>,
    tables: RwLock<()>,
    /// Tables were changed since they were last written out. Set before a change;
    /// cleared by who holds `tables` alone.
    changed: AtomicBool,
    /// `imago` has panicked: nothing is known of its state.
    broken: AtomicBool,
    /// Size of the disk in bytes. Written by a resize, of which there is one at a
    /// time.
    size: AtomicU64,
    cluster_size: u64,
    version: u32,
    snapshots: bool,
    /// Written on main with no request in flight, as `writable` is.
    read_only: AtomicBool,
    /// `image` was opened for writing, and may be used so.
    writable: AtomicBool,
    /// What was prepared to come next. Main only.
    next: Mutex<Option<Next>>,
    /// It is about to come. Main only.
    reopening: AtomicBool,
    pass_discard: bool,
}

/// What a reopen makes of an image.
struct Next {
    read_only: bool,
    /// Opened for writing, where the present one was not.
    image: Option<Image>,
}

/// Where a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
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

/// Reads and checks the header of the image in `file`.
pub(crate) async fn read_header(file: &Arc<Node>, read_only: bool) -> Result<Header, OpenError> {
    let read_error = |error| OpenError::ReadImage {
        file: file.name().to_owned(),
        error,
    };
    let header_error = |error| OpenError::Qcow2(error);
    let first = read_start(file, header::FIRST_READ)
        .await
        .map_err(read_error)?;
    let cluster_len = header::cluster_len(&first).map_err(header_error)?;
    let cluster = read_start(file, cluster_len).await.map_err(read_error)?;
    let header = Header::parse(&cluster, file.size()).map_err(header_error)?;
    header.check_features(read_only).map_err(header_error)?;
    Ok(header)
}

/// The first `len` bytes of a node; zeroes where it is shorter.
pub(crate) async fn read_start(node: &Arc<Node>, len: usize) -> Result<Vec<u8>, IoError> {
    let iov = crate::buffer::AlignedBuffer::new(len).io_vec(len);
    read_or_zero(node, 0, iov.clone()).await?;
    let mut bytes = vec![0; len];
    iov.copy_to(0, &mut bytes);
    Ok(bytes)
}

/// What `imago` copies of a backing image, it takes from here.
async fn backing_of(backing: &Child) -> io::Result<FormatAccess<NodeStorage>> {
    let storage = NodeStorage::backing(backing.share());
    Ok(FormatAccess::new(Raw::open_image(storage, false).await?))
}

async fn open_image(
    header: &Header,
    file: &Arc<GrowingFile>,
    data_file: Option<&Arc<GrowingFile>>,
    backing: Option<&Child>,
    writable: bool,
) -> Result<Image, OpenError> {
    let opened = async {
        let order = match writable {
            false => None,
            true => Some(
                WriteOrder::load(header, file, data_file.map(Arc::clone))
                    .await
                    .map_err(|error| io::Error::from_raw_os_error(error.errno))?,
            ),
        };
        let storage = NodeStorage::image(Arc::clone(file), order);
        let mut image = Image::open_image(storage, writable).await?;
        image.set_data_file(data_file.map(Arc::clone).map(NodeStorage::data));
        image.set_backing(match backing {
            Some(backing) => Some(backing_of(backing).await?),
            None => None,
        });
        Ok::<_, io::Error>(image)
    };
    let failed = |error| OpenError::Image {
        file: file.node().name().to_owned(),
        error,
    };
    match AssertUnwindSafe(opened).catch_unwind().await {
        Ok(opened) => opened.map_err(failed),
        Err(_) => Err(failed(io::Error::other("its tables make no sense"))),
    }
}

impl Qcow2Driver {
    /// Opens the image with this header as node `node`. `pass_discard`: what is
    /// discarded in the image is discarded in its file.
    pub async fn open(
        node: &str,
        header: &Header,
        children: Children,
        read_only: bool,
        pass_discard: bool,
    ) -> Result<Self, OpenError> {
        let file = Arc::new(GrowingFile::new(children.file));
        let data_file = children
            .data_file
            .map(|child| Arc::new(GrowingFile::new(child)));
        let backing = children.backing;
        let image = open_image(
            header,
            &file,
            data_file.as_ref(),
            backing.as_ref(),
            !read_only,
        )
        .await?;
        Ok(Self {
            node: node.into(),
            file,
            data_file,
            backing: ArcSwapOption::from(backing.map(Arc::new)),
            image: RwLock::new(image),
            tables: RwLock::with_max_readers((), MAX_CHANGES),
            changed: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            size: AtomicU64::new(header.size),
            cluster_size: 1 << header.cluster_bits,
            version: header.version,
            snapshots: header.snapshots > 0,
            read_only: AtomicBool::new(read_only),
            writable: AtomicBool::new(!read_only),
            next: Mutex::default(),
            reopening: AtomicBool::new(false),
            pass_discard,
        })
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    fn next(&self) -> MutexGuard<'_, Option<Next>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares for a reopen. An image that was opened for writing stays open so; one
    /// that was not is opened once more, since nobody can have changed it.
    async fn prepare(&self, to: &Reopen<'_>) -> Result<Reopened, ReopenError> {
        let changed = |option: &str| ReopenError::CannotChange(option.to_owned());
        for (role, file) in [
            (ChildRole::File, Some(&self.file)),
            (ChildRole::DataFile, self.data_file.as_ref()),
        ] {
            let now = file.map(|file| file.node().skip_filters().id());
            let then = to.child(role).map(|node| node.skip_filters().id());
            // Its tables are known, and would not be those of another file.
            if now != then {
                return Err(changed(role.as_str()));
            }
        }
        if let (DriverOptions::Qcow2(old), DriverOptions::Qcow2(new)) = (to.old, to.driver)
            && old.pass_discard_request != new.pass_discard_request
        {
            return Err(changed("pass-discard-request"));
        }
        let read_only = to.options.read_only;
        let mut image = None;
        if !read_only && !self.writable.load(Ordering::Relaxed) {
            let header = read_header(&self.file.node(), false).await?;
            let backing = self.backing.load_full();
            let (data_file, backing) = (self.data_file.as_ref(), backing.as_deref());
            image = Some(open_image(&header, &self.file, data_file, backing, true).await?);
        }
        *self.next() = Some(Next { read_only, image });
        Ok(Reopened {
            read_only,
            size: None,
        })
    }

    /// The image, when nobody can have it: no request is in flight.
    fn change_image(&self, change: impl FnOnce(&mut Image)) {
        match self.image.try_write() {
            Ok(mut image) => change(&mut image),
            Err(_) => {
                self.broken.store(true, Ordering::Release);
                tracing::error!(
                    node = &*self.node,
                    "The image cannot be used any more: it was changed with requests in flight"
                );
            }
        }
    }

    fn error(&self, op: IoOp, offset: u64, len: u64, errno: i32) -> IoError {
        IoError {
            op,
            node: Arc::clone(&self.node),
            offset,
            len,
            errno,
        }
    }

    /// Where the data is.
    fn data(&self) -> &GrowingFile {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// Runs a part of `imago` for the request given. A panic there, by an image
    /// that nobody thought of, makes this node fail for ever and harms nothing else.
    async fn run<T>(
        &self,
        (op, offset, len): (IoOp, u64, u64),
        part: impl Future<Output = io::Result<T>>,
    ) -> Result<T, IoError> {
        if self.broken.load(Ordering::Acquire) {
            return Err(self.error(op, offset, len, libc::EIO));
        }
        match AssertUnwindSafe(part).catch_unwind().await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.error(op, offset, len, errno_of(&self.node, &error))),
            Err(panic) => {
                self.broken.store(true, Ordering::Release);
                tracing::error!(
                    node = &*self.node,
                    "The image cannot be used any more, its tables make no sense: {}",
                    panic_text(&*panic)
                );
                Err(self.error(op, offset, len, libc::EIO))
            }
        }
    }

    /// Where the bytes from `offset` are, and how many, at most `len`.
    async fn place(
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

    async fn read_all(&self, offset: u64, iov: &IoVec) -> Result<(), IoError> {
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
                    let unpacked = self.unpack(&image, request, at, &part).await?;
                    done += unpacked;
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

    /// Reads compressed clusters, a bounded number of them; gives how many bytes.
    async fn unpack(
        &self,
        image: &Image,
        request: (IoOp, u64, u64),
        at: u64,
        into: &IoVec,
    ) -> Result<usize, IoError> {
        // Not for writers, but each reader pins a table in the cache as they do.
        let _bounded = self.tables.read().await;
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

    async fn write_all(&self, offset: u64, iov: &IoVec) -> Result<(), IoError> {
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
    async fn write_new(
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
    async fn write_out(&self, image: &Image, request: (IoOp, u64, u64)) -> Result<(), IoError> {
        if !self.changed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.run(request, image.flush()).await?;
        // Not before: a flush that finds nothing changed does not wait.
        self.changed.store(false, Ordering::Release);
        Ok(())
    }

    async fn flush_all(&self) -> Result<(), IoError> {
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

    async fn status(&self, offset: u64, len: u64) -> Result<Extent, IoError> {
        let request = (IoOp::BlockStatus, offset, len);
        let image = self.image.read().await;
        let (place, mut found) = self.place(&image, request, offset, len).await?;
        // Places of one kind need not follow each other in the file.
        while found < len {
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

    fn flags(&self, place: Place) -> ExtentFlags {
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

    async fn set_size(&self, size: u64) -> Result<(), IoError> {
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

/// What an image needs of the file that it is in.
pub(crate) fn file_permissions(read_only: bool, users: Permissions) -> Permissions {
    let own = match read_only {
        true => Perm::CONSISTENT_READ,
        false => Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE,
    };
    Permissions {
        need: users.need | own,
        // The tables must stay what they are known to be.
        share: users.share.without(Perm::WRITE | Perm::RESIZE),
    }
}

/// The errno that an error of `imago` stands for.
fn errno_of(node: &str, error: &io::Error) -> i32 {
    if let Some(errno) = error.raw_os_error() {
        return errno;
    }
    match error.kind() {
        io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
        _ => {
            tracing::warn!(node, %error, "error in an image");
            libc::EIO
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "unknown panic",
    }
}
