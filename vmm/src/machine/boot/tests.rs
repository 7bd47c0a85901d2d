use super::super::memory;
use super::super::test_kernel::{ENTRY, SAY_K, elf, file};
use super::*;
use linux_loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{hvm_modlist_entry, hvm_start_info};
use tempfile::TempPath;

const MEMORY: u64 = 16 * layout::MIB;
const RSDP: u64 = 0xe_0000;
const DEVICE: MmioArgument = MmioArgument {
    gpa: 0xd000_0000,
    gsi: 5,
};

struct Booted {
    mem: std::sync::Arc<GuestMemory>,
    entry: Result<Entry, BootError>,
}

fn boot(kernel: &TempPath, initrd: Option<&TempPath>, protocol: BootProtocol) -> Booted {
    let images = BootImages::open(
        kernel,
        initrd.map(|path| &**path),
        "console=ttyS0 -- init",
        protocol,
    )
    .unwrap();
    let mem = memory::allocate(MEMORY).unwrap();
    let entry = images.load(&mem, MEMORY, RSDP, &[DEVICE]);
    Booted { mem, entry }
}

fn cmdline(mem: &GuestMemory) -> String {
    let mut bytes = vec![0; layout::CMDLINE_CAPACITY];
    mem.read_slice(&mut bytes, GuestAddress(layout::CMDLINE_GPA))
        .unwrap();
    let end = bytes.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(bytes[..end].to_vec()).unwrap()
}

#[test]
fn pvh_tells_of_command_line_initrd_memory_and_acpi() {
    let initrd = file(&[0xab; 5000]);
    let booted = boot(&elf(SAY_K, true), Some(&initrd), BootProtocol::Auto);
    assert_eq!(
        booted.entry.unwrap(),
        Entry::Pvh {
            entry: ENTRY as u32
        }
    );
    let info: hvm_start_info = booted
        .mem
        .read_obj(GuestAddress(layout::PVH_START_INFO_GPA))
        .unwrap();
    assert_eq!(info.magic, 0x336e_c578);
    assert_eq!((info.rsdp_paddr, info.nr_modules), (RSDP, 1));
    assert_eq!(info.cmdline_paddr, layout::CMDLINE_GPA);
    assert_eq!(
        info.memmap_entries as usize,
        layout::memory_map(MEMORY).len()
    );
    let module: hvm_modlist_entry = booted
        .mem
        .read_obj(GuestAddress(info.modlist_paddr))
        .unwrap();
    assert_eq!(module.size, 5000);
    assert_eq!(module.paddr, MEMORY - 8192, "as high as it fits, on a page");
    let byte: u8 = booted
        .mem
        .read_obj(GuestAddress(module.paddr + 4999))
        .unwrap();
    assert_eq!(byte, 0xab);
    assert_eq!(
        cmdline(&booted.mem),
        "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 -- init"
    );
}

#[test]
fn the_zero_page_tells_a_64_bit_kernel_the_same() {
    let initrd = file(&[1; 100]);
    let booted = boot(&elf(SAY_K, false), Some(&initrd), BootProtocol::Auto);
    assert_eq!(booted.entry.unwrap(), Entry::Linux64 { entry: ENTRY });
    let params: boot_params = booted
        .mem
        .read_obj(GuestAddress(layout::ZERO_PAGE_GPA))
        .unwrap();
    assert_eq!({ params.acpi_rsdp_addr }, RSDP);
    let header = params.hdr;
    assert_eq!({ header.cmd_line_ptr }, layout::CMDLINE_GPA as u32);
    assert_eq!({ header.ramdisk_size }, 100);
    assert_eq!({ header.ramdisk_image }, (MEMORY - 4096) as u32);
    assert_eq!(
        usize::from(params.e820_entries),
        layout::memory_map(MEMORY).len()
    );
    let last = params.e820_table[usize::from(params.e820_entries) - 1];
    assert_eq!({ last.addr } + { last.size }, MEMORY);
    // The identity map covers the entry: third 2 MiB page of the first table.
    let pd = layout::PAGE_TABLES_GPA + 0x2000;
    let entry: u64 = booted.mem.read_obj(GuestAddress(pd + 8 * 2)).unwrap();
    assert_eq!(entry, 0x40_0083);
}

#[test]
fn a_kernel_without_the_pvh_note_cannot_be_entered_by_it() {
    let booted = boot(&elf(SAY_K, false), None, BootProtocol::Pvh);
    assert!(matches!(booted.entry, Err(BootError::NoPvhEntry { .. })));
}

#[test]
fn what_is_no_kernel_is_refused_with_a_reason() {
    let mut wrong_machine = std::fs::read(elf(SAY_K, true)).unwrap();
    wrong_machine[18] = 183;
    let mut bad_segments = std::fs::read(elf(SAY_K, true)).unwrap();
    bad_segments[54] = 1;
    for content in [&b""[..], b"#!/bin/sh\n", &wrong_machine, &bad_segments] {
        let booted = boot(&file(content), None, BootProtocol::Auto);
        let error = booted.entry.unwrap_err();
        assert!(matches!(error, BootError::NotAKernel { .. }), "{error}");
        assert!(error.to_string().contains("bzImage"));
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_remedy() {
    let big = file(&vec![0; (MEMORY - layout::HIGH_RAM_GPA) as usize]);
    let booted = boot(&elf(SAY_K, true), Some(&big), BootProtocol::Auto);
    let error = booted.entry.unwrap_err();
    assert!(matches!(error, BootError::InitrdTooBig { .. }));
    assert!(error.to_string().contains("--memory"));

    let huge = elf(&vec![0x90; MEMORY as usize], true);
    let booted = boot(&huge, None, BootProtocol::Auto);
    assert!(matches!(booted.entry, Err(BootError::KernelTooBig { .. })));
}

#[test]
fn a_fifo_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU);
    rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
    let error = BootImages::open(&path, None, "", BootProtocol::Auto).unwrap_err();
    assert!(matches!(error, BootError::NotAFile { .. }), "{error}");
}

#[test]
fn a_directory_or_nothing_is_no_kernel() {
    let open = |path: &str| BootImages::open(Path::new(path), None, "", BootProtocol::Auto);
    assert!(matches!(open("/").unwrap_err(), BootError::NotAFile { .. }));
    assert!(matches!(
        open("/no/such/kernel").unwrap_err(),
        BootError::Read { .. }
    ));
}
