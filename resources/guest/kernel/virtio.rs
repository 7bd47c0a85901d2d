//! virtio-mmio and its queues, the driver's side (virtio 1.2 §4.2 and §2.7).
//!
//! All that touches memory shared with the device is in this file.

use core::ptr;
use core::sync::atomic::{AtomicU16, Ordering, fence};

use crate::memory::Arena;

/// Feature bits.
pub mod feature {
    pub const BLK_SIZE_MAX: u64 = 1 << 1;
    pub const BLK_BLK_SIZE: u64 = 1 << 6;
    pub const BLK_FLUSH: u64 = 1 << 9;
    pub const BLK_MQ: u64 = 1 << 12;
    pub const BLK_DISCARD: u64 = 1 << 13;
    pub const BLK_WRITE_ZEROES: u64 = 1 << 14;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

mod register {
    pub const MAGIC: usize = 0x00;
    pub const VERSION: usize = 0x04;
    pub const DEVICE_ID: usize = 0x08;
    pub const DEVICE_FEATURES: usize = 0x10;
    pub const DEVICE_FEATURES_SEL: usize = 0x14;
    pub const DRIVER_FEATURES: usize = 0x20;
    pub const DRIVER_FEATURES_SEL: usize = 0x24;
    pub const QUEUE_SEL: usize = 0x30;
    pub const QUEUE_NUM_MAX: usize = 0x34;
    pub const QUEUE_NUM: usize = 0x38;
    pub const QUEUE_READY: usize = 0x44;
    pub const QUEUE_NOTIFY: usize = 0x50;
    pub const INTERRUPT_STATUS: usize = 0x60;
    pub const INTERRUPT_ACK: usize = 0x64;
    pub const STATUS: usize = 0x70;
    pub const QUEUE_DESC: usize = 0x80;
    pub const QUEUE_DRIVER: usize = 0x90;
    pub const QUEUE_DEVICE: usize = 0xa0;
    pub const CONFIG: usize = 0x100;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const BLOCK_DEVICE: u32 = 2;
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A virtio-mmio device.
#[derive(Clone, Copy)]
pub struct Mmio {
    base: usize,
}

impl Mmio {
    /// The device at a guest-physical address below 4 GiB.
    pub fn new(base: u64) -> Self {
        Self {
            base: base as usize,
        }
    }

    fn read(self, register: usize) -> u32 {
        // SAFETY: device registers, mapped uncached and open to ring 3; where
        // there is no device the read gives all ones.
        unsafe { ptr::read_volatile((self.base + register) as *const u32) }
    }

    fn write(self, register: usize, value: u32) {
        // SAFETY: as in `read`; the device touches only the memory that the
        // queues below gave it.
        unsafe { ptr::write_volatile((self.base + register) as *mut u32, value) };
    }

    fn write_address(self, register: usize, address: u64) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }

    /// The device's kind (2 is a disk); `None` if there is no modern device.
    fn device_id(self) -> Option<u32> {
        if self.read(register::MAGIC) != MAGIC || self.read(register::VERSION) != 2 {
            return None;
        }
        Some(self.read(register::DEVICE_ID))
    }

    /// Whether there is a modern virtio-blk device.
    pub fn is_disk(self) -> bool {
        self.device_id() == Some(BLOCK_DEVICE)
    }

