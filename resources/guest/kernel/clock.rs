//! Time, from the time stamp counter.

use core::arch::x86_64::{__cpuid, _mm_pause, _rdtsc};

/// Converts the counter to nanoseconds.
#[derive(Clone, Copy)]
pub struct Clock {
    /// Frequency in kHz; 0 if nobody knows it and 1 GHz was assumed.
    pub khz: u64,
    /// Nanoseconds per tick, times 2^32.
    scale: u64,
    start: u64,
}

impl Clock {
    /// A clock that starts now. `khz` is what the command line says, or 0.
    pub fn new(khz: u64) -> Self {
        let khz = if khz == 0 { ask_processor() } else { khz };
        let assumed = if khz == 0 { 1_000_000 } else { khz };
        Self {
            khz,
            scale: (1_000_000u64 << 32) / assumed,
            start: ticks(),
        }
    }

    /// Nanoseconds since the clock was made.
    pub fn now_ns(&self) -> u64 {
        self.span_ns(ticks().wrapping_sub(self.start))
    }

    fn span_ns(&self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.scale)) >> 32) as u64
    }
}

fn ticks() -> u64 {
    // SAFETY: every x86_64 processor has the counter, and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// Tells the processor that this is a loop that waits.
pub fn relax() {
    _mm_pause();
}

/// The frequency in kHz that the hypervisor or the processor names, or 0.
fn ask_processor() -> u64 {
    const HYPERVISOR: u32 = 0x4000_0000;
    // The timing leaf that KVM and others share.
    if __cpuid(1).ecx & 1 << 31 != 0 && __cpuid(HYPERVISOR).eax >= HYPERVISOR + 0x10 {
        let khz = __cpuid(HYPERVISOR + 0x10).eax;
        if khz != 0 {
            return u64::from(khz);
        }
    }
    let last = __cpuid(0).eax;
    if last >= 0x15 {
        let crystal = __cpuid(0x15);
        if crystal.eax != 0 && crystal.ebx != 0 && crystal.ecx != 0 {
            let hz = u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax);
            return hz / 1000;
        }
    }
    if last >= 0x16 {
        return u64::from(__cpuid(0x16).eax & 0xffff) * 1000;
    }
    0
}
