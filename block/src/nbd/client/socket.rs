//! A connected stream socket on this thread's loop: exact reads and writes for
//! the handshake, scatter-gather transfers for requests.
//!
//! What does not live here: addresses (`connect`), and what the bytes mean.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::net::{RecvFlags, SendFlags};
use smallvec::SmallVec;

use crate::buffer::IoVec;
use crate::runtime::{AsyncFd, Interest};

/// Segments that the kernel takes in one call (`UIO_MAXIOV`).
const MAX_SEGMENTS: usize = 1024;
/// Bytes that are read ahead: replies without data are 16 to 32.
const READ_AHEAD: usize = 16 << 10;

/// A non-blocking stream socket, watched by this thread's loop.
pub(super) struct Socket {
    fd: AsyncFd<OwnedFd>,
    /// Times that something was received; wraps.
    heard: Cell<u64>,
}

/// What is sent in one go, in order.
pub(super) enum Part {
    /// Bytes of our own.
    Bytes(Vec<u8>),
    /// Somebody's data, sent from where it is.
    Data(IoVec),
}

impl Part {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Data(iov) => iov.len(),
        }
    }
}

impl Socket {
    /// Uses `fd`, a connected stream socket.
    pub(super) fn new(fd: AsyncFd<OwnedFd>) -> Self {
        Self {
            fd,
            heard: Cell::new(0),
        }
    }

    /// A number that changes when something is received.
    pub(super) fn heard(&self) -> u64 {
        self.heard.get()
    }

    /// Waits for something to read, and reads it by `receive`. `Ok(0)`: the peer has
    /// ended.
    async fn hear(&self, receive: impl FnMut(&OwnedFd) -> io::Result<usize>) -> io::Result<usize> {
        let count = self.fd.io(Interest::Readable, receive).await?;
        self.heard.set(self.heard.get().wrapping_add(1));
        Ok(count)
    }

    /// Fills `buffer`. Fails with `UnexpectedEof` if the peer ends before.
    ///
    /// Cancel: what has been read is lost.
    pub(super) async fn read_exact(&self, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let rest = &mut buffer[done..];
            let count = self
                .hear(|fd| Ok(rustix::net::recv(fd, &mut *rest, RecvFlags::empty())?.1))
                .await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += count;
        }
        Ok(())
    }

    /// Sends all of `bytes`. Cancel: a part of them may have been sent.
    pub(super) async fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            done += self
                .fd
                .io(Interest::Writable, |fd| {
                    Ok(rustix::net::send(fd, &bytes[done..], SendFlags::NOSIGNAL)?)
                })
                .await?;
        }
        Ok(())
    }

    /// Sends all `parts`. Cancel: a part of them may have been sent; the kernel
    /// does not use their memory afterwards.
    pub(super) async fn send(&self, parts: &[Part]) -> io::Result<()> {
        let mut at = 0;
        // Bytes of `parts[at]` that have been sent.
        let mut done = 0;
        while at < parts.len() {
            let mut sent = self
                .fd
                .io(Interest::Writable, |fd| {
                    let iovecs = gather(&parts[at..], done);
                    // SAFETY: the segments point into `parts`, which outlive the call.
                    unsafe { send_segments(fd.as_raw_fd(), &iovecs) }
                })
                .await?;
            while at < parts.len() && sent >= parts[at].len() - done {
                sent -= parts[at].len() - done;
                done = 0;
                at += 1;
            }
            done += sent;
        }
        Ok(())
    }

    /// Receives at least one byte into `iov` from byte `done` on, and, behind its
    /// end, into `behind`. `Ok(0)`: the peer has ended.
    async fn receive(&self, iov: &IoVec, done: usize, behind: &mut [u8]) -> io::Result<usize> {
        let rest = iov.slice(done, iov.len() - done);
        let mut iovecs = rest.to_iovecs();
        if iovecs.len() >= MAX_SEGMENTS {
            iovecs.truncate(MAX_SEGMENTS);
        } else {
            iovecs.push(libc::iovec {
                iov_base: behind.as_mut_ptr().cast(),
                iov_len: behind.len(),
            });
        }
        self.hear(|fd| {
            // SAFETY: the segments are those of `rest` and `behind`, which
            // outlive the call and may be written.
            unsafe { receive_segments(fd.as_raw_fd(), &mut iovecs) }
        })
        .await
    }
}

