//! `block-dirty-bitmap-*`: as commands, and as actions of a transaction.
//!
//! A command makes its change and lets it last; it is answered when that is durable, if the
//! bitmap is persistent. A transaction reads all of its
//! actions first, then makes the changes, and undoes them if a later action fails.

use std::rc::Rc;
use std::sync::Arc;

use block::{
    BitmapChange, BitmapRoom, Graph, GraphError, NamedBitmap, NamedBitmapError, NewBitmap, Node,
};
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{Outcome, done};
use crate::monitor::Monitor;
use crate::monitor::args::{Args, StringOrObject};
use crate::monitor::error::QmpError;

/// A change to a bitmap, as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BitmapAction {
    Add {
        node: String,
        name: String,
        granularity: Option<u32>,
        persistent: bool,
        disabled: bool,
    },
    Clear(Place),
    Disable(Place),
    Enable(Place),
    Remove(Place),
    Merge {
        target: Place,
        from: Vec<Place>,
    },
}

/// A bitmap, as users name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The node that has it, or a device on that.
    node: String,
    name: String,
}

impl Place {
    fn take(mut args: Args) -> Result<Self, QmpError> {
        let place = Self {
            node: args.required_str("node")?,
            name: args.required_str("name")?,
        };
        args.finish()?;
        Ok(place)
    }

    fn find(&self, graph: &Graph) -> Result<Arc<NamedBitmap>, NamedBitmapError> {
        graph.find_bitmap(&self.node, &self.name)
    }
}

impl BitmapAction {
    /// The arguments of `block-dirty-bitmap-add`.
    pub(super) fn add(mut args: Args) -> Result<Self, QmpError> {
        let action = Self::Add {
            node: args.required_str("node")?,
            name: args.required_str("name")?,
            granularity: args.optional_u32("granularity")?,
            persistent: args.optional_bool("persistent")?.unwrap_or(false),
            disabled: args.optional_bool("disabled")?.unwrap_or(false),
        };
        args.finish()?;
        Ok(action)
    }

    /// The arguments of `block-dirty-bitmap-clear`.
    pub(super) fn clear(args: Args) -> Result<Self, QmpError> {
        Place::take(args).map(Self::Clear)
    }

    /// The arguments of `block-dirty-bitmap-disable`.
    pub(super) fn disable(args: Args) -> Result<Self, QmpError> {
        Place::take(args).map(Self::Disable)
    }

    /// The arguments of `block-dirty-bitmap-enable`.
    pub(super) fn enable(args: Args) -> Result<Self, QmpError> {
        Place::take(args).map(Self::Enable)
    }

    /// The arguments of `block-dirty-bitmap-remove`.
    pub(super) fn remove(args: Args) -> Result<Self, QmpError> {
        Place::take(args).map(Self::Remove)
    }

    /// The arguments of `block-dirty-bitmap-merge`.
    pub(super) fn merge(mut args: Args) -> Result<Self, QmpError> {
        let node = args.required_str("node")?;
        let name = args.required_str("target")?;
        let from = args
            .optional_list_of_string_or_object("bitmaps", "BlockDirtyBitmapOrStr")?
            .ok_or_else(|| args.missing("bitmaps"))?;
        let from = from.into_iter().map(|source| match source {
            StringOrObject::String(name) => Ok(Place {
                node: node.clone(),
                name,
            }),
            StringOrObject::Object(args) => Place::take(args),
        });
        let from = from.collect::<Result<_, _>>()?;
        args.finish()?;
        Ok(Self::Merge {
            target: Place { node, name },
            from,
        })
    }

