//! A small QMP client that blocks, for the demo and `diptych job`.
//!
//! Replies and events come on one connection; events that arrive while a reply
//! is awaited are kept, in order, until somebody asks for them. Every wait has
//! a deadline and looks at a [`Watch`] now and then, so that an interrupt or
//! the end of the other process ends it too.
//!
//! The other side is not trusted: what it can make the client hold is bounded,
//! it may hang, close, or send rubbish at any moment, and its words are made fit
//! for a terminal before they are part of an error ([`printable`]).

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};

/// How long a wait goes on before it looks at its [`Watch`].
const SLICE: Duration = Duration::from_millis(50);
/// A longer message is not QMP's.
const MESSAGE_MAX_BYTES: usize = 16 << 20;
/// More events before a reply are no conversation.
const EVENTS_MAX: usize = 1 << 16;
/// Bytes asked of the socket at once.
const READ_SIZE: usize = 16 << 10;
/// Characters of the other side's that are shown in an error.
const SHOWN_MAX: usize = 200;

/// Looked at during every wait; an error ends the wait.
pub trait Watch {
    /// Why to go on no longer, if there is a reason.
    fn check(&mut self) -> Result<(), String>;
}

/// Watches nothing.
impl Watch for () {
    fn check(&mut self) -> Result<(), String> {
        Ok(())
    }
}

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("Cannot connect to the QMP socket '{path}'", path = path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody listens there, and does not greet.
    #[error(
        "No greeting from the QMP socket '{path}' within {seconds} s; it serves one client at a \
         time: end the other one, or give the server a second --qmp socket",
        path = path.display()
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// For how long it was awaited.
        seconds: u64,
    },
    /// The connection failed.
    #[error("The QMP connection failed")]
    Io(#[from] io::Error),
    /// The other side closed the connection.
    #[error("The QMP connection was closed")]
    Closed,
    /// The other side does not speak QMP.
    #[error("Not a QMP message: {0}")]
    Protocol(String),
    /// The command was refused.
    #[error("{command}: {desc}")]
    Refused {
        /// The command's name.
        command: String,
        /// QMP's error class.
        class: String,
        /// What the other side says.
        desc: String,
    },
    /// It took too long.
    #[error("No answer to {what} within {seconds} s")]
    Timeout {
        /// What was awaited.
        what: String,
        /// For how long.
        seconds: u64,
    },
    /// The watch ended the wait.
    #[error("{0}")]
    Stopped(String),
}

/// An event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, as `JOB_STATUS_CHANGE`.
    pub name: String,
    /// Its data; null if it has none.
    pub data: Value,
    /// When it happened, as it was sent.
    pub timestamp: Value,
}

/// A connection after negotiation.
#[derive(Debug)]
pub struct Client<W> {
    stream: UnixStream,
    received: Vec<u8>,
    /// So many bytes of `received` have no end of a line in them.
    scanned: usize,
    events: VecDeque<Event>,
    watch: W,
    next_id: u64,
    /// How long a reply may take.
    patience: Duration,
}

impl<W: Watch> Client<W> {
    /// Connects to a socket that is there, and negotiates. This, and each reply
    /// later, may take up to `patience`.
    ///
    /// Errors: [`ClientError::Connect`] if nobody listens, and
    /// [`ClientError::NoGreeting`] if nobody answers; all others.
    pub fn connect(path: &Path, patience: Duration, watch: W) -> Result<Self, ClientError> {
        Self::connect_until(path, None, patience, watch)
    }

    /// As [`connect`](Self::connect), and waits as long for the socket to be there.
    pub fn connect_when_there(
        path: &Path,
        patience: Duration,
        watch: W,
    ) -> Result<Self, ClientError> {
        let deadline = Instant::now() + patience;
        Self::connect_until(path, Some(deadline), patience, watch)
    }

