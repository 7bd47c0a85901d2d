//! The client against a scripted peer.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use super::*;

/// A peer that greets, then answers each line it reads by the next script.
fn peer(scripts: &'static [&'static str]) -> (tempfile::TempDir, PathBuf, JoinHandle<Vec<Value>>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut writer = stream;
        writer
            .write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n")
            .unwrap();
        let mut commands = Vec::new();
        for script in scripts {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            commands.push(serde_json::from_str(&line).unwrap());
            writer.write_all(script.as_bytes()).unwrap();
        }
        commands
    });
    (dir, path, thread)
}

const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn events_before_a_reply_are_kept_in_order() {
    let (_dir, path, thread) = peer(&[
        "{\"return\": {}, \"id\": 1}\r\n",
        "{\"event\": \"A\", \"timestamp\": {}}\r\n{\"event\": \"B\", \"data\": {\"x\": 1}}\r\n\
         {\"return\": 7, \"id\": 2}\r\n",
    ]);
    let mut client = Client::connect(&path, PATIENCE, ()).unwrap();
    assert_eq!(client.execute("get", json!({"a": 1})).unwrap(), json!(7));
    let a = client.next_event(PATIENCE).unwrap().unwrap();
    let b = client.next_event(PATIENCE).unwrap().unwrap();
    assert_eq!((a.name.as_str(), a.data), ("A", Value::Null));
    assert_eq!((b.name.as_str(), b.data), ("B", json!({"x": 1})));
    let commands = thread.join().unwrap();
    assert_eq!(commands[0]["execute"], "qmp_capabilities");
    assert_eq!(
        commands[1],
        json!({"execute": "get", "arguments": {"a": 1}, "id": 2})
    );
}

#[test]
fn an_event_that_comes_before_the_greeting_is_passed_by() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(b"{\"event\": \"OLD\", \"data\": {}}\r\n{\"QMP\": {}}\r\n")
            .unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap())
            .read_line(&mut line)
            .unwrap();
        stream
            .write_all(b"{\"return\": {}, \"id\": 1}\r\n")
            .unwrap();
    });
    let mut client = Client::connect(&path, PATIENCE, ()).unwrap();
    thread.join().unwrap();
    // It is not told as one of now, either.
    assert!(matches!(
        client.next_event(PATIENCE),
        Err(ClientError::Closed)
    ));
}

#[test]
fn a_refusal_tells_class_and_text() {
    let (_dir, path, _thread) = peer(&[
        "{\"return\": {}, \"id\": 1}\r\n",
        "{\"id\": 2, \"error\": {\"class\": \"GenericError\", \"desc\": \"No\"}}\r\n",
    ]);
    let mut client = Client::connect(&path, PATIENCE, ()).unwrap();
    let error = client.execute("get", json!({})).unwrap_err();
    assert!(matches!(&error, ClientError::Refused { class, .. } if class == "GenericError"));
    assert_eq!(error.to_string(), "get: No");
}

#[test]
fn a_closed_connection_is_told() {
    let (_dir, path, _thread) = peer(&["{\"return\": {}, \"id\": 1}\r\n"]);
    let mut client = Client::connect(&path, PATIENCE, ()).unwrap();
    let error = client.next_event(PATIENCE).unwrap_err();
    assert!(matches!(error, ClientError::Closed), "{error}");
}

#[test]
fn the_watch_ends_a_wait() {
    #[derive(Debug)]
    struct Never;
    impl Watch for Never {
        fn check(&mut self) -> Result<(), String> {
            Err("The child has ended".into())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let error = Client::connect_when_there(&dir.path().join("none"), PATIENCE, Never).unwrap_err();
    assert_eq!(error.to_string(), "The child has ended");
}

#[test]
fn a_peer_that_speaks_otherwise_is_told() {
    let (_dir, path, _thread) = peer(&["HTTP/1.1 200 OK\r\n"]);
    let error = Client::connect(&path, PATIENCE, ()).unwrap_err();
    assert!(matches!(error, ClientError::Protocol(_)), "{error}");
}

#[test]
fn a_peer_that_greets_in_another_protocol_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").unwrap();
        // Until the client has gone.
        let _ = stream.read(&mut [0; 1]);
    });
    let for_ever = Duration::from_secs(3600);
    let error = Client::connect(&path, for_ever, ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Not a QMP message: NBDMAGICIHAVEOPT\\u{0}\\u{3}"
    );
    thread.join().unwrap();
}

