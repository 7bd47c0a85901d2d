//! Where the guest's serial port leads: terminal, file, socket, nowhere.
//!
//! The guest's bytes go through a bounded queue to a thread that writes them,
//! so that a slow terminal slows the guest down only a little and a stopped one
//! never holds it. Input comes on a thread of its own ([`input`]), for a socket
//! together with its clients ([`socket`]). The port itself is in `devices`.

mod input;
mod socket;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use devices::Serial;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::config::SerialSpec;
use crate::monitor::SocketError;
use crate::terminal::RawTerminal;
use input::{InputQueue, Overrun};
use socket::SocketPlace;

/// Bytes of output that may wait.
const QUEUE_CAPACITY: usize = 64 * 1024;
/// How long the guest waits for room before output is lost: once, then not at
/// all until whoever reads goes on.
const STALL_LIMIT: Duration = Duration::from_secs(1);

/// Why there is no place for the serial port.
#[derive(Debug, thiserror::Error)]
pub enum SerialBackendError {
    /// The socket cannot be had.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The file cannot be had.
    #[error("Cannot lead the serial port to file '{}'; check the path and its permissions", .path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A FIFO whose other end nobody has open.
    #[error("Cannot lead the serial port to '{}': it is a FIFO that nobody reads; start its reader first", .path.display())]
    NoReader {
        /// Its path.
        path: PathBuf,
    },
    /// The terminal or a thread cannot be had.
    #[error("Cannot lead the serial port to {what}")]
    System {
        /// What it was.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The place a serial port leads to. Dropping it gives a terminal back.
pub struct SerialBackend {
    output: Arc<OutputQueue>,
    input: Option<Input>,
    terminal: Option<RawTerminal>,
}

/// Where input will come from.
enum Input {
    Stdin { terminal: bool },
    Socket(Arc<SocketPlace>),
}

impl SerialBackend {
    /// Opens the place and starts to write there.
    ///
    /// Errors: it cannot be had.
    pub fn open(spec: &SerialSpec) -> Result<Self, SerialBackendError> {
        let output = Arc::new(OutputQueue::default());
        let system = |what| move |source| SerialBackendError::System { what, source };
        let mut terminal = None;
        let (place, input): (Box<dyn Place>, _) = match spec {
            SerialSpec::Null => (Box::new(Nowhere), None),
            SerialSpec::Stdio => {
                let stdout = io::stdout()
                    .as_fd()
                    .try_clone_to_owned()
                    .map_err(system("stdout"))?;
                terminal = RawTerminal::enter().map_err(system("the terminal"))?;
                let input = Input::Stdin {
                    terminal: terminal.is_some(),
                };
                (Box::new(FilePlace::new(File::from(stdout))), Some(input))
            }
            SerialSpec::File(path) => (Box::new(FilePlace::new(open_file(path)?)), None),
            SerialSpec::Unix(path) => {
                let socket = Arc::new(SocketPlace::bind(path)?);
                (Box::new(Arc::clone(&socket)), Some(Input::Socket(socket)))
            }
        };
        let queue = Arc::clone(&output);
        thread::Builder::new()
            .name("serial-out".to_owned())
            .spawn(move || queue.write_out(place))
            .map_err(system("a thread"))?;
        Ok(Self {
            output,
            input,
            terminal,
        })
    }

    /// The port's sink, to be written on vCPU threads.
    pub fn sink(&self) -> Box<dyn Write + Send> {
        Box::new(Sink(Arc::clone(&self.output)))
    }

    /// Starts to read input for `serial`. `quit` is called, on another thread,
    /// when the user of a terminal wants to end the process (Ctrl-A x).
    pub fn start_input(
        &mut self,
        serial: Arc<Serial>,
        quit: impl Fn() + Send + 'static,
    ) -> Result<(), SerialBackendError> {
        let Some(input) = self.input.take() else {
            return Ok(());
        };
        thread::Builder::new()
            .name("serial-in".to_owned())
            .spawn(move || {
                let ended = match input {
                    Input::Stdin { terminal } => read_stdin(&serial, terminal, &quit),
                    Input::Socket(socket) => socket.serve(&serial),
                };
                if let Err(error) = ended {
                    tracing::warn!(%error, "Serial port gets no more input");
                }
            })
            .map(drop)
            .map_err(|source| SerialBackendError::System {
                what: "a thread",
                source,
            })
    }

    /// Waits until what the guest has said is written, `limit` at the longest.
    pub fn flush(&self, limit: Duration) {
        self.output.flush(limit);
    }
}

impl Drop for SerialBackend {
    fn drop(&mut self) {
        self.flush(STALL_LIMIT);
        self.terminal = None;
    }
}

/// Bytes on their way from vCPU threads to the thread that writes them.
#[derive(Default)]
struct OutputQueue {
    /// A leaf lock, held to move bytes only.
    state: Mutex<OutputState>,
    /// There are bytes, for the writer.
    filled: Condvar,
    /// There is room, or all is written, for vCPUs and `flush`.
    emptied: Condvar,
}

#[derive(Default)]
struct OutputState {
    bytes: VecDeque<u8>,
    /// The writer is writing bytes that are in the queue no more.
    writing: bool,
    /// The writer made no progress for `STALL_LIMIT`.
    stalled: bool,
}

impl OutputQueue {
    fn lock(&self) -> MutexGuard<'_, OutputState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues bytes; `WouldBlock` if nobody takes them.
    fn push(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        if state.bytes.len() >= QUEUE_CAPACITY && !state.stalled {
            let full = |state: &mut OutputState| state.bytes.len() >= QUEUE_CAPACITY;
            let (waited, timeout) = self
                .emptied
                .wait_timeout_while(state, STALL_LIMIT, full)
                .unwrap_or_else(PoisonError::into_inner);
            state = waited;
            state.stalled = timeout.timed_out();
        }
        let room = QUEUE_CAPACITY.saturating_sub(state.bytes.len());
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = room.min(bytes.len());
        state.bytes.extend(&bytes[..taken]);
        drop(state);
        self.filled.notify_one();
        Ok(taken)
    }

    /// The writer: moves bytes to `place` for ever.
    fn write_out(&self, mut place: Box<dyn Place>) {
        let mut chunk = Vec::new();
        loop {
            let mut state = self.lock();
            state.writing = false;
            if state.bytes.is_empty() {
                self.emptied.notify_all();
            }
            while state.bytes.is_empty() {
                state = self
                    .filled
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            chunk.clear();
            chunk.extend(state.bytes.drain(..));
            state.writing = true;
            state.stalled = false;
            drop(state);
            self.emptied.notify_all();
            place.put(&chunk);
        }
    }

    fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.writing || !state.bytes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            (state, _) = self
                .emptied
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A vCPU's end of the queue.
struct Sink(Arc<OutputQueue>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where bytes end up. Writing may block; failures are the place's to report.
trait Place: Send {
    fn put(&mut self, bytes: &[u8]);
}

struct Nowhere;

impl Place for Nowhere {
    fn put(&mut self, _: &[u8]) {}
}

/// A file, or whatever stdout is.
struct FilePlace {
    file: File,
    /// The last write failed: said once, until one succeeds.
    failing: bool,
}

impl FilePlace {
    fn new(file: File) -> Self {
        Self {
            file,
            failing: false,
        }
    }
}

impl Place for FilePlace {
    fn put(&mut self, bytes: &[u8]) {
        match self.file.write_all(bytes) {
            Ok(()) => self.failing = false,
            Err(error) if !self.failing => {
                self.failing = true;
                tracing::warn!(%error, "Serial port loses output");
            }
            Err(_) => {}
        }
    }
}

/// Opens a file for output. A FIFO is not waited for.
fn open_file(path: &Path) -> Result<File, SerialBackendError> {
    let failed = |source: io::Error| SerialBackendError::Open {
        path: path.to_owned(),
        source,
    };
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENXIO) => SerialBackendError::NoReader {
                path: path.to_owned(),
            },
            _ => failed(source),
        })?;
    // Writing may wait: it has a thread of its own.
    fcntl_getfl(&file)
        .and_then(|flags| fcntl_setfl(&file, flags - OFlags::NONBLOCK))
        .map_err(|error| failed(error.into()))?;
    Ok(file)
}

/// Gives what comes on stdin to the guest. At a terminal, Ctrl-A commands are
/// heard whatever the guest does; a pipe is not read faster than the guest does.
fn read_stdin(serial: &Serial, terminal: bool, quit: &dyn Fn()) -> io::Result<()> {
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut queue = if terminal {
        InputQueue::with_commands(serial, quit)
    } else {
        InputQueue::new(serial, Overrun::Wait)
    };
    queue.copy(&stdin)?;
    queue.drain()
}
