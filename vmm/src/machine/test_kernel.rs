//! Tiny kernels for tests: ELF files around a few bytes of machine code that
//! mean the same in 32- and 64-bit mode.

use std::io::Write;

use tempfile::TempPath;

/// Where the code is loaded and entered.
pub const ENTRY: u64 = 0x10_0000;
/// Counted up by [`COUNT`], 32 bits.
pub const COUNTER_GPA: u64 = 0x20_0000;

/// `mov dx, 0x3f8; mov al, 'k'; out dx, al`.
pub const SAY_K: &[u8] = b"\x66\xba\xf8\x03\xb0k\xee";
/// `mov dx, 0x600; mov al, S5 | SLP_EN; out dx, al`, then `hlt` for ever.
pub const POWER_OFF: &[u8] = b"\x66\xba\x00\x06\xb0\x34\xee\xf4\xeb\xfd";
/// `mov al, 0xfe; out 0x64, al`, then `hlt` for ever.
pub const RESET: &[u8] = b"\xb0\xfe\xe6\x64\xf4\xeb\xfd";
/// `ud2` without an IDT. (A limit of 0 is what both entries start with.)
pub const CRASH: &[u8] = b"\x0f\x0b";
/// `mov edi, COUNTER_GPA`, then `add dword ptr [edi], 1` for ever (32-bit mode).
pub const COUNT: &[u8] = b"\xbf\x00\x00\x20\x00\x83\x07\x01\xeb\xfb";

/// An ELF kernel of `code`, with a PVH note if asked for.
pub fn elf(code: &[u8], pvh: bool) -> TempPath {
    const CODE_OFFSET: usize = 0x1000;
    const NOTE_OFFSET: usize = 0x200;
    let mut image = vec![0; CODE_OFFSET];
    let mut note = Vec::new();
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend((ENTRY as u32).to_le_bytes());
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    header.extend([2_u16, 62].map(u16::to_le_bytes).concat());
    header.extend(1_u32.to_le_bytes());
    header.extend([ENTRY, 64, 0].map(u64::to_le_bytes).concat());
    header.extend(0_u32.to_le_bytes());
    let segments = if pvh { 2_u16 } else { 1 };
    header.extend(
        [64_u16, 56, segments, 0, 0, 0]
            .map(u16::to_le_bytes)
            .concat(),
    );
    let mut segment = |kind: u32, offset: usize, gpa: u64, len: usize| {
        header.extend([kind, 5].map(u32::to_le_bytes).concat());
        let words = [offset as u64, gpa, gpa, len as u64, len as u64, 4];
        header.extend(words.map(u64::to_le_bytes).concat());
    };
    segment(1, CODE_OFFSET, ENTRY, code.len());
    segment(4, NOTE_OFFSET, 0, note.len());
    image[..header.len()].copy_from_slice(&header);
    image[NOTE_OFFSET..NOTE_OFFSET + note.len()].copy_from_slice(&note);
    image.extend_from_slice(code);
    file(&image)
}

/// A temporary file.
pub fn file(content: &[u8]) -> TempPath {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    file.into_temp_path()
}
