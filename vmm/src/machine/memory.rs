//! The guest's RAM: its mapping in this process, and its registration with KVM.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

use super::{MachineError, layout};

/// The guest's memory, as devices and boot loaders see it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Maps `memory` bytes of zeroed, private, anonymous RAM.
///
/// Errors: a size that no guest can have, or that this host has not.
pub fn allocate(memory: u64) -> Result<Arc<GuestMemory>, MachineError> {
    let ranges: Vec<_> = layout::ram_ranges(memory)?
        .into_iter()
        .map(|range| (GuestAddress(range.start), range.len as usize))
        .collect();
    let mem = GuestMemory::from_ranges(&ranges).map_err(|source| MachineError::AllocateMemory {
        memory,
        source: Box::new(source),
    })?;
    for region in mem.iter() {
        // Huge pages make nested page walks short. A host without them is fine.
        advise(region, libc::MADV_HUGEPAGE);
    }
    Ok(Arc::new(mem))
}

/// Gives the guest's memory back to the host: it reads as zeroes afterwards.
///
/// No vCPU may run, and no device may have a request in flight.
pub fn clear(mem: &GuestMemory) -> Result<(), MachineError> {
    for region in mem.iter() {
        if !advise(region, libc::MADV_DONTNEED) {
            return Err(MachineError::ClearMemory {
                source: std::io::Error::last_os_error(),
            });
        }
    }
    Ok(())
}

/// `madvise` over a whole region; whether the kernel took it.
fn advise<R: GuestMemoryRegion>(region: &R, advice: libc::c_int) -> bool {
    let Ok(hva) = region.get_host_address(MemoryRegionAddress(0)) else {
        return false;
    };
    // SAFETY: the range is one mapping of our own, made by `allocate` and alive
    // as long as `region`. Neither advice unmaps it; guest memory is only ever
    // accessed by volatile or atomic accesses, for which a change of content
    // under their hands is nothing new.
    unsafe { libc::madvise(hva.cast(), region.len() as usize, advice) == 0 }
}

/// Tells KVM of the guest's memory.
pub fn register(vm: &VmFd, mem: &GuestMemory) -> Result<(), MachineError> {
    for (slot, region) in mem.iter().enumerate() {
        let userspace_addr = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|source| MachineError::AllocateMemory {
                memory: region.len(),
                source: Box::new(source),
            })? as u64;
        let memslot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr,
        };
        // SAFETY: the range is mapped, page-aligned and does not overlap another
        // slot. The machine keeps `mem` alive longer than the VM's descriptor.
        unsafe { vm.set_user_memory_region(memslot) }.map_err(|source| MachineError::Kvm {
            what: "register the guest's memory",
            source,
        })?;
    }
    Ok(())
}
