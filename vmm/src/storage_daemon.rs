//! `diptych storage-daemon`: block graph, jobs and monitor without a guest.

use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use block::runtime::EventLoop;
use block::{BlockdevOptions, Graph};
use futures_util::future::{Either, select};
use futures_util::pin_mut;
use jobs::Jobs;

use crate::end_watchdog;
use crate::monitor::{
    ExportArgs, Monitor, NbdServerArgs, ObjectOptions, QmpAddress, QmpError, QmpSocket,
    parse_blockdev, parse_export, parse_nbd_server, parse_object,
};
use crate::signals::EndSignals;

/// How long jobs may take to end when the program does.
const JOBS_END_TIME: Duration = Duration::from_secs(3);

/// How long requests of exports may take to end when the program does.
const EXPORTS_END_TIME: Duration = Duration::from_secs(1);

/// Arguments of `diptych storage-daemon`.
#[derive(Debug, clap::Args)]
pub struct StorageDaemonArgs {
    /// Listen for QMP clients on a unix socket (may be given several times)
    #[arg(long, value_name = "unix:PATH", required = true)]
    qmp: Vec<QmpAddress>,

    /// Make an object, as object-add does: JSON, or TYPE,id=NAME,key=value,...
    /// (throttle-group, iothread; may be given several times)
    #[arg(long, value_name = "OPTIONS", value_parser = object_parser)]
    object: Vec<ObjectOptions>,

    /// Open a node, as blockdev-add does: JSON, or key=value,... with dots for
    /// what is nested and doubled commas in values (may be given several times)
    #[arg(long, value_name = "OPTIONS", value_parser = blockdev_parser)]
    blockdev: Vec<BlockdevOptions>,

    /// Start the NBD server, as nbd-server-start does: JSON, or
    /// addr.type=unix,addr.path=PATH or addr.type=inet,addr.host=HOST,addr.port=PORT
    #[arg(long, value_name = "OPTIONS", value_parser = nbd_server_parser)]
    nbd_server: Option<NbdServerArgs>,

    /// Export a node, as block-export-add does: JSON, or
    /// nbd,id=ID,node-name=NODE,name=NAME,writable=on,... (may be given several times)
    #[arg(long, value_name = "OPTIONS", value_parser = export_parser)]
    export: Vec<ExportArgs>,
}

/// Who wants the program to end.
enum End {
    Quit,
    Signal,
}

fn blockdev_parser(text: &str) -> Result<BlockdevOptions, QmpError> {
    parse_blockdev(text)
}

fn object_parser(text: &str) -> Result<ObjectOptions, QmpError> {
    parse_object(text)
}

fn nbd_server_parser(text: &str) -> Result<NbdServerArgs, QmpError> {
    parse_nbd_server(text)
}

fn export_parser(text: &str) -> Result<ExportArgs, QmpError> {
    parse_export(text)
}

/// Serves until a client says `quit` or a signal asks for the end.
pub fn main(args: StorageDaemonArgs) -> anyhow::Result<ExitCode> {
    let event_loop = EventLoop::new("main").context("Cannot make the main event loop")?;
    event_loop.block_on(serve(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(args: StorageDaemonArgs) -> anyhow::Result<()> {
    // Taken before any image is opened: a socket in use is the cheaper mistake.
    let sockets = args
        .qmp
        .iter()
        .map(QmpSocket::bind)
        .collect::<Result<Vec<_>, _>>()?;
    let graph = Graph::new();
    let jobs = Jobs::new(graph.handle());
    let monitor = Monitor::new(&graph, &jobs);
    for options in args.object {
        let id = options.id().to_owned();
        monitor
            .objects()
            .add(options)
            .with_context(|| format!("Cannot make object '{id}'"))?;
    }
    for options in args.blockdev {
        let name = options.node_name.clone().unwrap_or_default();
        graph
            .blockdev_add(options)
            .await
            .with_context(|| format!("Cannot add node '{name}'"))?;
    }
    if let Some(server) = args.nbd_server {
        monitor
            .start_nbd_server(server)
            .await
            .context("Cannot start the NBD server")?;
    }
    for export in args.export {
        let id = export.id().to_owned();
        monitor
            .add_export(export)
            .with_context(|| format!("Cannot add export '{id}'"))?;
    }
    // Not before: opening may hang, and a signal just kills then.
    let signals = EndSignals::new().context("Cannot listen for signals")?;
    for socket in sockets {
        monitor
            .listen(socket)
            .context("Cannot watch a QMP socket")?;
    }
    let asked = wait_for_end(&monitor, &signals).await;
    end_watchdog::start(matches!(asked, Ok(End::Signal)));
    end(&monitor).await;
    graph.flush_all().await;
    asked.map(drop)
}

/// Ends in order: exports, so that nobody writes any more, jobs, then clients, who are told how the jobs ended. Storage
/// that hangs, here or when the event loop waits for its last requests, is the
/// watchdog's.
async fn end(monitor: &Monitor) {
    monitor.request_quit();
    let left = monitor.exports().close_all(EXPORTS_END_TIME).await;
    if !left.is_empty() {
        tracing::error!(exports = left.join(", "), "Exports did not end in time");
    }
    let left = monitor.jobs().cancel_all(JOBS_END_TIME).await;
    if !left.is_empty() {
        tracing::error!(jobs = left.join(", "), "Jobs did not end in time");
    }
    monitor.close().await;
}

/// Returns when somebody wants the program to end.
async fn wait_for_end(monitor: &Rc<Monitor>, signals: &EndSignals) -> anyhow::Result<End> {
    let quit = monitor.quit_requested();
    let signal = signals.next();
    pin_mut!(quit, signal);
    match select(quit, signal).await {
        Either::Left(((), _)) => Ok(End::Quit),
        Either::Right((result, _)) => result
            .map(|_| End::Signal)
            .context("Cannot wait for signals"),
    }
}
