//! The virtio-mmio transport, version 2 (virtio 1.2 §4.2): registers, the
//! device status, feature negotiation, queue set-up and reset.
//!
//! Serving queues is the device's part; KVM is the machine's.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::EventFd;

use super::queue_registers::QueueRegisters;
use super::{Activation, Interrupt, VirtioDevice};
use crate::GuestMemory;
use crate::bus::{MmioDevice, MmioOutcome};
use crate::rate_limit::RateLimit;
use crate::ticket::ResetTicket;

/// "virt".
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"dpty");

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

#[derive(Default)]
struct Registers {
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    config_generation: u32,
    /// A device reset that may still have I/O in the kernel.
    resetting: Option<ResetTicket>,
}

impl Registers {
    fn initial(num_queues: u16, queue_max_size: u16, config_generation: u32) -> Self {
        let queue = QueueRegisters::new(queue_max_size);
        Self {
            queues: vec![queue; num_queues.into()],
            config_generation,
            ..Self::default()
        }
    }

    fn queue(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::try_from(self.queue_sel).ok()?)
    }
}

/// A virtio device behind the MMIO transport.
///
/// Dropping it without [`Self::reset`] stops the device's queues as soon as
/// their iothreads get to it.
pub struct VirtioMmio {
    mem: Arc<GuestMemory>,
    device: Arc<dyn VirtioDevice>,
    interrupt: Arc<Interrupt>,
    interrupt_evt: Arc<EventFd>,
    notify: Vec<Arc<EventFd>>,
    /// Taken by register accesses, [`Self::reset`] and [`Self::refresh_config`]
    /// only; the device's own control lock nests in it. Never on the way of a
    /// request.
    registers: Mutex<Registers>,
    log: RateLimit,
}

impl VirtioMmio {
    /// Size of the register window in bytes.
    pub const LEN: u64 = 0x1000;
    /// Offset of `QueueNotify`: where ioeventfds are bound, with the queue's
    /// index as the 4-byte datamatch.
    pub const NOTIFY_OFFSET: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

