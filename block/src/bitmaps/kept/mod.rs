//! Persistent bitmaps: kept in a *side-car* file beside the image, so that none misses a
//! write that was acknowledged, whatever kills the program or the host.
//!
//! - `format`: what the file looks like;
//! - `store`: its content, replaced as a whole;
//! - `intent`: which regions may be written;
//! - `core`: the order in which things become durable;
//! - `keeper`: the thread that does that;
//! - `room`: who has room for bitmaps that are still to come;
//! - `image`: the image it belongs to, and the file;
//! - `of_node`: nodes get their bitmaps from the file, and have them kept.
//!
//! Here a node's file is found and read, or made. What a bitmap is while the program runs is
//! the business of the modules above.

mod core;
mod format;
mod image;
mod intent;
mod keeper;
mod of_node;
mod room;
mod store;
#[cfg(all(test, not(shuttle)))]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::format::{FormatError, Hot, Use};
use self::image::{Access, Identity, Image, SideCar};
use self::store::{Disk, LoadError, LoadedBitmap, Store};
use crate::dirty_bitmap::DirtyBitmap;
use crate::error::os_text;
use crate::node::Node;

pub(crate) use self::core::KeepError;
pub(crate) use self::format::{MAX_BITMAPS, MAX_BITS};
pub(crate) use self::image::ImageFile;
pub use self::image::bitmap_file_beside;
pub(crate) use self::intent::{Intent, Writing};
pub(crate) use self::of_node::Keeping;
pub(crate) use self::room::Room;
pub(crate) use self::store::BitmapState;

/// Unit of the file in bytes.
const BLOCK: usize = 4096;
/// The layer in which QEMU has persistent bitmaps.
const QCOW2: &str = "qcow2";

/// Why bitmaps of a node cannot be kept, or had from their file.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// Nothing keeps bitmaps of such a node.
    #[error("Can't store persistent bitmaps to {0}: Operation not supported")]
    NotKept(String),
    /// The node cannot be written.
    #[error("Can't store persistent bitmaps to {0}: it is read-only")]
    ReadOnly(String),
    /// The file is used by another process, or for another node.
    #[error("Bitmap file '{}' is in use by another process or node", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be opened or read.
    #[error("Could not open bitmap file '{}': {}", path.display(), os_text(error))]
    Open {
        /// The file, or the image.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It is of a version that is not known here.
    #[error(
        "Bitmap file '{}' cannot be used ({why}): move it away to go without its bitmaps",
        path.display()
    )]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// There is a file that has bitmaps of something else.
    #[error(
        "Bitmap file '{}' is there already, and not of node '{node}': move it away to store \
         bitmaps there",
        path.display()
    )]
    Occupied {
        /// The file.
        path: PathBuf,
        /// The node.
        node: String,
    },
    /// The bitmaps cannot be made durable.
    #[error("Could not store bitmaps of node '{node}': {why}")]
    Store {
        /// The node.
        node: String,
        /// Why.
        why: KeepError,
    },
}

impl KeptError {
    /// The number that says it best to who knows nothing of bitmaps.
    pub(crate) fn errno(&self) -> i32 {
        match self {
            Self::Store { why, .. } => match why {
                // Also if the file would be larger than any may be.
                KeepError::Room(_) => libc::ENOSPC,
                KeepError::Write(error) => error.raw_os_error().unwrap_or(libc::EIO),
                KeepError::GivenUp | KeepError::Gone => libc::EIO,
            },
            _ => libc::EIO,
        }
    }
}

/// What of a node is needed to find and read its file, on a helper thread.
struct Place {
    node: String,
    /// Bytes.
    size: u64,
    layer: String,
    image: ImageFile,
}

/// What was found in a file.
struct Found {
    path: PathBuf,
    store: Store<SideCar>,
    image: Image,
    bitmaps: Vec<Loaded>,
    /// Bits were found only in marks, or may not be on the disk for other reasons.
    recover: bool,
}

