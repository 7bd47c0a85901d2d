//! vmlinux files: x86-64 ELF, entered by PVH where they have its note.

use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, Error as LoaderError, KernelLoader};

use super::super::layout;
use super::super::memory::GuestMemory;
use super::{BootError, BootProtocol, Loaded, LoadedEntry, NamedFile, linux64, not_a_kernel};

/// `EI_CLASS` of 64-bit files.
const ELFCLASS64: u8 = 2;
/// `e_machine` of x86-64.
const EM_X86_64: u16 = 62;

/// Loads the segments of an ELF kernel, of which `head` is the beginning, and
/// chooses its entry.
pub(super) fn load(
    kernel: &NamedFile,
    head: &[u8],
    mem: &GuestMemory,
    memory: u64,
    protocol: BootProtocol,
) -> Result<Loaded, BootError> {
    if head[4] != ELFCLASS64 || u16::from_le_bytes([head[18], head[19]]) != EM_X86_64 {
        return Err(not_a_kernel(kernel, "an ELF file, but not for x86-64"));
    }
    let mut file = &kernel.file;
    let result = Elf::load(mem, None, &mut file, None).map_err(|error| match error {
        LoaderError::Elf(linux_loader::loader::elf::Error::ReadKernelImage) => {
            BootError::KernelTooBig {
                path: kernel.path.clone(),
                memory,
            }
        }
        other => not_a_kernel(kernel, other),
    })?;
    let too_big = || BootError::KernelTooBig {
        path: kernel.path.clone(),
        memory,
    };
    // The loader copies what the file holds; what the kernel wants zeroed
    // behind it has to be there too.
    if result.kernel_end > layout::low_memory_end(memory) {
        return Err(too_big());
    }
    let pvh_entry = match result.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => u32::try_from(entry.0).ok(),
        _ => None,
    };
    let entry = match (protocol, pvh_entry) {
        (BootProtocol::Pvh | BootProtocol::Auto, Some(entry)) => LoadedEntry::Pvh { entry },
        (BootProtocol::Pvh, None) => {
            return Err(BootError::NoPvhEntry {
                path: kernel.path.clone(),
            });
        }
        (BootProtocol::Auto | BootProtocol::Linux64, _) => LoadedEntry::Linux64 {
            entry: result.kernel_load.0,
            header: header(),
        },
    };
    Ok(Loaded {
        kernel_end: result.kernel_end,
        initrd_limit: layout::HOLE_START_GPA,
        entry,
    })
}

/// The setup header that a boot loader makes up for a kernel that has none
/// (Linux, Documentation/arch/x86/boot.rst).
fn header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: linux64::HEADER_MAGIC,
        version: 0x020f,
        loadflags: linux64::LOADED_HIGH,
        kernel_alignment: 0x0100_0000,
        cmdline_size: layout::CMDLINE_CAPACITY as u32 - 1,
        ..Default::default()
    }
}