    /// Resets the device and agrees on features: those of `wanted` that it
    /// offers. `None` if it refuses them.
    pub fn negotiate(self, wanted: u64) -> Option<u64> {
        self.write(register::STATUS, 0);
        // Requests of an earlier run may have to end first.
        while self.read(register::STATUS) != 0 {
            crate::clock::relax();
        }
        self.write(register::STATUS, ACKNOWLEDGE | DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.write(register::DEVICE_FEATURES_SEL, half);
            offered |= u64::from(self.read(register::DEVICE_FEATURES)) << (32 * half);
        }
        let features = offered & wanted;
        for half in 0..2 {
            self.write(register::DRIVER_FEATURES_SEL, half);
            self.write(register::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        let status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        self.write(register::STATUS, status);
        (self.read(register::STATUS) == status).then_some(features)
    }

    /// Lets the device begin.
    pub fn driver_ok(self) {
        self.write(
            register::STATUS,
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        );
    }

    /// 32 bits of the configuration space.
    pub fn config_u32(self, offset: usize) -> u32 {
        self.read(register::CONFIG + offset)
    }

    /// 16 bits of the configuration space.
    pub fn config_u16(self, offset: usize) -> u16 {
        // SAFETY: as in `read`.
        unsafe { ptr::read_volatile((self.base + register::CONFIG + offset) as *const u16) }
    }

    /// Acknowledges whatever interrupts the device has raised.
    pub fn acknowledge_interrupt(self) {
        let status = self.read(register::INTERRUPT_STATUS);
        if status != 0 {
            self.write(register::INTERRUPT_ACK, status);
        }
    }

    /// The longest that queue `index` can be; 0 if it is not there.
    pub fn queue_num_max(self, index: u16) -> u16 {
        self.write(register::QUEUE_SEL, u32::from(index));
        self.read(register::QUEUE_NUM_MAX).min(32768) as u16
    }
}

#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Part of a request.
#[derive(Clone, Copy)]
pub struct Part {
    /// Where it is.
    pub address: *mut u8,
    /// How long, in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub device_writes: bool,
}

/// A split virtqueue with room for a fixed number of requests, each of up to
/// three parts. Request `n` uses descriptors `3n` to `3n + 2` for good.
pub struct Queue {
    mmio: Mmio,
    index: u16,
    size: u16,
    event_idx: bool,
    descriptors: *mut Descriptor,
    /// flags, idx, ring[size], used_event: 16 bits each.
    available: *mut u16,
    /// flags, idx: 16 bits each; ring[size] of (id, len): 32 bits each;
    /// avail_event: 16 bits.
    used: *mut u16,
    next_available: u16,
    published: u16,
    next_used: u16,
}

impl Queue {
    /// Sets queue `index` up for `requests` requests under way. `None` if it
    /// is not that long or memory is short.
    pub fn new(
        arena: &mut Arena,
        mmio: Mmio,
        index: u16,
        requests: u16,
        event_idx: bool,
    ) -> Option<Self> {
        let size = (requests.checked_mul(3)?).next_power_of_two();
        if size > mmio.queue_num_max(index) {
            return None;
        }
        let n = u64::from(size);
        let descriptors = arena.pages(16 * n)?;
        let available = arena.pages(6 + 2 * n)?;
        let used = arena.pages(6 + 8 * n)?;
        // `queue_num_max` has selected the queue.
        mmio.write(register::QUEUE_NUM, u32::from(size));
        mmio.write_address(register::QUEUE_DESC, descriptors as u64);
        mmio.write_address(register::QUEUE_DRIVER, available as u64);
        mmio.write_address(register::QUEUE_DEVICE, used as u64);
        mmio.write(register::QUEUE_READY, 1);
        let mut queue = Self {
            mmio,
            index,
            size,
            event_idx,
            descriptors: descriptors.cast(),
            available: available.cast(),
            used: used.cast(),
            next_available: 0,
            published: 0,
            next_used: 0,
        };
        queue.want_no_interrupt();
        Some(queue)
    }

    /// The most requests that a queue of `num_max` descriptors takes.
    pub fn requests_in(num_max: u16) -> u16 {
        // Sizes are powers of two, so a third of the largest one that fits.
        match num_max.checked_ilog2() {
            Some(log) => (1 << log) / 3,
            None => 0,
        }
    }

    /// Makes request `number` available, not yet published.
    ///
    /// # Safety
    ///
    /// `number` is below the number of requests, and not under way. The parts
    /// stay there, and nobody else touches them, until the request has ended.
    pub unsafe fn push(&mut self, number: u16, parts: &[Part]) {
        debug_assert!(parts.len() <= 3 && 3 * number + 2 < self.size);
        let head = 3 * number;
        for (i, part) in (0u16..).zip(parts.iter()) {
            let more = usize::from(i) + 1 < parts.len();
            let descriptor = Descriptor {
                address: part.address as u64,
                len: part.len,
                flags: if more { DESC_NEXT } else { 0 }
                    | if part.device_writes { DESC_WRITE } else { 0 },
                next: head + i + 1,
            };
            // SAFETY: descriptors 3n to 3n + 2 are this request's, which is
            // not under way, so the device does not look at them.
            unsafe {
                self.descriptors
                    .add(usize::from(head + i))
                    .write_volatile(descriptor);
            }
        }
        let place = 2 + usize::from(self.next_available % self.size);
        // SAFETY: within the ring; the device reads the entry only after the
        // index that `publish` writes.
        unsafe { self.available.add(place).write_volatile(head) };
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Shows the device all that was pushed, and kicks it if it wants.
    pub fn publish(&mut self) {
        if self.published == self.next_available {
            return;
        }
        let old = self.published;
        self.published = self.next_available;
        self.shared(self.available, 1)
            .store(self.next_available, Ordering::Release);
        // The device looks at the index after it asked for a kick; we look at
        // its wish after the index (§2.7.13.4.1).
        fence(Ordering::SeqCst);
        let kick = if self.event_idx {
            let event = self.shared(self.used, 2 + 4 * usize::from(self.size));
            need_event(event.load(Ordering::Relaxed), self.published, old)
        } else {
            self.shared(self.used, 0).load(Ordering::Relaxed) & NO_NOTIFY == 0
        };
        if kick {
            self.mmio
                .write(register::QUEUE_NOTIFY, u32::from(self.index));
        }
    }

    /// The next request that has ended: its number.
    pub fn pop(&mut self) -> Option<u16> {
        if !self.has_used() {
            return None;
        }
        let place = 2 + 4 * usize::from(self.next_used % self.size);
        // SAFETY: within the ring; the index said that the device has written
        // the entry, and it was read with Acquire.
        let id = unsafe { self.used.add(place).cast::<u32>().read_volatile() };
        self.next_used = self.next_used.wrapping_add(1);
        Some((id / 3) as u16)
    }

    /// Whether a request has ended that `pop` has not given yet.
    pub fn has_used(&self) -> bool {
        self.shared(self.used, 1).load(Ordering::Acquire) != self.next_used
    }

    /// Asks for an interrupt when the next request ends. Look at
    /// [`Self::has_used`] again before sleeping.
    pub fn want_interrupt(&mut self) {
        if self.event_idx {
            self.used_event().store(self.next_used, Ordering::Relaxed);
        } else {
            self.shared(self.available, 0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
    }

    /// Asks for no interrupts, as far as one can.
    pub fn want_no_interrupt(&mut self) {
        if self.event_idx {
            // Half a turn away from where the device is.
            let far = self.next_used.wrapping_add(0x8000);
            self.used_event().store(far, Ordering::Relaxed);
        } else {
            self.shared(self.available, 0)
                .store(NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    fn used_event(&self) -> &AtomicU16 {
        self.shared(self.available, 2 + usize::from(self.size))
    }

    fn shared(&self, ring: *mut u16, place: usize) -> &AtomicU16 {
        // SAFETY: both rings are longer than any place used here, aligned, and
        // stay for good.
        unsafe { AtomicU16::from_ptr(ring.add(place)) }
    }
}

/// Whether going from `old` to `new` passes `event` (virtio 1.2 §2.7.10).
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
