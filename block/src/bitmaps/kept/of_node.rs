//! Nodes get their bitmaps from their files, and have them kept: when that begins and ends.

use std::io;
use std::sync::{Arc, Weak};

use futures_util::lock::Mutex as TaskMutex;

use super::core::{Core, KeepError, Snapshot, Source};
use super::format::Stamp;
use super::image::{Access, Image, SideCar};
use super::intent::{Arming, Intent};
use super::keeper::Keeper;
use super::room::Room;
use super::store::{Storage as _, Store, Version};
use super::{KeptError, Place, QCOW2};
use crate::node::Node;
use crate::runtime::unblock;
use crate::sync::{Mutex, lock};

/// Who keeps the persistent bitmaps of a node.
#[derive(Debug, Default)]
pub(crate) struct Keeping {
    /// A leaf lock: held to copy, or to exchange. Changed on main, or when nobody uses the node
    /// any more.
    now: Mutex<Now>,
    /// Held by who makes a file: one at a time.
    making: TaskMutex<()>,
}

#[derive(Debug, Default)]
struct Now {
    keeper: Option<Arc<Keeper>>,
    /// What the file had when it was last read or closed.
    version: Option<Version>,
}

impl Keeping {
    fn keeper(&self) -> Option<Arc<Keeper>> {
        lock(&self.now).keeper.clone()
    }

    fn version(&self) -> Option<Version> {
        lock(&self.now).version
    }

    fn set_version(&self, version: Version) {
        lock(&self.now).version = Some(version);
    }

    fn begin(&self, keeper: Keeper) {
        let before = lock(&self.now).keeper.replace(Arc::new(keeper));
        // It asks its thread for something.
        drop(before);
    }

    /// `keeper` has ended, with this `version`: if it is the one that there is.
    fn has_ended(&self, keeper: &Arc<Keeper>, version: Option<Version>) {
        let before = {
            let mut now = lock(&self.now);
            let current = now.keeper.take_if(|now| Arc::ptr_eq(now, keeper));
            if current.is_some() {
                now.version = version;
            }
            current
        };
        drop(before);
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
        self.keeping.set_version(found.store.version());
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
            // Nobody is there to mark writes, and none are needed.
            if let Some(intent) = self.intent.get() {
                intent.disarm();
            }
            return Ok(());
        };
        if self.keeping.version() != Some(found.store.version()) {
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
        let identity = source.image.with(&store.storage);
        let identity = identity.map_err(|error| self.store_error(KeepError::Write(error)))?;
        let identity = identity.as_str().to_owned();
        let mut core = Core::new(store, source, Arc::clone(&intent), identity, layer);
        let core = match recover {
            false => core,
            true => unblock(move || core.recover().map(|()| core))
                .await
                .map_err(|why| self.store_error(why))?,
        };
        let keeper = Keeper::start(self.name(), core, &intent)
            .map_err(|error| self.store_error(KeepError::Write(error)))?;
        self.keeping.begin(keeper);
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
        self.all_writes_are_marked(self.intent_or_new().arm());
        if let Some(keeper) = self.keeper() {
            // What a crash left of one who added none.
            keeper.tidy();
        }
        Ok(())
    }

    /// Has writes to the node marked from now on. Those that are under way are not: once they
    /// have ended, [`all_writes_are_marked`](Self::all_writes_are_marked), and persistent
    /// bitmaps can be added.
    ///
    /// Fails if the node is being closed.
    pub(crate) fn mark_writes(&self, room: &Room) -> Result<Arming, KeptError> {
        let arming = room.arm(self.intent_or_new());
        arming.ok_or_else(|| self.store_error(KeepError::Gone))
    }

    /// The requests that were under way when writes began to be marked have ended.
    pub(crate) fn all_writes_are_marked(&self, since: Arming) {
        self.intent_or_new().all_are_counted(since);
    }

    /// Whether writes are marked, all of them.
    pub(crate) fn marks_all_writes(&self) -> bool {
        self.intent_or_new().is_complete()
    }

    /// Makes sure that bitmaps of so many `chunks` each can be kept in addition, as soon as
    /// [all writes are marked](Self::marks_all_writes), and as long as there is the room.
    ///
    /// Cancel: the file is there or not.
    pub(crate) async fn prepare_to_keep(
        self: &Arc<Self>,
        chunks: &[u64],
    ) -> Result<Room, KeptError> {
        let _alone = self.keeping.making.lock().await;
        let place = Place::of(self).ok_or_else(|| KeptError::NotKept(self.name().to_owned()))?;
        let check_writable = || match self.read_only() {
            true => Err(KeptError::ReadOnly(self.name().to_owned())),
            false => Ok(()),
        };
        check_writable()?;
        if let Some(keeper) = self.keeper() {
            match keeper.reserve(chunks.to_vec()).await {
                // Its last bitmap has just been removed.
                Err(KeepError::Gone) => {}
                result => return result.map_err(|why| self.store_error(why)),
            }
        }
        let (store, image) = unblock(move || place.create()).await?;
        if let Err(error) = check_writable() {
            let removed = unblock(move || store.storage.remove()).await;
            if let Err(error) = removed {
                tracing::warn!(node = self.name(), %error, "an empty bitmap file is left");
            }
            return Err(error);
        }
        self.start_keeper(store, image, false).await?;
        let keeper = self.keeper();
        let keeper = keeper.ok_or_else(|| self.store_error(KeepError::Gone))?;
        let reserved = keeper.reserve(chunks.to_vec()).await;
        reserved.map_err(|why| self.store_error(why))
    }

    /// Room for a moment, if somebody has made some and has it still: a bitmap may be added.
    pub(crate) fn share_room(&self) -> Option<Room> {
        self.keeper()?.share_room()
    }

    fn store_error(&self, why: KeepError) -> KeptError {
        KeptError::Store {
            node: self.name().to_owned(),
            why,
        }
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
            result => result.map_err(|why| self.store_error(why)),
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
        let noted = keeper.resize(to).await;
        noted.map_err(|why| self.store_error(why))
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
        self.keeping.has_ended(&keeper, version);
    }

    fn keeper(&self) -> Option<Arc<Keeper>> {
        self.keeping.keeper()
    }

    /// Whether bitmaps are kept, or may be.
    pub(crate) fn keeps_bitmaps(&self) -> bool {
        self.keeper().is_some_and(|keeper| !keeper.has_ended())
    }

    fn intent_or_new(&self) -> &Arc<Intent> {
        self.intent
            .get_or_init(|| Arc::new(Intent::new(self.size())))
    }
}
