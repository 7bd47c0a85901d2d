//! The 64-bit Linux boot protocol: boot parameters, identity map and GDT
//! (Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};

use super::super::layout::{self, MemoryKind};
use super::super::memory::GuestMemory;
use super::registers::{GDT, PDE_2M, PTE_PRESENT_WRITABLE};
use super::{BootData, BootError, write, write_obj};

/// `HdrS`, the setup header's magic number.
pub(super) const HEADER_MAGIC: u32 = 0x5372_6448;
/// `loadflags`: the protected-mode code is loaded high.
pub(super) const LOADED_HIGH: u8 = 1;
/// `type_of_loader`: no assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Writes the zero page, the page tables and the GDT.
pub(super) fn write_boot_data(
    mem: &GuestMemory,
    data: &BootData,
    header: setup_header,
) -> Result<(), BootError> {
    write_obj(mem, layout::ZERO_PAGE_GPA, zero_page(data, header))?;
    write_identity_map(mem)?;
    for (index, descriptor) in GDT.iter().enumerate() {
        write_obj(mem, layout::GDT_GPA + 8 * index as u64, *descriptor)?;
    }
    Ok(())
}

/// Makes the boot parameters.
fn zero_page(data: &BootData, header: setup_header) -> boot_params {
    let mut params = boot_params {
        acpi_rsdp_addr: data.rsdp,
        hdr: setup_header {
            type_of_loader: LOADER_UNDEFINED,
            cmd_line_ptr: layout::CMDLINE_GPA as u32,
            ..header
        },
        ..Default::default()
    };
    // A bzImage says how much it can take; the length is told to an ELF kernel.
    if params.hdr.cmdline_size == 0 {
        params.hdr.cmdline_size = data.cmdline_len;
    }
    if let Some(initrd) = data.initrd {
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
        params.ext_ramdisk_image = (initrd.start >> 32) as u32;
        params.ext_ramdisk_size = (initrd.len >> 32) as u32;
    }
    let map = layout::memory_map(data.memory);
    for (entry, (range, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.len,
            r#type: match kind {
                MemoryKind::Ram => E820_RAM,
                MemoryKind::Reserved => E820_RESERVED,
            },
        };
    }
    params.e820_entries = map.len() as u8;
    params
}

/// Maps the first 4 GiB to themselves by 2 MiB pages.
fn write_identity_map(mem: &GuestMemory) -> Result<(), BootError> {
    const PAGE: u64 = 0x1000;
    const TABLES: u64 = 4;
    let pml4 = layout::PAGE_TABLES_GPA;
    let pdpt = pml4 + PAGE;
    let first_pd = pdpt + PAGE;
    write_obj(mem, pml4, pdpt | PTE_PRESENT_WRITABLE)?;
    let mut entries = Vec::with_capacity(512 * 8);
    for table in 0..TABLES {
        let pd = first_pd + table * PAGE;
        write_obj(mem, pdpt + 8 * table, pd | PTE_PRESENT_WRITABLE)?;
        entries.clear();
        for index in 0..512_u64 {
            let gpa = (table * 512 + index) << 21;
            entries.extend_from_slice(&(gpa | PTE_PRESENT_WRITABLE | PDE_2M).to_le_bytes());
        }
        write(mem, pd, &entries)?;
    }
    Ok(())
}
