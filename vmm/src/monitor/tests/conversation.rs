//! Greeting, negotiation, order, ids, and clients that misbehave.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

use block::runtime::{sleep, spawn_local};
use serde_json::json;

use super::super::output::MAX_BACKLOG;
use super::super::{Event, Monitor};
use super::{Client, with_monitor};

#[test]
fn a_client_is_greeted_and_has_to_negotiate() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = Client::connect(path);
            let greeting = client.line();
            assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
            assert!(greeting["QMP"]["version"]["qemu"]["major"].is_u64());
            let early = "Expecting capabilities negotiation with 'qmp_capabilities'";
            for command in ["query-version", "nonsense"] {
                let reply = client.ask(command);
                assert_eq!(
                    reply,
                    json!({"error": {"class": "CommandNotFound", "desc": early}})
                );
            }
            assert_eq!(
                client.refusal("qmp_capabilities", json!({"enable": ["nope"]})),
                "Parameter 'null' does not accept value 'nope'"
            );
            assert_eq!(
                client.refusal("qmp_capabilities", json!({"colour": "red"})),
                "Parameter 'colour' is unexpected"
            );
            assert_eq!(client.ask("qmp_capabilities"), json!({"return": {}}));
            assert_eq!(
                client.refusal("qmp_capabilities", json!({})),
                "Capabilities negotiation is already complete, command ignored"
            );
            assert_eq!(
                client.refusal("qmp_capabilities", json!({"enable": "oob"})),
                "Invalid parameter type for 'enable', expected: array"
            );
            assert!(client.ask("query-version")["return"]["qemu"].is_object());
        },
    );
}

#[test]
fn replies_come_in_order_with_the_ids_of_their_commands() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = Client::negotiated(path);
            let ids = [
                json!("abc"),
                json!(-1),
                json!(null),
                json!(1.5),
                json!({"a": [1, {"b": null}]}),
                json!([]),
                json!(""),
            ];
            let mut batch = String::new();
            for id in &ids {
                batch += &json!({"execute": "query-version", "id": id}).to_string();
                batch += &json!({"execute": "nope", "id": id}).to_string();
            }
            client.send(batch);
            for id in &ids {
                let reply = client.reply();
                assert_eq!(reply.get("id"), Some(id));
                assert!(reply.get("return").is_some());
                let reply = client.reply();
                assert_eq!(reply.get("id"), Some(id));
                assert_eq!(
                    reply["error"]["desc"],
                    "The command nope has not been found"
                );
            }
            assert!(client.ask("query-version").get("id").is_none());
        },
    );
}

#[test]
fn rubbish_is_answered_and_the_conversation_goes_on() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = Client::negotiated(path);
            client.send("{\"execute\" 5}\n");
            assert_eq!(
                client.reply(),
                json!({"error": {
                    "class": "GenericError",
                    "desc": "JSON parse error, missing : in object pair"
                }})
            );
            client.send("{\"execute\": \"half\u{1}");
            assert!(client.reply().get("error").is_some());
            client.send("[]");
            assert_eq!(
                client.reply()["error"]["desc"],
                "QMP input must be a JSON object"
            );
            client.send(b"{\"execute\": \"query-\xff");
            assert!(client.reply().get("error").is_some());
            assert!(client.ask("query-version").get("return").is_some());
        },
    );
}

#[test]
fn a_message_may_arrive_in_pieces() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = Client::negotiated(path);
            for byte in "{'execute': 'query-version'}".bytes() {
                client.send([byte]);
            }
            assert!(client.reply().get("return").is_some());
        },
    );
}

#[test]
fn out_of_band_is_known_once_negotiated() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = Client::negotiated(path);
            client.send("{'exec-oob': 'query-version', 'id': 1}");
            assert_eq!(
                client.reply()["error"]["desc"],
                "QMP input member 'exec-oob' is unexpected"
            );
            drop(client);
            let mut client = Client::connect(path);
            client.line();
            client.ask_with("qmp_capabilities", json!({"enable": ["oob"]}));
            client.send("{'exec-oob': 'query-version', 'id': 1}");
            let reply = client.reply();
            assert_eq!(reply["id"], 1);
            assert_eq!(
                reply["error"]["desc"],
                "The command query-version does not support OOB"
            );
            client.send("{'exec-oob': 'nope'}");
            assert_eq!(client.reply()["error"]["class"], "CommandNotFound");
        },
    );
}

