//! `diptych run`: puts a guest's machine, block graph, jobs and monitor
//! together, and takes them apart in an order that loses nothing.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use block::runtime::{EventLoop, sleep};
use block::{Backend, BlockdevOptions, Graph};
use futures_channel::mpsc;
use futures_util::future::{Either, join_all, select};
use futures_util::{FutureExt, StreamExt};
use jobs::Jobs;

use crate::config::{DiskSpec, IothreadSpec, MemorySize, SerialSpec, VmSpec};
use crate::disks::{self, Disk, Iothreads};
use crate::end_watchdog::EndWatchdog;
use crate::machine::{
    BootImages, BootProtocol, CrashPolicy, GuestEnd, MAX_CPUS, Machine, MachineSpec, RebootPolicy,
};
use crate::monitor::{Monitor, ObjectOptions, QmpAddress, QmpSocket};
use crate::serial_backend::SerialBackend;
use crate::set_up::{self, BLOCKDEV_PARSER, OBJECT_PARSER};
use crate::signals::EndSignals;
use crate::stdio::complain_at_the_end;
use crate::vm_control::{IothreadInfo, ShutdownCause, VmControl, VmEvent};

/// How long the end of the process may take in all.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How long the devices may take at the process' end, and how long the jobs.
const STEP_LIMIT: Duration = Duration::from_secs(3);
/// How long requests of exports may take at the process' end.
const EXPORTS_LIMIT: Duration = Duration::from_secs(1);
/// When, after the end's beginning, no flush is waited for any more: early enough
/// for clients to be told before the watchdog's limit.
const FLUSH_LIMIT: Duration = Duration::from_secs(9);
/// Status of the process when the guest crashed.
const EXIT_GUEST_CRASHED: u8 = 3;
/// Status of the process when a signal ended it: this and the signal's number.
const EXIT_SIGNAL_BASE: u8 = 128;

/// Arguments of `diptych run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0 the guest shut down (or a monitor said quit), 1 an error, 2 wrong
usage, 3 the guest crashed, 128+N ended by signal N. A second signal does not wait
for the disks, and the status is 1.

On a terminal, Ctrl-A x ends the process; Ctrl-A Ctrl-A is a Ctrl-A for the guest.")]
pub struct RunArgs {
    /// Kernel: an x86-64 ELF vmlinux or a bzImage
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,

    /// Kernel command line [default: console=ttyS0]; the disks' virtio_mmio.device=
    /// arguments are appended
    #[arg(long, value_name = "STRING")]
    cmdline: Option<String>,

    /// How an ELF kernel is entered [default: auto]
    #[arg(long, value_name = "PROTOCOL")]
    boot: Option<BootProtocol>,

    /// Number of vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CPUS)))]
    cpus: Option<u8>,

    /// Memory: MiB, or a number with K, M, G or T behind it [default: 256M]
    #[arg(long, value_name = "SIZE")]
    memory: Option<MemorySize>,

    /// Disks, in the order the guest finds them
    #[arg(
        long,
        value_name = "KEY=VALUE,…",
        help = "A disk, as path=P[,id=ID][,format=qcow2]…; see --help. May be repeated",
        long_help = DiskSpec::HELP
    )]
    disk: Vec<DiskSpec>,

    /// An object that a node needs, as the storage daemon's --object: TYPE,id=NAME,key=value,…
    /// or JSON; help lists the types. May be repeated
    #[arg(long, value_name = "OPTIONS", value_parser = OBJECT_PARSER)]
    object: Vec<ObjectOptions>,

    /// A node that a disk (as node=NAME) or the monitor may use, as the storage daemon's
    /// --blockdev: driver=D,node-name=NAME,key=value,… or JSON. May be repeated
    #[arg(long, value_name = "OPTIONS", value_parser = BLOCKDEV_PARSER)]
    blockdev: Vec<BlockdevOptions>,

    /// A thread for disks to be served by, as id=ID. May be repeated
    #[arg(long, value_name = "id=ID", long_help = IothreadSpec::HELP)]
    iothread: Vec<IothreadSpec>,

    /// A monitor socket, as unix:PATH, or fd:NUMBER or fd:NAME for one that was passed
    /// (LISTEN_FDNAMES). May be repeated
    #[arg(long, value_name = "ADDRESS")]
    qmp: Vec<QmpAddress>,

    /// Let the headers of images that a monitor opens name backing files in this
    /// directory, or below it, besides the image's own. May be repeated
    #[arg(long, value_name = "DIRECTORY")]
    backing_directory: Vec<PathBuf>,

    /// The serial port: stdio, file:PATH, unix:PATH (listens) or null [default: stdio]
    #[arg(long, value_name = "PLACE")]
    serial: Option<SerialSpec>,

    /// Do not run the guest before a monitor says cont
    #[arg(long)]
    paused: bool,

    /// What happens when the guest resets itself [default: exit]
    #[arg(long, value_name = "ACTION")]
    on_reboot: Option<RebootPolicy>,

    /// What happens when the guest crashes (triple fault, KVM error) [default: pause]
    #[arg(long, value_name = "ACTION")]
    on_crash: Option<CrashPolicy>,

    /// File that says the same and more; JSON if its name ends so, else TOML.
    /// Flags override its values and add to its lists
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
}

