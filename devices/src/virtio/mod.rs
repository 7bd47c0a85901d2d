//! Virtio 1.2: the transport, and what a device has to offer to it.

pub(crate) mod blk;
mod interrupt;
mod mmio;
mod queue_registers;

use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;
use crate::ticket::ResetTicket;

pub use interrupt::Interrupt;
pub use mmio::VirtioMmio;

/// What a device gets when the driver sets DRIVER_OK.
pub struct Activation {
    /// Guest memory. The queues' rings are inside.
    pub mem: Arc<GuestMemory>,
    /// Negotiated features.
    pub features: u64,
    /// The queues that the driver made ready, with their index: checked, and
    /// told whether EVENT_IDX was negotiated.
    pub queues: Vec<(u16, Queue)>,
    /// What the driver's notifications arrive on, one per queue of the device.
    pub notify: Vec<Arc<EventFd>>,
    /// How to interrupt the driver.
    pub interrupt: Arc<Interrupt>,
}

/// A virtio device behind a transport.
///
/// Threads: called by vCPU threads and main, one call at a time (the transport
/// sees to that). No method waits for anything.
pub trait VirtioDevice: Send + Sync {
    /// Device type (virtio 1.2 §5).
    fn device_type(&self) -> u32;

    /// Number of queues.
    fn num_queues(&self) -> u16;

    /// Largest queue size: a power of two, at most 32768.
    fn queue_max_size(&self) -> u16;

    /// Features it offers.
    fn features(&self) -> u64;

    /// The driver has set FEATURES_OK with these features, and that was accepted:
    /// fields whose first value depends on them are set here (virtio 1.2 §3.1.1).
    /// Until a reset, they stay as they are.
    fn features_accepted(&self, features: u64);

    /// Fills `data` from the configuration space at `offset`; zeroes past its end.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` to the configuration space at `offset`, as far as the
    /// negotiated `features` allow it; else nothing happens.
    fn write_config(&self, offset: u64, data: &[u8], features: u64);

    /// Looks whether the configuration changed from outside, and takes it over.
    /// Returns whether it did.
    fn refresh_config(&self) -> bool;

    /// The driver is ready: begin to serve the queues.
    fn activate(&self, activation: Activation);

    /// Stops one queue. When the ticket is done, nothing of it touches guest
    /// memory any more.
    fn stop_queue(&self, index: u16) -> ResetTicket;

    /// Stops all queues and goes back to the initial state. When the ticket is
    /// done, nothing of the device touches guest memory any more.
    fn reset(&self) -> ResetTicket;
}