#[test]
fn a_second_client_is_served_when_the_first_has_left() {
    with_monitor(
        |_| (),
        |path| {
            let mut first = Client::negotiated(path);
            let second = UnixStream::connect(path).unwrap();
            second.set_nonblocking(true).unwrap();
            // The first client is still there, so the second has no greeting,
            // however often the monitor looks.
            for _ in 0..3 {
                assert!(first.ask("query-version").get("return").is_some());
                let read = (&second).read(&mut [0; 1]);
                assert!(read.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock));
            }
            drop(first);
            second.set_nonblocking(false).unwrap();
            assert_eq!((&second).read(&mut [0; 1]).unwrap(), 1);
        },
    );
}

#[test]
fn replies_are_given_to_a_client_that_has_ended_its_input() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = Client::connect(path);
            client.send("{'execute':'qmp_capabilities'}{'execute':'query-version','id':9}");
            client.end_input();
            client.line();
            assert_eq!(client.reply(), json!({"return": {}}));
            assert_eq!(client.reply()["id"], 9);
            assert_eq!(client.drain(), 0);
        },
    );
}

#[test]
fn events_go_to_negotiated_clients_only() {
    let (emit, mut to_emit) = futures_channel::mpsc::unbounded::<()>();
    with_monitor(
        |monitor| {
            let monitor = Rc::clone(monitor);
            spawn_local(async move {
                while futures_util::StreamExt::next(&mut to_emit).await.is_some() {
                    monitor.emit(&Event::now("TEST", Some(json!({"a": 1}))));
                }
            })
            .detach();
        },
        move |path| {
            let mut client = Client::connect(path);
            client.line();
            emit.unbounded_send(()).unwrap();
            // Its answer shows that the event would have come before it.
            client.ask("nope");
            client.ask("qmp_capabilities");
            emit.unbounded_send(()).unwrap();
            let event = client.line();
            assert_eq!(event["event"], "TEST");
            assert_eq!(event["data"], json!({"a": 1}));
            assert!(event["timestamp"]["seconds"].is_u64());
            assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
        },
    );
}

/// Emits big events until told to stop.
fn flood(monitor: &Rc<Monitor>, stop: mpsc::Receiver<()>) {
    let monitor = Rc::clone(monitor);
    spawn_local(async move {
        let padding = "x".repeat(10_000);
        while stop.try_recv() == Err(mpsc::TryRecvError::Empty) {
            monitor.emit(&Event::now("FLOOD", Some(json!({"padding": padding}))));
            sleep(Duration::from_millis(1)).await;
        }
    })
    .detach();
}

#[test]
fn a_client_that_does_not_read_its_events_is_cut_off_and_the_next_is_served() {
    let (stop, stopped) = mpsc::channel();
    with_monitor(
        |monitor| flood(monitor, stopped),
        move |path| {
            let mut sleeper = Client::negotiated(path);
            // Served only when the sleeper has been cut off.
            let mut next = Client::connect(path);
            assert!(next.line().get("QMP").is_some());
            stop.send(()).unwrap();
            assert_eq!(next.ask("qmp_capabilities"), json!({"return": {}}));
            // What it can still read is what the kernel holds.
            assert!(sleeper.drain() < MAX_BACKLOG);
        },
    );
}

#[test]
fn commands_of_a_client_that_does_not_read_its_replies_are_not_read_either() {
    with_monitor(
        |_| (),
        |path| {
            let client = Client::negotiated(path);
            let stream = client.into_stream();
            stream.set_nonblocking(true).unwrap();
            let command = b"{\"execute\":\"query-commands\"}\n";
            let mut sent = 0;
            // Blocks for good once socket buffers and the queue are full.
            let mut refused = 0;
            while refused < 50 {
                match (&stream).write(command) {
                    Ok(len) => {
                        sent += len;
                        refused = 0;
                    }
                    Err(_) => {
                        refused += 1;
                        std::thread::sleep(Duration::from_millis(2));
                    }
                }
                assert!(sent < 4 << 20, "the monitor reads on and on");
            }
        },
    );
}

#[test]
fn closing_the_monitor_ends_sessions_and_removes_the_socket() {
    let (path_out, path_in) = mpsc::channel();
    with_monitor(
        |_| (),
        move |path| {
            let client = Client::negotiated(path);
            path_out.send((path.to_owned(), client)).unwrap();
        },
    );
    let (path, mut client) = path_in.recv().unwrap();
    assert_eq!(client.drain(), 0);
    assert!(!path.exists());
}

#[test]
fn quit_is_answered_and_later_commands_are_not_carried_out() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = Client::negotiated(path);
            client.send("{'execute':'quit','id':1}{'execute':'query-version','id':2}");
            assert_eq!(client.reply(), json!({"return": {}, "id": 1}));
            let stream = client.into_stream();
            stream
                .set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            assert!((&stream).read(&mut [0; 1]).is_err());
        },
    );
}
