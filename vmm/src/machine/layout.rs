//! The guest's physical address space: where RAM, boot data, firmware tables
//! and device windows are.
//!
//! Everything is a pure function of the memory size, so that a restart of the
//! guest finds it all in the same place.

use super::MachineError;

/// One KiB in bytes.
pub const KIB: u64 = 1 << 10;
/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;
/// One GiB in bytes.
pub const GIB: u64 = 1 << 30;

/// Where the 64-bit boot protocol's GDT is put.
pub const GDT_GPA: u64 = 0x500;
/// Where PVH's `hvm_start_info` is put; its tables follow it.
pub const PVH_START_INFO_GPA: u64 = 0x6000;
/// Where Linux's boot parameters ("zero page") are put.
pub const ZERO_PAGE_GPA: u64 = 0x7000;
/// Top of the stack that a 64-bit entry starts with.
pub const BOOT_STACK_GPA: u64 = 0x8ff0;
/// Where the identity map's page tables begin: one PML4, one PDPT, four PDs.
pub const PAGE_TABLES_GPA: u64 = 0x9000;
/// Where the kernel's command line is put.
pub const CMDLINE_GPA: u64 = 0x2_0000;
/// Longest command line in bytes, with its terminating NUL (Linux's
/// `COMMAND_LINE_SIZE` on x86).
pub const CMDLINE_CAPACITY: usize = 2048;
/// End of the RAM below the legacy hole.
pub const LOW_RAM_END_GPA: u64 = 0x9_fc00;
/// Where the ACPI tables begin: the area that a guest scans for the RSDP.
pub const ACPI_TABLES_GPA: u64 = 0xe_0000;
/// Size of the area that the ACPI tables may fill; a test sees that they do not
/// need more.
#[cfg(test)]
pub const ACPI_TABLES_SIZE: u64 = RESET_VECTOR_GPA - ACPI_TABLES_GPA;
/// Where a PC's processor begins after a reset, in real mode (F000:FFF0).
pub const RESET_VECTOR_GPA: u64 = 0xf_fff0;
/// Where RAM goes on above the legacy hole; kernels go here or higher.
pub const HIGH_RAM_GPA: u64 = MIB;
/// End of the RAM below the device hole (the 3 GiB mark).
pub const HOLE_START_GPA: u64 = 3 * GIB;
/// Where RAM goes on above the device hole.
pub const ABOVE_HOLE_GPA: u64 = 4 * GIB;

/// Where the windows of the virtio-mmio devices begin.
pub const VIRTIO_MMIO_GPA: u64 = 0xd000_0000;
/// Size of one such window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// I/O APIC, where every PC has it and KVM's is.
pub const IO_APIC_GPA: u64 = 0xfec0_0000;
/// Local APICs, where every PC has them and KVM's are.
pub const LOCAL_APIC_GPA: u64 = 0xfee0_0000;
/// One page that KVM needs on processors without unrestricted guests.
pub const IDENTITY_MAP_GPA: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel processors.
pub const TSS_GPA: u64 = 0xfffb_d000;

/// Least memory that a guest can have.
pub const MIN_MEMORY: u64 = 2 * MIB;
/// Most memory that a guest can have. A processor may address less: then KVM
/// refuses the memory.
pub const MAX_MEMORY: u64 = 1 << 40;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpaRange {
    /// First address.
    pub start: u64,
    /// Length in bytes, not 0.
    pub len: u64,
}

impl GpaRange {
    /// The first address behind the range.
    #[cfg(test)]
    pub fn end(self) -> u64 {
        self.start + self.len
    }
}

/// What a range of the memory map is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// The guest may use it.
    Ram,
    /// The guest must leave it alone.
    Reserved,
}

/// Checks a memory size in bytes and gives the ranges of RAM it makes: one
/// below the device hole, and one above if there is more.
pub fn ram_ranges(memory: u64) -> Result<Vec<GpaRange>, MachineError> {
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory) || !memory.is_multiple_of(MIB) {
        return Err(MachineError::MemorySize { memory });
    }
    let below = memory.min(HOLE_START_GPA);
    let mut ranges = vec![GpaRange {
        start: 0,
        len: below,
    }];
    if memory > below {
        ranges.push(GpaRange {
            start: ABOVE_HOLE_GPA,
            len: memory - below,
        });
    }
    Ok(ranges)
}

