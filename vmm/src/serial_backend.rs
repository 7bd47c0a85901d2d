//! Where the guest's serial port leads: terminal, file, socket, nowhere.
//!
//! The guest's bytes go through a bounded queue to a thread that writes them,
//! so that a slow terminal slows the guest down only a little and a stopped one
//! never holds it. Input comes on a thread of its own. The port itself is in
//! `devices`.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use devices::Serial;
use vmm_sys_util::poll::PollContext;

use crate::config::SerialSpec;
use crate::monitor::{QmpAddress, QmpSocket, SocketError};
use crate::terminal::RawTerminal;

/// Bytes of output that may wait.
const QUEUE_CAPACITY: usize = 64 * 1024;
/// How long the guest waits for room before output is lost: once, then not at
/// all until whoever reads goes on.
const STALL_LIMIT: Duration = Duration::from_secs(1);
/// Key that begins a command to diptych on a terminal: Ctrl-A.
const ESCAPE: u8 = 0x01;

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
    Stdin { escape: bool },
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
                    escape: terminal.is_some(),
                };
                (Box::new(FilePlace::new(File::from(stdout))), Some(input))
            }
            SerialSpec::File(path) => {
                let file = OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .open(path)
                    .map_err(|source| SerialBackendError::Open {
                        path: path.clone(),
                        source,
                    })?;
                (Box::new(FilePlace::new(file)), None)
            }
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
                    Input::Stdin { escape } => read_stdin(&serial, escape, &quit),
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

/// A listening socket with at most one client. Output that comes while there is
/// none is lost, as on a line with nothing plugged in.
struct SocketPlace {
    listener: UnixListener,
    /// Removes the socket's file when dropped.
    socket: QmpSocket,
    /// The client's stream, for output. A leaf lock, held to copy the descriptor.
    client: Mutex<Option<Arc<UnixStream>>>,
}

impl SocketPlace {
    fn bind(path: &Path) -> Result<Self, SerialBackendError> {
        let socket = QmpSocket::bind(&QmpAddress::at(path))?;
        let listener = socket
            .listener()
            .and_then(|listener| listener.set_nonblocking(false).map(|()| listener))
            .map_err(|source| SerialBackendError::System {
                what: "a socket",
                source,
            })?;
        Ok(Self {
            listener,
            socket,
            client: Mutex::new(None),
        })
    }

    fn client(&self) -> MutexGuard<'_, Option<Arc<UnixStream>>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts one client after another, and gives their bytes to the guest.
    fn serve(&self, serial: &Serial) -> io::Result<()> {
        loop {
            let (stream, _) = self.listener.accept()?;
            let stream = Arc::new(stream);
            *self.client() = Some(Arc::clone(&stream));
            let ended = copy_input(&*stream, serial, None, &|| {});
            *self.client() = None;
            if let Err(error) = ended {
                tracing::debug!(%error, path = %self.socket.path().display(), "Serial client left");
            }
        }
    }
}

impl Place for Arc<SocketPlace> {
    fn put(&mut self, bytes: &[u8]) {
        let client = self.client().clone();
        if let Some(client) = client
            && let Err(error) = (&*client).write_all(bytes)
        {
            tracing::debug!(%error, "Serial client does not read");
            *self.client() = None;
        }
    }
}

fn read_stdin(serial: &Serial, escape: bool, quit: &dyn Fn()) -> io::Result<()> {
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    copy_input(&stdin, serial, escape.then(Escape::default), quit)
}

/// Gives bytes to the guest until they end.
fn copy_input(
    mut from: impl Read,
    serial: &Serial,
    mut escape: Option<Escape>,
    quit: &dyn Fn(),
) -> io::Result<()> {
    let mut buffer = [0; 256];
    loop {
        let len = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let mut typed = buffer[..len].to_vec();
        if let Some(escape) = &mut escape
            && escape.filter(&mut typed)
        {
            quit();
        }
        offer(serial, &typed)?;
    }
}

/// Offers bytes to the port until it has taken them all.
fn offer(serial: &Serial, mut bytes: &[u8]) -> io::Result<()> {
    let poll = PollContext::new()?;
    poll.add(&**serial.room_evt(), ())?;
    loop {
        let taken = serial.enqueue(bytes)?;
        bytes = &bytes[taken..];
        if bytes.is_empty() {
            return Ok(());
        }
        poll.wait()?;
        // Spurious or not: the port says again if there is no room.
        let _ = serial.room_evt().read();
    }
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
    use super::*;

    #[test]
    fn output_reaches_a_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backend = SerialBackend::open(&SerialSpec::File(file.path().to_owned())).unwrap();
        let mut sink = backend.sink();
        for _ in 0..10_000 {
            sink.write_all(b"0123456789").unwrap();
        }
        backend.flush(Duration::from_secs(60));
        assert_eq!(file.as_file().metadata().unwrap().len(), 100_000);
    }

    #[test]
    fn a_reader_that_stops_holds_the_guest_once_and_loses_output_then() {
        struct Stuck;
        impl Place for Stuck {
            fn put(&mut self, _: &[u8]) {
                loop {
                    thread::park();
                }
            }
        }
        let queue = Arc::new(OutputQueue::default());
        let writer = Arc::clone(&queue);
        thread::spawn(move || writer.write_out(Box::new(Stuck)));
        let mut lost = 0;
        for _ in 0..3 * QUEUE_CAPACITY {
            lost += usize::from(queue.push(b"x").is_err());
        }
        // Not more than the queue and what the writer took at once is kept; had
        // every byte waited, this test would take a day.
        assert!(lost >= QUEUE_CAPACITY, "{lost}");
    }

    #[test]
    fn a_client_of_the_socket_gets_output_and_the_next_can_come() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let mut backend = SerialBackend::open(&SerialSpec::Unix(path.clone())).unwrap();
        let serial = Arc::new(Serial::new(backend.sink()).unwrap());
        backend.start_input(Arc::clone(&serial), || {}).unwrap();
        for round in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            // Input proves that the client has been accepted.
            client.write_all(b"hi").unwrap();
            let mut got = Vec::new();
            while got.len() < 2 {
                let mut status = [0];
                devices::PioDevice::read(&*serial, 5, &mut status);
                if status[0] & 1 != 0 {
                    let mut byte = [0];
                    devices::PioDevice::read(&*serial, 0, &mut byte);
                    got.push(byte[0]);
                } else {
                    thread::yield_now();
                }
            }
            assert_eq!(got, b"hi", "round {round}");
            devices::PioDevice::write(&*serial, 0, b"!");
            let mut answer = [0];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"!");
        }
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
}
