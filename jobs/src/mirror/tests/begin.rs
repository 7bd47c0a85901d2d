//! What is copied at first, and writes that come while that is found out; `replaces`.

use block::test_storage::{Match, TestStorage};
use block::{
    BlockDriver, BlockdevOptions, BlockdevRef, BoxFuture, DriverOptions, Extent, IoOp, Limits,
    ThrottleOptions,
};

use super::*;
use crate::CopyMode;
use crate::mirror::SyncMode;

/// Two layers: what is written goes to the upper one, chunk by chunk, and the rest of a
/// chunk is copied up with it.
struct Layers {
    upper: Box<dyn BlockDriver>,
    allocated: std::sync::Mutex<Vec<bool>>,
    base: Arc<Node>,
}

const CHUNK: u64 = 64 * KIB;

impl Layers {
    fn is_allocated(&self, offset: u64) -> bool {
        self.allocated.lock().unwrap()[(offset / CHUNK) as usize]
    }

    fn pieces(offset: u64, len: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
        let end = offset + len;
        (offset / CHUNK..end.div_ceil(CHUNK))
            .map(move |n| offset.max(n * CHUNK)..end.min((n + 1) * CHUNK))
    }

    async fn copy_up(&self, offset: u64, len: u64) -> Result<(), IoError> {
        for piece in Self::pieces(offset, len) {
            let chunk = piece.start / CHUNK * CHUNK;
            if !self.is_allocated(chunk) {
                let iov = AlignedBuffer::new(CHUNK as usize).io_vec(CHUNK as usize);
                self.base.read(chunk, iov.clone()).await?;
                self.upper.write(chunk, iov, WriteFlags::default()).await?;
            }
        }
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) {
        for piece in Self::pieces(offset, len) {
            self.allocated.lock().unwrap()[(piece.start / CHUNK) as usize] = true;
        }
    }
}

impl BlockDriver for Layers {
    fn name(&self) -> &'static str {
        "layers"
    }

    fn size(&self) -> u64 {
        self.upper.size()
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn filename(&self) -> String {
        String::new()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            for piece in Self::pieces(offset, iov.len() as u64) {
                let part = iov.slice(
                    (piece.start - offset) as usize,
                    (piece.end - piece.start) as usize,
                );
                if self.is_allocated(piece.start) {
                    self.upper.read(piece.start, part).await?;
                } else {
                    self.base.read(piece.start, part).await?;
                }
            }
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            let len = iov.len() as u64;
            self.copy_up(offset, len).await?;
            self.upper.write(offset, iov, flags).await?;
            self.allocate(offset, len);
            Ok(())
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(async move {
            self.copy_up(offset, len).await?;
            self.upper.write_zeroes(offset, len, flags).await?;
            self.allocate(offset, len);
            Ok(())
        })
    }

    fn discard<'a>(&'a self, _: u64, _: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        self.upper.flush()
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(async move {
            let here = len.min((offset / CHUNK + 1) * CHUNK - offset);
            // The upper storage is asked in any case: tests hold the question.
            let mut extent = self.upper.block_status(offset, here).await?;
            extent.flags.allocated = self.is_allocated(offset);
            if !extent.flags.allocated {
                extent.len = here;
                extent.flags.data = false;
                extent.flags.zero = false;
            }
            Ok(extent)
        })
    }

    fn backing(&self) -> Option<Arc<Node>> {
        Some(Arc::clone(&self.base))
    }
}

/// A disk of two layers, of which the first chunk of the upper one is allocated, and a
/// target that shows the same base.
pub(super) struct Chain {
    rig: Rc<Rig>,
    pub(super) upper: TestStorage,
    pub(super) target: TestStorage,
    pub(super) disk: Arc<Backend>,
}

