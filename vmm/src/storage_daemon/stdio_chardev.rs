//! `--chardev stdio`: stdin and stdout as the connection of one monitor client.
//!
//! They may be files, pipes or a terminal that others share, on which neither epoll nor
//! non-blocking I/O can be relied on. So two threads carry bytes between them and a
//! socket; what they hold is bounded by the socket's buffers.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

/// Bytes carried at once.
const CHUNK: usize = 16 << 10;
/// How long the last replies may take to be read at the end.
const LAST_TIME: Duration = Duration::from_millis(200);

/// Tells when stdout has taken everything.
pub(super) struct Said(Receiver<()>);

impl Said {
    /// Waits until everything has been written that came before the connection ended,
    /// but not for a stdout that takes nothing. Blocks.
    pub(super) fn wait(self) {
        // Too late, or the thread is gone: nothing can be done about either.
        let _ = self.0.recv_timeout(LAST_TIME);
    }
}

/// The client at stdin and stdout. Once per process.
pub(super) fn connect() -> io::Result<(UnixStream, Said)> {
    let (ours, theirs) = UnixStream::pair()?;
    let sender = theirs.try_clone()?;
    let (told, said) = channel();
    thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            // The end of either side is the end of it.
            let _ = carry(&mut io::stdin().lock(), &mut &sender);
            let _ = sender.shutdown(Shutdown::Write);
        })?;
    thread::Builder::new()
        .name("stdout".to_owned())
        .spawn(move || {
            if carry(&mut &theirs, &mut io::stdout().lock()).is_err() {
                // Nobody reads any more: the session ends.
                let _ = theirs.shutdown(Shutdown::Both);
            }
            let _ = told.send(());
        })?;
    Ok((ours, Said(said)))
}

/// Carries bytes as they come, to the end.
fn carry(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(len) => {
                to.write_all(chunk.get(..len).unwrap_or_default())?;
                to.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