    /// Puts `device` behind the transport.
    ///
    /// # Errors
    ///
    /// If no event descriptors can be made.
    pub fn new(mem: Arc<GuestMemory>, device: Arc<dyn VirtioDevice>) -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new);
        let interrupt_evt = event()?;
        let notify = (0..device.num_queues())
            .map(|_| event())
            .collect::<io::Result<_>>()?;
        let registers = Registers::initial(device.num_queues(), device.queue_max_size(), 0);
        Ok(Self {
            mem,
            interrupt: Arc::new(Interrupt::new(Arc::clone(&interrupt_evt))),
            interrupt_evt,
            notify,
            device,
            registers: Mutex::new(registers),
            log: RateLimit::new(),
        })
    }

    /// Signalled for each interrupt: an irqfd, edge-triggered.
    pub fn interrupt_evt(&self) -> &Arc<EventFd> {
        &self.interrupt_evt
    }

    /// What the driver's notifications have to arrive on, by queue index
    /// (ioeventfds at [`Self::NOTIFY_OFFSET`]). Without ioeventfds, writes to
    /// that register do the same, slower.
    pub fn queue_evts(&self) -> &[Arc<EventFd>] {
        &self.notify
    }

    /// Resets the device, as the driver would by writing 0 to its status: for a
    /// machine reset. Its memory may be reused when the ticket is done.
    pub fn reset(&self) -> ResetTicket {
        let mut registers = self.lock();
        match self.begin_reset(&mut registers) {
            MmioOutcome::Wait(ticket) => ticket,
            MmioOutcome::Done => ResetTicket::new(0).0,
        }
    }

    /// Looks whether the device's configuration changed from outside (a disk
    /// was resized), and tells the driver. Cheap; any thread.
    pub fn refresh_config(&self) {
        let mut registers = self.lock();
        if self.device.refresh_config() {
            registers.config_generation = registers.config_generation.wrapping_add(1);
            if registers.status & DRIVER_OK != 0 && registers.resetting.is_none() {
                self.interrupt.signal_config_change();
            }
        }
    }

    /// The registers, with a finished reset taken into account.
    fn lock(&self) -> MutexGuard<'_, Registers> {
        let mut registers = self
            .registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if registers
            .resetting
            .as_ref()
            .is_some_and(ResetTicket::is_done)
        {
            self.finish_reset(&mut registers);
        }
        registers
    }

    fn begin_reset(&self, registers: &mut Registers) -> MmioOutcome {
        if let Some(ticket) = &registers.resetting {
            return MmioOutcome::Wait(ticket.clone());
        }
        let ticket = self.device.reset();
        if ticket.is_done() {
            self.finish_reset(registers);
            return MmioOutcome::Done;
        }
        registers.resetting = Some(ticket.clone());
        MmioOutcome::Wait(ticket)
    }

    fn finish_reset(&self, registers: &mut Registers) {
        *registers = Registers::initial(
            self.device.num_queues(),
            self.device.queue_max_size(),
            registers.config_generation,
        );
        self.interrupt.reset();
    }

    fn read_register(&self, registers: &mut Registers, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.device_type(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => {
                feature_word(self.device.features(), registers.device_features_sel)
            }
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => registers
                .queue()
                .map_or(0, |_| self.device.queue_max_size().into()),
            reg::VIRTIO_MMIO_QUEUE_READY => {
                registers.queue().is_some_and(|queue| queue.in_use()).into()
            }
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            reg::VIRTIO_MMIO_STATUS => {
                registers.status
                    | if self.interrupt.needs_reset() {
                        NEEDS_RESET
                    } else {
                        0
                    }
            }
            // No shared memory regions (virtio 1.2 §4.2.2: length of all ones).
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => registers.config_generation,
            _ => 0,
        }
    }

    fn write_register(&self, registers: &mut Registers, offset: u32, value: u32) -> MmioOutcome {
        if offset == reg::VIRTIO_MMIO_STATUS {
            return self.write_status(registers, value);
        }
        // Until a reset is done the driver has nothing to say.
        if registers.resetting.is_some() {
            return MmioOutcome::Done;
        }
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => {
                if registers.status & (DRIVER | FEATURES_OK) == DRIVER {
                    let features = &mut registers.driver_features;
                    match registers.driver_features_sel {
                        0 => *features = *features >> 32 << 32 | u64::from(value),
                        1 => *features = *features & 0xffff_ffff | u64::from(value) << 32,
                        // Bits that no device of ours offers.
                        _ if value != 0 => self.complain("features above bit 63", value),
                        _ => {}
                    }
                } else {
                    self.complain("features outside negotiation", value);
                }
            }
            reg::VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            reg::VIRTIO_MMIO_QUEUE_NUM
            | reg::VIRTIO_MMIO_QUEUE_DESC_LOW
            | reg::VIRTIO_MMIO_QUEUE_DESC_HIGH
            | reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW
            | reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH
            | reg::VIRTIO_MMIO_QUEUE_USED_LOW
            | reg::VIRTIO_MMIO_QUEUE_USED_HIGH => match self.queue_in_setup(registers) {
                Some(queue) => queue.write(offset, value),
                None => self.complain("a queue that cannot be set up now", offset),
            },
            reg::VIRTIO_MMIO_QUEUE_READY => return self.write_queue_ready(registers, value),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            _ => {}
        }
        MmioOutcome::Done
    }

    fn write_status(&self, registers: &mut Registers, value: u32) -> MmioOutcome {
        if value == 0 {
            return self.begin_reset(registers);
        }
        if registers.resetting.is_some() {
            return MmioOutcome::Done;
        }
        let old = registers.status;
        let mut new = value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        // Bits are cleared by a reset only, and each step stands on the one
        // before (virtio 1.2 §2.1.1, §3.1.1).
        let out_of_order = new & old != old
            || new & DRIVER != 0 && new & ACKNOWLEDGE == 0
            || new & FEATURES_OK != 0 && new & DRIVER == 0
            || new & DRIVER_OK != 0 && new & FEATURES_OK == 0;
        if out_of_order {
            self.complain("a device status out of order", value);
            return MmioOutcome::Done;
        }
        if new & !old & FEATURES_OK != 0 {
            if self.features_acceptable(registers.driver_features) {
                self.device.features_accepted(registers.driver_features);
            } else {
                // The driver reads the status back to see that.
                self.complain("features that were not offered", value);
                new &= !(FEATURES_OK | DRIVER_OK);
            }
        }
        if new & FAILED != 0 || self.interrupt.needs_reset() {
            new &= !DRIVER_OK | old;
        }
        registers.status = new;
        if new & !old & DRIVER_OK != 0 {
            self.activate(registers);
        }
        MmioOutcome::Done
    }

    fn features_acceptable(&self, features: u64) -> bool {
        features & !self.device.features() == 0 && features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    /// The selected queue, if the driver may change it now: after feature
    /// negotiation, before DRIVER_OK, not while it is ready, and not if only a
    /// reset helps any more.
    fn queue_in_setup<'a>(&self, registers: &'a mut Registers) -> Option<&'a mut QueueRegisters> {
        if registers.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK
            || self.interrupt.needs_reset()
        {
            return None;
        }
        registers.queue().filter(|queue| !queue.in_use())
    }

    fn write_queue_ready(&self, registers: &mut Registers, value: u32) -> MmioOutcome {
        let live = registers.status & DRIVER_OK != 0;
        let event_idx = event_idx(registers.driver_features);
        let index = registers.queue_sel;
        match value {
            0 => {
                let Some(queue) = registers.queue() else {
                    return MmioOutcome::Done;
                };
                if !live {
                    queue.ready = false;
                    return MmioOutcome::Done;
                }
                if std::mem::take(&mut queue.ready) {
                    queue.stopping = Some(self.device.stop_queue(index as u16));
                }
                match &queue.stopping {
                    Some(ticket) if !ticket.is_done() => MmioOutcome::Wait(ticket.clone()),
                    _ => MmioOutcome::Done,
                }
            }
            1 => {
                let Some(queue) = self.queue_in_setup(registers) else {
                    self.complain("a queue that cannot be made ready now", index);
                    return MmioOutcome::Done;
                };
                match queue.build(event_idx, &self.mem) {
                    Ok(_) => queue.ready = true,
                    Err(error) => {
                        self.interrupt.mark_needs_reset();
                        if let Some(suppressed) = self.log.allow() {
                            tracing::warn!(%error, queue = index, suppressed,
                                "Driver sets up a queue wrongly: device needs a reset");
                        }
                    }
                }
                MmioOutcome::Done
            }
            _ => MmioOutcome::Done,
        }
    }

    fn activate(&self, registers: &Registers) {
        let event_idx = event_idx(registers.driver_features);
        let mut queues = Vec::new();
        for (index, queue) in (0u16..).zip(&registers.queues) {
            if !queue.ready {
                continue;
            }
            match queue.build(event_idx, &self.mem) {
                Ok(queue) => queues.push((index, queue)),
                // Guest memory and these registers are as they were when the
                // same check passed, so this is not met; but it is no reason to
                // trust a queue.
                Err(_) => self.interrupt.fail(),
            }
        }
        self.device.activate(Activation {
            mem: Arc::clone(&self.mem),
            features: registers.driver_features,
            queues,
            notify: self.notify.clone(),
            interrupt: Arc::clone(&self.interrupt),
        });
    }

    fn notify(&self, queue: u32) {
        let event = usize::try_from(queue).ok().and_then(|i| self.notify.get(i));
        match event {
            Some(event) => {
                if let Err(error) = event.write(1) {
                    tracing::debug!(%error, "Queue was notified already");
                }
            }
            None => self.complain("a queue that does not exist", queue),
        }
    }

    fn complain(&self, what: &str, value: u32) {
        if let Some(suppressed) = self.log.allow() {
            tracing::warn!(value, suppressed, "Driver writes {what}: ignored");
        }
    }
}

