//! The registers by which a driver describes a queue (virtio 1.2 §4.2.2), and
//! the check before it is believed.

use virtio_bindings::virtio_mmio as reg;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::GuestMemory;
use crate::ticket::ResetTicket;

/// A queue as the driver sets it up.
#[derive(Clone)]
pub(super) struct QueueRegisters {
    max_size: u16,
    size: u32,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
    pub(super) ready: bool,
    /// Being stopped by the driver, or stopped: it cannot be made ready again
    /// before a device reset.
    pub(super) stopping: Option<ResetTicket>,
}

impl QueueRegisters {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size.into(),
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            ready: false,
            stopping: None,
        }
    }

    /// The queue these registers describe, or what is wrong with them.
    pub(super) fn build(
        &self,
        event_idx: bool,
        mem: &GuestMemory,
    ) -> Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(self.max_size)?;
        let size = u16::try_from(self.size).map_err(|_| virtio_queue::Error::InvalidSize)?;
        queue.try_set_size(size)?;
        queue.try_set_desc_table_address(GuestAddress(self.desc_table))?;
        queue.try_set_avail_ring_address(GuestAddress(self.avail_ring))?;
        queue.try_set_used_ring_address(GuestAddress(self.used_ring))?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        // The queue takes an avail ring at 0 for one that was never set. It checks
        // the rings again, but would log each that is wrong, as often as the guest
        // likes.
        if self.avail_ring == 0 || !self.rings_are_in(mem) || !queue.is_valid(mem) {
            return Err(virtio_queue::Error::FindMemoryRegion);
        }
        Ok(queue)
    }

    /// Whether the guest's memory holds all three rings (virtio 1.2 §2.7).
    fn rings_are_in(&self, mem: &GuestMemory) -> bool {
        let size = u64::from(self.size);
        [
            (self.desc_table, 16 * size),
            (self.avail_ring, 6 + 2 * size),
            (self.used_ring, 6 + 8 * size),
        ]
        .into_iter()
        .all(|(start, len)| {
            // At most 2^32 entries.
            usize::try_from(len).is_ok_and(|len| mem.check_range(GuestAddress(start), len))
        })
    }

    /// As `QueueReady` reads: until a stop is done, the queue is in use.
    pub(super) fn in_use(&self) -> bool {
        self.ready || self.stopping.as_ref().is_some_and(|stop| !stop.is_done())
    }

    /// A write to one of the registers that describe the self.
    pub(super) fn write(&mut self, offset: u32, value: u32) {
        let low = |address: &mut u64| *address = *address >> 32 << 32 | u64::from(value);
        let high = |address: &mut u64| *address = *address & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => self.size = value,
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => low(&mut self.desc_table),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => high(&mut self.desc_table),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => low(&mut self.avail_ring),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => high(&mut self.avail_ring),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => low(&mut self.used_ring),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => high(&mut self.used_ring),
            _ => {}
        }
    }
}
