//! What is copied at first, and writes that come while that is found out.

use block::test_storage::{Match, TestStorage};
use block::{IoOp, Limits};

use super::*;
use crate::CopyMode;
use crate::mirror::SyncMode;
use crate::test_layers::{CHUNK, Layers};

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
        let layer = |name: &str, storage: &TestStorage| {
            let layers = Layers::new(storage, rig.node("src"));
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
