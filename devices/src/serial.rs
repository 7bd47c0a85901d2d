//! A 16550 serial port (`vm-superio`) on a byte sink.
//!
//! Where the bytes go and come from (terminal, socket, file) is the machine's
//! business.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::PioDevice;
use crate::rate_limit::RateLimit;
use crate::trigger::EventTrigger;

/// Modem control register, and its loopback bit.
const MCR_OFFSET: u8 = 4;
const MCR_LOOP: u8 = 1 << 4;

type Uart = vm_superio::Serial<EventTrigger, NoEvents, Box<dyn Write + Send>>;

struct State {
    uart: Uart,
    /// The guest has the port in loopback: no outside input can enter.
    loopback: bool,
    /// Input was turned away: say when there is room.
    starved: bool,
}

/// A serial port: output goes to a sink byte by byte, input waits in a FIFO of
/// 64 bytes.
///
/// Input is never dropped: [`Self::enqueue`] takes what fits, and
/// [`Self::room_evt`] tells when the rest may be offered again.
pub struct Serial {
    /// Held for one register access or one `enqueue`, hence while one byte goes
    /// to the sink. Taken by vCPU threads and the thread that reads the input.
    state: Mutex<State>,
    interrupt_evt: Arc<EventFd>,
    room_evt: Arc<EventFd>,
    log: RateLimit,
}

impl Serial {
    /// Number of ports.
    pub const PORTS: u16 = 8;

    /// A port that writes the guest's output to `out`.
    ///
    /// `out` is written on vCPU threads: it should buffer, or be quick. A byte
    /// that it refuses (`WouldBlock`, a closed pipe) is lost, as on a line with
    /// nobody listening, and logged.
    ///
    /// # Errors
    ///
    /// If no event descriptor can be made.
    pub fn new(out: Box<dyn Write + Send>) -> io::Result<Self> {
        let interrupt_evt = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let room_evt = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        Ok(Self {
            state: Mutex::new(State {
                uart: vm_superio::Serial::new(EventTrigger(Arc::clone(&interrupt_evt)), out),
                loopback: false,
                starved: false,
            }),
            interrupt_evt,
            room_evt,
            log: RateLimit::new(),
        })
    }

    /// Signalled for each interrupt; edge-triggered (an irqfd).
    pub fn interrupt_evt(&self) -> &Arc<EventFd> {
        &self.interrupt_evt
    }

    /// Signalled when input fits again after [`Self::enqueue`] took less than
    /// it was given.
    pub fn room_evt(&self) -> &Arc<EventFd> {
        &self.room_evt
    }

    /// Gives input to the guest. Returns how many of the bytes were taken; offer
    /// the others again when [`Self::room_evt`] says so.
    ///
    /// # Errors
    ///
    /// If the interrupt cannot be signalled; the bytes are in the FIFO then.
    pub fn enqueue(&self, input: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        let fits = if state.loopback {
            0
        } else {
            state.uart.fifo_capacity().min(input.len())
        };
        state.starved = fits < input.len();
        if fits == 0 {
            return Ok(0);
        }
        match state.uart.enqueue_raw_bytes(&input[..fits]) {
            Ok(taken) => Ok(taken),
            Err(vm_superio::serial::Error::Trigger(error)) => Err(error),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// A machine reset: registers to their initial state, unread input dropped.
    pub fn reset(&self) {
        let mut state = self.lock();
        // Drains the FIFO by its own register, then restores what a driver sets.
        write_register(&mut state, MCR_OFFSET, 0b1000, &self.log);
        write_register(&mut state, 3, 0b11, &self.log);
        while state.uart.read(5) & 1 != 0 {
            state.uart.read(0);
        }
        write_register(&mut state, 1, 0, &self.log);
        self.tell_room(&mut state);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_room(&self, state: &mut State) {
        if state.starved && !state.loopback && state.uart.fifo_capacity() > 0 {
            state.starved = false;
            if let Err(error) = self.room_evt.write(1) {
                tracing::error!(%error, "Serial port cannot ask for input");
            }
        }
    }
}

fn write_register(state: &mut State, offset: u8, value: u8, log: &RateLimit) {
    if offset == MCR_OFFSET {
        state.loopback = value & MCR_LOOP != 0;
    }
    if let Err(error) = state.uart.write(offset, value)
        && let Some(suppressed) = log.allow()
    {
        tracing::warn!(%error, suppressed, "Serial port loses output");
    }
}

impl PioDevice for Serial {
    fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let ([byte], Ok(offset)) = (data, u8::try_from(offset)) else {
            return;
        };
        let mut state = self.lock();
        *byte = state.uart.read(offset);
        self.tell_room(&mut state);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let ([value], Ok(offset)) = (data, u8::try_from(offset)) else {
            return;
        };
        let mut state = self.lock();
        write_register(&mut state, offset, *value, &self.log);
        self.tell_room(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn read(serial: &Serial, offset: u16) -> u8 {
        let mut byte = [0];
        serial.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn output_reaches_the_sink() {
        let sink = Sink::default();
        let serial = Serial::new(Box::new(sink.clone())).unwrap();
        for byte in b"boot\n" {
            serial.write(0, &[*byte]);
        }
        serial.write(0, b"no wide accesses");
        assert_eq!(*sink.0.lock().unwrap(), b"boot\n");
    }

    #[test]
    fn input_beyond_the_fifo_waits_and_none_is_lost() {
        let serial = Serial::new(Box::new(io::sink())).unwrap();
        let input: Vec<u8> = (0..200).collect();
        let mut offered = 0;
        let mut got = Vec::new();
        serial.write(1, &[1]);
        offered += serial.enqueue(&input).unwrap();
        assert!(offered < input.len());
        assert!(serial.interrupt_evt().read().is_ok());
        while got.len() < input.len() {
            while read(&serial, 5) & 1 != 0 {
                got.push(read(&serial, 0));
            }
            if offered < input.len() {
                assert!(serial.room_evt().read().is_ok());
                offered += serial.enqueue(&input[offered..]).unwrap();
            }
        }
        assert_eq!(got, input);
        assert!(serial.room_evt().read().is_err());
    }

    #[test]
    fn input_waits_for_the_end_of_loopback() {
        let serial = Serial::new(Box::new(io::sink())).unwrap();
        serial.write(4, &[MCR_LOOP]);
        assert_eq!(serial.enqueue(b"x").unwrap(), 0);
        assert!(serial.room_evt().read().is_err());
        serial.write(4, &[0]);
        assert!(serial.room_evt().read().is_ok());
        assert_eq!(serial.enqueue(b"x").unwrap(), 1);
        assert_eq!(read(&serial, 0), b'x');
    }

    #[test]
    fn a_reset_drops_unread_input_and_masks_interrupts() {
        let serial = Serial::new(Box::new(io::sink())).unwrap();
        serial.write(1, &[1]);
        serial.enqueue(&[1; 65]).unwrap();
        serial.write(4, &[MCR_LOOP]);
        serial.reset();
        assert_eq!(read(&serial, 5) & 1, 0);
        assert_eq!(read(&serial, 1), 0);
        assert!(serial.room_evt().read().is_ok());
    }
}
