//! Signals that end the program, as something to wait for.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use block::runtime::{AsyncFd, Interest};
use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::low_level::{pipe, unregister};

/// The signals that ask the process to end.
pub(crate) const END_SIGNALS: [libc::c_int; 3] = [SIGINT, SIGTERM, SIGHUP];

/// [`END_SIGNALS`]: each is a wish for an orderly end, and none kills
/// the process any more while this exists.
///
/// Belongs to the event loop of the thread that made it.
pub(crate) struct EndSignals {
    receiver: AsyncFd<UnixStream>,
    /// Number of the last one that came. Own synchronisation: stored by the
    /// handler before it writes to the socket.
    last: Arc<AtomicUsize>,
    registered: Vec<SigId>,
}

impl EndSignals {
    /// Begins to listen for the signals.
    ///
    /// Panics: no event loop on this thread.
    pub(crate) fn new() -> io::Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        receiver.set_nonblocking(true)?;
        let mut signals = Self {
            receiver: AsyncFd::new(receiver)?,
            last: Arc::default(),
            registered: Vec::new(),
        };
        for signal in END_SIGNALS {
            let number = usize::try_from(signal).unwrap_or_default();
            let id = flag::register_usize(signal, Arc::clone(&signals.last), number)?;
            signals.registered.push(id);
            let id = pipe::register(signal, sender.try_clone()?)?;
            signals.registered.push(id);
        }
        Ok(signals)
    }

    /// Waits for the next of the signals and gives its number; several at once
    /// may count as one. Cancel: a signal that came meanwhile is found by the
    /// next call.
    pub(crate) async fn next(&self) -> io::Result<u8> {
        let mut bytes = [0; 64];
        self.receiver
            .io(Interest::Readable, |mut stream| stream.read(&mut bytes))
            .await?;
        Ok(self.last.load(Ordering::SeqCst) as u8)
    }
}

impl Drop for EndSignals {
    fn drop(&mut self) {
        for id in self.registered.drain(..) {
            unregister(id);
        }
    }
}
