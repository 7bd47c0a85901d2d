//! From the PVH entry to ring 3, and the way back for what only ring 0 may do.
//!
//! Some hosts run guest ring 0 in an instruction emulator, a microsecond per
//! instruction, and ring 3 natively; there `syscall` and `int` do not work
//! either, but faults do. So everything that can be is a constant of the image
//! (page tables, descriptor tables), ring 0 executes some thirty instructions
//! at boot, and ring 3 asks for the rest with `ud2` at one known address. On
//! hardware all of it is as good as any other way.
//!
//! The program trusts itself: there is one address space, and the whole first
//! 4 GiB are open to ring 3. Rings are for speed here, not for protection.

use core::arch::global_asm;

global_asm!(include_str!("boot.s"), options(att_syntax));

/// What ring 0 can be asked for: addresses of routines in `boot.s`.
#[derive(Clone, Copy)]
pub enum Service {
    /// A byte to an I/O port.
    Out8,
    /// A byte from an I/O port.
    In8,
    /// Sleep until an interrupt has come.
    WaitForInterrupt,
    /// Halt for good.
    Halt,
}

unsafe extern "C" {
    fn gate_call(service: usize, port: u32, value: u32) -> u32;
    static service_out8: u8;
    static service_in8: u8;
    static service_wait: u8;
    static service_halt: u8;
    static image_end: u8;
}

/// Asks ring 0 for a service. Costs a fault, on slow hosts some 10 µs.
fn call(service: Service, port: u16, value: u8) -> u32 {
    let routine = match service {
        Service::Out8 => &raw const service_out8,
        Service::In8 => &raw const service_in8,
        Service::WaitForInterrupt => &raw const service_wait,
        Service::Halt => &raw const service_halt,
    };
    // SAFETY: the routine is one of ring 0's, all of which come back (or halt)
    // with only eax changed; port I/O touches no memory of ours.
    unsafe { gate_call(routine as usize, u32::from(port), u32::from(value)) }
}

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    call(Service::Out8, port, value);
}

/// Reads a byte from an I/O port.
pub fn in8(port: u16) -> u8 {
    call(Service::In8, port, 0) as u8
}

/// Sleeps until an interrupt has come. One that came before, since interrupts
/// were last let in, ends the sleep at once.
pub fn wait_for_interrupt() {
    call(Service::WaitForInterrupt, 0, 0);
}

/// Stops the processor for good.
pub fn halt() -> ! {
    loop {
        call(Service::Halt, 0, 0);
    }
}

/// The first address after the image, its stacks and zeroed memory.
pub fn end_of_image() -> u64 {
    &raw const image_end as u64
}
