//! Persistent bitmaps of the nodes of a graph: when they are opened, stored and saved.
//!
//! How they are kept is `crate::bitmaps`' business.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_channel::oneshot;
use futures_util::future::{Either, join_all, select};

use super::{Graph, GraphError};
use crate::bitmaps::kept::{BitmapState, Room};
use crate::bitmaps::{BitmapChange, NamedBitmapError, NewBitmap};
use crate::dirty_bitmap::DirtyBitmap;
use crate::error::IoOp;
use crate::node::Node;
use crate::runtime;

/// Longest that requests are held back so that those which are under way end.
const DRAIN: Duration = Duration::from_secs(2);

/// Longest that it is waited until a file for a guest's bitmaps is there, or is not: also
/// while the guest is held.
const ROOM: Duration = Duration::from_secs(2);

/// Room for persistent bitmaps of a node, made before they come. As long as there is one they
/// can be added, and the file does not go. Dropped, on any thread, it goes if there are none.
#[derive(Debug)]
#[must_use = "dropped, the room goes again"]
pub struct BitmapRoom {
    /// `None`: there is none, and it was waited for.
    room: Option<Room>,
    /// What each bitmap has that there is room for, the largest first.
    chunks: Vec<u64>,
}

impl BitmapRoom {
    /// Whether there is room for bitmaps of so many `chunks` each, the largest first.
    fn is_enough_for(&self, chunks: &[u64]) -> bool {
        let mut pairs = chunks.iter().zip(&self.chunks);
        chunks.len() <= self.chunks.len() && pairs.all(|(wanted, there)| wanted <= there)
    }
}

/// Bitmaps that a node has got from another one. Dropped, it has not got them.
#[derive(Debug)]
#[must_use = "dropped, the bitmaps go again"]
pub struct CopiedBitmaps {
    node: Arc<Node>,
    changes: Vec<BitmapChange>,
    /// That was made for them, and is not needed any more once they are settled.
    room: Option<Room>,
}

impl CopiedBitmaps {
    /// They stay, and become durable: before anything that is written from now on.
    pub fn commit(mut self) {
        for change in self.changes.drain(..) {
            change.commit();
        }
    }
}

impl Drop for CopiedBitmaps {
    fn drop(&mut self) {
        // The last one undoes what it does first.
        while let Some(change) = self.changes.pop() {
            drop(change);
        }
        self.node.store_bitmaps_soon();
        // What was made for them goes if there are none.
        drop(self.room.take());
    }
}

fn bitmaps_to_copy(from: &Node) -> impl Iterator<Item = BitmapState> {
    let bitmaps = from.kept_bitmaps().unwrap_or_default();
    bitmaps.into_iter().filter(|bitmap| !bitmap.inconsistent)
}

/// The chunks of each, the most first.
fn chunks_to_copy(from: &Node) -> Vec<u64> {
    let chunks = |bits: &DirtyBitmap| bits.size().div_ceil(bits.granularity());
    let all = bitmaps_to_copy(from).map(|bitmap| chunks(&bitmap.bits));
    let mut all: Vec<_> = all.collect();
    all.sort_unstable_by(|one, other| other.cmp(one));
    all
}

/// Lets `to` have these bits: in a new bitmap, or in the persistent one that it has of that
/// name.
fn copy_bitmap(bitmap: &BitmapState, to: &Arc<Node>) -> Result<BitmapChange, NamedBitmapError> {
    let change = match to.named_bitmap(&bitmap.name) {
        Some(known) if known.is_persistent() => BitmapChange::merge(&known, [])?,
        _ => {
            let new = NewBitmap {
                name: &bitmap.name,
                // At most 2 GiB.
                granularity: u32::try_from(bitmap.bits.granularity()).ok(),
                persistent: true,
                enabled: bitmap.enabled,
            };
            BitmapChange::add(to, &new)?
        }
    };
    let bits = change.bitmap().bits();
    bits.merge(&bitmap.bits);
    if let Some(successor) = &bitmap.successor {
        bits.merge(successor);
    }
    Ok(change)
}

/// As [`Node::prepare_to_keep`]. Cancel: what was made goes again.
fn room_for(
    node: &Arc<Node>,
    chunks: Vec<u64>,
) -> impl Future<Output = Result<Room, GraphError>> + use<> {
    let (done, prepared) = oneshot::channel();
    let node = Arc::clone(node);
    runtime::spawn_local(async move {
        // If nobody waits for it, it goes again.
        let _ = done.send(node.prepare_to_keep(&chunks).await);
    })
    .detach();
    async move { Ok(prepared.await.map_err(|_| GraphError::MainGone)??) }
}

async fn within<T>(
    limit: Duration,
    node: &Node,
    part: impl Future<Output = Result<T, GraphError>>,
) -> Result<T, GraphError> {
    match select(pin!(part), pin!(runtime::sleep(limit))).await {
        Either::Left((result, _)) => result,
        Either::Right(_) => Err(node.error(IoOp::Flush, 0, 0, libc::ETIMEDOUT).into()),
    }
}

