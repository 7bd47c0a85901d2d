//! `diptych storage-daemon` as a program: its command line, its socket, its end.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A wait that no working program needs: it ends a hanging test.
const PATIENCE: Duration = Duration::from_secs(30);

fn diptych(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_diptych"));
    command
        .arg("storage-daemon")
        .args(args)
        .stdin(Stdio::null());
    command
}

/// What a daemon that does not come up says.
fn failure(args: &[&str]) -> Output {
    diptych(args).output().unwrap()
}

struct Daemon {
    process: Child,
    socket: PathBuf,
    folder: TempDir,
}

impl Daemon {
    fn start(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp.sock");
        let address = format!("unix:{}", socket.display());
        let process = diptych(&["--qmp", &address]).args(args).spawn().unwrap();
        Self {
            process,
            socket,
            folder,
        }
    }

    fn client(&mut self) -> Client {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(error) => {
                    assert_eq!(self.process.try_wait().unwrap(), None, "it has ended");
                    assert!(Instant::now() < deadline, "{error}");
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        };
        Client::negotiate(stream)
    }

    fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status();
        assert!(status.unwrap().success());
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn file(&self, name: &str, size: u64) -> String {
        let path = self.folder.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Only a test that failed leaves it running.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Client {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Client {
    fn negotiate(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        assert!(client.line().get("QMP").is_some());
        client.ok("qmp_capabilities", json!({}));
        client
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let message = json!({"execute": command, "arguments": arguments});
        let stream = self.stream.get_mut();
        stream.write_all(message.to_string().as_bytes()).unwrap();
        loop {
            let line = self.line();
            if line.get("event").is_none() {
                return line;
            }
            self.events.push(line);
        }
    }

    fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let reply = self.ask(command, arguments);
        assert!(reply.get("return").is_some(), "{command}: {reply}");
        reply["return"].clone()
    }

    /// Events that come until the connection ends.
    fn events_to_the_end(mut self) -> Vec<Value> {
        let mut rest = String::new();
        self.stream.read_to_string(&mut rest).unwrap();
        let more = rest.lines().map(|line| serde_json::from_str(line).unwrap());
        self.events.extend(more);
        self.events
    }
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn quit_ends_it_with_success_and_removes_the_socket() {
    let mut daemon = Daemon::start(&[]);
    let mut client = daemon.client();
    client.ok("quit", json!({}));
    assert!(daemon.wait().success());
    assert!(!daemon.socket.exists());
}

#[test]
fn a_signal_ends_it_with_success_and_removes_the_socket() {
    for signal in ["TERM", "INT", "HUP"] {
        let mut daemon = Daemon::start(&[]);
        let _client = daemon.client();
        daemon.signal(signal);
        assert!(daemon.wait().success(), "SIG{signal}");
        assert!(!daemon.socket.exists());
    }
}

#[test]
fn a_running_job_is_cancelled_at_the_end_and_clients_are_told() {
    let mut daemon = Daemon::start(&[
        "--blockdev",
        "driver=null-co,node-name=a,size=64M",
        "--blockdev",
        "{'driver': 'null-co', 'node-name': 'b', 'size': 67108864}",
    ]);
    let mut client = daemon.client();
    client.ok(
        "blockdev-mirror",
        json!({"job-id": "j0", "device": "a", "target": "b", "sync": "full", "speed": 65536}),
    );
    daemon.signal("TERM");
    let events = client.events_to_the_end();
    let cancelled = events.iter().any(|e| e["event"] == "BLOCK_JOB_CANCELLED");
    let last = events.last().map(|e| e["data"]["status"].clone());
    assert!(cancelled, "{events:?}");
    assert_eq!(last, Some(json!("null")));
    assert!(daemon.wait().success());
}

#[test]
fn a_second_signal_does_not_wait_for_storage_that_hangs() {
    let mut daemon = Daemon::start(&[
        "--blockdev",
        "driver=null-co,node-name=a,size=64M",
        "--blockdev",
        "driver=null-co,node-name=b,size=64M,latency-ns=3600000000000",
    ]);
    let mut client = daemon.client();
    client.ok(
        "blockdev-mirror",
        json!({"job-id": "j0", "device": "a", "target": "b", "sync": "full"}),
    );
    // An orderly end would wait for the job, and have status 0. The first ones
    // of these count as one.
    let deadline = Instant::now() + PATIENCE;
    while daemon.process.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "it does not end");
        daemon.signal("TERM");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(daemon.wait().code(), Some(1));
}

#[test]
fn quit_is_answered_before_the_jobs_end() {
    let mut daemon = Daemon::start(&[
        "--blockdev",
        "driver=null-co,node-name=a,size=64M",
        "--blockdev",
        "driver=null-co,node-name=b,size=64M",
    ]);
    let mut client = daemon.client();
    client.ok(
        "blockdev-mirror",
        json!({"job-id": "j0", "device": "a", "target": "b", "sync": "full", "speed": 65536}),
    );
    client.ok("quit", json!({}));
    let cancelled = |e: &Value| e["event"] == "BLOCK_JOB_CANCELLED";
    assert!(!client.events.iter().any(cancelled));
    assert!(client.events_to_the_end().iter().any(cancelled));
    assert!(daemon.wait().success());
}

#[test]
fn two_monitors_see_the_same_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let second = folder.path().join("second.sock");
    let address = format!("unix:{}", second.display());
    let mut daemon = Daemon::start(&["--qmp", &address]);
    let image = daemon.file("a.img", 65536);
    let mut first = daemon.client();
    first.ok(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": image}),
    );
    let mut second = Client::negotiate(UnixStream::connect(&second).unwrap());
    let nodes = second.ok("query-named-block-nodes", json!({}));
    assert_eq!(nodes[0]["node-name"], "f");
    assert_eq!(nodes[0]["image"]["virtual-size"], 65536);
}

#[test]
fn a_socket_in_use_is_an_error_with_a_remedy_and_left_alone() {
    let mut daemon = Daemon::start(&[]);
    drop(daemon.client());
    let address = format!("unix:{}", daemon.socket.display());
    let output = failure(&["--qmp", &address]);
    assert_eq!(output.status.code(), Some(1));
    let message = text(&output.stderr);
    assert_eq!(message.lines().count(), 1, "{message}");
    for part in [
        "in use",
        "give another path",
        daemon.socket.to_str().unwrap(),
    ] {
        assert!(message.contains(part), "{message}");
    }
    drop(daemon.client());
}

#[test]
fn a_node_that_cannot_be_opened_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qmp.sock");
    let missing = folder.path().join("missing.img");
    let output = failure(&[
        "--qmp",
        &format!("unix:{}", socket.display()),
        "--blockdev",
        &format!("driver=file,node-name=f,filename={}", missing.display()),
    ]);
    assert_eq!(output.status.code(), Some(1));
    let message = text(&output.stderr);
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(message.contains("No such file or directory"), "{message}");
    assert!(message.contains(missing.to_str().unwrap()), "{message}");
    assert!(!Path::new(&socket).exists());
}

#[test]
fn a_mistake_on_the_command_line_has_status_2() {
    let bad = [
        &["--qmp", "tcp:1"][..],
        &["--qmp", "unix:/x", "--blockdev", "driver=floppy"],
        &["--qmp", "unix:/x", "--blockdev", "driver=null-co"],
        &[],
    ];
    for args in bad {
        assert_eq!(failure(args).status.code(), Some(2), "{args:?}");
    }
}