impl Chain {
    pub(super) fn new(rig: &Rc<Rig>) -> Self {
        scribble(&rig.source);
        let (upper, target) = (TestStorage::new(SIZE), TestStorage::new(SIZE));
        upper.poke(0, &[7; CHUNK as usize]);
        let chunks = (SIZE / CHUNK) as usize;
        let layer = |name: &str, storage: &TestStorage| {
            let layers = Layers {
                upper: storage.driver(),
                allocated: vec![false; chunks].into(),
                base: rig.node("src"),
            };
            if name == "top" {
                layers.allocate(0, CHUNK);
            }
            let added = rig
                .graph
                .add_node(Some(name), Box::new(layers), NodeOptions::default());
            added.expect("a layered node")
        };
        let top = layer("top", &upper);
        layer("copy", &target);
        let disk = rig.graph.attach("disk1", &top, device(), None);
        Self {
            rig: Rc::clone(rig),
            upper,
            target,
            disk: disk.expect("device"),
        }
    }

    pub(super) fn spec(&self, copy_mode: CopyMode) -> MirrorSpec {
        MirrorSpec {
            sync: SyncMode::Top,
            copy_mode,
            source: self.rig.node("top"),
            target: self.rig.node("copy"),
            granularity: CHUNK as u32,
            ..self.rig.spec()
        }
    }

    fn begin_write(&self, offset: u64, byte: u8) -> LocalTask<Result<(), IoError>> {
        let disk = Arc::clone(&self.disk);
        self.rig.guest(1, move |_| async move {
            disk.write(offset, filled(4096, byte), WriteFlags::default())
                .await
        })
    }

    pub(super) async fn assert_equal(&self) {
        let (top, copy) = (self.rig.node("top"), self.rig.node("copy"));
        for offset in (0..SIZE).step_by(CHUNK as usize) {
            let read = async |node: &Arc<Node>| {
                let iov = filled(CHUNK, 0);
                node.read(offset, iov.clone()).await.expect("a read");
                let mut bytes = vec![0; CHUNK as usize];
                iov.copy_to(0, &mut bytes);
                bytes
            };
            assert!(read(&top).await == read(&copy).await, "chunk at {offset}");
        }
    }
}

#[test]
fn sync_top_copies_the_topmost_layer_only() {
    with_rig(|rig| async move {
        let chain = Chain::new(&rig);
        let key = rig.ready(chain.spec(CopyMode::Background)).await;
        let info = rig.jobs.query().remove(0);
        assert_eq!((info.current_progress, info.total_progress), (CHUNK, CHUNK));
        chain.begin_write(5 * CHUNK, 9).await.expect("a write");
        rig.pivot(key).await;
        assert_eq!(chain.disk.root().name(), "copy");
        chain.assert_equal().await;
        assert_eq!(
            chain.target.peek(2 * CHUNK, 1),
            [0],
            "the base is not copied"
        );
    });
}

#[test]
fn a_write_while_the_layers_are_looked_through_is_not_lost() {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        with_rig(|rig| async move {
            let chain = Chain::new(&rig);
            // Chunks 0 to 2 have been looked at, 3 is being asked for, the rest is not.
            let at = 3 * CHUNK;
            chain
                .upper
                .hold(Match::op(IoOp::BlockStatus).range(at..at + 1));
            let key = rig.start(chain.spec(copy_mode)).await;
            chain.upper.wait_held(1).await;
            for chunk in [1, 3, 5] {
                let write = chain.begin_write(chunk * CHUNK + 4096, chunk as u8);
                write.await.expect("a write");
            }
            chain.upper.release_all();
            rig.wait_for(JobStatus::Ready).await;
            rig.pivot(key).await;
            chain.assert_equal().await;
        });
    }
}