/// The segments of `parts`, less the first `skip` bytes, as far as one call takes
/// them.
fn gather(parts: &[Part], skip: usize) -> SmallVec<[libc::iovec; 16]> {
    let mut iovecs = SmallVec::new();
    let mut skip = skip;
    for part in parts {
        match part {
            Part::Bytes(bytes) => iovecs.push(libc::iovec {
                iov_base: bytes[skip..].as_ptr().cast_mut().cast(),
                iov_len: bytes.len() - skip,
            }),
            Part::Data(iov) if skip == 0 => iovecs.extend(iov.to_iovecs()),
            Part::Data(iov) => iovecs.extend(iov.slice(skip, iov.len() - skip).to_iovecs()),
        }
        skip = 0;
        if iovecs.len() >= MAX_SEGMENTS {
            iovecs.truncate(MAX_SEGMENTS);
            break;
        }
    }
    iovecs
}

/// # Safety
///
/// Each segment must be readable during the call.
unsafe fn send_segments(fd: RawFd, iovecs: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: all zeroes is a message without name, data and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_ptr().cast_mut();
    message.msg_iovlen = iovecs.len() as _;
    // SAFETY: the message and its segments last during the call (caller); sendmsg
    // only reads them.
    let sent = unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// # Safety
///
/// Each segment must be writable during the call.
unsafe fn receive_segments(fd: RawFd, iovecs: &mut [libc::iovec]) -> io::Result<usize> {
    // SAFETY: all zeroes is a message without name, data and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len() as _;
    // SAFETY: the message and its segments last during the call (caller).
    let received = unsafe { libc::recvmsg(fd, &raw mut message, 0) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// Reads a socket with as few system calls as it can: what follows the data of
/// one reply is read with it.
pub(super) struct Reader<'a> {
    socket: &'a Socket,
    ahead: Box<[u8]>,
    /// What of `ahead` has been received and not been given out.
    start: usize,
    end: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(socket: &'a Socket) -> Self {
        Self {
            socket,
            ahead: vec![0; READ_AHEAD].into(),
            start: 0,
            end: 0,
        }
    }

    async fn fill(&mut self) -> io::Result<()> {
        (self.start, self.end) = (0, 0);
        let ahead = &mut self.ahead[..];
        let count = self
            .socket
            .hear(|fd| Ok(rustix::net::recv(fd, &mut *ahead, RecvFlags::empty())?.1))
            .await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.end = count;
        Ok(())
    }

    /// Takes up to `max` bytes of what has been read ahead.
    fn take(&mut self, max: usize) -> &[u8] {
        let count = max.min(self.end - self.start);
        self.start += count;
        &self.ahead[self.start - count..self.start]
    }

    /// Fills `buffer`.
    pub(super) async fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            if self.start == self.end {
                self.fill().await?;
            }
            let bytes = self.take(buffer.len() - done);
            buffer[done..done + bytes.len()].copy_from_slice(bytes);
            done += bytes.len();
        }
        Ok(())
    }

    /// Fills `iov`.
    pub(super) async fn read_into(&mut self, iov: &IoVec) -> io::Result<()> {
        let bytes = self.take(iov.len());
        iov.copy_from(0, bytes);
        let mut done = bytes.len();
        while done < iov.len() {
            // Nothing is left ahead.
            (self.start, self.end) = (0, 0);
            let count = self.socket.receive(iov, done, &mut self.ahead).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let data = count.min(iov.len() - done);
            self.end = count - data;
            done += data;
        }
        Ok(())
    }
}
