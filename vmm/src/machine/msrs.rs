//! Model-specific registers at the guest's start. KVM may refuse any of them
//! (a host without hardware virtualisation does); the guest can live without.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Enabled; everything write-back.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// What firmware would have set.
const AT_START: [(u32, u64); 2] = [
    (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
    (MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
];

/// Sets each register that KVM accepts, and logs the others.
pub fn apply(vcpu: &VcpuFd) {
    for (index, data) in AT_START {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let set = Msrs::from_entries(&[entry])
            .ok()
            .and_then(|msrs| vcpu.set_msrs(&msrs).ok());
        if set != Some(1) {
            tracing::info!("KVM does not set MSR {index:#x}; the guest starts with its default");
        }
    }
}