impl Graph {
    /// Makes room for the persistent bitmaps of `from`, which `to` is to get soon: its file.
    /// Requests go on. Waits 2 s at most; then, or after an error, which is logged, there is
    /// room for none. `None` if there is nothing to get. While the result is held the file does
    /// not go.
    ///
    /// Cancel: there is no room.
    pub async fn make_room_for_bitmaps(
        &self,
        from: &Arc<Node>,
        to: &Arc<Node>,
    ) -> Option<BitmapRoom> {
        let chunks = chunks_to_copy(from);
        if chunks.is_empty() {
            return None;
        }
        let room = match within(ROOM, to, room_for(to, chunks.clone())).await {
            Ok(room) => Some(room),
            Err(error) => {
                let (from, to) = (from.name(), to.name());
                tracing::warn!(from, to, %error, "there is no place for persistent bitmaps");
                None
            }
        };
        Some(BitmapRoom { room, chunks })
    }

    /// Gives `to` the persistent bitmaps of `from`, of which it is about to take the place with
    /// the same content, in a drained section. `from` keeps its own.
    ///
    /// One that `to` has already, of that name and persistent, gets the bits. Those that it
    /// cannot have, for whatever reason, are named in the log. Where
    /// [`room`](Self::make_room_for_bitmaps) was made nothing is waited for; else 2 s at most,
    /// for bitmaps that have come since. Cancel: nothing is copied.
    pub async fn copy_kept_bitmaps(
        &self,
        from: &Arc<Node>,
        to: &Arc<Node>,
        room: Option<&BitmapRoom>,
    ) -> CopiedBitmaps {
        let mut copied = CopiedBitmaps {
            node: Arc::clone(to),
            changes: Vec::new(),
            room: None,
        };
        let chunks = chunks_to_copy(from);
        if chunks.is_empty() {
            return copied;
        }
        let failed = |error: &dyn std::fmt::Display| {
            let (from, to) = (from.name(), to.name());
            tracing::error!(from, to, %error, "persistent bitmaps stay with the old image only");
        };
        let room = match room {
            // It was waited for already.
            Some(BitmapRoom { room: None, .. }) => {
                failed(&"there is no place for them");
                return copied;
            }
            Some(BitmapRoom {
                room: Some(enough), ..
            }) if room.is_some_and(|room| room.is_enough_for(&chunks)) => enough,
            _ => match within(ROOM, to, room_for(to, chunks)).await {
                Ok(room) => copied.room.insert(room),
                Err(error) => {
                    failed(&error);
                    return copied;
                }
            },
        };
        match to.mark_writes(room) {
            // Its requests are those of the job, and have ended.
            Ok(since) => to.all_writes_are_marked(since),
            Err(error) => {
                failed(&error);
                return copied;
            }
        }
        // Nothing is awaited from here on: what is not settled cannot be stored.
        for bitmap in bitmaps_to_copy(from) {
            match copy_bitmap(&bitmap, to) {
                Ok(change) => copied.changes.push(change),
                Err(error) => tracing::error!(
                    bitmap = bitmap.name,
                    from = from.name(),
                    to = to.name(),
                    %error,
                    "a persistent bitmap stays with the old image only"
                ),
            }
        }
        copied
    }

    /// Makes sure that `new` can be kept, if it is to be: its file is there, and has room. As
    /// long as the result is held it can be added, and
    /// [`store_bitmaps`](Self::store_bitmaps) makes that durable. What was made goes with the
    /// result, if it was not added; `store_bitmaps` called after that returns when it has gone.
    /// `None` if it is not to be kept.
    ///
    /// If these are the first bitmaps that the node keeps, requests are held back until those
    /// under way have ended: they were not looked at.
    ///
    /// Fails as adding it does, if it cannot be kept, and if requests do not end. Cancel:
    /// what was made goes again.
    pub async fn prepare_bitmap(
        &self,
        node: &Arc<Node>,
        new: &NewBitmap<'_>,
    ) -> Result<Option<BitmapRoom>, GraphError> {
        let granularity = node.check_new_bitmap(new)?;
        if !new.persistent {
            return Ok(None);
        }
        let chunks = vec![node.size().div_ceil(granularity)];
        let room = room_for(node, chunks.clone()).await?;
        if !node.marks_all_writes() {
            let since = node.mark_writes(&room)?;
            drop(self.drain_within(node, &[], DRAIN).await?);
            node.all_writes_are_marked(since);
        }
        Ok(Some(BitmapRoom {
            room: Some(room),
            chunks,
        }))
    }

    /// Makes durable what the persistent bitmaps of `nodes` are by now. Does nothing for
    /// those that have none.
    ///
    /// Fails if a file cannot be written: the bitmaps in it are inconsistent from then on.
    /// Cancel: it is done all the same.
    pub async fn store_bitmaps(&self, nodes: &[Arc<Node>]) -> Result<(), GraphError> {
        let stored = join_all(nodes.iter().map(|node| node.store_bitmaps())).await;
        Ok(stored.into_iter().collect::<Result<(), _>>()?)
    }

    /// The nodes that stand on `node`, as far as they keep bitmaps.
    pub(super) fn keepers_above(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        let topology = self.topology.borrow();
        let above = topology.above(node.id());
        let above = above.iter().filter_map(|id| topology.node(*id));
        let nodes = above.map(|entry| Arc::clone(&entry.node));
        let others = nodes.filter(|above| above.id() != node.id());
        others.filter(|node| node.keeps_bitmaps()).collect()
    }
}
