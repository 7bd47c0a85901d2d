//! Layers of an image: a node, its backing image, the backing image of that, and
//! so on; filters in between do not count.

use std::sync::Arc;

use crate::driver::Extent;
use crate::error::{IoError, IoOp};
use crate::node::Node;

/// A run of bytes that comes from one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainExtent {
    /// Length in bytes: at least 1, at most what was asked for.
    pub len: u64,
    /// The layer that it is allocated in: 1 is the node itself, 2 its backing image,
    /// and so on. 0: none of those that were looked at.
    pub depth: u32,
    /// Holds data that has to be read.
    pub data: bool,
    /// Reads as zeroes.
    pub zero: bool,
}

impl Node {
    /// The first node from this one down that is not a filter.
    pub fn skip_filters(self: &Arc<Self>) -> Arc<Node> {
        let mut node = Arc::clone(self);
        while let Some(below) = node.driver().filtered() {
            node = below;
        }
        node
    }

    /// The node that shows through what is not allocated in this one (or in what it
    /// shows, if it is a filter). It may be a filter itself.
    pub fn backing(self: &Arc<Self>) -> Option<Arc<Node>> {
        self.skip_filters().driver().backing()
    }

    /// Where the bytes at `offset` come from, as far as all of them come from the
    /// same layer: this node or one below, down to `base`, which is not looked at.
    /// Without a base the whole chain is looked at.
    ///
    /// With a base, an extent of depth 0 is what the base has there. Without, it
    /// reads as zeroes. What lies past the end of a shorter layer reads as zeroes
    /// and counts as allocated there, since it hides what is below.
    ///
    /// `len` must not be 0; fails as [`block_status`](Self::block_status) does, and
    /// with `EINVAL` if `base` is not in the chain. Cancel: nothing happens.
    pub async fn chain_status(
        self: &Arc<Self>,
        base: Option<&Arc<Node>>,
        offset: u64,
        len: u64,
    ) -> Result<ChainExtent, IoError> {
        let mut rest = len;
        let mut depth = 0;
        let mut next = Some(Arc::clone(self));
        while let Some(node) = next {
            let Some(layer) = layer_above(&node, base) else {
                return Ok(unallocated(rest, false));
            };
            depth += 1;
            let past_end = depth > 1 && offset >= layer.size();
            if past_end {
                return Ok(ChainExtent {
                    depth,
                    ..unallocated(rest, true)
                });
            }
            let inside = match depth {
                1 => rest,
                _ => rest.min(layer.size() - offset),
            };
            let Extent { len, flags } = layer.block_status(offset, inside).await?;
            rest = rest.min(len);
            if flags.allocated {
                return Ok(ChainExtent {
                    len: rest,
                    depth,
                    data: flags.data,
                    zero: flags.zero,
                });
            }
            next = layer.driver().backing();
        }
        match base {
            None => Ok(unallocated(rest, true)),
            Some(_) => Err(self.error(IoOp::BlockStatus, offset, len, libc::EINVAL)),
        }
    }
}

/// The layer that `node` is or shows; `None` if `base` comes first.
fn layer_above(node: &Arc<Node>, base: Option<&Arc<Node>>) -> Option<Arc<Node>> {
    let is_base = |node: &Arc<Node>| base.is_some_and(|base| base.id() == node.id());
    let mut node = Arc::clone(node);
    while !is_base(&node) {
        match node.driver().filtered() {
            Some(below) => node = below,
            None => return Some(node),
        }
    }
    None
}

fn unallocated(len: u64, zero: bool) -> ChainExtent {
    ChainExtent {
        len,
        depth: 0,
        data: false,
        zero,
    }
}

#[cfg(all(test, not(shuttle)))]
pub(crate) mod tests;
