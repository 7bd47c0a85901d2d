//! KVM's part of a machine: the VM, its interrupt controllers, the wiring of
//! event descriptors, and the vCPU threads. Made anew at each restart of the
//! guest, so that no state of the last one survives in KVM.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use devices::VirtioMmio;
use futures_channel::mpsc::UnboundedSender;
use kvm_bindings::{KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};

use super::board::Board;
use super::boot::Entry;
use super::cpuid::HostCpuid;
use super::run_control::{ParkedNotice, RunControl};
use super::vcpu::Generation;
use super::{MachineError, MachineEvent, irq, kick, layout, memory, vcpu};

const KVM_PATH: &str = "/dev/kvm";

/// Opens KVM and checks that it has what no guest can do without.
pub fn open() -> Result<Kvm, MachineError> {
    let path = Path::new(KVM_PATH);
    let kvm = Kvm::new().map_err(|source| match source.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => MachineError::NoKvm { path: path.into() },
        libc::EACCES | libc::EPERM => MachineError::KvmPermission { path: path.into() },
        _ => MachineError::OpenKvm {
            path: path.into(),
            source,
        },
    })?;
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(MachineError::KvmLacks {
            what: "the stable API (version 12)",
        });
    }
    for (cap, what) in [
        (Cap::UserMemory, "memory slots"),
        (Cap::Irqchip, "an interrupt controller"),
        (Cap::Irqfd, "interrupts by event descriptor (irqfd)"),
        (Cap::ImmediateExit, "immediate exits"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(MachineError::KvmLacks { what });
        }
    }
    Ok(kvm)
}

/// A VM and its vCPU threads. Dropping it ends them.
pub struct KvmVm {
    control: Arc<RunControl>,
    /// Before `_vm`: vCPUs go first.
    threads: Vec<JoinHandle<()>>,
    _vm: VmFd,
}

impl KvmVm {
    /// Makes a VM around the board, with its vCPUs parked at `entry`. Their
    /// crashes are reported to `events` with `generation`.
    pub fn start(
        kvm: &Kvm,
        cpuid: &HostCpuid,
        board: &Board,
        entry: Entry,
        generation: Generation,
        events: &UnboundedSender<MachineEvent>,
        notices: UnboundedSender<ParkedNotice>,
    ) -> Result<Self, MachineError> {
        let limit = kvm.get_max_vcpus();
        if usize::from(board.cpus) > limit {
            return Err(MachineError::TooManyCpus {
                cpus: board.cpus,
                limit,
            });
        }
        let vm = create_vm(kvm)?;
        memory::register(&vm, &board.mem)?;
        connect(&vm, board)?;
        let control = RunControl::new(board.cpus.into(), notices);
        let mut this = Self {
            control: Arc::clone(&control),
            threads: Vec::with_capacity(board.cpus.into()),
            _vm: vm,
        };
        let mut vcpus = Vec::with_capacity(board.cpus.into());
        for index in 0..board.cpus {
            vcpus.push((
                index,
                vcpu::create(&this._vm, cpuid, index, board.cpus, entry)?,
            ));
        }
        for (index, vcpu) in vcpus {
            this.threads.push(vcpu::spawn(
                vcpu,
                (generation, index),
                Arc::clone(&board.buses),
                Arc::clone(&control),
                events.clone(),
            )?);
        }
        Ok(this)
    }

    /// Lets the vCPUs run.
    pub fn run(&self) {
        self.control.request_run();
    }

    /// Asks the vCPUs to park: the notice to wait for, or `None` if they are.
    #[must_use]
    pub fn pause(&self) -> Option<ParkedNotice> {
        let notice = self.control.request_pause();
        self.threads.iter().for_each(kick::kick);
        notice
    }
}

impl Drop for KvmVm {
    /// Ends the threads. Takes as long as the access that a vCPU is in.
    fn drop(&mut self) {
        self.control.request_exit();
        for thread in self.threads.drain(..) {
            kick::kick(&thread);
            if thread.join().is_err() {
                tracing::error!("A vCPU thread panicked");
            }
        }
    }
}

/// Creates the VM with its interrupt controllers and timer.
fn create_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    let error = |what| move |source| MachineError::Kvm { what, source };
    let vm = loop {
        match kvm.create_vm() {
            Ok(vm) => break vm,
            Err(error) if error.errno() == libc::EINTR => {}
            Err(source) => {
                return Err(MachineError::Kvm {
                    what: "create a VM",
                    source,
                });
            }
        }
    };
    // Needed on Intel processors; others may not know them.
    if let Err(error) = vm.set_identity_map_address(layout::IDENTITY_MAP_GPA) {
        tracing::info!("KVM takes no identity map address ({error})");
    }
    if let Err(error) = vm.set_tss_address(layout::TSS_GPA as usize) {
        tracing::info!("KVM takes no TSS address ({error})");
    }
    vm.create_irq_chip()
        .map_err(error("create the interrupt controllers"))?;
    // The guest is told of no such timer, but some look for it all the same.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    if let Err(error) = vm.create_pit2(pit) {
        tracing::info!("KVM has no PIT ({error}); the guest has to use its local timers");
    }
    Ok(vm)
}

/// Binds the devices' event descriptors: interrupts as irqfds, queue
/// notifications as ioeventfds.
fn connect(vm: &VmFd, board: &Board) -> Result<(), MachineError> {
    let irqfd_error = |source| MachineError::Kvm {
        what: "bind an interrupt to an event descriptor",
        source,
    };
    vm.register_irqfd(board.serial.interrupt_evt(), irq::SERIAL_GSI)
        .map_err(irqfd_error)?;
    for slot in &board.virtio {
        vm.register_irqfd(slot.transport.interrupt_evt(), slot.gsi)
            .map_err(irqfd_error)?;
        let notify = IoEventAddress::Mmio(slot.gpa + VirtioMmio::NOTIFY_OFFSET);
        for (queue, event) in (0_u32..).zip(slot.transport.queue_evts()) {
            // Without, the register's write does the same by an exit.
            if let Err(error) = vm.register_ioevent(event, &notify, queue) {
                tracing::warn!("KVM binds no queue notification ({error}); disks will be slower");
            }
        }
    }
    Ok(())
}
