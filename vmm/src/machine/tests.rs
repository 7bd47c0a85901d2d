//! Whole machines with tiny kernels, on the host's KVM.

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use block::runtime::{EventLoop, yield_now};
use vm_memory::{Bytes, GuestAddress};

use super::test_kernel::{COUNT, COUNTER_GPA, CRASH, POWER_OFF, RESET, SAY_K, elf};
use super::vcpu::{Crash, CrashKind};
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
                let mem = &rig.machine.board().mem;
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
            let mem = Arc::clone(&rig.machine.board().mem);
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

/// A crash of a vCPU in the given start of the guest.
fn crash(generation: u64, vcpu: u8) -> Crash {
    Crash {
        generation,
        vcpu,
        kind: CrashKind::TripleFault,
        report: "staged".to_owned(),
    }
}

/// Runs `work` until it is done; other tasks have had many turns when it returns.
async fn settled(work: impl Future<Output = Result<(), VmError>>) {
    work.await.unwrap();
    for _ in 0..100 {
        yield_now().await;
    }
}

#[test]
fn a_power_off_that_meets_a_stop_ends_the_guest_when_it_goes_on() {
    with_machine(
        "a_power_off_that_meets_a_stop_ends_the_guest_when_it_goes_on",
        &[COUNT],
        |_| {},
        async |rig| {
            rig.machine.cont().await.unwrap();
            // Asked for, but not begun: main has not had a turn.
            let stopping = rig.machine.stop();
            rig.machine.board().power_off_evt.write(1).unwrap();
            settled(stopping).await;
            assert_eq!(rig.machine.run_state(), RunState::Paused);
            rig.machine.cont().await.unwrap();
            assert_eq!(rig.machine.ended().await, GuestEnd::PoweredOff);
            assert_eq!(
                *rig.events.borrow(),
                [
                    VmEvent::Resume,
                    VmEvent::Stop,
                    VmEvent::Resume,
                    VmEvent::Shutdown(ShutdownCause::GuestShutdown)
                ]
            );
        },
    );
}

#[test]
fn a_guests_reset_that_meets_a_stop_is_done_when_it_goes_on() {
    with_machine(
        "a_guests_reset_that_meets_a_stop_is_done_when_it_goes_on",
        &[COUNT],
        |spec| spec.on_reboot = RebootPolicy::Reset,
        async |rig| {
            rig.machine.cont().await.unwrap();
            let stopping = rig.machine.stop();
            rig.machine.board().reset_evt.write(1).unwrap();
            settled(stopping).await;
            let reset = VmEvent::Reset(ShutdownCause::GuestReset);
            assert!(!rig.events.borrow().contains(&reset));
            rig.machine.cont().await.unwrap();
            assert_eq!(rig.events.borrow().last(), Some(&reset));
            let mem = &rig.machine.board().mem;
            until(|| mem.read_obj::<u32>(GuestAddress(COUNTER_GPA)).unwrap() != 0).await;
        },
    );
}

#[test]
fn a_reset_forgets_what_the_guest_before_it_asked_for() {
    with_machine(
        "a_reset_forgets_what_the_guest_before_it_asked_for",
        &[COUNT],
        |_| {},
        async |rig| {
            let mem = &rig.machine.board().mem;
            let count = || mem.read_obj::<u32>(GuestAddress(COUNTER_GPA)).unwrap();
            rig.machine.cont().await.unwrap();
            let stopping = rig.machine.stop();
            rig.machine.board().power_off_evt.write(1).unwrap();
            settled(stopping).await;
            rig.machine.system_reset().await.unwrap();
            settled(rig.machine.cont()).await;
            until(|| count() != 0).await;
            assert_eq!(rig.machine.run_state(), RunState::Running);
        },
    );
}

#[test]
fn a_crash_that_meets_a_stop_is_reported_and_the_guest_cannot_go_on() {
    with_machine(
        "a_crash_that_meets_a_stop_is_reported_and_the_guest_cannot_go_on",
        &[COUNT],
        |_| {},
        async |rig| {
            rig.machine.cont().await.unwrap();
            let stopping = rig.machine.stop();
            rig.machine.report(crash(0, 1));
            settled(stopping).await;
            assert_eq!(rig.machine.run_state(), RunState::Shutdown);
            assert!(rig.machine.crashed());
            assert!(matches!(
                rig.machine.cont().await,
                Err(VmError::ResetRequired { .. })
            ));
            let panic = VmEvent::Shutdown(ShutdownCause::GuestPanic);
            assert_eq!(
                *rig.events.borrow(),
                [VmEvent::Resume, VmEvent::Stop, panic]
            );
        },
    );
}

#[test]
fn a_second_vcpus_crash_does_not_reset_the_fresh_guest() {
    with_machine(
        "a_second_vcpus_crash_does_not_reset_the_fresh_guest",
        &[COUNT],
        |spec| spec.on_crash = CrashPolicy::Reset,
        async |rig| {
            rig.machine.cont().await.unwrap();
            rig.machine.report(crash(0, 0));
            rig.machine.report(crash(0, 1));
            let reset = VmEvent::Reset(ShutdownCause::GuestReset);
            until(|| rig.events.borrow().contains(&reset)).await;
            // Answered after the second report.
            settled(rig.machine.stop()).await;
            assert_eq!(
                *rig.events.borrow(),
                [VmEvent::Resume, reset, VmEvent::Stop]
            );
            rig.machine.report(crash(1, 0));
            until(|| rig.events.borrow().len() == 4).await;
            assert_eq!(
                rig.events.borrow()[3],
                reset,
                "the new guest's own crash counts"
            );
            assert_eq!(rig.machine.run_state(), RunState::Paused);
        },
    );
}

#[test]
fn a_guest_that_powers_off_just_when_it_is_stopped_ends_after_cont() {
    for _ in 0..30 {
        with_machine(
            "a_guest_that_powers_off_just_when_it_is_stopped_ends_after_cont",
            &[SAY_K, POWER_OFF],
            |_| {},
            async |rig| {
                rig.machine.cont().await.unwrap();
                // Main has no turn until the guest is at its last instructions.
                while rig.console.text().is_empty() {
                    std::thread::yield_now();
                }
                rig.machine.stop().await.unwrap();
                // It has ended already if it was quicker than the stop.
                let _ = rig.machine.cont().await;
                assert_eq!(rig.machine.ended().await, GuestEnd::PoweredOff);
            },
        );
    }
}

/// A device whose code has a mistake.
struct Panicking;

impl Write for Panicking {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        panic!("staged")
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_panic_on_a_vcpu_thread_is_a_crash_and_holds_nobody() {
    with_machine(
        "a_panic_on_a_vcpu_thread_is_a_crash_and_holds_nobody",
        &[SAY_K, POWER_OFF],
        |spec| spec.serial_output = Box::new(Panicking),
        async |rig| {
            for round in 1..3 {
                if round == 1 {
                    rig.machine.cont().await.unwrap();
                } else {
                    rig.machine.system_reset().await.unwrap();
                }
                until(|| rig.machine.run_state() == RunState::InternalError).await;
                assert!(rig.machine.crashed());
                rig.machine.stop().await.unwrap();
            }
            assert_eq!(rig.events.borrow().last(), Some(&VmEvent::Stop));
        },
    );
}