impl RunArgs {
    /// What the flags and the file, if there is one, say together.
    pub fn into_spec(self) -> Result<VmSpec, crate::config::ConfigError> {
        let file = match &self.config {
            Some(path) => VmSpec::read(path)?,
            None => VmSpec::default(),
        };
        Ok(file.overlay(VmSpec {
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            boot: self.boot,
            cpus: self.cpus,
            memory: self.memory,
            disk: self.disk,
            object: self.object,
            blockdev: self.blockdev,
            iothread: self.iothread,
            qmp: self.qmp,
            backing_directory: self.backing_directory,
            serial: self.serial,
            paused: self.paused.then_some(true),
            on_reboot: self.on_reboot,
            on_crash: self.on_crash,
        }))
    }
}

/// Boots the guest and serves it until it ends.
pub fn main(args: RunArgs) -> anyhow::Result<ExitCode> {
    let mut spec = args.into_spec()?;
    spec.check()?;
    let event_loop = EventLoop::new("main").context("Cannot make the main event loop")?;
    event_loop.block_on(run(spec))
}

/// Why the process ends.
enum End {
    /// The process cannot tell any more whether it shall.
    Failed(anyhow::Error),
    Guest(GuestEnd),
    Signal(u8),
    Quit(ShutdownCause),
}

async fn run(spec: VmSpec) -> anyhow::Result<ExitCode> {
    // What costs little and fails often comes first.
    let images = BootImages::open(
        spec.kernel.as_deref().unwrap_or(Path::new("")),
        spec.initrd.as_deref(),
        spec.cmdline.as_deref().unwrap_or(VmSpec::DEFAULT_CMDLINE),
        spec.boot.unwrap_or_default(),
    )?;
    let sockets = spec
        .qmp
        .iter()
        .map(QmpSocket::bind)
        .collect::<Result<Vec<_>, _>>()?;
    let graph = Graph::new();
    graph.set_backing_directories(spec.backing_directory);
    let jobs = Jobs::new(graph.handle());
    let monitor = Monitor::new(&graph, &jobs);
    let iothreads = Iothreads::start(&spec.iothread)?;
    for object in spec.object {
        set_up::add_object(&monitor, object)?;
    }
    for node in spec.blockdev {
        set_up::add_node(&graph, node).await?;
    }
    let disks = disks::open(&graph, &spec.disk, &iothreads).await?;
    // From here on there is something to give back at a signal. Before, opening
    // may hang, and a signal just kills.
    let signals = EndSignals::new().context("Cannot listen for signals")?;
    let watchdog = EndWatchdog::start(END_LIMIT);
    let mut serial = SerialBackend::open(&spec.serial.unwrap_or_default())?;
    let event_monitor = Rc::clone(&monitor);
    let machine = Rc::new(Machine::build(
        MachineSpec {
            memory: spec.memory.unwrap_or(MemorySize::DEFAULT).0,
            cpus: spec.cpus.unwrap_or(VmSpec::DEFAULT_CPUS),
            images,
            disks: disks.iter().map(|disk| Arc::clone(&disk.device)).collect(),
            iothreads: iothreads
                .handles()
                .map(|handle| IothreadInfo {
                    id: handle.name().to_owned(),
                    thread_id: handle.thread_id(),
                })
                .collect(),
            serial_output: serial.sink(),
            on_reboot: spec.on_reboot.unwrap_or_default(),
            on_crash: spec.on_crash.unwrap_or_default(),
        },
        move |event| event_monitor.emit_machine(event),
    )?);
    monitor.set_machine(Rc::clone(&machine) as _);
    for socket in sockets {
        monitor
            .listen(socket)
            .context("Cannot watch a QMP socket")?;
    }
    let (quit, quit_by_user) = mpsc::unbounded();
    serial.start_input(Arc::clone(machine.serial()), move || {
        if quit.unbounded_send(()).is_err() {
            // The process is ending already: that counts as a signal's repetition
            // does. Fails for numbers only that are no signals.
            let _ = signal_hook::low_level::raise(signal_hook::consts::SIGTERM);
        }
    })?;
    if !spec.paused.unwrap_or(false) {
        machine.cont().await?;
    }
    let end = wait_for_end(&machine, &monitor, &signals, quit_by_user).await;
    // It has heard signals itself.
    let by_user = matches!(end, End::Quit(ShutdownCause::HostSignal));
    watchdog.begin(by_user);
    let clean = take_down(&end, &machine, &monitor, &graph, disks).await;
    drop(serial);
    if !clean {
        // What hangs would hold the iothreads' end, and main's, for ever.
        complain_at_the_end(
            "diptych: the guest's disks may lack its last writes; see the log above".to_owned(),
        );
        std::process::exit(1);
    }
    iothreads.stop();
    Ok(match end {
        End::Failed(error) => return Err(error),
        End::Signal(signal) => ExitCode::from(EXIT_SIGNAL_BASE.saturating_add(signal)),
        End::Guest(GuestEnd::RestartFailed) => ExitCode::FAILURE,
        End::Guest(_) | End::Quit(_) if machine.crashed() => ExitCode::from(EXIT_GUEST_CRASHED),
        End::Guest(_) | End::Quit(_) => ExitCode::SUCCESS,
    })
}

