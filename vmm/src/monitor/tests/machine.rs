//! Commands of the machine, with a machine that does what the test says.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::{Arc, Condvar, Mutex};

use block::BoxFuture;
use futures_channel::oneshot;
use futures_util::FutureExt;
use serde_json::{Value, json};

use super::super::Monitor;
use super::{Client, with_monitor};
use crate::vm_control::{
    DiskInfo, IothreadInfo, RunState, ShutdownCause, VmControl, VmError, VmEvent,
};

pub(in super::super) struct FakeMachine {
    monitor: Weak<Monitor>,
    state: Cell<RunState>,
    /// `stop` waits for this, if it is there.
    hold: RefCell<Option<oneshot::Receiver<()>>>,
    /// Told when `stop` waits.
    held: Arc<(Mutex<bool>, Condvar)>,
}

impl FakeMachine {
    fn emit(&self, event: VmEvent) {
        self.monitor.upgrade().unwrap().emit_machine(event);
    }
}

// The future may hold no reference to a machine that is not `Sync`, so each
// operation takes effect when it is asked for.
impl VmControl for FakeMachine {
    fn run_state(&self) -> RunState {
        self.state.get()
    }

    fn stop(&self) -> BoxFuture<'_, Result<(), VmError>> {
        self.state.set(RunState::Paused);
        self.emit(VmEvent::Stop);
        match self.hold.borrow_mut().take() {
            Some(hold) => {
                *self.held.0.lock().unwrap() = true;
                self.held.1.notify_all();
                async move {
                    let _ = hold.await;
                    Ok(())
                }
                .boxed()
            }
            None => std::future::ready(Ok(())).boxed(),
        }
    }

    fn cont(&self) -> BoxFuture<'_, Result<(), VmError>> {
        if self.state.get() == RunState::Shutdown {
            let state = RunState::Shutdown;
            return std::future::ready(Err(VmError::ResetRequired { state })).boxed();
        }
        self.state.set(RunState::Running);
        self.emit(VmEvent::Resume);
        std::future::ready(Ok(())).boxed()
    }

    fn system_reset(&self) -> BoxFuture<'_, Result<(), VmError>> {
        self.emit(VmEvent::Reset(ShutdownCause::HostQmpSystemReset));
        std::future::ready(Ok(())).boxed()
    }

    fn disks(&self) -> Vec<DiskInfo> {
        let disk = |(number, id): (usize, &str)| DiskInfo {
            id: id.to_owned(),
            qdev: format!("/machine/virtio-mmio@{number}/virtio-backend"),
        };
        ["vda", "vdb"].into_iter().enumerate().map(disk).collect()
    }

    fn iothreads(&self) -> Vec<IothreadInfo> {
        vec![IothreadInfo {
            id: "io0".to_owned(),
            thread_id: 42,
        }]
    }
}

pub(in super::super) fn machine(monitor: &Rc<Monitor>, state: RunState) -> FakeMachine {
    FakeMachine {
        monitor: Rc::downgrade(monitor),
        state: Cell::new(state),
        hold: RefCell::new(None),
        held: Arc::default(),
    }
}

#[test]
fn commands_of_the_machine_are_unknown_without_one() {
    with_monitor(
        |_| (),
        |path| {
            let mut client = Client::negotiated(path);
            for command in ["stop", "cont", "system_reset", "query-status", "query-name"] {
                assert_eq!(
                    client.ask(command)["error"],
                    json!({
                        "class": "CommandNotFound",
                        "desc": format!("The command {command} has not been found")
                    })
                );
            }
        },
    );
}

#[test]
fn the_guest_is_stopped_continued_and_reset_with_events_before_the_replies() {
    with_monitor(
        |monitor| monitor.set_machine(Rc::new(machine(monitor, RunState::Running))),
        |path| {
            let mut client = Client::negotiated(path);
            let status = client.ask("query-status")["return"].clone();
            assert_eq!(
                status,
                json!({"running": true, "singlestep": false, "status": "running"})
            );
            for (command, event) in [
                ("stop", "STOP"),
                ("cont", "RESUME"),
                ("system_reset", "RESET"),
            ] {
                assert_eq!(client.ask(command), json!({"return": {}}));
                assert_eq!(client.events.pop().unwrap()["event"], event);
                assert!(client.events.is_empty());
            }
            assert_eq!(
                client.ask("query-iothreads")["return"][0]["thread-id"],
                json!(42)
            );
            assert_eq!(client.ask("query-name"), json!({"return": {}}));
            let version = client.ask_with(
                "human-monitor-command",
                json!({"command-line": "info version"}),
            );
            assert!(version["return"].as_str().unwrap().contains("diptych"));
            let other =
                client.ask_with("human-monitor-command", json!({"command-line": "info pci"}));
            assert_eq!(other["return"], "unknown command: 'info'\r\n");
        },
    );
}

