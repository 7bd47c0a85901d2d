//! Input on its way to the guest: the bytes that the port has no room for yet,
//! and the commands that a terminal's user gives to diptych among them.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use devices::Serial;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Bytes of input that may wait for the guest.
pub const CAPACITY: usize = 4096;
/// Key that begins a command to diptych on a terminal: Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What becomes of input that the guest does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overrun {
    /// It is lost once [`CAPACITY`] bytes wait, as on a real port. The source is
    /// read all the same, so that commands among the input are heard.
    Lose,
    /// The source is not read until there is room.
    Wait,
}

/// How [`InputQueue::copy`] came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceEnd {
    /// There will be no more input; a socket's client may still read.
    Eof,
    /// The other end is gone.
    HungUp,
}

/// Bytes that wait for one port. Belongs to the thread that reads its input.
pub struct InputQueue<'a> {
    serial: &'a Serial,
    waiting: VecDeque<u8>,
    overrun: Overrun,
    commands: Option<(Escape, &'a dyn Fn())>,
}

impl<'a> InputQueue<'a> {
    /// A queue in front of `serial`; all input is the guest's.
    pub fn new(serial: &'a Serial, overrun: Overrun) -> Self {
        Self {
            serial,
            waiting: VecDeque::new(),
            overrun,
            commands: None,
        }
    }

    /// A queue whose input has Ctrl-A commands; `quit` is called for Ctrl-A x,
    /// whether the guest reads or not.
    pub fn with_commands(serial: &'a Serial, quit: &'a dyn Fn()) -> Self {
        Self {
            commands: Some((Escape::default(), quit)),
            ..Self::new(serial, Overrun::Lose)
        }
    }