#[test]
fn a_write_in_flight_while_the_layers_are_looked_through_is_not_lost() {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        with_rig(|rig| async move {
            let chain = Chain::new(&rig);
            let at = 5 * CHUNK;
            chain
                .upper
                .hold(Match::op(IoOp::Write).range(at..at + CHUNK));
            let key = rig.start(chain.spec(copy_mode)).await;
            let write = chain.begin_write(at + 4096, 9);
            chain.upper.wait_held(1).await;
            // Everything has been looked at by the time the write goes on.
            rig.wait_for(JobStatus::Ready).await;
            chain.upper.release_all();
            write.await.expect("a write");
            rig.pivot(key).await;
            chain.assert_equal().await;
        });
    }
}

#[test]
fn old_data_is_zeroed_first_where_that_is_fast_and_writes_beside_it_survive() {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        with_rig(|rig| async move {
            let limits = Limits {
                can_zero_fast: true,
                ..Limits::default()
            };
            let old = TestStorage::with_limits(SIZE, limits);
            scribble(&old);
            rig.source.poke(CHUNK, &[3; 4096]);
            let options = NodeOptions {
                discard: DiscardMode::Unmap,
                ..NodeOptions::default()
            };
            let target = rig.graph.add_node(Some("fast"), old.driver(), options);
            old.hold(Match::op(IoOp::WriteZeroes));
            let spec = MirrorSpec {
                target: target.expect("target"),
                copy_mode,
                ..rig.spec()
            };
            rig.start(spec).await;
            old.wait_held(1).await;
            let write = rig.begin_write(9 * CHUNK, 4096, 5);
            old.release_all();
            write.await.expect("a write");
            rig.wait_for(JobStatus::Ready).await;
            rig.write(11 * CHUNK, 512, 6).await;
            rig.act(|jobs| {
                let key = jobs.find("j0")?;
                jobs.cancel(key, false)
            });
            rig.wait_for(JobStatus::Null).await;
            assert!(rig.source.snapshot() == old.snapshot());
        });
    }
}

#[test]
fn a_cancel_while_the_layers_are_looked_through_is_heeded() {
    with_rig(|rig| async move {
        let chain = Chain::new(&rig);
        let at = 3 * CHUNK;
        chain
            .upper
            .hold(Match::op(IoOp::BlockStatus).range(at..at + 1));
        let key = rig.start(chain.spec(CopyMode::Background)).await;
        chain.upper.wait_held(1).await;
        rig.act(|jobs| jobs.cancel(key, true));
        chain.upper.release_all();
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.was_cancelled());
        assert_eq!(chain.disk.root().name(), "top");
    });
}

#[test]
fn a_cancel_or_a_deadline_does_not_wait_for_a_beginning_that_hangs() {
    for deadline in [None, Some(Duration::from_millis(50))] {
        with_rig(|rig| async move {
            let chain = Chain::new(&rig);
            let at = 3 * CHUNK;
            chain
                .upper
                .hold(Match::op(IoOp::BlockStatus).range(at..at + 1));
            let spec = MirrorSpec {
                deadline,
                ..chain.spec(CopyMode::Background)
            };
            let key = rig.start(spec).await;
            chain.upper.wait_held(1).await;
            if deadline.is_none() {
                rig.act(|jobs| jobs.cancel(key, true));
            }
            rig.wait_for(JobStatus::Null).await;
            assert_eq!(chain.upper.held(), 1);
            match rig.completed().flatten() {
                None => assert!(rig.was_cancelled()),
                Some(error) => assert!(error.contains("not looked at"), "{error}"),
            }
            assert_eq!(chain.disk.root().name(), "top");
            let top = rig.node("top");
            assert!(rig.graph.check_not_blocked(&top).is_err());
            chain.upper.release_all();
            rig.until(|| rig.graph.check_not_blocked(&top).is_ok())
                .await;
        });
    }
}

