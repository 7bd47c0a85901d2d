//! A blocking QMP client.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// A wait that no working monitor needs: it ends a hanging test.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) struct Client {
    stream: BufReader<UnixStream>,
    /// Events seen so far.
    pub(super) events: Vec<Value>,
}

impl Client {
    /// Connects and reads nothing.
    pub(super) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        }
    }

    /// Connects and negotiates.
    pub(super) fn negotiated(path: &Path) -> Self {
        let mut client = Self::connect(path);
        assert!(client.line().get("QMP").is_some());
        assert_eq!(client.ask("qmp_capabilities"), json!({"return": {}}));
        client
    }

    pub(super) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// The next message, whatever it is.
    pub(super) fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        assert!(line.ends_with("\r\n"), "{line:?}");
        serde_json::from_str(&line).unwrap()
    }

    /// The next reply; events before it are kept.
    pub(super) fn reply(&mut self) -> Value {
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
            self.events.push(line);
        }
    }

    /// Waits for an event of that name, unless it has been seen already.
    pub(super) fn wait_for(&mut self, name: &str) {
        while !self.events.iter().any(|event| event["event"] == name) {
            let line = self.line();
            self.events.push(line);
        }
    }

    /// Sends a command without arguments and gives its reply.
    pub(super) fn ask(&mut self, command: &str) -> Value {
        self.ask_with(command, json!({}))
    }

    pub(super) fn ask_with(&mut self, command: &str, arguments: Value) -> Value {
        self.send(json!({"execute": command, "arguments": arguments}).to_string());
        self.reply()
    }

    /// The text of the error that `command` is answered with.
    pub(super) fn refusal(&mut self, command: &str, arguments: Value) -> String {
        let reply = self.ask_with(command, arguments);
        reply["error"]["desc"].as_str().unwrap().to_owned()
    }

    /// The bare connection.
    pub(super) fn into_stream(self) -> UnixStream {
        self.stream.into_inner()
    }

    /// Says that nothing more will be sent.
    pub(super) fn end_input(&self) {
        let stream = self.stream.get_ref();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// Reads to the end of the connection; how much there was.
    pub(super) fn drain(&mut self) -> usize {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => rest.len(),
            Err(error) => panic!("{error}"),
        }
    }
}