    /// QMP's name of the command and of the action.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Add { .. } => "block-dirty-bitmap-add",
            Self::Clear(_) => "block-dirty-bitmap-clear",
            Self::Disable(_) => "block-dirty-bitmap-disable",
            Self::Enable(_) => "block-dirty-bitmap-enable",
            Self::Remove(_) => "block-dirty-bitmap-remove",
            Self::Merge { .. } => "block-dirty-bitmap-merge",
        }
    }

    /// The node whose bitmap it changes, if that is there.
    pub(super) fn node(&self, graph: &Graph) -> Option<Arc<Node>> {
        let node = match self {
            Self::Add { node, .. } => node,
            Self::Clear(place)
            | Self::Disable(place)
            | Self::Enable(place)
            | Self::Remove(place)
            | Self::Merge { target: place, .. } => &place.node,
        };
        graph.find(node).ok()
    }

    /// What it adds, and to which node.
    fn added(&self) -> Option<(&str, NewBitmap<'_>)> {
        match self {
            Self::Add {
                node,
                name,
                granularity,
                persistent,
                disabled,
            } => Some((
                node,
                NewBitmap {
                    name,
                    granularity: *granularity,
                    persistent: *persistent,
                    enabled: !disabled,
                },
            )),
            _ => None,
        }
    }

    /// Makes sure that a persistent bitmap can be kept which this adds. What else is wrong
    /// with it is left to [`apply`](Self::apply). Gives the node and the room in its file, to
    /// be held until it is added; see [`Graph::prepare_bitmap`].
    ///
    /// Cancel: as [`Graph::prepare_bitmap`].
    pub(super) async fn prepare(&self, graph: &Graph) -> Result<Option<Prepared>, QmpError> {
        let Some((node, new)) = self.added().filter(|(_, new)| new.persistent) else {
            return Ok(None);
        };
        let Ok(node) = graph.find(node) else {
            return Ok(None);
        };
        match graph.prepare_bitmap(&node, &new).await {
            Ok(room) => Ok(room.map(|room| Prepared { node, _room: room })),
            Err(GraphError::Bitmap(_)) => Ok(None),
            Err(error) => {
                // As if nothing had been tried.
                let _ = graph.store_bitmaps(&[node]).await;
                Err(error.into())
            }
        }
    }

    /// Makes the change. Nothing is awaited.
    ///
    /// Errors: in QEMU's words. Nothing has been changed.
    pub(super) fn apply(&self, graph: &Graph) -> Result<BitmapChange, QmpError> {
        let change = match self {
            Self::Add { node, name, .. } => {
                if name.is_empty() {
                    return Err(NamedBitmapError::EmptyName.into());
                }
                let node = graph.find(node)?;
                let Some((_, new)) = self.added() else {
                    return Err(NamedBitmapError::EmptyName.into());
                };
                BitmapChange::add(&node, &new)?
            }
            Self::Clear(place) => BitmapChange::clear(&place.find(graph)?)?,
            Self::Disable(place) => BitmapChange::disable(&place.find(graph)?)?,
            Self::Enable(place) => BitmapChange::enable(&place.find(graph)?)?,
            Self::Remove(place) => BitmapChange::remove(&place.find(graph)?)?,
            Self::Merge { target, from } => {
                let sources = from.iter().map(|source| source.find(graph));
                BitmapChange::merge(&target.find(graph)?, sources)?
            }
        };
        Ok(change)
    }

    /// Makes the change, durably where the bitmap is persistent.
    ///
    /// Cancel: it is made or not.
    async fn run(&self, monitor: &Monitor) -> Outcome {
        let graph = &monitor.graph;
        // What is made for the first persistent bitmap of a node is made once.
        let alone = match self.added() {
            Some((_, new)) if new.persistent => Some(monitor.graph_commands.lock().await),
            _ => None,
        };
        let prepared = self.prepare(graph).await?;
        let made = prepared.as_ref().map(|made| Arc::clone(&made.node));
        let change = match self.apply(graph) {
            Ok(change) => change,
            Err(error) => {
                // As if nothing had been tried.
                drop(prepared);
                let nodes: Vec<_> = made.into_iter().collect();
                graph.store_bitmaps(&nodes).await?;
                return Err(error);
            }
        };
        let bitmap = Arc::clone(change.bitmap());
        change.commit();
        drop(prepared);
        let nodes: Vec<_> = kept_by(&bitmap).into_iter().collect();
        if let Err(error) = graph.store_bitmaps(&nodes).await {
            if made.is_some()
                && let Ok(change) = BitmapChange::remove(&bitmap)
            {
                change.commit();
                let _ = graph.store_bitmaps(&nodes).await;
            }
            return Err(error.into());
        }
        drop(alone);
        done()
    }
}

/// A node in whose bitmap file there is room for a bitmap that is to be added.
pub(super) struct Prepared {
    pub(super) node: Arc<Node>,
    /// Held until it has been.
    _room: BitmapRoom,
}

/// The node that keeps the bitmap, if it is persistent.
pub(super) fn kept_by(bitmap: &NamedBitmap) -> Option<Arc<Node>> {
    bitmap.node().filter(|_| bitmap.is_persistent())
}

pub(super) async fn block_dirty_bitmap_add(monitor: Rc<Monitor>, args: Args) -> Outcome {
    BitmapAction::add(args)?.run(&monitor).await
}

pub(super) async fn block_dirty_bitmap_clear(monitor: Rc<Monitor>, args: Args) -> Outcome {
    BitmapAction::clear(args)?.run(&monitor).await
}

pub(super) async fn block_dirty_bitmap_disable(monitor: Rc<Monitor>, args: Args) -> Outcome {
    BitmapAction::disable(args)?.run(&monitor).await
}

pub(super) async fn block_dirty_bitmap_enable(monitor: Rc<Monitor>, args: Args) -> Outcome {
    BitmapAction::enable(args)?.run(&monitor).await
}

pub(super) async fn block_dirty_bitmap_merge(monitor: Rc<Monitor>, args: Args) -> Outcome {
    BitmapAction::merge(args)?.run(&monitor).await
}

pub(super) async fn block_dirty_bitmap_remove(monitor: Rc<Monitor>, args: Args) -> Outcome {
    BitmapAction::remove(args)?.run(&monitor).await
}

/// A digest of the bits, to compare bitmaps by.
pub(super) async fn x_debug_block_dirty_bitmap_sha256(monitor: Rc<Monitor>, args: Args) -> Outcome {
    let bitmap = Place::take(args)?.find(&monitor.graph)?;
    let bits = bitmap.bits();
    let mut digest = Sha256::new();
    for word in bits.words() {
        digest.update(word.to_le_bytes());
    }
    if bits.size() == 0 {
        // QEMU's bitmaps have at least one word.
        digest.update([0; 8]);
    }
    let digest: String = digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(json!({"sha256": digest}))
}
