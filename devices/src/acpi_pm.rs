//! Power-off and reset of a hardware-reduced ACPI machine (ACPI 6.5 §4.8.3.7
//! sleep registers, §4.8.3.6 reset register).
//!
//! The tables that point here (FADT, `\_S5`) are the machine's.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::bus::PioDevice;

const SLEEP_CONTROL: u16 = 0;
const SLEEP_STATUS: u16 = 1;
const RESET: u16 = 2;

/// `SLP_EN` of the sleep control register.
const SLP_EN: u8 = 1 << 5;
/// `SLP_TYPx` of the sleep control register: position and width.
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 0b111;

/// The sleep control, sleep status and reset registers, one byte each, in
/// consecutive ports.
pub struct AcpiPm {
    power_off_evt: Arc<EventFd>,
    reset_evt: Arc<EventFd>,
}

impl AcpiPm {
    /// Number of ports.
    pub const PORTS: u16 = 3;
    /// Port of the sleep control register (FADT `SLEEP_CONTROL_REG`), from the
    /// first one.
    pub const SLEEP_CONTROL_OFFSET: u16 = SLEEP_CONTROL;
    /// Port of the sleep status register (FADT `SLEEP_STATUS_REG`).
    pub const SLEEP_STATUS_OFFSET: u16 = SLEEP_STATUS;
    /// Port of the reset register (FADT `RESET_REG`).
    pub const RESET_OFFSET: u16 = RESET;
    /// What the guest writes there (FADT `RESET_VALUE`).
    pub const RESET_VALUE: u8 = 1;
    /// Sleep type of soft-off: the first element of `\_S5`.
    pub const S5_SLEEP_TYPE: u8 = 5;

    /// Registers that signal `power_off_evt` for S5, `reset_evt` for a reset.
    pub fn new(power_off_evt: Arc<EventFd>, reset_evt: Arc<EventFd>) -> Self {
        Self {
            power_off_evt,
            reset_evt,
        }
    }

    fn signal(event: &EventFd, what: &str) {
        if let Err(error) = event.write(1) {
            tracing::error!(%error, "ACPI registers cannot signal a {what}");
        }
    }
}

impl PioDevice for AcpiPm {
    /// All registers read as zero: write-only but for WAK_STS, and this machine
    /// never wakes.
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let [value] = *data else { return };
        match offset {
            SLEEP_CONTROL
                if value & SLP_EN != 0
                    && (value >> SLP_TYP_SHIFT) & SLP_TYP_MASK == Self::S5_SLEEP_TYPE =>
            {
                Self::signal(&self.power_off_evt, "power-off");
            }
            RESET if value == Self::RESET_VALUE => Self::signal(&self.reset_evt, "reset"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_off_needs_its_type_and_the_enable_bit() {
        let event = || Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let (off, reset) = (event(), event());
        let pm = AcpiPm::new(Arc::clone(&off), Arc::clone(&reset));
        let s5 = AcpiPm::S5_SLEEP_TYPE << 2;
        pm.write(0, &[s5]);
        pm.write(0, &[SLP_EN]);
        pm.write(0, &[s5 | SLP_EN, 0]);
        pm.write(1, &[s5 | SLP_EN]);
        pm.write(2, &[0]);
        assert!(off.read().is_err() && reset.read().is_err());
        pm.write(0, &[s5 | SLP_EN]);
        assert_eq!(off.read().unwrap(), 1);
        pm.write(2, &[AcpiPm::RESET_VALUE]);
        assert_eq!(reset.read().unwrap(), 1);
        let mut status = [0xff];
        pm.read(1, &mut status);
        assert_eq!(status, [0]);
    }
}
