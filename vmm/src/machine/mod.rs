//! The guest's machine: memory, processors, boot, firmware tables, and the
//! wiring of its devices to KVM.
//!
//! [`Machine::build`] puts it together and starts its vCPU threads parked;
//! [`control`] runs it on the main thread. What the devices do is the `devices`
//! crate's, and what their disks are is the caller's.
//!
//! # Threads
//!
//! Main builds and controls. vCPU threads enter the guest; they meet main in
//! [`run_control`] only, whose lock is a leaf held for a few instructions.

mod acpi;
mod board;
mod boot;
mod control;
mod cpuid;
mod irq;
mod kick;
mod kvm;
mod layout;
mod memory;
mod msrs;
mod run_control;
mod vcpu;

#[cfg(test)]
mod test_kernel;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

pub use boot::{BootError, BootImages, BootProtocol};
pub use control::{CrashPolicy, GuestEnd, Machine, MachineSpec, RebootPolicy};
pub use layout::{GIB, KIB, MIB};

/// Checks that a guest can have `memory` bytes of memory, as far as that can be
/// said without asking the host for them.
///
/// Errors: [`MachineError::MemorySize`].
pub fn check_memory_size(memory: u64) -> Result<(), MachineError> {
    layout::ram_ranges(memory).map(drop)
}

/// Most vCPUs that a guest can have.
pub const MAX_CPUS: u8 = 32;
/// Most disks that a guest can have.
pub const MAX_DISKS: usize = 32;

/// Why a machine could not be built or started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// There is no KVM.
    #[error(
        "No {} on this host; enable virtualisation in its firmware and load the kvm_intel or kvm_amd module (diptych storage-daemon runs without)",
        .path.display()
    )]
    NoKvm {
        /// The device.
        path: PathBuf,
    },
    /// KVM is there, but not for this user.
    #[error("No permission to use {}; add this user to the group that owns it (usually kvm), or run as root", .path.display())]
    KvmPermission {
        /// The device.
        path: PathBuf,
    },
    /// KVM's device cannot be used.
    #[error("Cannot use {}", .path.display())]
    OpenKvm {
        /// The device.
        path: PathBuf,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// KVM lacks what a guest cannot do without.
    #[error("This host's KVM lacks {what}; a newer kernel has it")]
    KvmLacks {
        /// What is missing.
        what: &'static str,
    },
    /// A request to KVM failed.
    #[error("KVM cannot {what}")]
    Kvm {
        /// What it was asked.
        what: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// More vCPUs than KVM has.
    #[error("This host's KVM gives a guest {limit} vCPUs at most; {cpus} were asked for (--cpus)")]
    TooManyCpus {
        /// How many were asked for.
        cpus: u8,
        /// How many there can be.
        limit: usize,
    },
    /// A memory size that no guest can have.
    #[error(
        "A guest cannot have {memory} bytes of memory; give whole MiB, from {} MiB to {} GiB (--memory)",
        layout::MIN_MEMORY / MIB, layout::MAX_MEMORY / GIB
    )]
    MemorySize {
        /// The size asked for, in bytes.
        memory: u64,
    },
    /// The host does not give so much memory.
    #[error("Cannot map {} MiB for the guest; give it less (--memory)", .memory / MIB)]
    AllocateMemory {
        /// The size asked for, in bytes.
        memory: u64,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The guest's memory could not be cleared for a restart.
    #[error("Cannot clear the guest's memory")]
    ClearMemory {
        /// Why.
        source: std::io::Error,
    },
    /// An event descriptor or device could not be made.
    #[error("Cannot make the guest's {what}")]
    Device {
        /// Which one.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// Two devices in one place: a mistake of ours.
    #[error("Cannot place the guest's devices")]
    Bus(#[from] devices::BusError),
    /// A vCPU thread could not be started.
    #[error("Cannot start a vCPU thread")]
    Thread {
        /// Why.
        source: std::io::Error,
    },
    /// The kernel could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
}

/// What vCPU threads tell main.
#[derive(Debug)]
enum MachineEvent {
    /// A vCPU cannot go on; its thread is parked.
    Crashed(vcpu::Crash),
}
