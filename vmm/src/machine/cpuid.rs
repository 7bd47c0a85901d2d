//! What the guest's processors say they are: the host's abilities as far as KVM
//! passes them on, with the guest's own topology (one socket, one thread per
//! core, APIC id = index of the vCPU).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::MachineError;

const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE_INTEL: u32 = 0x4;
const LEAF_THERMAL: u32 = 0x6;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_EXT_FEATURES: u32 = 0x8000_0001;
const LEAF_EXT_SIZES: u32 = 0x8000_0008;
const LEAF_CACHE_AMD: u32 = 0x8000_001d;
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001e;

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// Leaf 6: the local APIC timer runs in all C-states.
const EAX_ARAT: u32 = 1 << 2;
/// Leaf 0x8000_0001: more than one core by the old rules.
const ECX_CMP_LEGACY: u32 = 1 << 1;

/// The host's CPUID as KVM supports it, read once for all vCPUs.
pub struct HostCpuid {
    entries: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl HostCpuid {
    /// Asks KVM.
    pub fn read(kvm: &Kvm) -> Result<Self, MachineError> {
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| MachineError::Kvm {
                what: "read the supported CPUID",
                source,
            })?;
        Ok(Self {
            entries: cpuid.as_slice().to_vec(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }

    /// The CPUID of one of `cpus` vCPUs.
    pub fn for_vcpu(&self, apic_id: u8, cpus: u8) -> Vec<kvm_cpuid_entry2> {
        let mut entries: Vec<_> = self
            .entries
            .iter()
            .copied()
            .filter(|entry| !matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2))
            .collect();
        for entry in &mut entries {
            adjust(entry, apic_id, cpus, self.tsc_deadline);
        }
        let max_leaf = entries
            .iter()
            .find(|e| e.function == 0)
            .map_or(0, |e| e.eax);
        if max_leaf >= LEAF_TOPOLOGY {
            entries.extend(topology(apic_id, cpus));
        }
        entries
    }

    /// Gives a vCPU its CPUID.
    pub fn apply(&self, vcpu: &VcpuFd, apic_id: u8, cpus: u8) -> Result<(), MachineError> {
        let kvm_error = |source| MachineError::Kvm {
            what: "set the CPUID of a vCPU",
            source,
        };
        let entries = self.for_vcpu(apic_id, cpus);
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| kvm_error(kvm_ioctls::Error::new(libc::E2BIG)))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm_error)
    }
}

/// Bits that an APIC id's core part takes.
fn core_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

/// Changes one leaf of the host to the guest's.
fn adjust(entry: &mut kvm_cpuid_entry2, apic_id: u8, cpus: u8, tsc_deadline: bool) {
    let more_cores = u32::from(cpus) - 1;
    match entry.function {
        LEAF_FEATURES => {
            // EBX: initial APIC id, logical processors, CLFLUSH line, brand.
            entry.ebx = u32::from(apic_id) << 24 | u32::from(cpus) << 16 | entry.ebx & 0xffff;
            entry.ecx |= ECX_HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
            set_bit(&mut entry.edx, EDX_HTT, cpus > 1);
        }
        // EAX: cores per package in 31:26, threads sharing the cache in 25:14.
        // Levels 1 and 2 belong to a core, level 3 to the package.
        LEAF_CACHE_INTEL => {
            let level = entry.eax >> 5 & 0b111;
            let sharing = if level >= 3 { more_cores } else { 0 };
            entry.eax = more_cores << 26 | sharing << 14 | entry.eax & 0x3fff;
        }
        LEAF_THERMAL => entry.eax |= EAX_ARAT,
        LEAF_EXT_FEATURES => set_bit(&mut entry.ecx, ECX_CMP_LEGACY, cpus > 1),
        // ECX: APIC id size in 15:12, cores less one in 7:0.
        LEAF_EXT_SIZES => {
            entry.ecx = entry.ecx & !0xf0ff | core_bits(cpus) << 12 | more_cores;
        }
        LEAF_CACHE_AMD => {
            let level = entry.eax >> 5 & 0b111;
            let sharing = if level >= 3 { more_cores } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        LEAF_TOPOLOGY_AMD => {
            // Extended APIC id; core id, one thread; node 0 of one.
            entry.eax = u32::from(apic_id);
            entry.ebx = u32::from(apic_id);
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

/// Leaf 0xb (extended topology): a thread level, a core level, the end.
fn topology(apic_id: u8, cpus: u8) -> [kvm_cpuid_entry2; 3] {
    const LEVEL_SMT: u32 = 1;
    const LEVEL_CORE: u32 = 2;
    const SIGNIFICANT_INDEX: u32 = 1;
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: u32::from(apic_id),
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_SMT),
        level(1, core_bits(cpus), u32::from(cpus), LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

/// Whether the vCPUs will have an x2APIC, for the log.
pub fn has_x2apic(entries: &[kvm_cpuid_entry2]) -> bool {
    entries
        .iter()
        .any(|entry| entry.function == LEAF_FEATURES && entry.ecx & ECX_X2APIC != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostCpuid {
        let leaf = |function, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        HostCpuid {
            entries: vec![
                leaf(0, 0xd, 0, 0, 0),
                leaf(LEAF_FEATURES, 0, 0x0710_0800, 0, EDX_HTT),
                leaf(LEAF_CACHE_INTEL, 0xfc00_0121 | 0x3 << 14, 0, 0, 0),
                leaf(LEAF_TOPOLOGY, 1, 2, 0x100, 7),
                leaf(LEAF_EXT_SIZES, 0x3030, 0, 0x703f, 0),
                leaf(LEAF_TOPOLOGY_AMD, 7, 0x103, 0x100, 0),
            ],
            tsc_deadline: true,
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries
            .iter()
            .filter(|e| e.function == function && e.index == index);
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "one entry for {function:#x}");
        entry
    }

    #[test]
    fn the_topology_is_one_socket_of_single_threaded_cores() {
        let entries = host().for_vcpu(2, 3);
        let features = find(&entries, LEAF_FEATURES, 0);
        assert_eq!(features.ebx, 0x0203_0800);
        assert_ne!(features.ecx & ECX_HYPERVISOR, 0);
        assert_ne!(features.ecx & ECX_TSC_DEADLINE, 0);
        assert_ne!(features.edx & EDX_HTT, 0);
        let cores = find(&entries, LEAF_TOPOLOGY, 1);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, 2));
        assert_eq!(find(&entries, LEAF_TOPOLOGY, 0).ebx, 1);
        assert_eq!(find(&entries, LEAF_EXT_SIZES, 0).ecx, 0x2002);
        let amd = find(&entries, LEAF_TOPOLOGY_AMD, 0);
        assert_eq!((amd.eax, amd.ebx, amd.ecx), (2, 2, 0));
    }

    #[test]
    fn a_single_processor_shares_nothing() {
        let entries = host().for_vcpu(0, 1);
        assert_eq!(find(&entries, LEAF_FEATURES, 0).edx & EDX_HTT, 0);
        assert_eq!(find(&entries, LEAF_CACHE_INTEL, 0).eax, 0x121);
        assert_eq!(find(&entries, LEAF_TOPOLOGY, 1).eax, 0);
    }
}
