//! Guests' writes against a copier against readers of the snapshot, under the model
//! checker: the real filter and its snapshot, over storages in memory whose requests take
//! effect some time after they began and some time before they end. Run with
//! `RUSTFLAGS="--cfg shuttle" cargo test -p block shuttle_`.
//!
//! A lost wake-up is a deadlock, which shuttle reports. A clock that runs out at any
//! moment stands for `cbw-timeout`.
//!
//! Not here: the body of a backup and its timing, drained sections, the graph.

use shuttle::{future, thread};

use super::copy::Entered;
use super::*;
use crate::buffer::AlignedBuffer;
use crate::driver::ChildRole;
use crate::node::NodeOptions;
use crate::test_storage::{Match, TestStorage};

/// Interleavings tried per test and scheduler.
const SCHEDULES: usize = 400;
/// Bytes of a cluster, and of a write.
const CLUSTER: u64 = 4096;
/// A cluster that both guests write, and one of each.
const SIZE: u64 = 3 * CLUSTER;
/// What the disk held.
const OLD: u8 = 1;

/// Lets other threads go on before and after each request takes effect.
struct Slow(Box<dyn BlockDriver>);

async fn slowly<T>(request: BoxFuture<'_, T>) -> T {
    for _ in 0..2 {
        future::yield_now().await;
    }
    let result = request.await;
    future::yield_now().await;
    result
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
        Box::pin(slowly(self.0.read(offset, iov)))
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
        self.0.write_zeroes(offset, len, flags)
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        self.0.discard(offset, len)
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        self.0.flush()
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        self.0.block_status(offset, len)
    }
}

/// What guests' requests wait for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Saving {
    /// Their copies.
    Awaited,
    /// That what they change is in memory.
    Behind,
}

struct Model {
    source: TestStorage,
    target: TestStorage,
    source_node: Arc<Node>,
    target_node: Arc<Node>,
    filter: Arc<Node>,
    snapshot: Arc<Snapshot>,
}

impl Model {
    fn new(policy: CbwPolicy, saving: Saving) -> Arc<Self> {
        let (source, target) = (TestStorage::new(SIZE), TestStorage::new(SIZE));
        source.poke(0, &[OLD; SIZE as usize]);
        let node = |name, storage: &TestStorage| {
            let driver = Box::new(Slow(storage.driver()));
            Node::new(name, driver, NodeOptions::default())
        };
        let (source_node, target_node) = (node("src", &source), node("dst", &target));
        let account = SnapshotAccount::new(SIZE, CLUSTER, None).unwrap();
        let driver = CopyBeforeWriteDriver::with_target(
            Child::new(ChildRole::File, Arc::clone(&source_node)),
            Target::Child(Child::new(ChildRole::Target, Arc::clone(&target_node))),
            account,
            policy,
        );
        if saving == Saving::Behind {
            driver.kept().behind.prove();
        }
        Arc::new(Self {
            source,
            target,
            source_node,
            target_node,
            snapshot: Arc::clone(driver.kept()),
            filter: Node::new("cbw", Box::new(driver), NodeOptions::default()),
        })
    }

    /// Writes two neighbouring clusters, one after the other, and the one of them again.
    fn guest(self: &Arc<Self>, first: u64, byte: u8) -> thread::JoinHandle<Vec<Option<i32>>> {
        let this = Arc::clone(self);
        thread::spawn(move || {
            let write = |cluster: u64| {
                let iov = AlignedBuffer::new(CLUSTER as usize).io_vec(CLUSTER as usize);
                iov.fill(byte);
                let flags = WriteFlags::default();
                let written = this.filter.write(cluster * CLUSTER, iov, flags);
                future::block_on(written).err().map(|error| error.errno)
            };
            [first, first + 1, first].map(write).into()
        })
    }

    /// Reads the whole snapshot some times: all of it is what the disk held, or it is
    /// refused.
    fn reader(self: &Arc<Self>) -> thread::JoinHandle<usize> {
        let this = Arc::clone(self);
        thread::spawn(move || {
            let mut refused = 0;
            for _ in 0..2 {
                let iov = AlignedBuffer::new(SIZE as usize).io_vec(SIZE as usize);
                match future::block_on(this.snapshot.read(0, iov.clone())) {
                    Ok(()) => {
                        let mut bytes = vec![0; SIZE as usize];
                        iov.copy_to(0, &mut bytes);
                        assert!(bytes.iter().all(|byte| *byte == OLD), "a mixed snapshot");
                    }
                    Err(error) => {
                        assert_eq!(error.errno, libc::EACCES);
                        refused += 1;
                    }
                }
            }
            refused
        })
    }

    /// Copies as a backup does, a claim after the other, until nothing is left.
    fn copier(self: &Arc<Self>) -> thread::JoinHandle<()> {
        let this = Arc::clone(self);
        thread::spawn(move || {
            while !this.snapshot.is_complete() && this.snapshot.broken().is_none() {
                this.save_one();
                let Some(mut claim) = this.snapshot.claim(0..SIZE) else {
                    thread::yield_now();
                    continue;
                };
                // Some of it is left to others, and some given back after the copy.
                claim.leave_from(claim.range().start + 2 * CLUSTER);
                let start = claim.range().start;
                let iov = AlignedBuffer::new(CLUSTER as usize).io_vec(CLUSTER as usize);
                let flags = WriteFlags::default();
                let copied = future::block_on(async {
                    this.source_node.read(start, iov.clone()).await?;
                    this.target_node.write(start, iov, flags).await
                });
                if copied.is_ok() {
                    claim.copied_to(start + CLUSTER);
                }
            }
        })
    }

