//! Whole machines with tiny kernels, on the host's KVM.

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use block::runtime::{EventLoop, yield_now};
use vm_memory::{Bytes, GuestAddress};

use super::test_kernel::{COUNT, COUNTER_GPA, CRASH, POWER_OFF, RESET, SAY_K, elf};
use super::*;
use crate::vm_control::{RunState, ShutdownCause, VmControl, VmError, VmEvent};

/// What the guest has said.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A machine under test.
struct Rig {
    machine: Machine,
    console: Console,
    events: Rc<RefCell<Vec<VmEvent>>>,
}

fn spec(kernel: &Path, protocol: BootProtocol, console: &Console) -> MachineSpec {
    MachineSpec {
        memory: 16 * MIB,
        cpus: 2,
        images: BootImages::open(kernel, None, "test", protocol).unwrap(),
        disks: Vec::new(),
        iothreads: Vec::new(),
        serial_output: Box::new(console.clone()),
        on_reboot: RebootPolicy::Exit,
        on_crash: CrashPolicy::Pause,
    }
}

/// Runs `test` with a machine that boots `code`; not at all without KVM.
fn with_machine(
    name: &str,
    code: &[&[u8]],
    change: impl FnOnce(&mut MachineSpec),
    test: impl AsyncFnOnce(&Rig),
) {
    if let Err(error) = kvm::open() {
        println!("SKIPPED {name}: {error}");
        return;
    }
    let kernel = elf(&code.concat(), true);
    let console = Console::default();
    let mut spec = spec(&kernel, BootProtocol::Auto, &console);
    change(&mut spec);
    let event_loop = EventLoop::new("test").unwrap();
    event_loop.block_on(async {
        let events = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&events);
        let machine = Machine::build(spec, move |event| sink.borrow_mut().push(event)).unwrap();
        let rig = Rig {
            machine,
            console,
            events,
        };
        test(&rig).await;
        rig.machine.take_down().await;
        assert!(matches!(
            rig.machine.cont().await,
            Err(VmError::ShuttingDown)
        ));
    });
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        yield_now().await;
    }
}

#[test]
fn a_kernel_entered_by_pvh_speaks_and_powers_off() {
    with_machine(
        "a_kernel_entered_by_pvh_speaks_and_powers_off",
        &[SAY_K, POWER_OFF],
        |_| {},
        async |rig| {
            assert_eq!(rig.machine.run_state(), RunState::Prelaunch);
            rig.machine.cont().await.unwrap();
            assert_eq!(rig.machine.ended().await, GuestEnd::PoweredOff);
            assert_eq!(rig.machine.run_state(), RunState::Shutdown);
            assert_eq!(rig.console.text(), "k");
            assert_eq!(
                *rig.events.borrow(),
                [
                    VmEvent::Resume,
                    VmEvent::Shutdown(ShutdownCause::GuestShutdown)
                ]
            );
        },
    );
}

#[test]
fn a_kernel_entered_by_the_64_bit_protocol_speaks_and_resets() {
    let kernel = elf(&[SAY_K, RESET].concat(), false);
    with_machine(
        "a_kernel_entered_by_the_64_bit_protocol_speaks_and_resets",
        &[],
        |spec| {
            spec.images = BootImages::open(&kernel, None, "", BootProtocol::Auto).unwrap();
        },
        async |rig| {
            rig.machine.cont().await.unwrap();
            assert_eq!(rig.machine.ended().await, GuestEnd::Rebooted);
            assert_eq!(rig.console.text(), "k");
        },
    );
}

#[test]
fn a_guest_that_resets_itself_boots_again_if_the_policy_says_so() {
    with_machine(
        "a_guest_that_resets_itself_boots_again_if_the_policy_says_so",
        &[SAY_K, RESET],
        |spec| spec.on_reboot = RebootPolicy::Reset,
        async |rig| {
            rig.machine.cont().await.unwrap();
            until(|| rig.console.text().len() >= 4).await;
            rig.machine.stop().await.unwrap();
            let resets = rig.events.borrow();
            assert!(resets.contains(&VmEvent::Reset(ShutdownCause::GuestReset)));
            assert!(rig.machine.run_state() == RunState::Paused);
        },
    );
}

#[test]
fn stopped_vcpus_run_no_guest_code_and_go_on_after_cont() {
    with_machine(
        "stopped_vcpus_run_no_guest_code_and_go_on_after_cont",
        &[COUNT],
        |_| {},
        async |rig| {
            let count = || {
                let mem = rig.machine.memory();
                mem.read_obj::<u32>(GuestAddress(COUNTER_GPA)).unwrap()
            };
            for _ in 0..50 {
                let before = count();
                rig.machine.cont().await.unwrap();
                until(|| count() != before).await;
                rig.machine.stop().await.unwrap();
                let stopped = count();
                // Far more turns than the guest needed to count once.
                for _ in 0..100 {
                    yield_now().await;
                }
                assert_eq!(count(), stopped);
            }
        },
    );
}

#[test]
fn a_reset_finds_memory_cleared_and_keeps_a_stopped_guest_stopped() {
    with_machine(
        "a_reset_finds_memory_cleared_and_keeps_a_stopped_guest_stopped",
        &[COUNT],
        |_| {},
        async |rig| {
            let mem = Arc::clone(rig.machine.memory());
            let count = || mem.read_obj::<u32>(GuestAddress(COUNTER_GPA)).unwrap();
            rig.machine.cont().await.unwrap();
            until(|| count() != 0).await;
            rig.machine.stop().await.unwrap();
            rig.machine.system_reset().await.unwrap();
            assert_eq!(rig.machine.run_state(), RunState::Paused);
            assert_eq!(count(), 0);
            rig.machine.cont().await.unwrap();
            until(|| count() != 0).await;
        },
    );
}

#[test]
fn a_triple_fault_stops_the_guest_until_it_is_reset() {
    with_machine(
        "a_triple_fault_stops_the_guest_until_it_is_reset",
        &[SAY_K, CRASH],
        |_| {},
        async |rig| {
            for round in 1..3 {
                if round == 1 {
                    rig.machine.cont().await.unwrap();
                } else {
                    rig.machine.system_reset().await.unwrap();
                }
                until(|| rig.machine.run_state() == RunState::Shutdown).await;
                assert!(rig.machine.crashed());
                assert!(matches!(
                    rig.machine.cont().await,
                    Err(VmError::ResetRequired {
                        state: RunState::Shutdown
                    })
                ));
                assert_eq!(rig.console.text().len(), round);
            }
            assert_eq!(rig.events.borrow().last(), Some(&VmEvent::Stop));
        },
    );
}
