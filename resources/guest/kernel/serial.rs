//! The serial port: for a few bytes at the end, no console.

use core::fmt;

use crate::boot::{in8, out8};

const COM1: u16 = 0x3f8;
const FIFO_CONTROL: u16 = COM1 + 2;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// What a 16550 takes without being asked again.
const FIFO_BYTES: usize = 16;

/// The first serial port, polled.
pub struct Serial {
    room: usize,
}

impl Serial {
    /// Switches the port's FIFO on.
    pub fn new() -> Self {
        out8(FIFO_CONTROL, 1);
        Self { room: 0 }
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.room == 0 {
                // Bounded: a port that is never ready must not keep the guest
                // from ending.
                for _ in 0..1000 {
                    if in8(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                        break;
                    }
                }
                self.room = FIFO_BYTES;
            }
            out8(COM1, byte);
            self.room -= 1;
        }
        Ok(())
    }
}