    fn connect_until(
        path: &Path,
        there_by: Option<Instant>,
        patience: Duration,
        mut watch: W,
    ) -> Result<Self, ClientError> {
        let deadline = Instant::now() + patience;
        let no_greeting = || ClientError::NoGreeting {
            path: path.to_owned(),
            seconds: patience.as_secs(),
        };
        let stream = loop {
            let now = Instant::now();
            match connect_at_once(path) {
                Ok(stream) => break stream,
                // Too many wait to be accepted already.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if now >= deadline {
                        return Err(no_greeting());
                    }
                }
                Err(source) if there_by.is_none_or(|there_by| now >= there_by) => {
                    return Err(ClientError::Connect {
                        path: path.to_owned(),
                        source,
                    });
                }
                Err(_) => {}
            }
            watch.check().map_err(ClientError::Stopped)?;
            thread::sleep(Duration::from_millis(5));
        };
        let mut client = Self {
            stream,
            received: Vec::new(),
            scanned: 0,
            events: VecDeque::new(),
            watch,
            next_id: 0,
            patience,
        };
        let deadline = Instant::now() + patience;
        loop {
            match client.message(deadline)? {
                Some(greeting) if greeting.get("QMP").is_some() => break,
                // One that came after the last client had gone: QEMU keeps it for the next.
                Some(event) if event.get("event").is_some() && Instant::now() < deadline => {}
                Some(other) => return Err(not_qmp(&other.to_string())),
                None => return Err(no_greeting()),
            }
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Runs a command and waits for its reply.
    ///
    /// Errors: [`ClientError::Refused`] with the other side's words; all others.
    /// After a refusal, a timeout or a stop by the watch the connection can be
    /// used on; whether the command was carried out is open after the latter two.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let deadline = Instant::now() + self.patience;
        self.next_id += 1;
        let id = self.next_id;
        let mut text = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        text.push('\n');
        self.send(text.as_bytes(), command, deadline)?;
        while let Some(mut message) = self.message(deadline)? {
            if let Some(event) = event_of(&mut message) {
                if self.events.len() >= EVENTS_MAX {
                    return Err(ClientError::Protocol("events without end".into()));
                }
                self.events.push_back(event);
                // Events must not keep the reply away for ever.
                if Instant::now() >= deadline {
                    break;
                }
                continue;
            }
            match message.get("id").and_then(Value::as_u64) {
                Some(answered) if answered == id => {}
                // That of a command whose reply was not waited for.
                Some(answered) if answered < id => continue,
                _ => return Err(not_qmp(&message.to_string())),
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            let text = |name: &str| match message["error"][name].as_str() {
                Some(text) => printable(text, SHOWN_MAX * 5),
                None => printable(&message.to_string(), SHOWN_MAX),
            };
            return Err(ClientError::Refused {
                command: command.to_owned(),
                class: text("class"),
                desc: text("desc"),
            });
        }
        Err(ClientError::Timeout {
            what: command.to_owned(),
            seconds: self.patience.as_secs(),
        })
    }

    /// Writes a whole message, also to a peer that reads slowly.
    ///
    /// Errors: after one, the other side may have read a part of it, and then
    /// does not understand what follows.
    fn send(&mut self, mut text: &[u8], what: &str, deadline: Instant) -> Result<(), ClientError> {
        while !text.is_empty() {
            match self.stream.write(text) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(n) => text = text.get(n..).unwrap_or_default(),
                Err(error) if is_transient(&error) => {
                    if Instant::now() >= deadline {
                        return Err(ClientError::Timeout {
                            what: what.to_owned(),
                            seconds: self.patience.as_secs(),
                        });
                    }
                    self.watch.check().map_err(ClientError::Stopped)?;
                }
                Err(error) => {
                    self.watch.check().map_err(ClientError::Stopped)?;
                    return Err(closed_or(error));
                }
            }
        }
        Ok(())
    }

    /// The next event, kept or new; `None` if none comes within `patience`.
    pub fn next_event(&mut self, patience: Duration) -> Result<Option<Event>, ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Instant::now() + patience;
        match self.message(deadline)? {
            None => Ok(None),
            Some(mut message) => match event_of(&mut message) {
                Some(event) => Ok(Some(event)),
                None => Err(ClientError::Protocol(message.to_string())),
            },
        }
    }

    /// The events that have come and that nobody asked for yet, the oldest first.
    pub fn kept_events(&mut self) -> &mut VecDeque<Event> {
        &mut self.events
    }

    /// The watch.
    pub fn watch(&mut self) -> &mut W {
        &mut self.watch
    }

    /// The next message; `None` if there is no whole one by the deadline. What
    /// came of it is kept.
    fn message(&mut self, deadline: Instant) -> Result<Option<Value>, ClientError> {
        let mut chunk = [0; READ_SIZE];
        let mut has_read = false;
        loop {
            while let Some(line) = self.line() {
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|_| not_qmp(&String::from_utf8_lossy(&line)));
            }
            // QMP's messages are objects: what begins otherwise need not end.
            let first = self
                .received
                .iter()
                .find(|byte| !byte.is_ascii_whitespace());
            if first.is_some_and(|byte| *byte != b'{') {
                return Err(not_qmp(&String::from_utf8_lossy(&self.received)));
            }
            if self.received.len() > MESSAGE_MAX_BYTES {
                return Err(ClientError::Protocol("a line without end".into()));
            }
            if has_read && Instant::now() >= deadline {
                return Ok(None);
            }
            self.watch.check().map_err(ClientError::Stopped)?;
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    // The watch may know why.
                    self.watch.check().map_err(ClientError::Stopped)?;
                    return Err(ClientError::Closed);
                }
                Ok(n) => self
                    .received
                    .extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(closed_or(error)),
            }
            has_read = true;
        }
    }

    /// Takes a whole line of what was received.
    fn line(&mut self) -> Option<Vec<u8>> {
        let new = self.received.get(self.scanned..).unwrap_or_default();
        match new.iter().position(|&byte| byte == b'\n') {
            Some(end) => {
                let end = self.scanned + end;
                self.scanned = 0;
                Some(self.received.drain(..=end).collect())
            }
            None => {
                self.scanned = self.received.len();
                None
            }
        }
    }
}

/// Connects without waiting; `WouldBlock` if too many others wait.
fn connect_at_once(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    connect(&socket, &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(SLICE))?;
    stream.set_write_timeout(Some(SLICE))?;
    Ok(stream)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// The other side has gone, whichever way the system tells it.
fn closed_or(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
        _ => ClientError::Io(error),
    }
}

fn event_of(message: &mut Value) -> Option<Event> {
    let name = message.get("event")?.as_str()?.to_owned();
    Some(Event {
        name,
        data: message["data"].take(),
        timestamp: message["timestamp"].take(),
    })
}

fn not_qmp(message: &str) -> ClientError {
    ClientError::Protocol(printable(message.trim_end(), SHOWN_MAX))
}

/// Text of somebody else's, fit for a terminal: no control characters, and no
/// more than `max` characters.
pub fn printable(text: &str, max: usize) -> String {
    let mut shown = String::new();
    for c in text.chars().take(max) {
        if c.is_control() || moves_others(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    if text.chars().nth(max).is_some() {
        shown.push('…');
    }
    shown
}

/// Whether a character changes the direction or the place of others.
fn moves_others(c: char) -> bool {
    matches!(
        c,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}'
    )
}

#[cfg(test)]
mod tests;