/// A bitmap for a node.
struct Loaded {
    name: String,
    granularity: u64,
    enabled: bool,
    bits: Option<Arc<DirtyBitmap>>,
}

impl Place {
    fn of(node: &Node) -> Option<Self> {
        Some(Self {
            node: node.name().to_owned(),
            size: node.size(),
            layer: node.driver().bitmap_layer()?,
            image: node.driver().image_file()?,
        })
    }

    fn path(&self) -> Result<Option<PathBuf>, KeptError> {
        self.image.side_car().map_err(|error| KeptError::Open {
            path: self.image.path.clone(),
            error,
        })
    }

    fn watch(&self) -> Result<Image, KeptError> {
        self.image.watch().map_err(|error| KeptError::Open {
            path: self.image.path.clone(),
            error,
        })
    }

    /// Reads the node's bitmaps from its file; `None` if it has none. Blocks.
    fn load(&self, access: Access) -> Result<Option<Found>, KeptError> {
        let Some(path) = self.path()? else {
            return Ok(None);
        };
        let side_car = match SideCar::open(&path, access) {
            Ok(Some(side_car)) => side_car,
            Ok(None) => return Ok(None),
            Err(error) => {
                let error = open_error(path, error);
                // Another node on the image may have it, whose bitmaps they are.
                return match &error {
                    KeptError::InUse { path } if self.is_of_another_layer(path) => Ok(None),
                    _ => Err(error),
                };
            }
        };
        let mut store = match Store::open(side_car) {
            Ok(store) => store,
            Err(LoadError::Read(source)) => return Err(open_error(path, source)),
            Err(LoadError::Format(why @ FormatError::NoSuperblock)) => {
                tracing::error!(
                    node = self.node,
                    "file '{}' is not used as a bitmap file: {why}",
                    path.display()
                );
                return Ok(None);
            }
            Err(LoadError::Format(why)) => {
                let why = why.to_string();
                return Err(KeptError::Unusable { path, why });
            }
        };
        if store.directory().layer != self.layer {
            tracing::info!(
                node = self.node,
                layer = store.directory().layer,
                "the bitmaps in '{}' are of another kind of node, and are not loaded",
                path.display()
            );
            return Ok(None);
        }
        let image = self.watch()?;
        let read = |error| match error {
            LoadError::Read(source) => open_error(path.clone(), source),
            LoadError::Format(why) => KeptError::Unusable {
                path: path.clone(),
                why: why.to_string(),
            },
        };
        let hot = store
            .load_hot()
            .map_err(|error| open_error(path.clone(), error))?;
        let identity = image.with(&store.storage);
        let identity = identity.map_err(|error| open_error(path.clone(), error))?;
        let wrong = self.mistrust(&store, &image, &identity, hot.is_none())?;
        let bitmaps = store.load(wrong.is_none()).map_err(read)?;
        if let Some(why) = &wrong {
            tracing::error!(
                node = self.node,
                "the bitmaps in '{}' are inconsistent: {why}",
                path.display()
            );
        }
        let hot = hot.unwrap_or(Hot::All).ranges(self.size);
        let bitmaps = bitmaps
            .into_iter()
            .map(|loaded| take_over(loaded, &hot, self.size))
            .collect();
        Ok(Some(Found {
            recover: !hot.is_empty() || wrong.is_some() || store.directory().size != self.size,
            path,
            store,
            image,
            bitmaps,
        }))
    }

    /// Whether a file that somebody else uses is certainly not of this kind of node: that
    /// never changes.
    fn is_of_another_layer(&self, path: &Path) -> bool {
        let side_car = SideCar::open(path, Access::Look).ok().flatten();
        let store = side_car.and_then(|side_car| Store::open(side_car).ok());
        store.is_some_and(|store| store.directory().layer != self.layer)
    }