    /// Writes what a guest's request did not wait for, if there is something.
    fn save_one(&self) {
        if let Some(saves) = self.snapshot.take_saves() {
            let target = Entered::Child(Arc::clone(&self.target_node));
            // What fails is kept.
            let _ = future::block_on(saves.write_to(target));
        }
    }

    /// Everything was copied, or is kept, and is what the disk held.
    fn assert_copied(&self) {
        while !self.snapshot.is_complete() {
            assert!(self.snapshot.next_todo(0, SIZE).is_none());
            self.save_one();
        }
        assert!(self.snapshot.is_complete());
        let target = self.target.snapshot();
        assert!(target.iter().all(|byte| *byte == OLD), "a mixed copy");
    }
}

fn check_with(saving: Saving, test: impl Fn(Saving) + Send + Sync + Copy + 'static) {
    shuttle::check_random(move || test(saving), SCHEDULES);
    shuttle::check_pct(move || test(saving), SCHEDULES, 3);
}

fn check(test: impl Fn(Saving) + Send + Sync + Copy + 'static) {
    check_with(Saving::Awaited, test);
    check_with(Saving::Behind, test);
}

#[test]
fn shuttle_two_guests_a_copier_and_a_reader_see_one_instant() {
    check(|saving| {
        let model = Model::new(CbwPolicy::default(), saving);
        let reader = model.reader();
        let guests = [model.guest(0, 2), model.guest(1, 3)];
        model.copier().join().unwrap();
        for guest in guests {
            assert_eq!(guest.join().unwrap(), [None; 3]);
        }
        assert_eq!(reader.join().unwrap(), 0);
        model.assert_copied();
        assert!(model.source.snapshot().iter().all(|byte| *byte != OLD));
    });
}

#[test]
fn shuttle_guests_and_two_readers_without_a_copier_never_wait_for_ever() {
    check(|saving| {
        let model = Model::new(CbwPolicy::default(), saving);
        let guests = [model.guest(0, 2), model.guest(1, 3)];
        let readers = [model.reader(), model.reader()];
        for guest in guests {
            assert_eq!(guest.join().unwrap(), [None; 3]);
        }
        // Who reads waits for what is kept.
        model.assert_copied();
        assert_eq!(readers.map(|reader| reader.join().unwrap()), [0; 2]);
    });
}

#[test]
fn shuttle_a_failed_copy_fails_one_request_and_is_made_up_for() {
    check(|saving| {
        let model = Model::new(CbwPolicy::default(), saving);
        model.target.fail_once(Match::any(), libc::EIO);
        let reader = model.reader();
        let guests = [model.guest(0, 2), model.guest(1, 3)];
        model.copier().join().unwrap();
        let failed = guests.map(|guest| guest.join().unwrap());
        let failed = failed.iter().flatten().filter(|it| it.is_some());
        assert!(failed.count() <= 1);
        // A read of what is copied may be what has failed.
        let _ = reader.join();
        model.assert_copied();
    });
}

#[test]
fn shuttle_a_snapshot_that_breaks_is_refused_and_never_mixed() {
    // Of what is kept a job is asked what is to be done then.
    check_with(Saving::Awaited, |saving| {
        let policy = CbwPolicy {
            on_error: OnCbwError::BreakSnapshot,
            timeout: None,
        };
        let model = Model::new(policy, saving);
        model
            .target
            .fail(Match::any().range(CLUSTER..SIZE), libc::ENOSPC);
        let reader = model.reader();
        let guests = [model.guest(0, 2), model.guest(1, 3)];
        for guest in guests {
            assert_eq!(guest.join().unwrap(), [None; 3]);
        }
        reader.join().unwrap();
        assert_eq!(model.snapshot.broken(), Some(libc::ENOSPC));
        let late = model.reader();
        assert_eq!(late.join().unwrap(), 2);
    });
}

#[test]
fn shuttle_requests_that_time_out_change_nothing_and_hold_up_nobody() {
    check(|saving| {
        let policy = CbwPolicy {
            on_error: OnCbwError::BreakGuestWrite,
            timeout: Some(Duration::from_secs(1)),
        };
        let model = Model::new(policy, saving);
        let reader = model.reader();
        let guests = [model.guest(0, 2), model.guest(1, 3)];
        for guest in guests {
            for error in guest.join().unwrap().into_iter().flatten() {
                assert_eq!(error, libc::ETIMEDOUT);
            }
        }
        // What was given up goes on by itself.
        model.copier().join().unwrap();
        assert_eq!(reader.join().unwrap(), 0);
        model.assert_copied();
    });
}

#[test]
fn shuttle_the_end_of_a_snapshot_lets_all_requests_go_on() {
    check(|saving| {
        let model = Model::new(CbwPolicy::default(), saving);
        let reader = model.reader();
        let guests = [model.guest(0, 2), model.guest(1, 3)];
        model.snapshot.end();
        for guest in guests {
            assert_eq!(guest.join().unwrap(), [None; 3]);
        }
        reader.join().unwrap();
        assert!(model.source.snapshot().iter().all(|byte| *byte != OLD));
    });
}
