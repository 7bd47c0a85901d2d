//! The PVH entry: `hvm_start_info` and its tables (Xen, docs/misc/pvh.pandoc
//! and xen/include/public/arch-x86/hvm/start_info.h).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};

use super::super::layout::{self, MemoryKind};
use super::super::memory::GuestMemory;
use super::{BootData, BootError, write_obj};

/// `xEn3`.
const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
/// Where the list of modules (the initrd) is.
const MODLIST_GPA: u64 = layout::PVH_START_INFO_GPA + 0x40;
/// Where the memory map is.
const MEMMAP_GPA: u64 = layout::PVH_START_INFO_GPA + 0x80;
const MEMMAP_RAM: u32 = 1;
const MEMMAP_RESERVED: u32 = 2;

/// Writes `hvm_start_info`, the module list and the memory map.
pub(super) fn write_start_info(mem: &GuestMemory, data: &BootData) -> Result<(), BootError> {
    let map = layout::memory_map(data.memory);
    for (index, (range, kind)) in map.iter().enumerate() {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.len,
            type_: match kind {
                MemoryKind::Ram => MEMMAP_RAM,
                MemoryKind::Reserved => MEMMAP_RESERVED,
            },
            reserved: 0,
        };
        let gpa = MEMMAP_GPA + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        write_obj(mem, gpa, entry)?;
    }
    if let Some(initrd) = data.initrd {
        write_obj(
            mem,
            MODLIST_GPA,
            hvm_modlist_entry {
                paddr: initrd.start,
                size: initrd.len,
                ..Default::default()
            },
        )?;
    }
    write_obj(
        mem,
        layout::PVH_START_INFO_GPA,
        hvm_start_info {
            magic: MAGIC,
            version: VERSION,
            flags: 0,
            nr_modules: u32::from(data.initrd.is_some()),
            modlist_paddr: if data.initrd.is_some() {
                MODLIST_GPA
            } else {
                0
            },
            cmdline_paddr: layout::CMDLINE_GPA,
            rsdp_paddr: data.rsdp,
            memmap_paddr: MEMMAP_GPA,
            memmap_entries: map.len() as u32,
            reserved: 0,
        },
    )
}
