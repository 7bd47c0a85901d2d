//! What the monitor may do with the guest's machine, and what the machine
//! tells the monitor.
//!
//! The machine implements [`VmControl`]; the monitor knows nothing else of it.
//! Everything here is used on the main thread only.

use block::BoxFuture;

/// State of the guest, by QMP's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Built, and not started yet (`--paused`).
    Prelaunch,
    /// The vCPUs run.
    Running,
    /// Stopped by the monitor (or by a policy).
    Paused,
    /// The guest has ended (powered off, or a triple fault).
    Shutdown,
    /// KVM could not go on with the guest.
    InternalError,
}

impl RunState {
    /// The name in `query-status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
        }
    }

    /// Whether the vCPUs run: `running` in `query-status`.
    pub fn is_running(self) -> bool {
        self == Self::Running
    }
}

/// Why a guest was reset or ended: `reason` of the RESET and SHUTDOWN events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownCause {
    /// `quit` over QMP.
    HostQmpQuit,
    /// `system_reset` over QMP.
    HostQmpSystemReset,
    /// SIGINT, SIGTERM or SIGHUP.
    HostSignal,
    /// The guest powered off.
    GuestShutdown,
    /// The guest asked for a reset.
    GuestReset,
    /// The guest crashed.
    GuestPanic,
}

impl ShutdownCause {
    /// QMP's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::HostQmpQuit => "host-qmp-quit",
            Self::HostQmpSystemReset => "host-qmp-system-reset",
            Self::HostSignal => "host-signal",
            Self::GuestShutdown => "guest-shutdown",
            Self::GuestReset => "guest-reset",
            Self::GuestPanic => "guest-panic",
        }
    }

    /// Whether the guest itself caused it: `guest` of the events.
    pub fn by_guest(self) -> bool {
        matches!(
            self,
            Self::GuestShutdown | Self::GuestReset | Self::GuestPanic
        )
    }
}

/// A QMP event of the machine. The machine hands each, in order, to the sink
/// it was built with, on the main thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmEvent {
    /// STOP: the vCPUs have stopped.
    Stop,
    /// RESUME: the vCPUs run (again).
    Resume,
    /// RESET: the machine starts from the beginning.
    Reset(ShutdownCause),
    /// SHUTDOWN: the guest has ended.
    Shutdown(ShutdownCause),
}

impl VmEvent {
    /// QMP's name of the event.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "STOP",
            Self::Resume => "RESUME",
            Self::Reset(_) => "RESET",
            Self::Shutdown(_) => "SHUTDOWN",
        }
    }

    /// The event's `data`, if it has any.
    pub fn data(self) -> Option<serde_json::Value> {
        match self {
            Self::Stop | Self::Resume => None,
            Self::Reset(cause) | Self::Shutdown(cause) => Some(serde_json::json!({
                "guest": cause.by_guest(),
                "reason": cause.as_str(),
            })),
        }
    }
}

/// A disk of the guest, as `query-block` shows it.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// The disk's id; its backend (`device` in QMP) has the same name.
    pub id: String,
    /// Where the device sits in the machine (`qdev` in QMP).
    pub qdev: String,
}

/// An iothread, as `query-iothreads` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IothreadInfo {
    /// Its id.
    pub id: String,
    /// The kernel's id of the thread.
    pub thread_id: i32,
}

/// Why the machine refused.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The guest has ended and cannot go on.
    #[error(
        "The guest is in state '{}' and cannot go on; reset it first (system_reset)",
        .state.as_str()
    )]
    ResetRequired {
        /// The state it is in.
        state: RunState,
    },
    /// The machine is being taken down.
    #[error("The machine is shutting down")]
    ShuttingDown,
    /// Starting the machine from the beginning failed.
    #[error("Cannot restart the guest: {reason}")]
    Restart {
        /// What failed, with its causes.
        reason: String,
    },
}

/// The monitor's side of a machine.
///
/// Threads: main only. Operations are carried out one after another, in the
/// order they were asked for. Dropping a returned future does not take the
/// operation back: it is finished without anybody being told.
pub trait VmControl {
    /// The guest's state at this moment.
    fn run_state(&self) -> RunState;

    /// Stops all vCPUs and waits until none runs guest code and the devices
    /// take no new requests. Done at once if they are stopped already.
    fn stop(&self) -> BoxFuture<'_, Result<(), VmError>>;

    /// Lets the vCPUs run (again); also starts a guest made with `--paused`.
    ///
    /// Errors: [`VmError::ResetRequired`] if the guest has ended or crashed.
    fn cont(&self) -> BoxFuture<'_, Result<(), VmError>>;

    /// Starts the guest from the beginning: vCPUs, devices and memory are as
    /// they were at the first start. Block jobs go on undisturbed. The guest
    /// runs afterwards if and only if it ran before, or had ended.
    fn system_reset(&self) -> BoxFuture<'_, Result<(), VmError>>;

    /// The guest's disks, in the order they were given.
    fn disks(&self) -> Vec<DiskInfo>;

    /// Tells the guest of disks whose size has changed.
    fn refresh_disks(&self) {}

    /// The machine's iothreads (those of jobs are not among them).
    fn iothreads(&self) -> Vec<IothreadInfo>;
}
