//! A connected socket: non-blocking system calls, buffered input, output from
//! several pieces of memory.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::net::{RecvFlags, Shutdown, recv, sockopt};
use smallvec::SmallVec;

use crate::buffer::IoVec;
use crate::runtime::{AsyncFd, Interest, yield_now};

/// Pieces of memory in one system call.
const MAX_SEGMENTS: usize = 256;
/// Bytes that are read ahead.
const INPUT_BUFFER: usize = 128 << 10;
/// What is left of a payload is read to where it belongs if it is no less than
/// this; less comes with what follows it, by one system call.
const DIRECT: usize = 32 << 10;
/// System calls after which others of the loop have a turn: a client that sends, or
/// reads, as fast as we do never makes us wait. About 2 MiB of data.
const CALLS_PER_TURN: u32 = 16;

/// A connected stream socket. Any thread.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Socket {
    /// A socket in non-blocking mode, unix or TCP.
    pub(super) fn new(socket: OwnedFd) -> Self {
        // Only TCP knows these; both are no more than good.
        let _ = sockopt::set_tcp_nodelay(&socket, true);
        let _ = sockopt::set_socket_keepalive(&socket, true);
        Self(socket)
    }

    /// Ends the connection, for whoever uses it on whatever thread.
    pub(super) fn shut_down(&self) {
        // It may have ended already.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Both);
    }

    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let (received, _) = recv(&self.0, into, RecvFlags::empty())?;
        Ok(received)
    }

    fn receive_to(&self, into: &IoVec) -> io::Result<usize> {
        let mut segments = into.to_iovecs();
        let count = segments.len().min(MAX_SEGMENTS);
        // SAFETY: readv writes no more than the first `count` segments, which
        // `into` keeps alive.
        let received = unsafe {
            libc::readv(
                self.0.as_raw_fd(),
                segments.as_mut_ptr(),
                count as libc::c_int,
            )
        };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Sends from `segments`, less the first `skip` bytes; gives the number of
    /// bytes that the kernel took.
    fn send(&self, segments: &[Segment], skip: usize) -> io::Result<usize> {
        let mut iovecs: SmallVec<[libc::iovec; 64]> = SmallVec::new();
        let mut skip = skip;
        for segment in segments {
            if skip >= segment.len() {
                skip -= segment.len();
                continue;
            }
            match segment {
                Segment::Bytes(bytes) => iovecs.push(libc::iovec {
                    iov_base: bytes[skip..].as_ptr().cast_mut().cast(),
                    iov_len: bytes.len() - skip,
                }),
                Segment::Data(data) if skip == 0 => iovecs.extend(data.to_iovecs()),
                Segment::Data(data) => {
                    iovecs.extend(data.slice(skip, data.len() - skip).to_iovecs());
                }
            }
            skip = 0;
            if iovecs.len() >= MAX_SEGMENTS {
                iovecs.truncate(MAX_SEGMENTS);
                break;
            }
        }
        // SAFETY: zeroes are a value of this plain structure (no name, no control
        // data).
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = iovecs.as_mut_ptr();
        message.msg_iovlen = iovecs.len();
        // SAFETY: the kernel only reads what the message points to, which `segments`
        // keeps alive.
        let sent =
            unsafe { libc::sendmsg(self.0.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// A piece of output.
#[derive(Debug)]
pub(super) enum Segment {
    /// Headers and small things.
    Bytes(Vec<u8>),
    /// The content of a buffer.
    Data(IoVec),
}

impl Segment {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Data(data) => data.len(),
        }
    }
}

/// A socket on this thread's loop. The halves are used by one task each.
pub(super) struct Stream {
    socket: AsyncFd<Arc<Socket>>,
    /// Calls since the others had a turn.
    calls: Cell<u32>,
}

impl Stream {
    /// Errors: the loop cannot watch it.
    pub(super) fn new(socket: Arc<Socket>) -> io::Result<Self> {
        Ok(Self {
            socket: AsyncFd::new(socket)?,
            calls: Cell::new(0),
        })
    }

    pub(super) fn socket(&self) -> &Arc<Socket> {
        self.socket.get_ref()
    }

    /// Does `call` as soon as it need not wait, and gives others a turn now and then.
    /// Cancel: what `call` has done is done.
    async fn io<R>(
        &self,
        interest: Interest,
        call: impl FnMut(&Arc<Socket>) -> io::Result<R>,
    ) -> io::Result<R> {
        let calls = self.calls.get() + 1;
        self.calls.set(calls % CALLS_PER_TURN);
        if calls == CALLS_PER_TURN {
            yield_now().await;
        }
        self.socket.io(interest, call).await
    }

    /// Sends all of `segments`. Cancel: a part of it may have been sent.
    pub(super) async fn send_all(&self, segments: &[Segment]) -> io::Result<()> {
        let total: usize = segments.iter().map(Segment::len).sum();
        let mut sent = 0;
        let mut first = 0;
        // Bytes before `first`.
        let mut before = 0;
        while sent < total {
            while first < segments.len() && before + segments[first].len() <= sent {
                before += segments[first].len();
                first += 1;
            }
            let (rest, skip) = (&segments[first..], sent - before);
            let more = self
                .io(Interest::Writable, |socket| socket.send(rest, skip))
                .await?;
            if more == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            sent += more;
        }
        Ok(())
    }
}

/// What was read of a connection and not used yet. Goes with the connection from
/// one thread to another.
pub(super) struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            buffer: vec![0; INPUT_BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    fn take(&mut self, into: &mut [u8]) -> usize {
        let taken = into.len().min(self.end - self.start);
        into[..taken].copy_from_slice(&self.buffer[self.start..self.start + taken]);
        self.start += taken;
        taken
    }

    /// Reads more; `false` at the end of the stream. Only when all was taken.
    async fn refill(&mut self, stream: &Stream) -> io::Result<bool> {
        debug_assert_eq!(self.start, self.end);
        (self.start, self.end) = (0, 0);
        let buffer = &mut self.buffer;
        self.end = stream
            .io(Interest::Readable, |socket| socket.receive(buffer))
            .await?;
        Ok(self.end > 0)
    }

    /// Reads exactly `N` bytes; `None` if the stream ends before the first.
    ///
    /// Errors: `UnexpectedEof` if it ends in between. Cancel: bytes are lost.
    pub(super) async fn array<const N: usize>(
        &mut self,
        stream: &Stream,
    ) -> io::Result<Option<[u8; N]>> {
        let mut bytes = [0; N];
        let mut done = self.take(&mut bytes);
        while done < N {
            if !self.refill(stream).await? {
                if done == 0 {
                    return Ok(None);
                }
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += self.take(&mut bytes[done..]);
        }
        Ok(Some(bytes))
    }

    /// Reads `len` bytes. The caller bounds `len`. Errors, cancel: as
    /// [`array`](Self::array).
    pub(super) async fn bytes(&mut self, stream: &Stream, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut done = self.take(&mut bytes);
        while done < len {
            if !self.refill(stream).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += self.take(&mut bytes[done..]);
        }
        Ok(bytes)
    }

    /// Reads `len` bytes and drops them. Errors, cancel: as [`array`](Self::array).
    pub(super) async fn skip(&mut self, stream: &Stream, len: u64) -> io::Result<()> {
        let mut left = len;
        loop {
            let taken = left.min((self.end - self.start) as u64);
            self.start += taken as usize;
            left -= taken;
            if left == 0 {
                return Ok(());
            }
            if !self.refill(stream).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Fills `into`. Errors, cancel: as [`array`](Self::array).
    pub(super) async fn fill(&mut self, stream: &Stream, into: &IoVec) -> io::Result<()> {
        let len = into.len();
        let mut done = 0;
        loop {
            let taken = (len - done).min(self.end - self.start);
            into.copy_from(done, &self.buffer[self.start..self.start + taken]);
            self.start += taken;
            done += taken;
            if done == len {
                return Ok(());
            }
            if len - done < DIRECT {
                if !self.refill(stream).await? {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                continue;
            }
            let rest = into.slice(done, len - done);
            let received = stream
                .io(Interest::Readable, |socket| socket.receive_to(&rest))
                .await?;
            if received == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += received;
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::pin::pin;

    use futures_util::poll;

    use super::*;
    use crate::runtime::EventLoop;

    #[test]
    fn a_client_that_is_never_waited_for_leaves_others_their_turn() {
        EventLoop::new("test").unwrap().block_on(async {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let socket = Socket::new(OwnedFd::from(ours));
            let stream = Stream::new(Arc::new(socket)).unwrap();
            let mut input = Input::new();
            for _ in 0..CALLS_PER_TURN - 1 {
                theirs.write_all(&[0; 8]).unwrap();
                let mut all = pin!(input.skip(&stream, 8));
                assert!(poll!(&mut all).is_ready());
            }
            theirs.write_all(&[0; 8]).unwrap();
            let mut all = pin!(input.skip(&stream, 8));
            assert!(
                poll!(&mut all).is_pending(),
                "all is there, but not its turn"
            );
            assert!(poll!(&mut all).is_ready());
        });
    }
}