#[test]
fn a_target_that_hangs_while_it_is_zeroed_first_does_not_keep_a_cancel_waiting() {
    with_rig(|rig| async move {
        let limits = Limits {
            can_zero_fast: true,
            ..Limits::default()
        };
        let old = TestStorage::with_limits(SIZE, limits);
        scribble(&old);
        let options = NodeOptions {
            discard: DiscardMode::Unmap,
            ..NodeOptions::default()
        };
        let target = rig.graph.add_node(Some("fast"), old.driver(), options);
        let target = target.expect("target");
        old.hold(Match::op(IoOp::WriteZeroes));
        let spec = MirrorSpec {
            target: Arc::clone(&target),
            ..rig.spec()
        };
        let key = rig.start(spec).await;
        old.wait_held(1).await;
        rig.act(|jobs| jobs.cancel(key, true));
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.was_cancelled() && old.held() == 1);
        assert!(rig.graph.check_not_blocked(&target).is_err());
        old.release_all();
        rig.until(|| rig.graph.check_not_blocked(&target).is_ok())
            .await;
    });
}

#[test]
fn a_source_that_cannot_tell_what_is_allocated_fails_the_job() {
    with_rig(|rig| async move {
        let chain = Chain::new(&rig);
        chain.upper.fail(Match::op(IoOp::BlockStatus), libc::EIO);
        rig.start(chain.spec(CopyMode::Background)).await;
        rig.wait_for(JobStatus::Null).await;
        assert!(rig.completed().flatten().is_some());
        assert_eq!(chain.disk.root().name(), "top");
    });
}

/// A throttle filter over `src`, with a device on it.
async fn filtered(rig: &Rc<Rig>) -> Arc<Backend> {
    let group = block::ThrottleLimits::default();
    rig.graph
        .throttle_groups()
        .create("group", group)
        .expect("a group");
    let below = rig.graph.add_node(
        Some("below"),
        rig.source.driver(),
        NodeOptions {
            discard: DiscardMode::Unmap,
            ..NodeOptions::default()
        },
    );
    below.expect("a node");
    let options = BlockdevOptions {
        node_name: Some("filter".to_owned()),
        discard: Some(DiscardMode::Unmap),
        ..BlockdevOptions::new(DriverOptions::Throttle(ThrottleOptions {
            group: "group".to_owned(),
            file: BlockdevRef::Name("below".to_owned()),
        }))
    };
    let filter = rig.graph.blockdev_add(options).await.expect("a filter");
    let disk = rig.graph.attach("disk1", &filter, device(), None);
    disk.expect("device")
}

#[test]
fn replaces_swaps_the_node_below_a_filter_and_keeps_the_filter() {
    with_rig(|rig| async move {
        let disk = filtered(&rig).await;
        scribble(&rig.source);
        let spec = MirrorSpec {
            source: rig.node("filter"),
            replaces: Some("below".to_owned()),
            ..rig.spec()
        };
        let key = rig.ready(spec).await;
        let refused = rig.graph.blockdev_del("below").await.unwrap_err();
        assert_eq!(refused.to_string(), "Block device below is in use");
        disk.write(CHUNK, filled(4096, 5), WriteFlags::default())
            .await
            .expect("a write");
        rig.pivot(key).await;
        assert_eq!(disk.root().name(), "filter");
        let below = rig.node("filter").driver().filtered();
        assert_eq!(below.expect("a child").name(), "dst");
        rig.assert_equal();
        rig.graph.blockdev_del("below").await.expect("it is free");
        disk.write(0, filled(512, 8), WriteFlags::default())
            .await
            .expect("a write");
        assert_eq!(rig.target.peek(0, 1), [8]);
        assert_ne!(rig.source.peek(0, 1), [8]);
    });
}

#[test]
fn replaces_takes_only_nodes_that_show_what_the_source_shows() {
    with_rig(|rig| async move {
        let _disk = filtered(&rig).await;
        let refused = async |replaces: &str| {
            let spec = MirrorSpec {
                source: rig.node("filter"),
                replaces: Some(replaces.to_owned()),
                ..rig.spec()
            };
            rig.try_start(spec).await.unwrap_err().to_string()
        };
        assert_eq!(
            refused("nosuch").await,
            "Failed to find node with node-name='nosuch'"
        );
        assert_eq!(
            refused("src").await,
            "Cannot replace 'src' by a node mirrored from 'filter', because it cannot be \
             guaranteed that doing so would not lead to an abrupt change of visible data"
        );
        assert!(rig.jobs.query().is_empty());
    });
}

