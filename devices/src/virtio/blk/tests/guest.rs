//! The guest's side: a small virtio-blk driver that does as tests say.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::runtime::{self, AsyncFd, Interest};
use virtio_bindings::virtio_blk::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::blk::VirtioBlk;
use crate::{GuestMemory, MmioDevice, MmioOutcome, ResetTicket, VirtioMmio};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
pub const CONFIG_WCE: u64 = 1 << VIRTIO_BLK_F_CONFIG_WCE;
pub const PLAIN: u64 = VERSION_1 | FLUSH;

pub const QUEUE_SIZE: u16 = 64;

/// Where rings are; data comes after them.
pub const RINGS: u64 = 0x1_0000;
const OTHER_RINGS: u64 = 17 << 20;
const RING_STRIDE: u64 = 0x1_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
const DATA: u64 = 0x20_0000;
const DATA_END: u64 = 0x80_0000;

/// A descriptor: address, length, flags without NEXT.
pub type Part = (u64, u32, u16);

struct Ring {
    next_descriptor: Cell<u16>,
    avail: Cell<u16>,
    used: Cell<u16>,
}

pub struct Guest {
    pub mem: Arc<GuestMemory>,
    pub mmio: VirtioMmio,
    pub blk: Arc<VirtioBlk>,
    interrupt: AsyncFd<Arc<EventFd>>,
    rings: Vec<Ring>,
    next_data: Cell<u64>,
}

/// A request that has been made available.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    pub head: u16,
    pub status: u64,
    pub data: u64,
}

impl Guest {
    pub fn new(mem: Arc<GuestMemory>, mmio: VirtioMmio, blk: Arc<VirtioBlk>) -> Self {
        let rings = mmio.queue_evts().iter().map(|_| Ring {
            next_descriptor: Cell::new(0),
            avail: Cell::new(0),
            used: Cell::new(0),
        });
        Self {
            rings: rings.collect(),
            interrupt: AsyncFd::new(Arc::clone(mmio.interrupt_evt())).unwrap(),
            mem,
            mmio,
            blk,
            next_data: Cell::new(DATA),
        }
    }

    pub fn read32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.mmio.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn write32(&self, offset: u64, value: u32) -> MmioOutcome {
        self.mmio.write(offset, &value.to_le_bytes())
    }

    fn set(&self, offset: u64, value: u32) {
        assert!(matches!(self.write32(offset, value), MmioOutcome::Done));
    }

    pub fn status(&self) -> u32 {
        self.read32(0x70)
    }

    /// Initialises the device and all queues (virtio 1.2 §3.1.1).
    pub fn init(&self, features: u64) {
        self.negotiate(features);
        for queue in 0..self.rings.len() {
            self.set_up_queue(queue, QUEUE_SIZE);
        }
        self.set(0x70, 15);
        assert_eq!(self.status(), 15);
    }

    pub fn negotiate(&self, features: u64) {
        assert_eq!(self.status(), 0);
        self.set(0x70, 1);
        self.set(0x70, 3);
        for word in 0..2 {
            self.set(0x24, word);
            self.set(0x20, (features >> (32 * word)) as u32);
        }
        self.set(0x70, 11);
        assert_eq!(self.status(), 11);
    }

    pub fn set_up_queue(&self, queue: usize, size: u16) {
        let ring = &self.rings[queue];
        ring.next_descriptor.set(0);
        ring.avail.set(0);
        ring.used.set(0);
        let base = self.ring_base(queue);
        self.mem
            .write_slice(&[0; RING_STRIDE as usize], GuestAddress(base))
            .unwrap();
        self.set(0x30, queue as u32);
        self.set(0x38, size.into());
        for (register, address) in [(0x80, base), (0x90, base + AVAIL), (0xa0, base + USED)] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
        assert_eq!(self.read32(0x44), 1);
    }

    /// The first queue's rings are in low memory, the others' far away from
    /// them, in the second region.
    pub fn ring_base(&self, queue: usize) -> u64 {
        if queue == 0 {
            RINGS
        } else {
            OTHER_RINGS + RING_STRIDE * queue as u64
        }
    }

    /// Writes 0 to the status.
    pub fn reset(&self) -> Option<ResetTicket> {
        match self.write32(0x70, 0) {
            MmioOutcome::Done => None,
            MmioOutcome::Wait(ticket) => Some(ticket),
        }
    }

    /// Memory for data, never handed out before a wrap.
    pub fn alloc(&self, len: usize) -> u64 {
        let mut gpa = self.next_data.get();
        if (DATA..DATA_END).contains(&gpa) && gpa + len as u64 > DATA_END {
            gpa = DATA;
        }
        self.next_data.set((gpa + len as u64).next_multiple_of(16));
        gpa
    }

    /// Hands out data from `gpa` on.
    pub fn use_data_at(&self, gpa: u64) {
        self.next_data.set(gpa);
    }

    pub fn store(&self, bytes: &[u8]) -> u64 {
        let gpa = self.alloc(bytes.len());
        self.mem.write_slice(bytes, GuestAddress(gpa)).unwrap();
        gpa
    }

