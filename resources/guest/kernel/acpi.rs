//! The way to power the machine off: ACPI's sleep control register, as the
//! tables of a hardware-reduced machine name it (ACPI 6.5 §5.2.9, §4.8.3.7).

use core::slice;

/// All tables are looked for below, where everything is mapped.
const MAPPED_END: u64 = 1 << 32;
const HEADER_BYTES: usize = 36;
const TABLE_MAX_BYTES: usize = 1 << 16;
/// Offset of SLEEP_CONTROL_REG in the FADT.
const SLEEP_CONTROL_REG: usize = 244;
const SYSTEM_IO: u8 = 1;

/// The I/O port of the sleep control register, by the tables that the RSDP at
/// `rsdp` leads to; `None` if they name none.
///
/// # Safety
///
/// `rsdp` is 0, or what the VMM handed over as the RSDP's address.
pub unsafe fn sleep_control_port(rsdp: u64) -> Option<u16> {
    // SAFETY: by the contract; so are the addresses that the tables hold.
    unsafe {
        let pointer = bytes(rsdp, 36)?;
        if pointer.first_chunk() != Some(b"RSD PTR ") {
            return None;
        }
        let xsdt = table(u64_at(pointer, 24)?, b"XSDT")?;
        let (entries, _) = xsdt.get(HEADER_BYTES..)?.as_chunks::<8>();
        let fadt = entries
            .iter()
            .find_map(|entry| table(u64::from_le_bytes(*entry), b"FACP"))?;
        let register = fadt.get(SLEEP_CONTROL_REG..SLEEP_CONTROL_REG + 12)?;
        let port = u64_at(register, 4)?;
        if register[0] != SYSTEM_IO || port == 0 {
            return None;
        }
        u16::try_from(port).ok()
    }
}

/// The table at `address`, if it is of this kind.
///
/// # Safety
///
/// There is a table.
unsafe fn table(address: u64, signature: &[u8; 4]) -> Option<&'static [u8]> {
    // SAFETY: by the contract.
    let header = unsafe { bytes(address, HEADER_BYTES) }?;
    if header.first_chunk() != Some(signature) {
        return None;
    }
    let len = u32::from_le_bytes(*header.get(4..)?.first_chunk()?) as usize;
    if !(HEADER_BYTES..=TABLE_MAX_BYTES).contains(&len) {
        return None;
    }
    // SAFETY: the header says how long the table is.
    unsafe { bytes(address, len) }
}

/// # Safety
///
/// Nobody writes this memory.
unsafe fn bytes(address: u64, len: usize) -> Option<&'static [u8]> {
    let end = address.checked_add(len as u64)?;
    if address == 0 || end > MAPPED_END {
        return None;
    }
    // SAFETY: below 4 GiB everything is mapped; the rest is the contract.
    Some(unsafe { slice::from_raw_parts(address as *const u8, len) })
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}
