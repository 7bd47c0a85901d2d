//! What the VMM hands over, and memory to work with.

use core::slice;

use crate::boot::end_of_image;

/// Start information of the PVH boot protocol (Xen's `hvm_start_info`).
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modules: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MemoryMapEntry {
    start: u64,
    len: u64,
    kind: u32,
    reserved: u32,
}

const START_INFO_MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
/// Only what lies below is mapped cached and used.
const LOW_RAM_END: u64 = 0xc000_0000;
const CMDLINE_MAX: usize = 4096;

/// The command line, up to 4096 bytes; empty if there is none, or not in ASCII.
///
/// # Safety
///
/// `start_info` is what the VMM left in ebx.
pub unsafe fn command_line(start_info: u32) -> &'static str {
    // SAFETY: by the contract the structure is there and nobody writes it.
    let info = unsafe { &*(start_info as usize as *const StartInfo) };
    if info.magic != START_INFO_MAGIC || info.cmdline == 0 {
        return "";
    }
    let text = info.cmdline as *const u8;
    let mut len = 0;
    // SAFETY: the VMM ends the text with a zero.
    while len < CMDLINE_MAX && unsafe { text.add(len).read() } != 0 {
        len += 1;
    }
    // SAFETY: these bytes were just read; they lie below the image or above
    // the arena's reach, and nobody writes there.
    let bytes = unsafe { slice::from_raw_parts(text, len) };
    str::from_utf8(bytes).unwrap_or("")
}

/// The address of ACPI's RSDP, 0 if there is none.
///
/// # Safety
///
/// `start_info` is what the VMM left in ebx.
pub unsafe fn rsdp(start_info: u32) -> u64 {
    // SAFETY: as in `command_line`.
    let info = unsafe { &*(start_info as usize as *const StartInfo) };
    if info.magic == START_INFO_MAGIC {
        info.rsdp
    } else {
        0
    }
}

/// Memory that is handed out and never taken back.
pub struct Arena {
    next: u64,
    end: u64,
}

impl Arena {
    /// All the memory after the image, up to the end of the RAM it lies in.
    ///
    /// # Safety
    ///
    /// `start_info` is what the VMM left in ebx. There is one arena only.
    pub unsafe fn new(start_info: u32) -> Self {
        // SAFETY: as in `command_line`.
        let info = unsafe { &*(start_info as usize as *const StartInfo) };
        let next = end_of_image();
        let mut end = next;
        if info.magic == START_INFO_MAGIC && info.version >= 1 {
            for i in 0..info.memory_map_entries as usize {
                // SAFETY: the map has that many entries.
                let entry = unsafe { &*(info.memory_map as *const MemoryMapEntry).add(i) };
                let entry_end = entry.start.saturating_add(entry.len).min(LOW_RAM_END);
                if entry.kind == RAM && entry.start <= next && next < entry_end {
                    end = entry_end;
                }
            }
        }
        Self { next, end }
    }

    /// Zeroed bytes at a page's start; `None` if that many are not left.
    pub fn pages(&mut self, bytes: u64) -> Option<*mut u8> {
        let start = self.next.next_multiple_of(4096);
        let end = start.checked_add(bytes)?;
        if end > self.end {
            return None;
        }
        self.next = end;
        let memory = start as *mut u8;
        // SAFETY: the range is RAM after the image, and is handed out once.
        unsafe { memory.write_bytes(0, bytes as usize) };
        Some(memory)
    }

    /// `len` copies of a value; `None` if memory is short.
    pub fn filled<T: Copy>(&mut self, len: usize, value: T) -> Option<&'static mut [T]> {
        const { assert!(align_of::<T>() <= 4096) };
        let bytes = (len as u64).checked_mul(size_of::<T>() as u64)?;
        let memory: *mut T = self.pages(bytes)?.cast();
        for i in 0..len {
            // SAFETY: `pages` gave that much memory, page-aligned.
            unsafe { memory.add(i).write(value) };
        }
        // SAFETY: all of it was just written, and nobody else has it.
        Some(unsafe { slice::from_raw_parts_mut(memory, len) })
    }
}