fn event_idx(features: u64) -> bool {
    features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
}

fn feature_word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Offset of the device's configuration space.
const CONFIG: u64 = reg::VIRTIO_MMIO_CONFIG as u64;

impl MmioDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let mut registers = self.lock();
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(offset, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            // Other widths are the driver's fault (virtio 1.2 §4.2.2.2).
            *word = self
                .read_register(&mut registers, offset as u32)
                .to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> MmioOutcome {
        // Without the lock: the slow form of an ioeventfd.
        if let (Self::NOTIFY_OFFSET, Ok(word)) = (offset, <[u8; 4]>::try_from(data)) {
            self.notify(u32::from_le_bytes(word));
            return MmioOutcome::Done;
        }
        let mut registers = self.lock();
        if let Some(offset) = offset.checked_sub(CONFIG) {
            if registers.resetting.is_none() {
                let negotiated = if registers.status & FEATURES_OK != 0 {
                    registers.driver_features
                } else {
                    0
                };
                self.device.write_config(offset, data, negotiated);
            }
            return MmioOutcome::Done;
        }
        match <[u8; 4]>::try_from(data) {
            Ok(word) if offset.is_multiple_of(4) => {
                self.write_register(&mut registers, offset as u32, u32::from_le_bytes(word))
            }
            _ => MmioOutcome::Done,
        }
    }
}

impl Drop for VirtioMmio {
    fn drop(&mut self) {
        let _ticket = self.device.reset();
    }
}

#[cfg(test)]
mod tests;