    pub fn load(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    /// Makes a status byte one that no device writes.
    pub fn mem_status_reset(&self, status: u64) {
        self.mem.write_obj(0xee_u8, GuestAddress(status)).unwrap();
    }

    pub fn write_descriptor(&self, table: u64, index: u16, part: Part, next: u16) {
        let (gpa, len, flags) = part;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.mem
            .write_slice(&bytes, GuestAddress(table + 16 * u64::from(index)))
            .unwrap();
    }

    /// Writes `parts` as a chain of the queue's table, without making it
    /// available.
    pub fn chain(&self, queue: usize, parts: &[Part]) -> u16 {
        let next = &self.rings[queue].next_descriptor;
        let head = next.get();
        for (i, (gpa, len, flags)) in parts.iter().copied().enumerate() {
            let index = next.get();
            next.set((index + 1) % QUEUE_SIZE);
            let flags = flags | if i + 1 < parts.len() { NEXT } else { 0 };
            self.write_descriptor(self.ring_base(queue), index, (gpa, len, flags), next.get());
        }
        head
    }

    pub fn make_available(&self, queue: usize, head: u16) {
        let avail = self.ring_base(queue) + AVAIL;
        let index = self.rings[queue].avail.get();
        let entry = avail + 4 + 2 * u64::from(index % QUEUE_SIZE);
        self.mem.write_obj(head, GuestAddress(entry)).unwrap();
        self.rings[queue].avail.set(index.wrapping_add(1));
        self.set_avail_index(queue, index.wrapping_add(1));
    }

    pub fn set_avail_index(&self, queue: usize, index: u16) {
        self.mem
            .store(
                index,
                GuestAddress(self.ring_base(queue) + AVAIL + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    pub fn set_avail_flags(&self, queue: usize, flags: u16) {
        self.mem
            .write_obj(flags, GuestAddress(self.ring_base(queue) + AVAIL))
            .unwrap();
    }

    /// `used_event`: interrupt when this entry of the used ring is written.
    pub fn set_used_event(&self, queue: usize, index: u16) {
        let gpa = self.ring_base(queue) + AVAIL + 4 + 2 * u64::from(QUEUE_SIZE);
        self.mem
            .store(index, GuestAddress(gpa), Ordering::Release)
            .unwrap();
    }

    /// What a request's header looks like.
    pub fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    /// Makes a request available in the usual layout: header, data, status.
    pub fn request(
        &self,
        queue: usize,
        kind: u32,
        sector: u64,
        out: &[u8],
        in_len: u32,
    ) -> Pending {
        let header = self.store(&Self::header(kind, sector));
        let status = self.store(&[0xee]);
        let mut parts = vec![(header, 16, 0)];
        let (data, data_len) = if out.is_empty() {
            (self.alloc(in_len as usize), in_len)
        } else {
            (self.store(out), out.len() as u32)
        };
        if !out.is_empty() {
            parts.push((data, data_len, 0));
        } else if in_len > 0 {
            parts.push((data, data_len, WRITE));
        }
        parts.push((status, 1, WRITE));
        let head = self.chain(queue, &parts);
        self.make_available(queue, head);
        Pending { head, status, data }
    }

    /// Notifies as an ioeventfd does.
    pub fn kick(&self, queue: usize) {
        self.mmio.queue_evts()[queue].write(1).unwrap();
    }

    pub fn used_index(&self, queue: usize) -> u16 {
        self.mem
            .load(
                GuestAddress(self.ring_base(queue) + USED + 2),
                Ordering::Acquire,
            )
            .unwrap()
    }

    /// New entries of the used ring: head and length.
    pub fn take_used(&self, queue: usize) -> Vec<(u16, u32)> {
        let used = &self.rings[queue].used;
        let mut entries = Vec::new();
        while used.get() != self.used_index(queue) {
            let at = self.ring_base(queue) + USED + 4 + 8 * u64::from(used.get() % QUEUE_SIZE);
            let id: u32 = self.mem.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
            entries.push((id as u16, len));
            used.set(used.get().wrapping_add(1));
        }
        entries
    }

    /// Waits for the next interrupt, and acknowledges it. Returns how many came
    /// together, and why.
    pub async fn interrupted(&self) -> (u64, u32) {
        let count = self
            .interrupt
            .io(Interest::Readable, |event| event.read())
            .await
            .unwrap();
        (count, self.acknowledge())
    }

    /// Interrupts since the last look, without waiting.
    pub fn interrupts(&self) -> u64 {
        self.interrupt.get_ref().read().unwrap_or(0)
    }

    pub fn acknowledge(&self) -> u32 {
        let why = self.read32(0x60);
        self.set(0x64, why);
        why
    }

    /// Waits by interrupt until `count` requests have been used.
    pub async fn wait_used(&self, queue: usize, count: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        loop {
            used.extend(self.take_used(queue));
            if used.len() >= count {
                return used;
            }
            self.interrupted().await;
        }
    }

    /// Waits until the device has taken all that is available (EVENT_IDX only:
    /// it says where it wants to be notified).
    pub async fn wait_taken(&self, queue: usize) {
        let gpa = self.ring_base(queue) + USED + 4 + 8 * u64::from(QUEUE_SIZE);
        loop {
            let avail_event: u16 = self.mem.load(GuestAddress(gpa), Ordering::Acquire).unwrap();
            if avail_event == self.rings[queue].avail.get() {
                return;
            }
            runtime::yield_now().await;
        }
    }

    pub fn status_of(&self, pending: &Pending) -> u8 {
        self.mem.read_obj(GuestAddress(pending.status)).unwrap()
    }

    /// A request from start to end: status, and what was read.
    pub async fn run(
        &self,
        queue: usize,
        kind: u32,
        sector: u64,
        out: &[u8],
        in_len: u32,
    ) -> (u8, Vec<u8>) {
        let pending = self.request(queue, kind, sector, out, in_len);
        self.kick(queue);
        let used = self.wait_used(queue, 1).await;
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, pending.head);
        let data = self.load(pending.data, in_len as usize);
        (self.status_of(&pending), data)
    }
}

/// One range of a DISCARD or WRITE_ZEROES request.
pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}
