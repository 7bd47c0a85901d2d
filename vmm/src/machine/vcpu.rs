//! A vCPU: its creation, and the thread that runs it.
//!
//! The loop enters the guest, serves its port and MMIO accesses on the buses,
//! and heeds what [`RunControl`] asks. What ends the guest (a triple fault, an
//! error of KVM) is told to main, and the thread parks.

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use devices::{Bus, MmioDevice, MmioOutcome, PioDevice, ResetTicket};
use futures_channel::mpsc::UnboundedSender;
use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use super::boot::Entry;
use super::cpuid::HostCpuid;
use super::kick::{self, Kickable};
use super::run_control::{Request, RunControl, Unparked};
use super::{MachineError, MachineEvent, msrs};

/// How long a vCPU waits for a device's reset before it looks whether it shall
/// do something else.
const TICKET_SLICE: Duration = Duration::from_millis(20);

/// The devices that vCPUs reach.
pub struct Buses {
    /// By I/O port.
    pub pio: Bus<dyn PioDevice>,
    /// By guest-physical address.
    pub mmio: Bus<dyn MmioDevice>,
}

/// Why a vCPU cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashKind {
    /// The guest did what a processor answers with a shutdown.
    TripleFault,
    /// KVM gave up on the guest, or a device did by a panic.
    KvmError,
}

/// Counts a guest's starts, so that what an earlier one did is told apart.
pub type Generation = u64;

/// A vCPU's end: what happened and where.
#[derive(Clone, Debug)]
pub struct Crash {
    /// Of the guest's start that the vCPU belongs to.
    pub generation: Generation,
    /// Index of the vCPU.
    pub vcpu: u8,
    /// What happened.
    pub kind: CrashKind,
    /// The same for people, with the registers.
    pub report: String,
}

/// Creates vCPU `index` of `cpus` and sets it up; the first starts at `entry`,
/// the others wait to be started by it.
pub fn create(
    vm: &VmFd,
    cpuid: &HostCpuid,
    index: u8,
    cpus: u8,
    entry: Entry,
) -> Result<VcpuFd, MachineError> {
    let error = |what| move |source| MachineError::Kvm { what, source };
    let vcpu = vm
        .create_vcpu(u64::from(index))
        .map_err(error("create a vCPU"))?;
    cpuid.apply(&vcpu, index, cpus)?;
    msrs::apply(&vcpu);
    connect_local_interrupts(&vcpu);
    // KVM leaves all but the first waiting for INIT and SIPI.
    if index == 0 {
        vcpu.set_regs(&entry.regs())
            .map_err(error("set the registers of a vCPU"))?;
        let mut sregs = vcpu
            .get_sregs()
            .map_err(error("read the system registers of a vCPU"))?;
        entry.change_sregs(&mut sregs);
        vcpu.set_sregs(&sregs)
            .map_err(error("set the system registers of a vCPU"))?;
    }
    Ok(vcpu)
}

/// Wires LINT0 to the 8259s and LINT1 to NMI, as firmware does.
fn connect_local_interrupts(vcpu: &VcpuFd) {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 0x400;
    const MODE_EXTINT: u32 = 0x700;
    let connected = vcpu.get_lapic().and_then(|mut lapic| {
        for (register, value) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
            for (at, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
                *at = byte as _;
            }
        }
        vcpu.set_lapic(&lapic)
    });
    if let Err(error) = connected {
        tracing::info!("KVM does not connect the local interrupts ({error})");
    }
}

/// Starts the thread of a vCPU, known by its generation and its index in that;
/// it parks until it is asked to run.
pub fn spawn(
    vcpu: VcpuFd,
    (generation, index): (Generation, u8),
    buses: Arc<Buses>,
    control: Arc<RunControl>,
    events: UnboundedSender<MachineEvent>,
) -> Result<JoinHandle<()>, MachineError> {
    kick::install_handler().map_err(|source| MachineError::Thread { source })?;
    thread::Builder::new()
        .name(format!("vcpu{index}"))
        .spawn(move || {
            let mut thread = VcpuThread {
                vcpu: Kickable::new(vcpu),
                generation,
                index,
                buses,
                control,
                access_pending: false,
            };
            if let Err(crash) = thread.run_or_panic() {
                let control = Arc::clone(&thread.control);
                // Nobody listens when the machine is being taken down.
                let _ = events.unbounded_send(MachineEvent::Crashed(crash));
                control.park_for_good();
            }
        })
        .map_err(|source| MachineError::Thread { source })
}

