//! The keyboard controller, as far as it resets the machine.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::I8042Device;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::PioDevice;
use crate::trigger::EventTrigger;

/// An i8042 that knows one command: pulse the reset line.
pub struct I8042 {
    /// Held for one register access.
    device: Mutex<I8042Device<EventTrigger>>,
}

impl I8042 {
    /// First port.
    pub const BASE_PORT: u16 = 0x60;
    /// Number of ports.
    pub const PORTS: u16 = 5;

    /// A controller that signals `reset_evt` when the guest wants to be reset.
    pub fn new(reset_evt: Arc<EventFd>) -> Self {
        Self {
            device: Mutex::new(I8042Device::new(EventTrigger(reset_evt))),
        }
    }

    fn command(&self, offset: u8, value: u8) -> io::Result<()> {
        self.device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(offset, value)
    }
}

impl PioDevice for I8042 {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self
                .device
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .read(offset);
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.command(offset, *value)
        {
            tracing::error!(%error, "i8042 cannot signal a reset");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_pulse_resets() {
        let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let i8042 = I8042::new(Arc::clone(&event));
        i8042.write(4, &[0xd1]);
        i8042.write(0, &[0xfe]);
        i8042.write(4, &[0xfe, 0xfe]);
        assert!(event.read().is_err());
        let mut status = [0xff];
        i8042.read(4, &mut status);
        assert_eq!(status, [0], "buffers empty, or a guest waits for ever");
        i8042.write(4, &[0xfe]);
        assert_eq!(event.read().unwrap(), 1);
    }
}
