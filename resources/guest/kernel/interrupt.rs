//! Interrupts, reduced to what ends a sleep: the local APIC and the I/O APIC,
//! reached from ring 3 through their mapped registers.

use core::ptr;

const IO_APIC: usize = 0xfec0_0000;
const LOCAL_APIC: usize = 0xfee0_0000;
const APIC_ID: usize = LOCAL_APIC + 0x20;
const END_OF_INTERRUPT: usize = LOCAL_APIC + 0xb0;
const SPURIOUS: usize = LOCAL_APIC + 0xf0;
const LOCAL_LINE_0: usize = LOCAL_APIC + 0x350;
const MASKED: u32 = 1 << 16;
/// Any vector past the exceptions; all end in the same `iretq`.
const VECTOR: u32 = 0x40;

fn write(register: usize, value: u32) {
    // SAFETY: an APIC register, mapped uncached and open to ring 3.
    unsafe { ptr::write_volatile(register as *mut u32, value) };
}

fn read(register: usize) -> u32 {
    // SAFETY: as in `write`.
    unsafe { ptr::read_volatile(register as *const u32) }
}

/// Switches the local APIC on, and the old interrupt controller off: KVM lets its
/// line through at start, with vectors that nobody has set.
pub fn enable() {
    write(LOCAL_LINE_0, MASKED);
    write(SPURIOUS, 0x1ff);
}

/// Lets an interrupt line (edge-triggered) through to this processor.
pub fn route(irq: u32) {
    let destination = read(APIC_ID) & 0xff00_0000;
    let entry = 0x10 + 2 * irq;
    write(IO_APIC, entry + 1);
    write(IO_APIC + 0x10, destination);
    write(IO_APIC, entry);
    write(IO_APIC + 0x10, VECTOR);
}

/// Tells the local APIC that the interrupt is dealt with.
pub fn end() {
    write(END_OF_INTERRUPT, 0);
}