struct VcpuThread {
    vcpu: Kickable,
    generation: Generation,
    index: u8,
    buses: Arc<Buses>,
    control: Arc<RunControl>,
    /// The last exit was an access whose instruction ends with the next entry.
    access_pending: bool,
}

/// What an exit means for the loop.
enum Step {
    /// Enter the guest again.
    Continue,
    /// The same, but first wait for a device.
    Wait(ResetTicket),
    /// The thread was asked to end.
    Exit,
}

impl VcpuThread {
    /// As [`Self::run`]; a panic of a device is this vCPU's end, too. Had it
    /// ended the thread, every pause would wait for it to park.
    fn run_or_panic(&mut self) -> Result<(), Crash> {
        // Devices heed the poison of their locks, or do not need to; and this
        // vCPU enters the guest no more.
        match catch_unwind(AssertUnwindSafe(|| self.run())) {
            Ok(result) => result,
            Err(payload) => Err(self.crash(&Failure::Panic(panic_text(&*payload).to_owned()))),
        }
    }

    /// Runs the vCPU until the thread is asked to end (`Ok`) or it cannot go on.
    fn run(&mut self) -> Result<(), Crash> {
        loop {
            if self.control.requested() != Request::Run {
                if let Step::Exit = self.finish_access()? {
                    return Ok(());
                }
                if self.control.park() == Unparked::Exit {
                    return Ok(());
                }
                continue;
            }
            if let Step::Exit = self.enter()? {
                return Ok(());
            }
        }
    }

    /// Enters the guest once, and serves what it left for.
    fn enter(&mut self) -> Result<Step, Crash> {
        match self.enter_and_serve()? {
            Step::Wait(ticket) => Ok(self.wait(&ticket)),
            step => Ok(step),
        }
    }

    /// Lets KVM finish the instruction of the last access, so that the vCPU's
    /// registers are those of an instruction boundary.
    fn finish_access(&mut self) -> Result<Step, Crash> {
        while self.access_pending {
            self.vcpu.set_immediate_exit();
            if let Step::Exit = self.enter()? {
                return Ok(Step::Exit);
            }
        }
        Ok(Step::Continue)
    }

    /// Waits until a device is reset, parked in between if asked to pause.
    fn wait(&self, ticket: &ResetTicket) -> Step {
        while !ticket.wait_timeout(TICKET_SLICE) {
            match self.control.requested() {
                Request::Run => {}
                Request::Pause => {
                    if self.control.park() == Unparked::Exit {
                        return Step::Exit;
                    }
                }
                Request::Exit => return Step::Exit,
            }
        }
        Step::Continue
    }

    fn enter_and_serve(&mut self) -> Result<Step, Crash> {
        self.access_pending = false;
        let exit = self.vcpu.vcpu().run();
        let failure = match exit {
            Ok(VcpuExit::IoIn(..)) => {
                self.access_pending = true;
                self.serve_pio(true);
                return Ok(Step::Continue);
            }
            Ok(VcpuExit::IoOut(..)) => {
                self.access_pending = true;
                self.serve_pio(false);
                return Ok(Step::Continue);
            }
            Ok(VcpuExit::MmioRead(gpa, data)) => {
                self.access_pending = true;
                self.buses.mmio.read(gpa, data);
                return Ok(Step::Continue);
            }
            Ok(VcpuExit::MmioWrite(gpa, data)) => {
                self.access_pending = true;
                return Ok(match self.buses.mmio.write(gpa, data) {
                    MmioOutcome::Done => Step::Continue,
                    MmioOutcome::Wait(ticket) => Step::Wait(ticket),
                });
            }
            // Not seen with KVM's own interrupt controller, and harmless.
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {
                return Ok(Step::Continue);
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                // A kick. It is noted before the request is looked at.
                self.vcpu.clear_immediate_exit();
                return Ok(Step::Continue);
            }
            Ok(VcpuExit::Shutdown) => Failure::TripleFault,
            Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_CRASH => {
                    Failure::SystemEvent(kind)
                }
                _ => return Ok(Step::Continue),
            },
            Ok(VcpuExit::InternalError) => Failure::InternalError,
            Ok(VcpuExit::FailEntry(reason, cpu)) => Failure::FailEntry { reason, cpu },
            Ok(other) => Failure::Unexpected(format!("{other:?}")),
            Err(error) => Failure::Run(error),
        };
        Err(self.crash(&failure))
    }

    /// Serves a port access, element by element (`rep insb` has several).
    fn serve_pio(&mut self, input: bool) {
        let (port, size, data) = pio_of(self.vcpu.vcpu().get_kvm_run());
        for element in data.chunks_mut(size) {
            if input {
                self.buses.pio.read(port, element);
            } else {
                self.buses.pio.write(port, element);
            }
        }
    }

    fn crash(&mut self, failure: &Failure) -> Crash {
        let detail = match failure {
            Failure::InternalError => internal_error_of(self.vcpu.vcpu().get_kvm_run()),
            other => other.to_string(),
        };
        let registers = Registers(self.vcpu.vcpu());
        Crash {
            generation: self.generation,
            vcpu: self.index,
            kind: match failure {
                Failure::TripleFault => CrashKind::TripleFault,
                _ => CrashKind::KvmError,
            },
            report: format!("{detail}; {registers}"),
        }
    }
}

