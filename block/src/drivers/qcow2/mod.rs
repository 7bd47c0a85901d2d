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
//! - `requests`, `zero`, `resize`: what requests do;
//! - `failure`: errors and panics of `imago`;
//! - `reopen`: other options for an open image;
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
mod failure;
mod file;
mod header;
mod order;
mod reopen;
mod requests;
mod resize;
mod storage;
#[cfg(all(test, not(shuttle)))]
pub(crate) mod tests;
mod zero;

use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwapOption;
use futures_util::FutureExt;
use imago::FormatAccess;
use imago::raw::Raw;
use tokio::sync::RwLock;

pub use self::backing_file::BackingFileError;
pub(crate) use self::backing_file::resolve;
pub(crate) use self::header::is_qcow2;
pub use self::header::{Header, HeaderError};

use self::file::{GrowingFile, read_or_zero};
use self::order::WriteOrder;
use self::reopen::Next;
use self::storage::NodeStorage;
use crate::driver::ImageDetails;
use crate::drivers::OpenError;
use crate::error::IoError;
use crate::node::{Child, Node};
use crate::options::EncryptOptions;
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
    /// `imago` has panicked: nothing is known of its state. Its storage looks at this,
    /// too, so that nothing of that state is written any more.
    broken: Arc<AtomicBool>,
    /// Size of the disk in bytes, as the header has it: perhaps not of whole sectors.
    /// Written by a resize, of which there is one at a time.
    size: AtomicU64,
    cluster_size: u64,
    version: u32,
    /// What the header said when the image was opened.
    details: ImageDetails,
    snapshots: bool,
    /// Written on main with no request in flight, as `writable` is.
    read_only: AtomicBool,
    /// `image` was opened for writing, and may be used so.
    writable: AtomicBool,
    /// What was prepared to come next. Main only.
    next: Mutex<Option<Next>>,
    /// It is about to come. Main only.
    reopening: AtomicBool,
    pass_discard: AtomicBool,
    names_backing: bool,
}

/// Reads and checks the header of the image in `file`.
pub(crate) async fn read_header(
    file: &Arc<Node>,
    read_only: bool,
    encrypt: Option<&EncryptOptions>,
) -> Result<Header, OpenError> {
    let read_error = OpenError::ReadImage;
    let header_error = |error| OpenError::Qcow2(error);
    let first = read_start(file, header::FIRST_READ)
        .await
        .map_err(read_error)?;
    let cluster_len = header::cluster_len(&first).map_err(header_error)?;
    let cluster = read_start(file, cluster_len).await.map_err(read_error)?;
    let header = Header::parse(&cluster, file.size()).map_err(header_error)?;
    if let Some(encrypt) = encrypt {
        header.check_encryption(encrypt)?;
    }
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
    (file, data_file, backing): (&Arc<GrowingFile>, Option<&Arc<GrowingFile>>, Option<&Child>),
    writable: bool,
    broken: &Arc<AtomicBool>,
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
        let storage = NodeStorage::image(Arc::clone(file), order, Arc::clone(broken));
        let mut image = Image::open_image(storage, writable).await?;
        let data = data_file.map(|file| NodeStorage::data(Arc::clone(file), Arc::clone(broken)));
        image.set_data_file(data);
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
        let broken = Arc::new(AtomicBool::new(false));
        let image = open_image(
            header,
            (&file, data_file.as_ref(), backing.as_ref()),
            !read_only,
            &broken,
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
            broken,
            size: AtomicU64::new(header.size),
            cluster_size: 1 << header.cluster_bits,
            version: header.version,
            details: header.details(),
            snapshots: header.snapshots > 0,
            read_only: AtomicBool::new(read_only),
            writable: AtomicBool::new(!read_only),
            next: Mutex::default(),
            reopening: AtomicBool::new(false),
            pass_discard: AtomicBool::new(pass_discard),
            names_backing: header.backing.is_some(),
        })
    }

    fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// Where the data is.
    fn data(&self) -> &GrowingFile {
        self.data_file.as_ref().unwrap_or(&self.file)
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
