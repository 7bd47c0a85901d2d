//! `diptych storage-daemon`: block graph, jobs and monitor without a guest.
//!
//! - [`args`]: the command line
//! - [`chardev`]: QEMU's way of naming sockets
//! - [`daemonize`], [`pidfile`]: living in the background
//! - [`stdio_chardev`]: a client at stdin and stdout
//! - [`end`]: leaving in time

mod args;
mod chardev;
pub(crate) mod daemonize;
mod end;
mod pidfile;
mod stdio_chardev;

use std::collections::HashMap;
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::Context;
use block::Graph;
use block::runtime::EventLoop;
use jobs::Jobs;

pub use args::StorageDaemonArgs;

use crate::end_watchdog::EndWatchdog;
use crate::monitor::{Monitor, QmpSocket};
use crate::set_up;
use crate::signals::EndSignals;
use args::Step;
use chardev::Place;
use pidfile::Pidfile;

/// Steps that contradict each other.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error("chardev \"{0}\" not found; its --chardev comes before --monitor")]
    NoChardev(String),
    #[error("chardev \"{0}\" has a monitor already")]
    ChardevInUse(String),
    #[error("Duplicate ID '{0}' for chardev")]
    DuplicateChardev(String),
    #[error("cannot use stdio by multiple character devices")]
    SecondStdio,
    #[error("cannot use stdio with --daemonize")]
    StdioInBackground,
}

/// Serves until a client says `quit` or a signal asks for the end.
pub fn main(args: StorageDaemonArgs) -> anyhow::Result<ExitCode> {
    if args.daemonize {
        if daemonize::launcher().is_none() {
            return daemonize::launch();
        }
        daemonize::detach().context("Cannot leave the terminal")?;
    }
    let event_loop = EventLoop::new("main").context("Cannot make the main event loop")?;
    event_loop.block_on(serve(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(args: StorageDaemonArgs) -> anyhow::Result<()> {
    // Taken before any image is opened: a socket in use is the cheaper mistake.
    let Sockets {
        monitors,
        chardevs,
        at_stdio,
    } = bind_sockets(&args.steps, args.daemonize)?;
    let graph = Graph::new();
    graph.set_backing_directories(args.backing_directories);
    let jobs = Jobs::new(graph.handle());
    let monitor = Monitor::new(&graph, &jobs);
    // A client that comes early finds what is said after the server, too.
    monitor.exports().hold_clients();
    for step in args.steps {
        carry_out(step, &graph, &monitor).await?;
    }
    // Not before: opening may hang, and a signal just kills then.
    let signals = EndSignals::new().context("Cannot listen for signals")?;
    let watchdog = EndWatchdog::start(end::LIMIT);
    for socket in monitors {
        monitor
            .listen(socket)
            .context("Cannot watch a QMP socket")?;
    }
    let mut said = None;
    if at_stdio {
        let context = "Cannot serve a QMP client at stdin and stdout";
        let (stream, all_said) = stdio_chardev::connect().context(context)?;
        monitor.serve_client("stdio", stream).context(context)?;
        said = Some(all_said);
    }
    let pidfile = args.pidfile.as_deref().map(Pidfile::write).transpose()?;
    monitor.exports().admit_clients();
    if args.daemonize {
        daemonize::ready()?;
    }
    let asked = end::asked_for(&monitor, &signals).await;
    watchdog.begin(false);
    let ended = end::all(&monitor, &graph).await;
    if let Some(said) = said {
        said.wait();
    }
    drop((chardevs, pidfile));
    asked?;
    Ok(ended?)
}

/// Sockets that listen already.
struct Sockets {
    /// For monitors.
    monitors: Vec<QmpSocket>,
    /// Those that nobody serves: clients wait there, as they do in QEMU.
    chardevs: Vec<QmpSocket>,
    /// A monitor serves stdin and stdout.
    at_stdio: bool,
}

fn bind_sockets(steps: &[Step], in_background: bool) -> anyhow::Result<Sockets> {
    let mut monitors = Vec::new();
    // `Some(None)`: stdio.
    let mut chardevs: HashMap<&String, Option<Option<QmpSocket>>> = HashMap::new();
    let mut has_stdio = false;
    let mut at_stdio = false;
    for step in steps {
        match step {
            Step::Qmp(address) => monitors.push(QmpSocket::bind(address)?),
            Step::Chardev(chardev) => {
                let id = &chardev.id;
                if chardevs.contains_key(id) {
                    return Err(StepError::DuplicateChardev(id.clone()).into());
                }
                let socket = match &chardev.place {
                    Place::Socket(address) => Some(QmpSocket::bind(address)?),
                    Place::Stdio if has_stdio => return Err(StepError::SecondStdio.into()),
                    Place::Stdio if in_background => {
                        return Err(StepError::StdioInBackground.into());
                    }
                    Place::Stdio => None,
                };
                has_stdio |= socket.is_none();
                chardevs.insert(id, Some(socket));
            }
            Step::Monitor(monitor) => {
                let id = &monitor.chardev;
                let chardev = chardevs.get_mut(id);
                let chardev = chardev.ok_or_else(|| StepError::NoChardev(id.clone()))?;
                let socket = chardev.take();
                match socket.ok_or_else(|| StepError::ChardevInUse(id.clone()))? {
                    Some(socket) => monitors.push(socket),
                    None => at_stdio = true,
                }
            }
            Step::Object(_) | Step::Blockdev(_) | Step::NbdServer(_) | Step::Export(_) => {}
        }
    }
    Ok(Sockets {
        monitors,
        chardevs: chardevs.into_values().flatten().flatten().collect(),
        at_stdio,
    })
}

/// Carries out a step that is not about sockets of monitors.
async fn carry_out(step: Step, graph: &Rc<Graph>, monitor: &Rc<Monitor>) -> anyhow::Result<()> {
    match step {
        Step::Qmp(_) | Step::Chardev(_) | Step::Monitor(_) => {}
        Step::Object(options) => set_up::add_object(monitor, *options)?,
        Step::Blockdev(options) => set_up::add_node(graph, *options).await?,
        Step::NbdServer(options) => {
            monitor
                .start_nbd_server(*options)
                .await
                .context("Cannot start the NBD server")?;
        }
        Step::Export(options) => {
            let id = options.id().to_owned();
            monitor
                .add_export(*options)
                .with_context(|| format!("Cannot add export '{id}'"))?;
        }
    }
    Ok(())
}
