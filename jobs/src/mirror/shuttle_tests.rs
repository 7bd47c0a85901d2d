//! Write tracking against copier against pivot, under the model checker: the real
//! filter, bitmap, range lock, gate and drained section, over a storage in memory where a
//! request takes effect some time after it began and some time before it ends. Run with
//! `RUSTFLAGS="--cfg shuttle" cargo test -p jobs shuttle_tests`.
//!
//! Not here: the body and its timing, which need a loop; `tests` has them.

use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::test_storage::TestStorage;
use block::{
    AlignedBuffer, Backend, BlockDriver, BoxFuture, Drained, Extent, Graph, IoError, IoVec, Limits,
    Node, NodeOptions, Perm, Permissions, WriteFlags, ZeroFlags,
};
use shuttle::{future, thread};

use super::copy::Copier;
use super::filter::MirrorTop;
use super::state::{MirrorState, TargetRules};
use super::sweep::{Sweep, Swept};
use crate::CopyMode;
use crate::copying::BufferPool;
use crate::copying::FilterHold;

/// Interleavings tried per test.
const SCHEDULES: usize = 150;
/// Bytes per bit, and per write of the guest.
const CHUNK: u64 = 4096;
/// The guests' disk: a chunk that both write, and one of each.
const SIZE: u64 = 3 * CHUNK;
/// Writes of each guest to each of its chunks.
const WRITES: u8 = 2;
/// How often everything is copied beside the guests.
const ROUNDS: usize = 4;

/// Lets other threads go on before and after each request takes effect.
struct Slow(Box<dyn BlockDriver>);

async fn slowly<T>(request: BoxFuture<'_, T>) -> T {
    yield_often().await;
    let result = request.await;
    yield_often().await;
    result
}

/// A schedule in which others come far meanwhile should not be too rare.
async fn yield_often() {
    for _ in 0..8 {
        future::yield_now().await;
    }
}

impl BlockDriver for Slow {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn filename(&self) -> String {
        self.0.filename()
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        // The copier reads while the guests' writes are on their way.
        self.0.read(offset, iov)
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(slowly(self.0.write(offset, iov, flags)))
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(slowly(self.0.write_zeroes(offset, len, flags)))
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(slowly(self.0.discard(offset, len)))
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        Box::pin(slowly(self.0.flush()))
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        Box::pin(slowly(self.0.block_status(offset, len)))
    }
}

struct Model {
    graph: Rc<Graph>,
    state: Arc<MirrorState>,
    source: TestStorage,
    target: TestStorage,
    disk: Arc<Backend>,
    source_backend: Arc<Backend>,
    source_node: Arc<Node>,
    target_node: Arc<Node>,
    filter: Arc<Node>,
    sweep: Sweep,
}

fn filled(byte: u8) -> IoVec {
    let iov = AlignedBuffer::new(CHUNK as usize).io_vec(CHUNK as usize);
    iov.fill(byte);
    iov
}

/// Without a loop there are no timers: who cannot be held at once is asked again.
fn drain(graph: &Graph, node: &Arc<Node>, except: &[&Arc<Backend>]) -> Drained {
    loop {
        match future::block_on(graph.drain_within(node, except, Duration::ZERO)) {
            Ok(drained) => return drained,
            Err(_) => thread::yield_now(),
        }
    }
}