/// Returns when the guest has ended, or somebody wants the process to.
async fn wait_for_end(
    machine: &Machine,
    monitor: &Monitor,
    signals: &EndSignals,
    mut quit_by_user: mpsc::UnboundedReceiver<()>,
) -> End {
    futures_util::select_biased! {
        end = pin!(machine.ended().fuse()) => End::Guest(end),
        signal = pin!(signals.next().fuse()) => match signal.context("Cannot wait for signals") {
            Ok(signal) => End::Signal(signal),
            Err(error) => End::Failed(error),
        },
        () = pin!(monitor.quit_requested().fuse()) => End::Quit(ShutdownCause::HostQmpQuit),
        () = quit_by_user.select_next_some() => End::Quit(ShutdownCause::HostSignal),
    }
}

/// Ends in an order that loses nothing: the vCPUs and devices first, then exports,
/// then jobs, then what the guest was told is written is flushed, then clients, who are
/// told how it all ended. No wait for storage goes beyond [`FLUSH_LIMIT`]. Says
/// whether all of it was done.
async fn take_down(
    end: &End,
    machine: &Machine,
    monitor: &Monitor,
    graph: &Graph,
    disks: Vec<Disk>,
) -> bool {
    let flush_deadline = Instant::now() + FLUSH_LIMIT;
    monitor.request_quit();
    let cause = match end {
        End::Failed(_) | End::Guest(_) => None,
        End::Signal(_) => Some(ShutdownCause::HostSignal),
        End::Quit(cause) => Some(*cause),
    };
    if let Some(cause) = cause {
        monitor.emit_machine(VmEvent::Shutdown(cause));
    }
    let mut clean = in_time(STEP_LIMIT, machine.take_down()).await.is_some();
    if !clean {
        tracing::error!("Disk requests did not end in time; the guest's last writes may be lost");
    }
    let left = monitor.exports().close_all(EXPORTS_LIMIT).await;
    if !left.is_empty() {
        tracing::error!(exports = left.join(", "), "Exports did not end in time");
    }
    clean &= left.is_empty();
    let left = monitor.jobs().cancel_all(STEP_LIMIT).await;
    if !left.is_empty() {
        tracing::error!(jobs = left.join(", "), "Jobs did not end in time");
    }
    clean &= left.is_empty();
    let left = flush_deadline.saturating_duration_since(Instant::now());
    let flushes = disks.iter().map(|Disk { backend, .. }| async move {
        let flushed = in_time(left, flush(backend)).await;
        (backend, flushed)
    });
    for (backend, flushed) in join_all(flushes).await {
        clean &= matches!(flushed, Some(Ok(())));
        match flushed {
            Some(Ok(())) => graph.detach(backend),
            Some(Err(error)) => tracing::error!(%error, "Cannot flush disk '{}'", backend.name()),
            None => tracing::error!("Flush of disk '{}' did not end in time", backend.name()),
        }
    }
    // Targets of jobs, say.
    let left = flush_deadline.saturating_duration_since(Instant::now());
    if in_time(left, graph.flush_all()).await.is_none() {
        tracing::error!("Flushing what no disk uses did not end in time");
        clean = false;
    }
    monitor.close().await;
    clean
}

/// Flushes a disk that may be written.
async fn flush(backend: &Arc<Backend>) -> Result<(), block::IoError> {
    if backend.root().read_only() {
        return Ok(());
    }
    backend.flush().await
}

/// Waits for `work`, but not longer than `limit`; `None` if it was not done.
async fn in_time<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    match select(pin!(work), pin!(sleep(limit))).await {
        Either::Left((done, _)) => Some(done),
        Either::Right(_) => None,
    }
}