#[test]
fn a_missing_socket_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none");
    let error = Client::connect(&path, Duration::ZERO, ()).unwrap_err();
    assert!(error.to_string().contains("none'"), "{error}");
}

/// A peer that greets and then does what it likes.
fn wild_peer(
    act: impl FnOnce(UnixStream) + Send + 'static,
) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(b"{\"QMP\": {}}\r\n{\"return\": {}, \"id\": 1}\r\n")
            .unwrap();
        act(stream);
    });
    (dir, path, thread)
}

/// For waits that a test sees through to their end.
const IMPATIENCE: Duration = Duration::from_millis(200);

#[test]
fn a_peer_that_does_not_greet_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let error = Client::connect(&path, IMPATIENCE, ()).unwrap_err();
    assert!(matches!(error, ClientError::NoGreeting { .. }), "{error}");
    // Also where nobody accepts any more, and a plain connect would sleep.
    let mut waiting = Vec::new();
    while let Ok(stream) = connect_at_once(&path) {
        waiting.push(stream);
    }
    let error = Client::connect(&path, IMPATIENCE, ()).unwrap_err();
    assert!(matches!(error, ClientError::NoGreeting { .. }), "{error}");
    drop(listener);
}

#[test]
fn a_peer_that_does_not_answer_is_not_waited_for() {
    let (_dir, path, thread) = wild_peer(|stream| {
        // Until the client has gone.
        let _ = (&stream).read_to_end(&mut Vec::new());
    });
    let mut client = Client::connect(&path, IMPATIENCE, ()).unwrap();
    let error = client.execute("get", json!({})).unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    drop(client);
    thread.join().unwrap();
}

#[test]
fn floods_of_every_kind_end() {
    let event = &b"{\"event\": \"E\", \"data\": {}}\r\n"[..];
    for flood in [event, b"\r\n", b"x", b"[[[[\n"] {
        let flood = flood.repeat(1000);
        let (_dir, path, thread) =
            wild_peer(move |mut stream| while stream.write_all(&flood).is_ok() {});
        let error = Client::connect(&path, IMPATIENCE, ())
            .and_then(|mut client| client.execute("get", json!({})))
            .unwrap_err();
        assert!(
            matches!(
                error,
                ClientError::Timeout { .. } | ClientError::Protocol(_)
            ),
            "{error}"
        );
        thread.join().unwrap();
    }
}

#[test]
fn a_reply_that_came_too_late_is_not_taken_for_another() {
    let (_dir, path, _thread) = peer(&[
        "{\"return\": {}, \"id\": 1}\r\n",
        "",
        "{\"return\": \"late\", \"id\": 2}\r\n{\"return\": \"new\", \"id\": 3}\r\n",
    ]);
    let mut client = Client::connect(&path, PATIENCE, ()).unwrap();
    client.patience = IMPATIENCE;
    let error = client.execute("slow", json!({})).unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    client.patience = PATIENCE;
    assert_eq!(client.execute("get", json!({})).unwrap(), json!("new"));
}

#[test]
fn what_a_peer_says_cannot_steer_the_terminal() {
    assert_eq!(printable("a\u{1b}[2Jb\n", 100), "a\\u{1b}[2Jb\\n");
    assert_eq!(printable("a\u{202e}b", 100), "a\\u{202e}b");
    assert_eq!(printable("Käse", 3), "Käs…");
}
