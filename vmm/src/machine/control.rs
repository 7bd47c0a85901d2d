//! Running the machine: start, stop, reset, and what happens when the guest
//! ends. One task on main carries out one operation after another; nothing
//! here takes a lock.

use std::cell::{Cell, RefCell};
use std::io::Write;
use std::rc::Rc;
use std::sync::{Arc, Weak};

use block::BoxFuture;
use block::runtime::{AsyncFd, Interest, spawn_local, unblock};
use devices::{Serial, VirtioBlk, VirtioMmio};
use futures_channel::{mpsc, oneshot};
use futures_util::StreamExt;
use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::EventFd;

use super::board::Board;
use super::boot::BootImages;
use super::cpuid::{self, HostCpuid};
use super::kvm::{self, KvmVm};
use super::run_control::ParkedNotice;
use super::vcpu::{Crash, CrashKind, Generation};
use super::{MachineError, MachineEvent, memory};
use crate::stdio::complain;
use crate::vm_control::{
    DiskInfo, IothreadInfo, RunState, ShutdownCause, VmControl, VmError, VmEvent,
};

/// What a guest's own request to be reset does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum RebootPolicy {
    /// The process ends, with status 0.
    #[default]
    Exit,
    /// The guest boots again.
    Reset,
}

/// What a guest's crash does: a triple fault, or an error of KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CrashPolicy {
    /// The guest stays stopped; monitors and block jobs go on.
    #[default]
    Pause,
    /// The process ends, with status 3.
    Exit,
    /// The guest boots again.
    Reset,
}

/// How the guest ended, when that ends the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It powered off.
    PoweredOff,
    /// It wanted a reset, and the policy is to exit.
    Rebooted,
    /// It crashed, and the policy is to exit.
    Crashed,
    /// It could not be started again.
    RestartFailed,
}

/// What a machine is made of.
pub struct MachineSpec {
    /// Memory in bytes.
    pub memory: u64,
    /// Number of vCPUs, 1 to `MAX_CPUS`.
    pub cpus: u8,
    /// What to boot.
    pub images: BootImages,
    /// The disks' devices.
    pub disks: Vec<Arc<VirtioBlk>>,
    /// What the monitor is told of iothreads.
    pub iothreads: Vec<IothreadInfo>,
    /// Where the serial port's output goes; written on vCPU threads.
    pub serial_output: Box<dyn Write + Send>,
    /// What a guest's wish for a reset does.
    pub on_reboot: RebootPolicy,
    /// What a crash does.
    pub on_crash: CrashPolicy,
}

/// An operation, and whom to tell when it is done.
enum Command {
    Stop(oneshot::Sender<Result<(), VmError>>),
    Cont(oneshot::Sender<Result<(), VmError>>),
    Reset(oneshot::Sender<Result<(), VmError>>),
    TakeDown(oneshot::Sender<()>),
    Guest(Generation, Wish),
    Crashed(Crash),
}

/// What a guest asks of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Reset,
    PowerOff,
}

/// A running machine, as main and the monitor see it.
pub struct Machine {
    commands: mpsc::UnboundedSender<Command>,
    state: Rc<Cell<RunState>>,
    crashed: Rc<Cell<bool>>,
    disks: Vec<DiskInfo>,
    transports: Vec<Weak<VirtioMmio>>,
    iothreads: Vec<IothreadInfo>,
    serial: Arc<Serial>,
    #[cfg(test)]
    board: Arc<Board>,
    #[cfg(test)]
    events: mpsc::UnboundedSender<MachineEvent>,
    end: RefCell<Option<oneshot::Receiver<GuestEnd>>>,
}

