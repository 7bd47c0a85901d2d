//! A small QMP client that blocks, for the demo.
//!
//! Replies and events come on one connection; events that arrive while a reply
//! is awaited are kept, in order, until somebody asks for them. Every wait has
//! a deadline and looks at a [`Watch`] now and then, so that an interrupt or
//! the end of the other process ends it too.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long a wait goes on before it looks at its [`Watch`].
const SLICE: Duration = Duration::from_millis(50);
/// A longer message is not QMP's.
const MESSAGE_MAX_BYTES: usize = 16 << 20;

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
}

/// A connection after negotiation.
#[derive(Debug)]
pub struct Client<W> {
    stream: UnixStream,
    received: Vec<u8>,
    events: VecDeque<Event>,
    watch: W,
    next_id: u64,
}

impl<W: Watch> Client<W> {
    /// Connects, waiting up to `patience` for the socket to be there, and
    /// negotiates.
    ///
    /// Errors: [`ClientError::Connect`] if nobody listens by then; all others.
    pub fn connect(path: &Path, patience: Duration, mut watch: W) -> Result<Self, ClientError> {
        let deadline = Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(source) if Instant::now() >= deadline => {
                    return Err(ClientError::Connect {
                        path: path.to_owned(),
                        source,
                    });
                }
                Err(_) => {
                    watch.check().map_err(ClientError::Stopped)?;
                    thread::sleep(Duration::from_millis(5));
                }
            }
        };
        stream.set_read_timeout(Some(SLICE))?;
        let mut client = Self {
            stream,
            received: Vec::new(),
            events: VecDeque::new(),
            watch,
            next_id: 0,
        };
        let greeting = client.message(deadline.max(Instant::now() + SLICE))?;
        match greeting {
            Some(greeting) if greeting.get("QMP").is_some() => {}
            Some(other) => return Err(ClientError::Protocol(other.to_string())),
            None => return Err(timeout("the connection", patience)),
        }
        client.execute("qmp_capabilities", json!({}))?;
        Ok(client)
    }

    /// Runs a command and waits for its reply, up to 30 s.
    ///
    /// Errors: [`ClientError::Refused`] with the other side's words; all others.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let patience = Duration::from_secs(30);
        let deadline = Instant::now() + patience;
        self.next_id += 1;
        let id = self.next_id;
        let mut text = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        text.push('\n');
        self.stream.write_all(text.as_bytes())?;
        while let Some(mut message) = self.message(deadline)? {
            if let Some(event) = event_of(&mut message) {
                self.events.push_back(event);
                continue;
            }
            if message.get("id").and_then(Value::as_u64) != Some(id) {
                return Err(ClientError::Protocol(message.to_string()));
            }
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            let text = |name: &str| match message["error"][name].as_str() {
                Some(text) => text.to_owned(),
                None => message.to_string(),
            };
            return Err(ClientError::Refused {
                command: command.to_owned(),
                class: text("class"),
                desc: text("desc"),
            });
        }
        Err(timeout(command, patience))
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

    /// The watch.
    pub fn watch(&mut self) -> &mut W {
        &mut self.watch
    }

    /// The next message; `None` at the deadline.
    fn message(&mut self, deadline: Instant) -> Result<Option<Value>, ClientError> {
        loop {
            if let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|_| ClientError::Protocol(String::from_utf8_lossy(&line).into()));
            }
            if self.received.len() > MESSAGE_MAX_BYTES {
                return Err(ClientError::Protocol("a line without end".into()));
            }
            self.watch.check().map_err(ClientError::Stopped)?;
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => {
                    // The watch may know why.
                    self.watch.check().map_err(ClientError::Stopped)?;
                    return Err(ClientError::Closed);
                }
                Ok(n) => self.received.extend_from_slice(&chunk[..n]),
                Err(error) if is_transient(&error) => {
                    if Instant::now() >= deadline {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

fn event_of(message: &mut Value) -> Option<Event> {
    let name = message.get("event")?.as_str()?.to_owned();
    Some(Event {
        name,
        data: message["data"].take(),
    })
}

fn timeout(what: &str, patience: Duration) -> ClientError {
    ClientError::Timeout {
        what: what.to_owned(),
        seconds: patience.as_secs(),
    }
}

#[cfg(test)]
mod tests;