/// Why `KVM_RUN` did not go on.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("Triple fault")]
    TripleFault,
    #[error("KVM reports system event {0}")]
    SystemEvent(u32),
    #[error("KVM internal error")]
    InternalError,
    #[error("KVM cannot enter the guest, hardware reason {reason:#x} on host CPU {cpu}")]
    FailEntry { reason: u64, cpu: u32 },
    #[error("Unexpected exit {0}")]
    Unexpected(String),
    #[error("KVM_RUN failed: {0}")]
    Run(kvm_ioctls::Error),
    #[error("Internal panic while it served the guest: {0}")]
    Panic(String),
}

/// What a panic said.
fn panic_text(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&str>() {
        text
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text
    } else {
        "no reason given"
    }
}

/// Port, size of an element and data of a `KVM_EXIT_IO`.
fn pio_of(run: &mut kvm_run) -> (u16, usize, &mut [u8]) {
    let base: *mut kvm_run = run;
    // SAFETY: called after an exit of kind IO only, for which the kernel fills
    // this member of the union.
    let io = unsafe { run.__bindgen_anon_1.io };
    let size = usize::from(io.size).max(1);
    let len = size * io.count as usize;
    // SAFETY: the kernel puts the data at this offset inside the vCPU's mapping,
    // which `run` is the beginning of; it is not touched again before the next
    // KVM_RUN, for which the borrow has to end.
    let data = unsafe {
        std::slice::from_raw_parts_mut(base.cast::<u8>().add(io.data_offset as usize), len)
    };
    (io.port, size, data)
}

/// What KVM says of an internal error.
fn internal_error_of(run: &mut kvm_run) -> String {
    // SAFETY: called after an exit of kind INTERNAL_ERROR only, for which the
    // kernel fills this member of the union.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let data = &internal.data[..internal.data.len().min(internal.ndata as usize)];
    let kind = match internal.suberror {
        1 => "cannot emulate an instruction",
        2 => "an exception during the delivery of another",
        3 => "an exception during the delivery of an interrupt",
        4 => "an unexpected hardware exit",
        _ => "unknown",
    };
    format!(
        "KVM internal error {} ({kind}), data {data:x?}",
        internal.suberror
    )
}

/// A vCPU's registers for the log.
struct Registers<'a>(&'a VcpuFd);

impl fmt::Display for Registers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Ok(r), Ok(s)) = (self.0.get_regs(), self.0.get_sregs()) else {
            return f.write_str("registers not readable");
        };
        write!(
            f,
            "rip={:#x} rsp={:#x} rbp={:#x} rflags={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} \
             rsi={:#x} rdi={:#x} r8={:#x} r9={:#x} r10={:#x} r11={:#x} r12={:#x} r13={:#x} \
             r14={:#x} r15={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x} cs={:#x} \
             ss={:#x} gdt={:#x} idt={:#x}",
            r.rip,
            r.rsp,
            r.rbp,
            r.rflags,
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            r.r8,
            r.r9,
            r.r10,
            r.r11,
            r.r12,
            r.r13,
            r.r14,
            r.r15,
            s.cr0,
            s.cr2,
            s.cr3,
            s.cr4,
            s.efer,
            s.cs.selector,
            s.ss.selector,
            s.gdt.base,
            s.idt.base,
        )
    }
}