impl Machine {
    /// Builds the machine, with the kernel loaded and the vCPUs parked. `sink`
    /// gets the machine's events, in order.
    ///
    /// Thread: main, with its event loop. Dropping the machine ends its vCPUs
    /// but waits for no I/O; see [`Self::take_down`].
    pub fn build(
        spec: MachineSpec,
        sink: impl Fn(VmEvent) + 'static,
    ) -> Result<Self, MachineError> {
        let kvm = kvm::open()?;
        let cpuid = HostCpuid::read(&kvm)?;
        tracing::info!(
            x2apic = cpuid::has_x2apic(&cpuid.for_vcpu(0, spec.cpus)),
            cpus = spec.cpus,
            memory = spec.memory,
            "Building the machine"
        );
        let board = Board::new(spec.memory, spec.cpus, &spec.disks, spec.serial_output)?;
        let entry = board.load(&spec.images)?;
        let (commands, inbox) = mpsc::unbounded();
        let (events, mut event_inbox) = mpsc::unbounded();
        let (notices, notice_inbox) = mpsc::unbounded();
        let generation = Rc::new(Cell::new(0));
        let vm = KvmVm::start(
            &kvm,
            &cpuid,
            &board,
            entry,
            generation.get(),
            &events,
            notices,
        )?;
        let state = Rc::new(Cell::new(RunState::Prelaunch));
        let crashed = Rc::new(Cell::new(false));
        let (end, end_receiver) = oneshot::channel();

        for (event, wish) in [
            (&board.reset_evt, Wish::Reset),
            (&board.power_off_evt, Wish::PowerOff),
        ] {
            watch(event, wish, &generation, &commands)?;
        }
        let crash_commands = commands.clone();
        spawn_local(async move {
            while let Some(MachineEvent::Crashed(crash)) = event_inbox.next().await {
                // Fails only while the machine is being taken down.
                let _ = crash_commands.unbounded_send(Command::Crashed(crash));
            }
        })
        .detach();

        let board = Arc::new(board);
        let this = Self {
            commands,
            state: Rc::clone(&state),
            crashed: Rc::clone(&crashed),
            disks: board.disk_infos(),
            transports: board
                .virtio
                .iter()
                .map(|slot| Arc::downgrade(&slot.transport))
                .collect(),
            iothreads: spec.iothreads,
            serial: Arc::clone(&board.serial),
            #[cfg(test)]
            board: Arc::clone(&board),
            #[cfg(test)]
            events: events.clone(),
            end: RefCell::new(Some(end_receiver)),
        };
        let operator = Operator {
            kvm,
            cpuid,
            board,
            images: Arc::new(spec.images),
            on_reboot: spec.on_reboot,
            on_crash: spec.on_crash,
            vm: Some(vm),
            generation,
            wish: None,
            events,
            notices: notice_inbox,
            state,
            crashed,
            sink: Box::new(sink),
            end: Some(end),
        };
        spawn_local(operator.operate(inbox)).detach();
        Ok(this)
    }

    /// The serial port, for its input.
    pub fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// The devices and the guest's memory.
    #[cfg(test)]
    pub(super) fn board(&self) -> &Board {
        &self.board
    }

    /// Reports a crash, as vCPU threads do.
    #[cfg(test)]
    pub(super) fn report(&self, crash: Crash) {
        self.events
            .unbounded_send(MachineEvent::Crashed(crash))
            .unwrap();
    }

    /// Whether the guest has crashed and was not reset since.
    pub fn crashed(&self) -> bool {
        self.crashed.get()
    }

    /// Waits until the guest ends in a way that ends the process. One caller
    /// only; any other waits for ever.
    pub async fn ended(&self) -> GuestEnd {
        let receiver = self.end.borrow_mut().take();
        if let Some(receiver) = receiver
            && let Ok(end) = receiver.await
        {
            return end;
        }
        std::future::pending().await
    }

    /// Ends the vCPUs, and waits until no device touches guest memory any more.
    /// Commands fail afterwards.
    pub async fn take_down(&self) {
        let (done, receiver) = oneshot::channel();
        if self
            .commands
            .unbounded_send(Command::TakeDown(done))
            .is_ok()
        {
            // An error means that it has been taken down already.
            let _ = receiver.await;
        }
    }

    fn ask(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<(), VmError>>) -> Command,
    ) -> BoxFuture<'_, Result<(), VmError>> {
        let (reply, receiver) = oneshot::channel();
        let sent = self.commands.unbounded_send(command(reply)).is_ok();
        Box::pin(async move {
            if !sent {
                return Err(VmError::ShuttingDown);
            }
            receiver.await.unwrap_or(Err(VmError::ShuttingDown))
        })
    }
}

impl VmControl for Machine {
    fn run_state(&self) -> RunState {
        self.state.get()
    }

    fn stop(&self) -> BoxFuture<'_, Result<(), VmError>> {
        self.ask(Command::Stop)
    }

    fn cont(&self) -> BoxFuture<'_, Result<(), VmError>> {
        self.ask(Command::Cont)
    }

    fn system_reset(&self) -> BoxFuture<'_, Result<(), VmError>> {
        self.ask(Command::Reset)
    }

    fn disks(&self) -> Vec<DiskInfo> {
        self.disks.clone()
    }

    fn refresh_disks(&self) {
        for transport in self.transports.iter().filter_map(Weak::upgrade) {
            transport.refresh_config();
        }
    }

    fn iothreads(&self) -> Vec<IothreadInfo> {
        self.iothreads.clone()
    }
}