#[test]
fn a_refusal_of_the_machine_is_told() {
    with_monitor(
        |monitor| monitor.set_machine(Rc::new(machine(monitor, RunState::Shutdown))),
        |path| {
            let mut client = Client::negotiated(path);
            let text = client.refusal("cont", json!({}));
            assert!(text.contains("system_reset"), "{text}");
        },
    );
}

#[test]
fn a_command_that_waits_keeps_neither_other_monitors_nor_oob_waiting() {
    let (release, hold) = oneshot::channel();
    let held: Arc<(Mutex<bool>, Condvar)> = Arc::default();
    let is_held = Arc::clone(&held);
    let folder = tempfile::tempdir().unwrap();
    let second = folder.path().join("second.sock");
    let other_path = second.clone();
    with_monitor(
        move |monitor| {
            let machine = FakeMachine {
                hold: RefCell::new(Some(hold)),
                held,
                ..machine(monitor, RunState::Running)
            };
            monitor.set_machine(Rc::new(machine));
            let address = format!("unix:{}", second.display()).parse().unwrap();
            let socket = super::QmpSocket::bind(&address).unwrap();
            monitor.listen(socket).unwrap();
        },
        move |path| {
            let mut waiting = Client::connect(path);
            waiting.line();
            waiting.ask_with("qmp_capabilities", json!({"enable": ["oob"]}));
            waiting.send("{'execute':'stop','id':1}{'execute':'query-status','id':2}");
            drop(
                is_held
                    .1
                    .wait_while(is_held.0.lock().unwrap(), |held| !*held),
            );

            let mut other = Client::negotiated(&other_path);
            assert_eq!(other.ask("query-status")["return"]["status"], "paused");
            waiting.send("{'exec-oob':'query-status','id':3}");
            assert_eq!(waiting.reply()["id"], 3);

            release.send(()).unwrap();
            assert_eq!(waiting.reply()["id"], 1);
            assert_eq!(waiting.reply()["id"], 2);
        },
    );
}

#[test]
fn a_command_is_finished_though_its_client_is_gone() {
    let (release, hold) = oneshot::channel();
    let held: Arc<(Mutex<bool>, Condvar)> = Arc::default();
    let is_held = Arc::clone(&held);
    with_monitor(
        move |monitor| {
            monitor.set_machine(Rc::new(FakeMachine {
                hold: RefCell::new(Some(hold)),
                held,
                ..machine(monitor, RunState::Running)
            }));
        },
        move |path| {
            let mut leaver = Client::negotiated(path);
            leaver.send("{'execute':'stop'}");
            drop(
                is_held
                    .1
                    .wait_while(is_held.0.lock().unwrap(), |held| !*held),
            );
            drop(leaver);
            release.send(()).unwrap();
            let mut next = Client::negotiated(path);
            assert_eq!(next.ask("query-status")["return"]["status"], "paused");
        },
    );
}

