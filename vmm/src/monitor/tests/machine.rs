//! Commands of the machine, with a machine that does what the test says.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::{Arc, Condvar, Mutex};

use block::BoxFuture;
use futures_channel::oneshot;
use futures_util::FutureExt;
use serde_json::json;

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
        Vec::new()
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