/// Turns an event descriptor's signals into commands, each with the generation
/// in which it was read: a restart drains the descriptor when it changes that.
fn watch(
    event: &Arc<EventFd>,
    wish: Wish,
    generation: &Rc<Cell<Generation>>,
    commands: &mpsc::UnboundedSender<Command>,
) -> Result<(), MachineError> {
    let commands = commands.clone();
    let generation = Rc::clone(generation);
    let error = |source| MachineError::Device {
        what: "power events",
        source,
    };
    let event = AsyncFd::new(event.try_clone().map_err(error)?).map_err(error)?;
    spawn_local(async move {
        while event.io(Interest::Readable, EventFd::read).await.is_ok() {
            let command = Command::Guest(generation.get(), wish);
            if commands.unbounded_send(command).is_err() {
                break;
            }
        }
    })
    .detach();
    Ok(())
}

/// The task's own side of the machine.
struct Operator {
    kvm: Kvm,
    cpuid: HostCpuid,
    board: Arc<Board>,
    images: Arc<BootImages>,
    on_reboot: RebootPolicy,
    on_crash: CrashPolicy,
    /// `None` only while the guest is being restarted, or could not be.
    vm: Option<KvmVm>,
    /// Which start of the guest `vm` is. What an earlier one did is ignored.
    generation: Rc<Cell<Generation>>,
    /// What the guest asked for just when it was stopped: done when it goes on.
    wish: Option<Wish>,
    events: mpsc::UnboundedSender<MachineEvent>,
    notices: mpsc::UnboundedReceiver<ParkedNotice>,
    state: Rc<Cell<RunState>>,
    crashed: Rc<Cell<bool>>,
    sink: Box<dyn Fn(VmEvent)>,
    end: Option<oneshot::Sender<GuestEnd>>,
}

impl Operator {
    /// Carries out commands until the machine is taken down or forgotten.
    async fn operate(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        // Whoever gave up waiting for a reply does not want it.
        while let Some(command) = inbox.next().await {
            match command {
                Command::Stop(reply) => {
                    self.stop(RunState::Paused).await;
                    let _ = reply.send(Ok(()));
                }
                Command::Cont(reply) => {
                    let _ = reply.send(self.cont().await);
                }
                Command::Reset(reply) => {
                    let result = self.reset(ShutdownCause::HostQmpSystemReset).await;
                    let _ = reply.send(result);
                }
                Command::Guest(generation, wish) => {
                    if generation == self.generation.get() {
                        self.guest_wishes(wish).await;
                    }
                }
                Command::Crashed(crash) => self.guest_crashed(crash).await,
                Command::TakeDown(done) => {
                    self.take_down().await;
                    let _ = done.send(());
                    return;
                }
            }
        }
    }

    /// Parks all vCPUs, and says so if they ran.
    async fn stop(&mut self, state: RunState) {
        if !self.state.get().is_running() {
            return;
        }
        self.park().await;
        self.board.pause_devices().await;
        self.state.set(state);
        (self.sink)(VmEvent::Stop);
    }

    async fn park(&mut self) {
        let Some(notice) = self.vm.as_ref().and_then(KvmVm::pause) else {
            return;
        };
        while let Some(parked) = self.notices.next().await {
            if parked == notice {
                return;
            }
        }
    }

    async fn cont(&mut self) -> Result<(), VmError> {
        let state = self.state.get();
        match state {
            RunState::Running => Ok(()),
            RunState::Prelaunch | RunState::Paused => {
                if let Some(vm) = &self.vm {
                    self.state.set(RunState::Running);
                    (self.sink)(VmEvent::Resume);
                    self.board.resume_devices();
                    match self.wish.take() {
                        // It has no code to run any more.
                        Some(wish) => Box::pin(self.guest_wishes(wish)).await,
                        None => vm.run(),
                    }
                }
                Ok(())
            }
            RunState::Shutdown | RunState::InternalError => Err(VmError::ResetRequired { state }),
        }
    }

    /// Starts the guest from the beginning.
    async fn reset(&mut self, cause: ShutdownCause) -> Result<(), VmError> {
        let state = self.state.get();
        match self.restart().await {
            Ok(()) => {
                self.crashed.set(false);
                (self.sink)(VmEvent::Reset(cause));
                match state {
                    RunState::Running => {
                        if let Some(vm) = &self.vm {
                            vm.run();
                        }
                    }
                    RunState::Prelaunch | RunState::Paused => {}
                    RunState::Shutdown | RunState::InternalError => {
                        self.state.set(RunState::Paused);
                        return self.cont().await;
                    }
                }
                Ok(())
            }
            Err(error) => {
                let reason = format!("{:#}", anyhow::Error::from(error));
                tracing::error!("Cannot restart the guest: {reason}");
                self.state.set(RunState::InternalError);
                self.crashed.set(true);
                (self.sink)(VmEvent::Stop);
                Err(VmError::Restart { reason })
            }
        }
    }