/// End of the RAM below the device hole, for a checked memory size.
pub fn low_memory_end(memory: u64) -> u64 {
    memory.min(HOLE_START_GPA)
}

/// The memory map that a guest is told, in ascending order.
pub fn memory_map(memory: u64) -> Vec<(GpaRange, MemoryKind)> {
    let mut map = vec![
        (
            GpaRange {
                start: 0,
                len: LOW_RAM_END_GPA,
            },
            MemoryKind::Ram,
        ),
        (
            GpaRange {
                start: LOW_RAM_END_GPA,
                len: HIGH_RAM_GPA - LOW_RAM_END_GPA,
            },
            MemoryKind::Reserved,
        ),
        (
            GpaRange {
                start: HIGH_RAM_GPA,
                len: low_memory_end(memory) - HIGH_RAM_GPA,
            },
            MemoryKind::Ram,
        ),
    ];
    if memory > HOLE_START_GPA {
        map.push((
            GpaRange {
                start: ABOVE_HOLE_GPA,
                len: memory - HOLE_START_GPA,
            },
            MemoryKind::Ram,
        ));
    }
    map
}

/// Address of the window of the `index`th virtio-mmio device.
pub fn virtio_mmio_gpa(index: usize) -> u64 {
    VIRTIO_MMIO_GPA + index as u64 * VIRTIO_MMIO_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_up_to_three_gib_is_one_range() {
        for memory in [MIN_MEMORY, 256 * MIB, HOLE_START_GPA] {
            assert_eq!(
                ram_ranges(memory).unwrap(),
                [GpaRange {
                    start: 0,
                    len: memory
                }]
            );
            assert_eq!(memory_map(memory).last().unwrap().0.end(), memory);
        }
    }

    #[test]
    fn memory_beyond_three_gib_goes_on_above_four() {
        let ranges = ram_ranges(5 * GIB).unwrap();
        assert_eq!(ranges[0].end(), HOLE_START_GPA);
        assert_eq!(ranges[1].start, ABOVE_HOLE_GPA);
        assert_eq!(ranges.iter().map(|range| range.len).sum::<u64>(), 5 * GIB);
        assert_eq!(ranges[1].end(), 6 * GIB);
    }

    #[test]
    fn sizes_that_no_guest_can_have_are_refused() {
        for memory in [
            0,
            MIB,
            MIN_MEMORY + 1,
            MAX_MEMORY + MIB,
            u64::MAX,
            256 * MIB + 512,
        ] {
            assert!(ram_ranges(memory).is_err(), "{memory}");
        }
    }

    #[test]
    fn the_memory_map_is_ascending_without_overlap() {
        for memory in [MIN_MEMORY, 512 * MIB, 3 * GIB, 3 * GIB + MIB, 64 * GIB] {
            let map = memory_map(memory);
            assert!(
                map.windows(2)
                    .all(|pair| pair[0].0.end() <= pair[1].0.start)
            );
            let highest = map.last().unwrap();
            assert_eq!(highest.1, MemoryKind::Ram);
        }
    }

    #[test]
    fn boot_data_does_not_overlap() {
        let areas = [
            (GDT_GPA, 0x100),
            (PVH_START_INFO_GPA, 0x1000),
            (ZERO_PAGE_GPA, 0x1000),
            (PAGE_TABLES_GPA, 6 * 0x1000),
            (CMDLINE_GPA, CMDLINE_CAPACITY as u64),
            (LOW_RAM_END_GPA, 0),
            (ACPI_TABLES_GPA, ACPI_TABLES_SIZE),
        ];
        assert!(areas.windows(2).all(|p| p[0].0 + p[0].1 <= p[1].0));
        const { assert!(BOOT_STACK_GPA > ZERO_PAGE_GPA + 0x1000 && BOOT_STACK_GPA < PAGE_TABLES_GPA) };
        const { assert!(RESET_VECTOR_GPA + 16 == HIGH_RAM_GPA) };
    }
}
