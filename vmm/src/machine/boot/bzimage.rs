//! bzImage files: what distributions ship. They unpack themselves.

use std::io::{Seek, SeekFrom};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress};

use super::super::layout;
use super::super::memory::GuestMemory;
use super::{BootError, Loaded, LoadedEntry, NamedFile, not_a_kernel, read_up_to};

/// Offset of the setup header in the file.
const HEADER_OFFSET: u64 = 0x1f1;
/// First version of the boot protocol with a 64-bit entry (Linux 3.8).
const FIRST_64_BIT_VERSION: u16 = 0x020c;
/// `xloadflags`: there is a 64-bit entry, 0x200 behind the load address.
const XLF_KERNEL_64: u16 = 1;
/// Offset of that entry.
const ENTRY_64_OFFSET: u64 = 0x200;

/// Loads the protected-mode part of a bzImage, with room to unpack itself.
pub(super) fn load(
    kernel: &NamedFile,
    mem: &GuestMemory,
    memory: u64,
) -> Result<Loaded, BootError> {
    let mut file = &kernel.file;
    let mut header = setup_header::default();
    file.seek(SeekFrom::Start(HEADER_OFFSET))
        .and_then(|_| read_up_to(&mut file, header.as_mut_slice()))
        .map_err(|source| kernel.read_error(source))?;
    if header.version < FIRST_64_BIT_VERSION || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(not_a_kernel(kernel, "a bzImage without a 64-bit entry"));
    }

    let load_gpa = load_address(&header, layout::low_memory_end(memory)).ok_or_else(|| {
        BootError::KernelTooBig {
            path: kernel.path.clone(),
            memory,
        }
    })?;
    let result = BzImage::load(mem, Some(GuestAddress(load_gpa)), &mut file, None)
        .map_err(|error| not_a_kernel(kernel, error))?;
    let header = result
        .setup_header
        .ok_or_else(|| not_a_kernel(kernel, "a bzImage without a setup header"))?;
    Ok(Loaded {
        kernel_end: result
            .kernel_end
            .max(load_gpa + u64::from(header.init_size)),
        initrd_limit: u64::from(header.initrd_addr_max).saturating_add(1),
        entry: LoadedEntry::Linux64 {
            entry: load_gpa + ENTRY_64_OFFSET,
            header,
        },
    })
}

/// Where to load the kernel so that `init_size` bytes from there are RAM: at
/// its preferred address, or lower if it can be moved.
fn load_address(header: &setup_header, low_memory_end: u64) -> Option<u64> {
    let fits = |gpa: u64| {
        gpa >= layout::HIGH_RAM_GPA
            && gpa
                .checked_add(u64::from(header.init_size))
                .is_some_and(|end| end <= low_memory_end)
    };
    let preferred = header.pref_address;
    if fits(preferred) {
        return Some(preferred);
    }
    let alignment = u64::from(header.kernel_alignment.max(0x1000));
    let lowest = layout::HIGH_RAM_GPA.next_multiple_of(alignment);
    (header.relocatable_kernel != 0 && fits(lowest)).then_some(lowest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(relocatable: u8) -> setup_header {
        setup_header {
            pref_address: 16 * layout::MIB,
            init_size: 32 * layout::MIB as u32,
            kernel_alignment: 2 * layout::MIB as u32,
            relocatable_kernel: relocatable,
            ..Default::default()
        }
    }

    #[test]
    fn a_kernel_goes_where_it_prefers_to_be() {
        assert_eq!(
            load_address(&header(1), 128 * layout::MIB),
            Some(16 * layout::MIB)
        );
    }

    #[test]
    fn a_relocatable_kernel_moves_down_when_memory_is_short() {
        assert_eq!(
            load_address(&header(1), 40 * layout::MIB),
            Some(2 * layout::MIB)
        );
        assert_eq!(load_address(&header(0), 40 * layout::MIB), None);
        assert_eq!(load_address(&header(1), 33 * layout::MIB), None);
    }
}