impl Model {
    /// A mirror as `start` sets it up, with everything to copy.
    fn new(mode: CopyMode) -> Self {
        let graph = Graph::new();
        let (source, target) = (TestStorage::new(SIZE), TestStorage::new(SIZE));
        source.poke(0, &[1; SIZE as usize]);
        let node = |name, storage: &TestStorage| {
            let driver = Box::new(Slow(storage.driver()));
            let node = graph.add_node(Some(name), driver, NodeOptions::default());
            node.expect("a node")
        };
        let (source_node, target_node) = (node("src", &source), node("dst", &target));
        let all = Permissions {
            need: Perm::CONSISTENT_READ | Perm::WRITE,
            share: Perm::ALL,
        };
        let disk = graph.attach("disk0", &source_node, all, None).unwrap();
        let state = MirrorState::new(SIZE, CHUNK, mode, TargetRules::default()).unwrap();
        let state = Arc::new(state);
        let drained = drain(&graph, &source_node, &[]);
        let top = Arc::clone(&state);
        let filter = graph.insert_filter(Some("top"), &source_node, &[], &drained, |child| {
            Box::new(MirrorTop::new(child, top))
        });
        let filter = filter.unwrap();
        let hold = Arc::new(FilterHold {
            job_type: "mirror",
            job_id: "j0".to_owned(),
        });
        let read = Permissions {
            need: Perm::CONSISTENT_READ,
            share: Perm::ALL,
        };
        let source_backend = graph
            .attach("", &source_node, read, Some(hold.clone()))
            .unwrap();
        let target_backend = graph.attach("", &target_node, all, Some(hold)).unwrap();
        state.set_target(target_backend);
        state.dirty.set_all();
        state.set_engaged(true);
        drop(drained);
        let pool = BufferPool::new(CHUNK as usize, 2);
        let copier = Copier::new(Arc::clone(&state), Arc::clone(&source_backend), pool);
        Self {
            sweep: Sweep::new(copier, Arc::clone(&state)),
            graph,
            state,
            source,
            target,
            disk,
            source_backend,
            source_node,
            target_node,
            filter,
        }
    }

    /// Two guests write, each its own chunk and one in common.
    fn guests(&self) -> Vec<thread::JoinHandle<()>> {
        let guest = |which: u8| {
            let disk = Arc::clone(&self.disk);
            thread::spawn(move || {
                for n in 0..WRITES {
                    let byte = 10 * which + n;
                    for chunk in [0, u64::from(which)] {
                        let write = disk.write(chunk * CHUNK, filled(byte), WriteFlags::default());
                        future::block_on(write).expect("a guest write");
                    }
                }
            })
        };
        vec![guest(1), guest(2)]
    }

    /// Copies beside the guests, then the rest with them held, and pivots.
    fn copy_and_pivot(&mut self) {
        for _ in 0..ROUNDS {
            let swept = future::block_on(self.sweep.copy(0, |_| (), pending()));
            assert!(matches!(swept, Swept::Done), "{swept:?}");
            thread::yield_now();
        }
        let drained = drain(&self.graph, &self.source_node, &[&self.source_backend]);
        let swept = future::block_on(self.sweep.copy(0, |_| (), pending()));
        assert!(matches!(swept, Swept::Done), "{swept:?}");
        assert!(self.state.dirty.is_clean());
        assert_eq!(self.source.snapshot(), self.target.snapshot());
        self.state.set_engaged(false);
        self.graph
            .replace(&self.filter, &self.target_node, &[], &drained)
            .expect("the pivot");
        drop(drained);
    }

    fn check_what_the_guests_wrote(&self) {
        for which in [1, 2] {
            let chunk = self.target.peek(u64::from(which) * CHUNK, CHUNK as usize);
            assert_eq!(chunk, [10 * which + WRITES - 1; CHUNK as usize]);
        }
        let both = self.target.peek(0, CHUNK as usize);
        let last = [1, 2].map(|which| 10 * which + WRITES - 1);
        assert!(last.contains(&both[0]), "{}", both[0]);
        assert!(both.iter().all(|byte| *byte == both[0]), "a torn write");
    }
}

fn mirror(mode: CopyMode, catches_up: bool) {
    let mut model = Model::new(mode);
    let guests = model.guests();
    if catches_up {
        // While writes that are recorded only are on their way.
        model.state.set_catching_up(true);
    }
    model.copy_and_pivot();
    for guest in guests {
        guest.join().unwrap();
    }
    model.check_what_the_guests_wrote();
}

fn check(mode: CopyMode, catches_up: bool) {
    shuttle::check_random(move || mirror(mode, catches_up), SCHEDULES);
    shuttle::check_pct(move || mirror(mode, catches_up), SCHEDULES, 3);
}

#[test]
fn no_write_is_lost_in_background_mode() {
    check(CopyMode::Background, false);
}

#[test]
fn no_write_is_lost_in_write_blocking_mode() {
    check(CopyMode::WriteBlocking, false);
}

#[test]
fn no_write_is_lost_when_a_mirror_begins_to_catch_up() {
    check(CopyMode::Background, true);
}
