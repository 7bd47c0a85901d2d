//! The devices a guest sees: virtio-blk over virtio-mmio, a serial port, and
//! the registers for reset and power-off.
//!
//! What does not live here: KVM (the `vmm` crate routes exits to the buses and
//! binds event descriptors as irqfds and ioeventfds), jobs, and QMP.
//!
//! # Threads
//!
//! - *vCPU threads* call [`MmioDevice`] and [`PioDevice`]. Nothing in there
//!   waits: what takes time is handed back as a [`ResetTicket`].
//! - *iothreads* run the virtqueues, each on one of them.
//! - *main* pauses, resumes and resets devices.
//!
//! Register state is behind a mutex per device that only register accesses and
//! device resets take, for a few instructions. The request path takes none.

mod acpi_pm;
mod bus;
mod i8042;
mod rate_limit;
mod serial;
mod ticket;
mod trigger;
mod virtio;

pub use acpi_pm::AcpiPm;
pub use bus::{Bus, BusError, MmioDevice, MmioOutcome, PioDevice};
pub use i8042::I8042;
pub use serial::Serial;
pub use ticket::ResetTicket;
pub use virtio::blk::{BlkConfigError, BlkStats, OpStats, VirtioBlk, VirtioBlkConfig};
pub use virtio::{Activation, Interrupt, VirtioDevice, VirtioMmio};

/// Guest memory as all devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
