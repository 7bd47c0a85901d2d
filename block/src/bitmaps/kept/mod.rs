//! Persistent bitmaps: kept in a *side-car* file beside the image, so that none misses a
//! write that was acknowledged, whatever kills the program or the host.
//!
//! - `format`: what the file looks like;
//! - `store`: its content, replaced as a whole;
//! - `intent`: which regions may be written;
//! - `core`: the order in which things become durable;
//! - `keeper`: the thread that does that;
//! - `image`: the image it belongs to, and the file.
//!
//! Here nodes get their bitmaps from the file, and have them kept. What a bitmap is while
//! the program runs is the business of the modules above.

mod core;
mod format;
mod image;
mod intent;
mod keeper;
mod store;
#[cfg(all(test, not(shuttle)))]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use self::core::{Core, Snapshot, Source};
use self::format::{FormatError, Hot, Stamp, Use};
use self::image::{Access, Image, SideCar};
use self::store::{Disk, LoadError, LoadedBitmap, Store};
use crate::dirty_bitmap::DirtyBitmap;
use crate::error::os_text;
use crate::node::Node;
use crate::runtime::unblock;
use crate::sync::lock;

pub(crate) use self::core::KeepError;
pub(crate) use self::format::{MAX_BITMAPS, MAX_BITS};
pub(crate) use self::image::ImageFile;
pub use self::image::bitmap_file_beside;
pub(crate) use self::intent::{Arming, Intent, Writing};
pub(crate) use self::keeper::Keeper;
pub(crate) use self::store::{BitmapState, Version};

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
        let wrong = self.mistrust(&store, &image, hot.is_none())?;
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
        if directory.identity != image.identity {
            return Ok(Some(format!(
                "the image is another one (it is {}, and they are of {})",
                image.identity, directory.identity
            )));
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
        let disk = Disk {
            identity: image.identity.clone(),
            layer: self.layer.clone(),
            size: self.size,
            resizing: false,
            usage: Use::Open,
        };
        let failed = |error| KeptError::Open {
            path: path.clone(),
            error,
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

/// The bitmaps of a node, for the keeper.
struct OfNode {
    node: Weak<Node>,
    image: Image,
    /// Whether the image is written by this node only, so that its time tells.
    watched: bool,
}

impl Source for OfNode {
    fn bitmaps(&self) -> Snapshot {
        match self.node.upgrade() {
            Some(node) => match node.kept_bitmaps() {
                Some(bitmaps) => Snapshot::Bitmaps(bitmaps),
                None => Snapshot::Changing,
            },
            None => Snapshot::Gone,
        }
    }

    fn size(&self) -> u64 {
        self.node.upgrade().map_or(0, |node| node.size())
    }

    fn spoil(&self, why: &str) {
        let Some(node) = self.node.upgrade() else {
            return;
        };
        tracing::error!(
            node = node.name(),
            "the persistent bitmaps are inconsistent from now on: {why}"
        );
        for bitmap in node.named_bitmaps() {
            bitmap.spoil();
        }
    }

    fn stamp(&self, at_end: bool) -> io::Result<Option<Stamp>> {
        if at_end {
            self.image.sync()?;
        } else if !self.watched {
            return Ok(None);
        }
        self.image.stamp().map(Some)
    }
}

impl Node {
    /// Gives the node the bitmaps that are in its side-car file, if it has one, and has them
    /// kept if it is writable. For a node that nobody uses yet.
    ///
    /// Cancel: it has them or not.
    pub(crate) async fn load_bitmaps(self: &Arc<Self>) -> Result<(), KeptError> {
        let Some(place) = Place::of(self) else {
            return Ok(());
        };
        let access = match self.read_only() {
            true => Access::Read,
            false => Access::Write,
        };
        let found = unblock(move || place.load(access)).await;
        let found = match found {
            // Readers go without. Who writes the image may have it.
            Err(error) if access == Access::Read => {
                tracing::warn!(node = self.name(), %error, "its bitmaps are not loaded");
                return Ok(());
            }
            found => found?,
        };
        let Some(found) = found else {
            return Ok(());
        };
        for loaded in &found.bitmaps {
            self.add_loaded(
                &loaded.name,
                loaded.granularity,
                loaded.enabled,
                loaded.bits.as_ref(),
            );
        }
        self.named_bitmaps.set_version(Some(found.store.version()));
        if access == Access::Write {
            self.keep(found.store, found.image, found.recover)
                .await
                .map_err(|error| match error {
                    KeptError::Store {
                        why: KeepError::Write(error),
                        ..
                    } => KeptError::Open {
                        path: found.path,
                        error,
                    },
                    error => error,
                })?;
        }
        Ok(())
    }

    /// The node, which is read-only, is about to be written: from now on its bitmaps are
    /// kept. They are loaded again if somebody else had the file meanwhile; those that are
    /// in use then are inconsistent.
    ///
    /// Fails if the file cannot be written. Cancel: they are kept or not.
    pub(crate) async fn reload_bitmaps(self: &Arc<Self>) -> Result<(), KeptError> {
        let Some(place) = Place::of(self) else {
            return Ok(());
        };
        if self.keeper().is_some() {
            // An earlier one may still be closing it.
            let node = Arc::clone(self);
            unblock(move || node.close_bitmaps()).await;
        }
        let Some(found) = unblock(move || place.load(Access::Write)).await? else {
            for bitmap in self.named_bitmaps() {
                bitmap.spoil();
            }
            return Ok(());
        };
        if self.named_bitmaps.version() != Some(found.store.version()) {
            self.drop_loaded();
        }
        for loaded in &found.bitmaps {
            match self.named_bitmap(&loaded.name) {
                Some(known) if loaded.bits.is_none() => known.spoil(),
                Some(_) => {}
                None => self.add_loaded(
                    &loaded.name,
                    loaded.granularity,
                    loaded.enabled,
                    loaded.bits.as_ref(),
                ),
            }
        }
        self.keep(found.store, found.image, true).await
    }

    /// Starts a keeper for the bitmaps that it has, which writers do not look at yet.
    async fn start_keeper(
        self: &Arc<Self>,
        store: Store<SideCar>,
        image: Image,
        recover: bool,
    ) -> Result<(), KeptError> {
        let intent = Arc::clone(self.intent_or_new());
        intent.disarm();
        let layer = store.directory().layer.clone();
        let source = OfNode {
            node: Arc::downgrade(self),
            // A format may write its file with no request of a user.
            watched: layer != QCOW2,
            image,
        };
        let identity = source.image.identity.clone();
        let mut core = Core::new(store, source, Arc::clone(&intent), identity, layer);
        let failed = |why| KeptError::Store {
            node: self.name().to_owned(),
            why,
        };
        let core = match recover {
            false => core,
            true => unblock(move || core.recover().map(|()| core))
                .await
                .map_err(failed)?,
        };
        let keeper = Keeper::start(self.name(), core, &intent)
            .map_err(|error| failed(KeepError::Write(error)))?;
        *lock(&self.keeper) = Some(Arc::new(keeper));
        Ok(())
    }

    /// As [`start_keeper`](Self::start_keeper), of a node that nobody writes at the moment.
    async fn keep(
        self: &Arc<Self>,
        store: Store<SideCar>,
        image: Image,
        recover: bool,
    ) -> Result<(), KeptError> {
        self.start_keeper(store, image, recover).await?;
        self.all_writes_are_marked(self.mark_writes());
        Ok(())
    }

    /// Has writes to the node marked from now on. Those that are under way are not: once they
    /// have ended, [`all_writes_are_marked`](Self::all_writes_are_marked), and persistent
    /// bitmaps can be added.
    pub(crate) fn mark_writes(&self) -> Arming {
        self.intent_or_new().arm()
    }

    /// The requests that were under way when writes began to be marked have ended.
    pub(crate) fn all_writes_are_marked(&self, since: Arming) {
        self.intent_or_new().all_are_counted(since);
    }

    /// Whether writes are marked, all of them.
    pub(crate) fn marks_all_writes(&self) -> bool {
        self.intent_or_new().is_complete()
    }

    /// Makes sure that bitmaps with `chunks` chunks in all can be kept in addition, as soon as
    /// [all writes are marked](Self::marks_all_writes).
    ///
    /// [`store_bitmaps`](Self::store_bitmaps) is called in the end, also if none is added.
    /// Cancel: the file is there or not.
    pub(crate) async fn prepare_to_keep(self: &Arc<Self>, chunks: u64) -> Result<(), KeptError> {
        let Some(place) = Place::of(self) else {
            return Err(KeptError::NotKept(self.name().to_owned()));
        };
        if self.read_only() {
            return Err(KeptError::ReadOnly(self.name().to_owned()));
        }
        if let Some(keeper) = self.keeper() {
            match keeper.reserve(chunks).await {
                Ok(()) => return Ok(()),
                // Its last bitmap has just been removed.
                Err(KeepError::Gone) => {}
                Err(why) => {
                    return Err(KeptError::Store {
                        node: self.name().to_owned(),
                        why,
                    });
                }
            }
        }
        let (store, image) = unblock(move || place.create()).await?;
        self.start_keeper(store, image, false).await?;
        if let Some(keeper) = self.keeper() {
            keeper
                .reserve(chunks)
                .await
                .map_err(|why| KeptError::Store {
                    node: self.name().to_owned(),
                    why,
                })?;
        }
        Ok(())
    }

    /// Makes what the persistent bitmaps are by now durable: returns when that is so. Does
    /// nothing if none are kept.
    ///
    /// Fails if that is not possible: they are inconsistent then, here and in the file.
    /// Cancel: it is done all the same.
    pub(crate) async fn store_bitmaps(&self) -> Result<(), KeptError> {
        let Some(keeper) = self.keeper() else {
            return Ok(());
        };
        match keeper.commit().await {
            // It has ended, since nothing was left.
            Err(KeepError::Gone) if self.kept_bitmaps().is_some_and(|all| all.is_empty()) => Ok(()),
            result => result.map_err(|why| KeptError::Store {
                node: self.name().to_owned(),
                why,
            }),
        }
    }

    /// As [`store_bitmaps`](Self::store_bitmaps), without waiting. Any thread.
    pub(crate) fn store_bitmaps_soon(&self) {
        if let Some(keeper) = self.keeper() {
            keeper.commit_soon();
        }
    }

    /// The size is about to become `to` bytes, or has changed, or not (`None`). Fails if that
    /// cannot be noted, or there is no room for larger bitmaps.
    pub(crate) async fn note_resize(&self, to: Option<u64>) -> Result<(), KeptError> {
        let Some(keeper) = self.keeper().filter(|keeper| !keeper.has_ended()) else {
            return Ok(());
        };
        keeper.resize(to).await.map_err(|why| KeptError::Store {
            node: self.name().to_owned(),
            why,
        })
    }

    /// Saves all bits, so that the bitmaps are loaded as they are; the node goes on. Errors
    /// are logged: then more is dirty after a restart.
    pub(crate) async fn save_bitmaps(&self) {
        let Some(keeper) = self.keeper() else {
            return;
        };
        match keeper.close().await {
            Ok(()) | Err(KeepError::Gone) => {}
            Err(error) => tracing::error!(
                node = self.name(),
                error = &error as &dyn std::error::Error,
                "persistent bitmaps could not be saved at the end"
            ),
        }
    }

    /// Saves all bits and closes the file. Blocks, for each who calls it, until that is so.
    pub(crate) fn close_bitmaps(&self) {
        let Some(keeper) = self.keeper() else {
            return;
        };
        let version = keeper.end();
        let mut current = lock(&self.keeper);
        if current
            .as_ref()
            .is_some_and(|now| Arc::ptr_eq(now, &keeper))
        {
            self.named_bitmaps.set_version(version);
            *current = None;
        }
    }

    fn keeper(&self) -> Option<Arc<Keeper>> {
        lock(&self.keeper).clone()
    }

    /// Whether bitmaps can be made persistent at this moment.
    pub(crate) fn keeps_bitmaps(&self) -> bool {
        self.keeper().is_some_and(|keeper| !keeper.has_ended())
    }

    fn intent_or_new(&self) -> &Arc<Intent> {
        self.intent
            .get_or_init(|| Arc::new(Intent::new(self.size())))
    }
}
