//! The interrupt of a virtio-mmio device, and why it was raised.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Bits of `InterruptStatus` (virtio 1.2 §4.2.2).
const USED_BUFFER: u32 = 1 << 0;
const CONFIG_CHANGE: u32 = 1 << 1;

/// Raises a device's interrupt. Any thread.
pub struct Interrupt {
    /// `InterruptStatus`. Own synchronisation: set before the event is
    /// signalled, cleared by the driver.
    status: AtomicU32,
    /// DEVICE_NEEDS_RESET. Own synchronisation; cleared by a device reset only.
    needs_reset: AtomicBool,
    event: Arc<EventFd>,
}

impl Interrupt {
    pub(crate) fn new(event: Arc<EventFd>) -> Self {
        Self {
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            event,
        }
    }

    /// Buffers were used in a queue.
    pub fn signal_used_buffers(&self) {
        self.signal(USED_BUFFER);
    }

    /// The configuration space changed.
    pub fn signal_config_change(&self) {
        self.signal(CONFIG_CHANGE);
    }

    /// The device cannot go on before it is reset: sets DEVICE_NEEDS_RESET and
    /// tells a running driver (virtio 1.2 §2.1.2).
    pub fn fail(&self) {
        self.mark_needs_reset();
        self.signal(CONFIG_CHANGE);
    }

    pub(crate) fn mark_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(crate) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Back to the initial state. Only while nothing of the device runs.
    pub(crate) fn reset(&self) {
        self.needs_reset.store(false, Ordering::Release);
        self.status.store(0, Ordering::Release);
    }

    fn signal(&self, why: u32) {
        self.status.fetch_or(why, Ordering::AcqRel);
        // Fails only when 2^64-2 signals are unread, and one is enough.
        if let Err(error) = self.event.write(1) {
            tracing::debug!(%error, "Interrupt was pending already");
        }
    }
}