    /// Moves bytes from `source` to the guest until they end. Some may still
    /// wait then.
    pub fn copy<S: AsFd>(&mut self, source: &S) -> io::Result<SourceEnd>
    where
        for<'s> &'s S: Read,
    {
        let mut buffer = [0; 256];
        loop {
            let room = CAPACITY - self.waiting.len();
            let wanted = match self.overrun {
                Overrun::Lose => buffer.len(),
                Overrun::Wait => room.min(buffer.len()),
            };
            let interest = if wanted == 0 {
                PollFlags::empty()
            } else {
                PollFlags::IN
            };
            let happened = self.wait(source.as_fd(), interest)?;
            if happened.is_empty() {
                continue;
            }
            if wanted == 0 {
                return Ok(SourceEnd::HungUp);
            }
            let mut source = source;
            match source.read(&mut buffer[..wanted]) {
                Ok(0) if happened.contains(PollFlags::HUP) => return Ok(SourceEnd::HungUp),
                Ok(0) => return Ok(SourceEnd::Eof),
                Ok(len) => self.take(&buffer[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until `source` is ready for one of `interest`, or has failed or
    /// hung up, or the guest may have read; gives the port what it has room for
    /// before and after. Returns what `source` is ready for.
    pub fn wait(&mut self, source: BorrowedFd, interest: PollFlags) -> io::Result<PollFlags> {
        self.offer()?;
        let mut fds = [
            PollFd::from_borrowed_fd(source, interest),
            room(self.serial),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let happened = fds[0].revents();
        if !fds[1].revents().is_empty() {
            self.offer_again()?;
        }
        Ok(happened)
    }

    /// Waits until the guest has taken all that waits.
    pub fn drain(&mut self) -> io::Result<()> {
        self.offer()?;
        while !self.waiting.is_empty() {
            match poll(&mut [room(self.serial)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.offer_again()?;
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        if let Some((escape, quit)) = &mut self.commands
            && escape.filter(&mut bytes)
        {
            quit();
        }
        bytes.truncate(CAPACITY - self.waiting.len());
        self.waiting.extend(bytes);
    }

    fn offer_again(&mut self) -> io::Result<()> {
        // Spurious or not: the port says again if there is no room.
        let _ = self.serial.room_evt().read();
        self.offer()
    }

    /// Gives the port what it has room for. It signals when there is more room
    /// if something is left.
    fn offer(&mut self) -> io::Result<()> {
        while !self.waiting.is_empty() {
            let taken = self.serial.enqueue(self.waiting.make_contiguous())?;
            if taken == 0 {
                break;
            }
            self.waiting.drain(..taken);
        }
        Ok(())
    }
}

/// The port's event as something to poll.
fn room(serial: &Serial) -> PollFd<'_> {
    // SAFETY: the event lives as long as the port, which is borrowed as long as
    // what is returned.
    let fd = unsafe { BorrowedFd::borrow_raw(serial.room_evt().as_raw_fd()) };
    PollFd::from_borrowed_fd(fd, PollFlags::IN)
}

/// Ctrl-A commands of a terminal's user: `x` ends the process, Ctrl-A again is
/// a Ctrl-A for the guest.
#[derive(Default)]
struct Escape {
    begun: bool,
}

impl Escape {
    /// Takes commands out of what was typed; whether one was to quit.
    fn filter(&mut self, typed: &mut Vec<u8>) -> bool {
        let mut quit = false;
        typed.retain(|&key| {
            if std::mem::take(&mut self.begun) {
                quit |= key == b'x';
                key == ESCAPE
            } else {
                self.begun = key == ESCAPE;
                !self.begun
            }
        });
        quit
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn port() -> Serial {
        Serial::new(Box::new(io::sink())).unwrap()
    }

    /// Sends `bytes` and the end to a queue's source.
    fn source(bytes: &[u8]) -> UnixStream {
        let (mut sender, source) = UnixStream::pair().unwrap();
        sender.write_all(bytes).unwrap();
        source
    }

    #[test]
    fn ctrl_a_commands_are_taken_out_of_the_input() {
        let mut escape = Escape::default();
        let mut typed = b"a\x01\x01b\x01".to_vec();
        assert!(!escape.filter(&mut typed));
        assert_eq!(typed, b"a\x01b");
        let mut typed = b"xc".to_vec();
        assert!(escape.filter(&mut typed), "the command spans two reads");
        assert_eq!(typed, b"c");
    }

    #[test]
    fn commands_are_heard_while_the_guest_reads_nothing() {
        let serial = port();
        let quits = Cell::new(0);
        let quit = || quits.set(quits.get() + 1);
        let mut queue = InputQueue::with_commands(&serial, &quit);
        let mut typed = vec![b'.'; 2 * CAPACITY];
        typed.extend(b"\x01x");
        assert_eq!(queue.copy(&source(&typed)).unwrap(), SourceEnd::HungUp);
        assert_eq!(quits.get(), 1);
        assert_eq!(queue.waiting.len(), CAPACITY);
    }

    #[test]
    fn a_source_that_can_wait_loses_nothing() {
        let serial = port();
        let mut queue = InputQueue::new(&serial, Overrun::Wait);
        let (mut sender, source) = UnixStream::pair().unwrap();
        let sent: Vec<u8> = (0..3 * CAPACITY).map(|i| (i % 251) as u8).collect();
        let mut got = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                sender.write_all(&sent).unwrap();
                sender.shutdown(std::net::Shutdown::Write).unwrap();
            });
            let reader = scope.spawn(|| {
                let mut got = Vec::new();
                while got.len() < sent.len() {
                    match read_port(&serial) {
                        Some(byte) => got.push(byte),
                        None => std::thread::yield_now(),
                    }
                }
                got
            });
            assert_eq!(queue.copy(&source).unwrap(), SourceEnd::Eof);
            queue.drain().unwrap();
            got = reader.join().unwrap();
        });
        assert!(got == sent);
    }

    fn read_port(serial: &Serial) -> Option<u8> {
        let mut byte = [0];
        devices::PioDevice::read(serial, 5, &mut byte);
        (byte[0] & 1 != 0).then(|| {
            devices::PioDevice::read(serial, 0, &mut byte);
            byte[0]
        })
    }
}
