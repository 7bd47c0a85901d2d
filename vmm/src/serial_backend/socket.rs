//! A serial port on a listening unix socket, with at most one client.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use devices::Serial;
use rustix::event::PollFlags;

use super::input::{InputQueue, Overrun, SourceEnd};
use super::{Place, SerialBackendError};
use crate::monitor::{QmpAddress, QmpSocket};

/// How long it takes to try again when no client can be accepted (usually for
/// lack of descriptors).
const RETRY_TIME: Duration = Duration::from_millis(100);

/// A listening socket with at most one client. Output that comes while there is
/// none is lost, as on a line with nothing plugged in.
pub struct SocketPlace {
    /// In non-blocking mode.
    listener: UnixListener,
    /// Removes the socket's file when dropped.
    socket: QmpSocket,
    /// The client's stream, for output. A leaf lock, held to copy the descriptor.
    client: Mutex<Option<Arc<UnixStream>>>,
}

impl SocketPlace {
    /// Begins to listen.
    pub fn bind(path: &Path) -> Result<Self, SerialBackendError> {
        let socket = QmpSocket::bind(&QmpAddress::at(path))?;
        let listener = socket
            .listener()
            .map_err(|source| SerialBackendError::System {
                what: "a socket",
                source,
            })?;
        Ok(Self {
            listener: listener.into(),
            socket,
            client: Mutex::new(None),
        })
    }

    pub(super) fn client(&self) -> MutexGuard<'_, Option<Arc<UnixStream>>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Parts with a client, if it is still the one, and wakes whoever reads from
    /// it or writes to it.
    pub(super) fn hang_up(&self, stream: &Arc<UnixStream>) {
        self.client().take_if(|client| Arc::ptr_eq(client, stream));
        // Fails if the client was faster.
        let _ = stream.shutdown(Shutdown::Both);
    }

    /// Accepts one client after another, and gives their bytes to the guest.
    /// What a client sent last reaches the guest even if it has left.
    pub fn serve(&self, serial: &Serial) -> io::Result<()> {
        let mut queue = InputQueue::new(serial, Overrun::Wait);
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => Arc::new(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    queue.wait(self.listener.as_fd(), PollFlags::IN)?;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, path = %self.socket.path().display(), "Cannot accept a serial client");
                    thread::sleep(RETRY_TIME);
                    continue;
                }
            };
            *self.client() = Some(Arc::clone(&stream));
            let served = serve_client(&stream, &mut queue);
            self.hang_up(&stream);
            if let Err(error) = served {
                tracing::debug!(%error, path = %self.socket.path().display(), "Serial client left");
            }
        }
    }
}

/// Reads from a client until it is gone. One that only ceased to send still
/// gets output.
fn serve_client(stream: &UnixStream, queue: &mut InputQueue) -> io::Result<()> {
    if queue.copy(stream)? == SourceEnd::Eof {
        while queue.wait(stream.as_fd(), PollFlags::empty())?.is_empty() {}
    }
    Ok(())
}

impl Place for Arc<SocketPlace> {
    fn put(&mut self, bytes: &[u8]) {
        let client = self.client().clone();
        if let Some(client) = client
            && let Err(error) = (&*client).write_all(bytes)
        {
            tracing::debug!(%error, "Serial client does not read");
            self.hang_up(&client);
        }
    }
}