#[test]
fn a_disk_is_moved_to_another_node_by_its_path_and_each_mistake_is_told() {
    let disk = "/machine/peripheral/vda";
    let with_disks = |monitor: &Rc<Monitor>| {
        monitor.set_machine(Rc::new(machine(monitor, RunState::Running)));
        let device = block::Permissions {
            need: block::Perm::CONSISTENT_READ | block::Perm::WRITE,
            share: block::Perm::CONSISTENT_READ,
        };
        for (id, name) in [("vda", "a"), ("vdb", "b")] {
            let driver = block::drivers::null::NullDriver::new(block::NullCoOptions {
                aio: false,
                size: 1 << 20,
                latency_ns: 0,
                read_zeroes: true,
            });
            let graph = &monitor.graph;
            let options = block::NodeOptions::default();
            let node = graph
                .add_node(Some(name), Box::new(driver), options)
                .unwrap();
            graph.attach(id, &node, device, None).unwrap();
        }
        // A name that is the end of two paths.
        let object = super::super::parse_object("throttle-group,id=vdb").unwrap();
        monitor.objects().add(object).unwrap();
    };
    with_monitor(with_disks, move |path| {
        let mut client = Client::negotiated(path);
        let null = |name: &str, size: u64| json!({"driver": "null-co", "node-name": name, "size": size, "read-zeroes": true});
        client.ask_with("blockdev-add", null("c", 1 << 20));
        client.ask_with("blockdev-add", null("small", 1 << 19));
        let mut ro = null("ro", 1 << 20);
        ro["read-only"] = true.into();
        client.ask_with("blockdev-add", ro);
        let set = |path: &str, property: &str, value: Value| json!({"path": path, "property": property, "value": value});
        let drive = |client: &mut Client, path: &str| {
            let arguments = json!({"path": path, "property": "drive"});
            client.ask_with("qom-get", arguments)["return"].clone()
        };
        let no_string = "Invalid parameter type for 'drive', expected: string";
        for (path, property, value, text) in [
            (
                disk,
                "drive",
                json!("nope"),
                "Cannot find device='' nor node-name='nope'",
            ),
            (
                disk,
                "drive",
                json!(""),
                "Cannot find device='' nor node-name=''",
            ),
            // A device's name is no node's.
            (
                disk,
                "drive",
                json!("vdb"),
                "Cannot find device='' nor node-name='vdb'",
            ),
            (disk, "drive", json!(null), no_string),
            (disk, "drive", json!({"node": "c"}), no_string),
            (disk, "drive", json!("ro"), "Block node is read-only"),
            (
                disk,
                "nope",
                json!("c"),
                "Property 'virtio-blk-device.nope' not found",
            ),
            (
                disk,
                "type",
                json!("c"),
                "Property 'virtio-blk-device.type' is not writable",
            ),
            (
                "/machine/peripheral/nope",
                "drive",
                json!("c"),
                "Device '/machine/peripheral/nope' not found",
            ),
            (
                "/machine/peripheral/vda/",
                "nope",
                json!("c"),
                "Property 'virtio-blk-device.nope' not found",
            ),
            (
                "/machine/peripheral",
                "vda",
                json!("c"),
                "Property 'container.vda' is not writable",
            ),
            (
                "/machine",
                "peripheral",
                json!("c"),
                "Property 'container.peripheral' is not writable",
            ),
            (
                "/machine",
                "nope",
                json!("c"),
                "Property 'container.nope' not found",
            ),
            (
                "virtio-backend",
                "drive",
                json!("c"),
                "Device 'virtio-backend' not found",
            ),
            ("vdb", "drive", json!("c"), "Device 'vdb' not found"),
        ] {
            let arguments = set(path, property, value);
            let shown = arguments.to_string();
            assert_eq!(client.refusal("qom-set", arguments), text, "{shown}");
        }
        for (node, text) in [
            ("small", "would see its size change"),
            (
                "b",
                "Permission conflict on node 'b': permissions 'write' are both required by",
            ),
        ] {
            let refusal = client.refusal("qom-set", set(disk, "drive", json!(node)));
            assert!(refusal.contains(text), "{refusal}");
        }
        assert_eq!(drive(&mut client, disk), "a");
        for (path, node) in [
            (disk, "c"),
            ("vda", "a"),
            ("peripheral/vda", "c"),
            ("/machine/virtio-mmio@0/virtio-backend", "a"),
        ] {
            let done = client.ask_with("qom-set", set(path, "drive", json!(node)));
            assert_eq!(done, json!({"return": {}}), "{path}");
            assert_eq!(drive(&mut client, path), node);
            let shown = client.ask("query-block")["return"][0].clone();
            assert_eq!(shown["inserted"]["node-name"], node);
        }
        let list = |client: &mut Client, path: &str| {
            client.ask_with("qom-list", json!({"path": path}))["return"].clone()
        };
        let kind = json!({"name": "type", "type": "string"});
        let disk_type = "child<virtio-blk-device>";
        assert_eq!(list(&mut client, "/")[2]["name"], "machine");
        assert_eq!(list(&mut client, "/machine")[1]["name"], "peripheral");
        assert_eq!(
            list(&mut client, "/machine/peripheral"),
            json!([
                kind,
                {"name": "vda", "type": disk_type},
                {"name": "vdb", "type": disk_type}
            ])
        );
        assert_eq!(
            list(&mut client, disk),
            json!([kind, {"name": "drive", "type": "str"}])
        );
        let of_type = json!({"typename": "virtio-blk-device"});
        let properties = client.ask_with("qom-list-properties", of_type)["return"].clone();
        assert_eq!(properties, list(&mut client, disk));
        let at = |name: &str| json!({"path": "/machine/peripheral", "property": name});
        assert_eq!(client.ask_with("qom-get", at("vda"))["return"], disk);
    });
}