#[test]
fn a_node_that_does_not_show_the_source_any_more_is_not_replaced() {
    with_rig(|rig| async move {
        let disk = filtered(&rig).await;
        let spec = MirrorSpec {
            source: rig.node("filter"),
            replaces: Some("below".to_owned()),
            ..rig.spec()
        };
        let key = rig.ready(spec).await;
        // Somebody puts another node under the filter.
        let storage = TestStorage::new(SIZE);
        let other = rig
            .graph
            .add_node(Some("other"), storage.driver(), NodeOptions::default())
            .expect("a node");
        let below = rig.node("below");
        let drained = rig.graph.drain(&below, &[]).await.expect("a section");
        let replaced = rig.graph.replace(&below, &other, &[], &drained);
        replaced.expect("it is replaced");
        drop(drained);
        rig.act(|jobs| jobs.complete(key));
        rig.wait_for(JobStatus::Null).await;
        let error = rig.completed().flatten().expect("it fails");
        assert!(error.contains("no longer shows it"), "{error}");
        assert_eq!(disk.root().name(), "filter");
    });
}

/// An image on its own: nothing allocated, of clusters, and what its backing image
/// would show is not open.
fn clusters(rig: &Rig) -> TestStorage {
    let limits = Limits {
        cluster_size: Some(CHUNK as u32),
        ..Limits::default()
    };
    let storage = TestStorage::with_limits(SIZE, limits);
    let node = rig
        .graph
        .add_node(Some("image"), storage.driver(), NodeOptions::default());
    node.expect("a node");
    storage
}

fn zeroed(storage: &TestStorage) -> u64 {
    let ended = storage.ended();
    let zeroes = ended.iter().filter(|e| e.op == IoOp::WriteZeroes);
    zeroes.map(|e| e.len).sum()
}

#[test]
fn zeroes_are_written_to_an_image_that_may_stand_on_another_one() {
    with_rig(|rig| async move {
        let image = clusters(&rig);
        rig.source.poke(CHUNK, &[3; CHUNK as usize]);
        let spec = MirrorSpec {
            target: rig.node("image"),
            ..rig.spec()
        };
        rig.ready(spec).await;
        assert_eq!(zeroed(&image), SIZE - CHUNK);
    });
    with_rig(|rig| async move {
        let image = clusters(&rig);
        let spec = MirrorSpec {
            target: rig.node("image"),
            target_is_zero: true,
            ..rig.spec()
        };
        rig.ready(spec).await;
        assert_eq!(zeroed(&image), 0, "the user says that nothing is there");
    });
}

#[test]
fn zeroes_of_a_part_of_the_disk_are_always_written() {
    for copy_mode in [CopyMode::Background, CopyMode::WriteBlocking] {
        with_rig(|rig| async move {
            let spec = MirrorSpec {
                sync: SyncMode::None,
                copy_mode,
                ..rig.spec()
            };
            let key = rig.ready(spec).await;
            rig.write_zeroes(2 * CHUNK, CHUNK, true).await;
            rig.write(5 * CHUNK, CHUNK, 0).await;
            rig.act(|jobs| jobs.cancel(key, false));
            rig.wait_for(JobStatus::Null).await;
            let ended = rig.target.ended();
            for chunk in [2, 5] {
                let range = chunk * CHUNK..(chunk + 1) * CHUNK;
                let written = ended
                    .iter()
                    .filter(|e| matches!(e.op, IoOp::Write | IoOp::WriteZeroes))
                    .any(|e| e.offset <= range.start && range.end <= e.offset + e.len);
                assert!(written, "{copy_mode:?}: chunk {chunk} of {ended:?}");
            }
        });
    }
}
