//! A disk on its iothreads, over a storage that tests control.

use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use block::runtime::{self, EventLoop, Iothread};
use block::test_storage::TestStorage;
use block::{
    Backend, BlockDriver, BoxFuture, Extent, Graph, IoError, IoVec, Limits, NodeOptions, Perm,
    Permissions, WriteFlags, ZeroFlags,
};
use futures_util::future::{Either, select};
use vm_memory::GuestAddress;

use super::guest::Guest;
use crate::virtio::blk::{VirtioBlk, VirtioBlkConfig};
use crate::{GuestMemory, VirtioMmio};

pub const DISK: u64 = 1 << 20;

/// What the driver below the disk saw, beyond what the storage records.
#[derive(Default)]
pub struct Seen {
    /// `fua` of each write and zero write.
    pub fua: Mutex<Vec<bool>>,
    /// `may_unmap` of each zero write.
    pub unmap: Mutex<Vec<bool>>,
    /// Iothread of each read.
    pub threads: Mutex<Vec<String>>,
    /// Size of the disk.
    pub size: AtomicU64,
    /// The next read panics.
    pub panic: AtomicBool,
}

struct Recorder {
    seen: Arc<Seen>,
    below: Box<dyn BlockDriver>,
}

impl BlockDriver for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }
    fn size(&self) -> u64 {
        self.seen.size.load(Ordering::Relaxed)
    }
    fn limits(&self) -> Limits {
        self.below.limits()
    }
    fn filename(&self) -> String {
        String::new()
    }
    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        let name = runtime::current().unwrap().name().to_owned();
        self.seen.threads.lock().unwrap().push(name);
        assert!(
            !self.seen.panic.swap(false, Ordering::Relaxed),
            "a bug, staged"
        );
        self.below.read(offset, iov)
    }
    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        self.seen.fua.lock().unwrap().push(flags.fua);
        self.below.write(offset, iov, flags)
    }
    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        self.seen.fua.lock().unwrap().push(flags.fua);
        self.seen.unmap.lock().unwrap().push(flags.may_unmap);
        self.below.write_zeroes(offset, len, flags)
    }
    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        self.below.discard(offset, len)
    }
    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        self.below.flush()
    }
    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        self.below.block_status(offset, len)
    }
}

/// Everything below the guest. The fields are dropped in their order.
pub struct Rig {
    pub storage: TestStorage,
    pub seen: Arc<Seen>,
    pub graph: Rc<Graph>,
    pub backend: Arc<Backend>,
    pub iothreads: Vec<Iothread>,
    main: EventLoop,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(DISK, 1)
    }

    pub fn with(size: u64, iothreads: usize) -> Self {
        let main = EventLoop::new("main").unwrap();
        let storage = TestStorage::new(size);
        let seen = Arc::new(Seen::default());
        seen.size.store(size, Ordering::Relaxed);
        let graph = Graph::new();
        let options = NodeOptions {
            discard: block::DiscardMode::Unmap,
            ..NodeOptions::default()
        };
        let recorder = Box::new(Recorder {
            seen: Arc::clone(&seen),
            below: storage.driver(),
        });
        let node = graph.add_node(Some("disk"), recorder, options).unwrap();
        let permissions = Permissions {
            need: Perm::CONSISTENT_READ | Perm::WRITE,
            share: Perm::ALL,
        };
        let backend = graph.attach("vda", &node, permissions, None).unwrap();
        let iothreads = (0..iothreads)
            .map(|i| Iothread::spawn(&format!("io{i}")).unwrap())
            .collect();
        Self {
            storage,
            seen,
            graph,
            backend,
            iothreads,
            main,
        }
    }

    pub fn config(&self) -> VirtioBlkConfig {
        let handles = self.iothreads.iter().map(|t| t.handle().clone()).collect();
        VirtioBlkConfig::new("vda", Arc::clone(&self.backend), handles)
    }

    /// A guest with two regions of memory, a hole between, and this disk. Not
    /// initialised.
    pub fn guest(&self, config: VirtioBlkConfig) -> Guest {
        let mib = 1 << 20;
        let regions = [
            (GuestAddress(0), 8 * mib),
            (GuestAddress(16 << 20), 8 * mib),
        ];
        self.guest_with(
            config,
            Arc::new(GuestMemory::from_ranges(&regions).unwrap()),
        )
    }

    pub fn guest_with(&self, config: VirtioBlkConfig, mem: Arc<GuestMemory>) -> Guest {
        let blk = Arc::new(VirtioBlk::new(config).unwrap());
        let mmio = VirtioMmio::new(Arc::clone(&mem), Arc::clone(&blk) as _).unwrap();
        Guest::new(mem, mmio, blk)
    }

    /// Runs a test, which fails instead of hanging.
    pub fn run<F: Future>(&self, test: F) -> F::Output {
        self.main.block_on(async {
            let limit = pin!(runtime::sleep(Duration::from_secs(60)));
            match select(pin!(test), limit).await {
                Either::Left((output, _)) => output,
                Either::Right(_) => panic!("the test hangs"),
            }
        })
    }

    /// Waits until everything that iothread `index` had to do is done.
    pub async fn settle(&self, index: usize) {
        for _ in 0..4 {
            self.iothreads[index]
                .handle()
                .call(|| async {
                    for _ in 0..8 {
                        runtime::yield_now().await;
                    }
                })
                .await
                .unwrap();
        }
    }
}
