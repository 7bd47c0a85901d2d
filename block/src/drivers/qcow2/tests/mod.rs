//! Tests of the driver.
//!
//! - `header`: what is refused before anything is read by it;
//! - `crash`: images are consistent wherever their writer stops;
//! - `order`: what has to be durable before what;
//! - `life`: images that are reopened, deleted, or not to be flushed;
//! - `requests`: what requests do, and what goes wrong with them;
//! - `resize`: disks that become larger or smaller;
//! - `check`: looks through an image as 'qemu-img check' does;
//! - `recorder`: a storage that remembers the order of what was done.

mod check;
mod crash;
mod header;
mod life;
mod order;
mod recorder;
mod requests;
mod resize;

use std::rc::Rc;
use std::sync::Arc;

use crate::graph::Graph;
use crate::node::Node;
use crate::options::{
    BackingRef, BlockdevOptions, BlockdevRef, DiscardMode, DriverOptions, Qcow2Options,
};
use crate::runtime::EventLoop;

/// How an image is laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_order: u32,
    /// Of the disk, in bytes.
    pub(crate) size: u64,
}

impl Layout {
    /// An empty image of version 3: header, reference count table with one block,
    /// first level table.
    pub(crate) fn image(self) -> Vec<u8> {
        let cluster = 1usize << self.cluster_bits;
        let l1_entries = self.size.div_ceil(1 << (2 * self.cluster_bits - 3)).max(1);
        let l1_clusters = (l1_entries as usize * 8).div_ceil(cluster);
        let mut image = vec![0; (3 + l1_clusters) * cluster];
        let mut put = |at: usize, value: &[u8]| image[at..at + value.len()].copy_from_slice(value);
        put(0, b"QFI\xfb");
        put(4, &3u32.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &(l1_entries as u32).to_be_bytes());
        put(40, &(3 * cluster as u64).to_be_bytes());
        put(48, &(cluster as u64).to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &self.refcount_order.to_be_bytes());
        put(100, &104u32.to_be_bytes());
        put(cluster, &(2 * cluster as u64).to_be_bytes());
        let bytes = (1usize << self.refcount_order) / 8;
        for used in 0..3 + l1_clusters {
            put(2 * cluster + (used + 1) * bytes - 1, &[1]);
        }
        image
    }
}

/// Runs a test on a main loop of its own.
fn on_main<F: Future<Output = ()>>(test: impl FnOnce(Rc<Graph>) -> F) {
    let main = EventLoop::new("test").expect("an event loop");
    let graph = Graph::new();
    main.block_on(test(graph));
}

/// The image in node `file`, as node `name`.
async fn open_on(
    graph: &Graph,
    name: &str,
    file: &str,
    backing: BackingRef,
) -> Result<Arc<Node>, crate::GraphError> {
    graph
        .blockdev_add(BlockdevOptions {
            node_name: Some(name.to_owned()),
            discard: Some(DiscardMode::Unmap),
            ..BlockdevOptions::new(DriverOptions::Qcow2(Qcow2Options {
                backing,
                ..Qcow2Options::new(BlockdevRef::Name(file.to_owned()))
            }))
        })
        .await
}
