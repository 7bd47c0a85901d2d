//! A client's connection: a stream socket of whatever family.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use rustix::net::{SendFlags, SocketFlags, accept_with, send, sockopt};

/// A connected stream socket, non-blocking.
#[derive(Debug)]
pub(super) struct Connection(OwnedFd);

impl Connection {
    /// The next client of a listening socket.
    pub(super) fn accept(listener: &OwnedFd) -> io::Result<Self> {
        let socket = accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        // Replies are small, and waited for. Unix sockets do not know it.
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        Ok(Self(socket))
    }

    /// A client that is there already.
    pub(super) fn of(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self(stream.into()))
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Read for &Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, buffer)?)
    }
}

impl Write for &Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A client that has gone is an error, not a signal.
        Ok(send(&self.0, bytes, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
