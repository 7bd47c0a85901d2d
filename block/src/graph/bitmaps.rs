//! Persistent bitmaps of the nodes of a graph: when they are opened, stored and saved.
//!
//! How they are kept is `crate::bitmaps`' business.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};

use super::{Graph, GraphError};
use crate::bitmaps::kept::BitmapState;
use crate::bitmaps::{BitmapChange, NamedBitmapError, NewBitmap};
use crate::dirty_bitmap::DirtyBitmap;
use crate::error::IoOp;
use crate::node::Node;
use crate::runtime;

/// Longest that requests are held back so that those which are under way end.
const DRAIN: Duration = Duration::from_secs(2);

/// Longest that guests are held until a file for their bitmaps is there, or is not.
const PIVOT: Duration = Duration::from_secs(2);

/// Bitmaps that a node has got from another one. Dropped, it has not got them.
#[derive(Debug)]
#[must_use = "dropped, the bitmaps go again"]
pub struct CopiedBitmaps {
    node: Arc<Node>,
    changes: Vec<BitmapChange>,
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
        // What was made for them goes if there are none.
        self.node.store_bitmaps_soon();
    }
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

impl Graph {
    /// Gives `to` the persistent bitmaps of `from`, of which it is about to take the place with
    /// the same content, in a drained section. `from` keeps its own.
    ///
    /// One that `to` has already, of that name and persistent, gets the bits. Those that it
    /// cannot have, for whatever reason, are named in the log. Waits 2 s at most. Cancel:
    /// nothing is copied.
    pub async fn copy_kept_bitmaps(&self, from: &Arc<Node>, to: &Arc<Node>) -> CopiedBitmaps {
        let mut copied = CopiedBitmaps {
            node: Arc::clone(to),
            changes: Vec::new(),
        };
        let kept = |node: &Arc<Node>| {
            let bitmaps = node.kept_bitmaps().unwrap_or_default();
            bitmaps.into_iter().filter(|bitmap| !bitmap.inconsistent)
        };
        let chunks = |bits: &DirtyBitmap| bits.size().div_ceil(bits.granularity());
        let chunks: u64 = kept(from).map(|bitmap| chunks(&bitmap.bits)).sum();
        if chunks == 0 {
            return copied;
        }
        if let Err(error) = self.room_for(to, chunks).await {
            let (from, to) = (from.name(), to.name());
            tracing::error!(from, to, %error, "persistent bitmaps stay with the old image only");
            return copied;
        }
        // Nothing is awaited from here on: what is not settled cannot be stored.
        for bitmap in kept(from) {
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

    async fn room_for(&self, node: &Arc<Node>, chunks: u64) -> Result<(), GraphError> {
        let prepared = pin!(node.prepare_to_keep(chunks));
        match select(prepared, pin!(runtime::sleep(PIVOT))).await {
            // Its requests are those of the job, and have ended.
            Either::Left((prepared, _)) => Ok(prepared.map(|_| ())?),
            Either::Right(_) => Err(node.error(IoOp::Flush, 0, 0, libc::ETIMEDOUT).into()),
        }
    }

    /// Makes sure that `new` can be kept, if it is to be: its file is there, and has room.
    /// Afterwards it can be added, and [`store_bitmaps`](Self::store_bitmaps) makes that
    /// durable, or takes back what was made if it was not added.
    ///
    /// If these are the first bitmaps that the node keeps, requests are held back until those
    /// under way have ended: they were not looked at.
    ///
    /// Fails as adding it does, if it cannot be kept, and if requests do not end. Cancel: the
    /// file is there or not.
    pub async fn prepare_bitmap(
        &self,
        node: &Arc<Node>,
        new: &NewBitmap<'_>,
    ) -> Result<(), GraphError> {
        let granularity = node.check_new_bitmap(new)?;
        if !new.persistent {
            return Ok(());
        }
        if node
            .prepare_to_keep(node.size().div_ceil(granularity))
            .await?
        {
            drop(self.drain_within(node, &[], DRAIN).await?);
        }
        Ok(())
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