    /// Ends KVM's VM, resets the devices, clears memory and builds it all anew.
    async fn restart(&mut self) -> Result<(), MachineError> {
        self.release_vm().await;
        let board = Arc::clone(&self.board);
        let images = Arc::clone(&self.images);
        let entry = unblock(move || {
            memory::clear(&board.mem)?;
            board.load(&images)
        })
        .await?;
        let (notices, notice_inbox) = mpsc::unbounded();
        self.notices = notice_inbox;
        self.vm = Some(KvmVm::start(
            &self.kvm,
            &self.cpuid,
            &self.board,
            entry,
            self.generation.get(),
            &self.events,
            notices,
        )?);
        Ok(())
    }

    /// Ends the vCPU threads, and waits until no device touches guest memory.
    async fn release_vm(&mut self) {
        self.park().await;
        if let Some(vm) = self.vm.take() {
            unblock(move || drop(vm)).await;
        }
        // Its vCPUs are gone, and what they signalled goes with the devices'
        // reset; nothing else may run in between.
        self.generation.set(self.generation.get() + 1);
        self.wish = None;
        for ticket in self.board.reset_devices() {
            ticket.done().await;
        }
    }

    /// Does what the guest asked for, at once or when it goes on.
    async fn guest_wishes(&mut self, wish: Wish) {
        match (self.state.get(), wish) {
            (RunState::Running, Wish::PowerOff) => {
                self.end_guest(ShutdownCause::GuestShutdown, GuestEnd::PoweredOff)
                    .await;
            }
            (RunState::Running, Wish::Reset) => match self.on_reboot {
                RebootPolicy::Exit => {
                    self.end_guest(ShutdownCause::GuestReset, GuestEnd::Rebooted)
                        .await;
                }
                RebootPolicy::Reset => {
                    if self.reset(ShutdownCause::GuestReset).await.is_err() {
                        self.finish(GuestEnd::RestartFailed);
                    }
                }
            },
            // It met a stop. The first wish counts, as it does in a guest that runs.
            (RunState::Prelaunch | RunState::Paused, wish) => {
                self.wish.get_or_insert(wish);
            }
            // It has ended already.
            (RunState::Shutdown | RunState::InternalError, _) => {}
        }
    }

    async fn end_guest(&mut self, cause: ShutdownCause, end: GuestEnd) {
        self.park().await;
        self.state.set(RunState::Shutdown);
        (self.sink)(VmEvent::Shutdown(cause));
        self.finish(end);
    }

    fn finish(&mut self, end: GuestEnd) {
        if let Some(sender) = self.end.take() {
            // Nobody waits while the process ends for another reason.
            let _ = sender.send(end);
        }
    }

    async fn guest_crashed(&mut self, crash: Crash) {
        if crash.generation != self.generation.get() {
            return;
        }
        match self.state.get() {
            // A crash that meets a stop is not put off: its vCPU never goes on.
            RunState::Running | RunState::Prelaunch | RunState::Paused => {}
            // The other vCPUs' reports of one crash add nothing.
            RunState::Shutdown | RunState::InternalError => return,
        }
        tracing::error!("vCPU {}: {}", crash.vcpu, crash.report);
        match self.on_crash {
            CrashPolicy::Reset => {
                if self.reset(ShutdownCause::GuestReset).await.is_err() {
                    self.finish(GuestEnd::RestartFailed);
                }
            }
            CrashPolicy::Pause | CrashPolicy::Exit => {
                self.crashed.set(true);
                let state = match crash.kind {
                    CrashKind::TripleFault => RunState::Shutdown,
                    CrashKind::KvmError => RunState::InternalError,
                };
                if crash.kind == CrashKind::TripleFault {
                    (self.sink)(VmEvent::Shutdown(ShutdownCause::GuestPanic));
                }
                self.stop(state).await;
                // Also where it was stopped already.
                self.state.set(state);
                if self.on_crash == CrashPolicy::Exit {
                    self.finish(GuestEnd::Crashed);
                } else {
                    complain(format_args!(
                        "diptych: the guest crashed and is stopped (state '{}'); system_reset or quit over QMP",
                        state.as_str()
                    ));
                }
            }
        }
    }

    async fn take_down(&mut self) {
        self.release_vm().await;
        if self.state.get().is_running() {
            self.state.set(RunState::Paused);
        }
    }
}