    /// Why nothing in the file can be trusted, if that is so.
    fn mistrust(
        &self,
        store: &Store<SideCar>,
        image: &Image,
        identity: &Identity,
        too_old: bool,
    ) -> Result<Option<String>, KeptError> {
        let directory = store.directory();
        if store.is_broken() {
            return Ok(Some(
                "they were given up when the file could not be written".to_owned(),
            ));
        }
        if too_old {
            return Ok(Some(
                "the file holds an older state than it should".to_owned(),
            ));
        }
        if directory.identity != identity.as_str() {
            return Ok(Some(format!(
                "the image, or the file, is another one, perhaps a copy (they are {:?}, and \
                 were {:?})",
                identity.as_str(),
                directory.identity
            )));
        }
        if store.usage() == Use::Open && !identity.is_unique() {
            return Ok(Some(
                "after a crash nothing tells whether the image is still the same: its file \
                 system knows no time of birth"
                    .to_owned(),
            ));
        }
        if directory.size != self.size && !directory.resizing {
            return Ok(Some(format!(
                "the disk has {} bytes, and they are of {}",
                self.size, directory.size
            )));
        }
        if let Use::Closed(then) = store.usage() {
            let now = image.stamp().map_err(|error| KeptError::Open {
                path: self.image.path.clone(),
                error,
            })?;
            if now != then {
                return Ok(Some("somebody else has written the image".to_owned()));
            }
        }
        Ok(None)
    }

    /// Makes a file without bitmaps: where the user said, or for formats in which QEMU keeps
    /// bitmaps beside the image. Blocks.
    fn create(&self) -> Result<(Store<SideCar>, Image), KeptError> {
        let may = self.image.bitmap_file.is_some() || self.layer == QCOW2;
        let Some(path) = self.path()?.filter(|_| may) else {
            tracing::info!(
                node = self.node,
                "say where bitmaps are to be kept with 'bitmap-file' of the file's node"
            );
            return Err(KeptError::NotKept(self.node.clone()));
        };
        let occupied = || KeptError::Occupied {
            path: path.clone(),
            node: self.node.clone(),
        };
        if std::fs::symlink_metadata(&path).is_ok() {
            return Err(occupied());
        }
        let image = self.watch()?;
        let side_car = SideCar::create(&path).map_err(|source| open_error(path.clone(), source))?;
        let failed = |error| KeptError::Open {
            path: path.clone(),
            error,
        };
        let identity = image.with(&side_car).map_err(failed)?;
        let disk = Disk {
            identity: identity.as_str().to_owned(),
            layer: self.layer.clone(),
            size: self.size,
            resizing: false,
            usage: Use::Open,
        };
        let mut store = Store::create(side_car, &disk).map_err(failed)?;
        match store.storage.put_in_place(&path) {
            Ok(()) => Ok((store, image)),
            Err(error) => {
                store.storage.discard();
                Err(match error.kind() {
                    io::ErrorKind::AlreadyExists => occupied(),
                    _ => failed(error),
                })
            }
        }
    }
}

/// What a bitmap of a disk of `size` bytes is, of which `hot` may have been written since its
/// bits were saved.
fn take_over(loaded: LoadedBitmap, hot: &[std::ops::Range<u64>], size: u64) -> Loaded {
    let bits = loaded.bits.and_then(|bits| {
        let bits = match super::fitted(&bits, size) {
            Ok(None) => bits,
            Ok(Some(fitted)) => {
                fitted.merge(&bits);
                fitted
            }
            Err(error) => {
                tracing::error!(bitmap = loaded.name, %error, "a bitmap cannot be loaded");
                return None;
            }
        };
        // What does not record was not meant by the marks.
        for range in hot.iter().filter(|_| loaded.enabled) {
            bits.set(range.start, range.end - range.start);
        }
        Some(bits)
    });
    Loaded {
        name: loaded.name,
        granularity: loaded.granularity,
        enabled: loaded.enabled,
        bits,
    }
}

fn open_error(path: PathBuf, error: io::Error) -> KeptError {
    match error.kind() {
        io::ErrorKind::WouldBlock => KeptError::InUse { path },
        _ => KeptError::Open { path, error },
    }
}
