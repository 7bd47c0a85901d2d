use super::*;
use crate::buffer::{AlignedBuffer, IoVec};
use crate::driver::{
    BlockDriver, BoxFuture, ChildRole, ExtentFlags, Limits, WriteFlags, ZeroFlags,
};
use crate::node::{Child, NodeOptions};
use crate::runtime::EventLoop;
use crate::test_storage::{CHUNK, TestStorage};

/// A layer over `backing` that has what its own storage has; or a filter.
struct Layer {
    own: Child,
    backing: Option<Child>,
    filter: bool,
}

impl BlockDriver for Layer {
    fn name(&self) -> &'static str {
        "layer"
    }
    fn size(&self) -> u64 {
        self.own.node().size()
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn filename(&self) -> String {
        String::new()
    }
    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            // Tests read what is in one piece.
            let extent = self.block_status(offset, iov.len() as u64).await?;
            match &self.backing {
                Some(backing) if !extent.flags.allocated => backing.node().read(offset, iov).await,
                _ => self.own.node().read(offset, iov).await,
            }
        })
    }
    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.own.node().write(offset, iov, flags).await })
    }
    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.own.node().write_zeroes(offset, len, flags).await })
    }
    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.own.node().discard(offset, len).await })
    }
    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move { self.own.node().flush().await })
    }
    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move {
            let extent = self.own.node().block_status(offset, len).await?;
            if self.filter || extent.flags.data {
                return Ok(extent);
            }
            Ok(Extent {
                flags: ExtentFlags::default(),
                ..extent
            })
        })
    }
    fn filtered(&self) -> Option<Arc<Node>> {
        self.filter.then(|| self.own.node())
    }
    fn backing(&self) -> Option<Arc<Node>> {
        self.backing.as_ref().map(Child::node)
    }
}

pub(crate) fn node(name: &str, driver: Box<dyn BlockDriver>) -> Arc<Node> {
    Node::new(name, driver, NodeOptions::default())
}

/// A layer of `chunks` chunks with data in those given.
pub(crate) fn layer(
    name: &str,
    chunks: u64,
    data: &[u64],
    backing: Option<&Arc<Node>>,
) -> Arc<Node> {
    let storage = TestStorage::new(chunks * CHUNK);
    let own = node("own", storage.driver());
    let event_loop = EventLoop::new("layer").unwrap();
    for chunk in data {
        let iov = AlignedBuffer::new(CHUNK as usize).io_vec(CHUNK as usize);
        iov.fill(1);
        event_loop
            .block_on(own.write(chunk * CHUNK, iov, WriteFlags::default()))
            .unwrap();
    }
    let driver = Layer {
        own: Child::new(ChildRole::File, own),
        backing: backing.map(|node| Child::new(ChildRole::Backing, Arc::clone(node))),
        filter: false,
    };
    node(name, Box::new(driver))
}

fn filter(below: &Arc<Node>) -> Arc<Node> {
    let driver = Layer {
        own: Child::new(ChildRole::File, Arc::clone(below)),
        backing: None,
        filter: true,
    };
    node("filter", Box::new(driver))
}

/// Depth of each run of chunks: `(chunks, depth, data, zero)`.
fn map(top: &Arc<Node>, base: Option<&Arc<Node>>) -> Vec<(u64, u32, bool, bool)> {
    let event_loop = EventLoop::new("map").unwrap();
    let mut at = 0;
    let mut runs = Vec::new();
    while at < top.size() {
        let extent = event_loop
            .block_on(top.chain_status(base, at, top.size() - at))
            .unwrap();
        assert!(extent.len > 0);
        runs.push((extent.len / CHUNK, extent.depth, extent.data, extent.zero));
        at += extent.len;
    }
    runs
}

#[test]
fn each_range_comes_from_the_topmost_layer_that_has_it() {
    let base = layer("base", 8, &[0, 1, 2], None);
    let middle = layer("middle", 8, &[1], Some(&base));
    let top = layer("top", 8, &[2, 3], Some(&middle));
    assert_eq!(
        map(&top, None),
        [
            (1, 3, true, false),
            (1, 2, true, false),
            (2, 1, true, false),
            (4, 0, false, true),
        ]
    );
    // What the base has is not asked for.
    assert_eq!(
        map(&top, Some(&base)),
        [
            (1, 0, false, false),
            (1, 2, true, false),
            (2, 1, true, false),
            (4, 0, false, false),
        ]
    );
    assert_eq!(map(&top, Some(&top)), [(8, 0, false, false)]);
}

#[test]
fn filters_do_not_count_as_layers() {
    let base = layer("base", 4, &[0], None);
    let below = filter(&base);
    let top = layer("top", 4, &[1], Some(&below));
    let above = filter(&filter(&top));
    let whole = [
        (1, 2, true, false),
        (1, 1, true, false),
        (2, 0, false, true),
    ];
    assert_eq!(map(&above, None), whole);
    // A filter of the chain may be the base, and so may what it shows.
    for stop in [&below, &base] {
        assert_eq!(
            map(&above, Some(stop)),
            [
                (1, 0, false, false),
                (1, 1, true, false),
                (2, 0, false, false)
            ]
        );
    }
    assert_eq!(above.skip_filters().id(), top.id());
    assert_eq!(above.backing().map(|node| node.id()), Some(below.id()));
}

#[test]
fn a_short_layer_hides_what_is_below_with_zeroes() {
    let base = layer("base", 6, &[0, 4, 5], None);
    let middle = layer("middle", 3, &[1], Some(&base));
    let top = layer("top", 6, &[], Some(&middle));
    assert_eq!(
        map(&top, None),
        [
            (1, 3, true, false),
            (1, 2, true, false),
            (1, 0, false, true),
            (3, 2, false, true),
        ]
    );
}

#[test]
fn a_base_that_is_not_in_the_chain_is_refused() {
    let other = layer("other", 4, &[], None);
    let top = layer("top", 4, &[], None);
    let event_loop = EventLoop::new("test").unwrap();
    let error = event_loop
        .block_on(top.chain_status(Some(&other), 0, CHUNK))
        .unwrap_err();
    assert_eq!(error.errno, libc::EINVAL);
}
