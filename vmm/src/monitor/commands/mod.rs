//! The commands: one file per family, and the table that names them.
//!
//! A handler takes its arguments first, in the order of QEMU's schema, so that
//! mistakes are reported as QEMU reports them; then it acts. It runs as a task of
//! its own on main and never blocks there.

mod backup;
mod bitmap_ranges;
mod bitmaps;
mod blockdev;
mod compare;
mod control;
mod exports;
mod history;
mod jobs;
mod mirror;
mod nodes;
mod objects;
mod query;
mod transaction;
mod vm;

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use block::runtime::sleep;
use futures_util::future::{Either, LocalBoxFuture, select};
use futures_util::{FutureExt, pin_mut};
use serde_json::{Value, json};

use super::Monitor;
use super::args::Args;
use super::error::QmpError;

pub(crate) use blockdev::parse_blockdev;
pub(crate) use exports::{ExportArgs, NbdServerArgs, parse_export, parse_nbd_server};

/// The command that a session begins with; sessions carry it out themselves.
pub(super) const NEGOTIATE: &str = "qmp_capabilities";

/// How long a command may wait for the guest or for drained I/O.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a command gives: a value or a refusal.
type Outcome = Result<Value, QmpError>;

/// One command.
struct Command {
    name: &'static str,
    /// There only with a guest's machine (`diptych run`).
    needs_machine: bool,
    start: fn(Rc<Monitor>, Args) -> LocalBoxFuture<'static, Outcome>,
}

/// Table rows: `"name" => handler` and, with a machine only,
/// `"name" (machine) => handler`.
macro_rules! commands {
    ($($name:literal $(($machine:ident))? => $handler:path,)*) => {
        &[$(Command {
            name: $name,
            needs_machine: commands!(@machine $($machine)?),
            start: |monitor, args| $handler(monitor, args).boxed_local(),
        },)*]
    };
    (@machine machine) => { true };
    (@machine) => { false };
}

/// All commands but [`NEGOTIATE`], in alphabetical order.
static COMMANDS: &[Command] = commands! {
    "block-dirty-bitmap-add" => bitmaps::block_dirty_bitmap_add,
    "block-dirty-bitmap-clear" => bitmaps::block_dirty_bitmap_clear,
    "block-dirty-bitmap-disable" => bitmaps::block_dirty_bitmap_disable,
    "block-dirty-bitmap-enable" => bitmaps::block_dirty_bitmap_enable,
    "block-dirty-bitmap-merge" => bitmaps::block_dirty_bitmap_merge,
    "block-dirty-bitmap-remove" => bitmaps::block_dirty_bitmap_remove,
    "block-export-add" => exports::block_export_add,
    "block-export-del" => exports::block_export_del,
    "block-job-cancel" => jobs::block_job_cancel,
    "block-job-change" => jobs::block_job_change,
    "block-job-complete" => jobs::block_job_complete,
    "block-job-dismiss" => jobs::block_job_dismiss,
    "block-job-finalize" => jobs::block_job_finalize,
    "block-job-pause" => jobs::block_job_pause,
    "block-job-resume" => jobs::block_job_resume,
    "block-job-set-speed" => jobs::block_job_set_speed,
    "block-set-write-threshold" => nodes::block_set_write_threshold,
    "block_resize" => nodes::block_resize,
    "blockdev-add" => blockdev::blockdev_add,
    "blockdev-backup" => backup::blockdev_backup,
    "blockdev-compare" => compare::blockdev_compare,
    "blockdev-del" => blockdev::blockdev_del,
    "blockdev-mirror" => mirror::blockdev_mirror,
    "blockdev-reopen" => blockdev::blockdev_reopen,
    "cont" (machine) => vm::cont,
    "drive-backup" => backup::drive_backup,
    "drive-mirror" => mirror::drive_mirror,
    "human-monitor-command" (machine) => control::human_monitor_command,
    "job-cancel" => jobs::job_cancel,
    "job-complete" => jobs::job_complete,
    "job-dismiss" => jobs::job_dismiss,
    "job-finalize" => jobs::job_finalize,
    "job-pause" => jobs::job_pause,
    "job-resume" => jobs::job_resume,
    "nbd-server-add" => exports::nbd_server_add,
    "nbd-server-remove" => exports::nbd_server_remove,
    "nbd-server-start" => exports::nbd_server_start,
    "nbd-server-stop" => exports::nbd_server_stop,
    "object-add" => objects::object_add,
    "object-del" => objects::object_del,
    "qom-get" => objects::qom_get,
    "qom-list" => objects::qom_list,
    "qom-list-properties" => objects::qom_list_properties,
    "qom-list-types" => objects::qom_list_types,
    "qom-set" => objects::qom_set,
    "query-block" => query::query_block,
    "query-block-dirty-bitmap-ranges" => bitmap_ranges::query_block_dirty_bitmap_ranges,
    "query-block-exports" => exports::query_block_exports,
    "query-block-jobs" => jobs::query_block_jobs,
    "query-commands" => control::query_commands,
    "query-iothreads" (machine) => vm::query_iothreads,
    "query-job-history" => history::query_job_history,
    "query-jobs" => jobs::query_jobs,
    "query-name" (machine) => vm::query_name,
    "query-named-block-nodes" => query::query_named_block_nodes,
    "query-qmp-schema" => control::query_qmp_schema,
    "query-status" (machine) => vm::query_status,
    "query-tpm" (machine) => vm::query_tpm,
    "query-version" => control::query_version,
    "quit" => control::quit,
    "stop" (machine) => vm::stop,
    "system_reset" (machine) => vm::system_reset,
    "transaction" => transaction::transaction,
    "x-debug-block-dirty-bitmap-sha256" => bitmaps::x_debug_block_dirty_bitmap_sha256,
    "x-debug-query-block-graph" => query::query_block_graph,
};

/// The names of the commands that this program has, in alphabetical order.
pub(super) fn names(monitor: &Monitor) -> Vec<&'static str> {
    let mut names: Vec<_> = available(monitor).map(|command| command.name).collect();
    names.push(NEGOTIATE);
    names.sort_unstable();
    names
}

fn available(monitor: &Monitor) -> impl Iterator<Item = &'static Command> {
    let has_machine = monitor.machine().is_some();
    COMMANDS
        .iter()
        .filter(move |command| has_machine || !command.needs_machine)
}

/// Starts a command: the future carries it out.
///
/// Errors: no such command.
pub(super) fn start(
    monitor: &Rc<Monitor>,
    name: &str,
    args: Args,
) -> Result<LocalBoxFuture<'static, Outcome>, QmpError> {
    let command = available(monitor)
        .find(|command| command.name == name)
        .ok_or_else(|| QmpError::not_found(name))?;
    Ok((command.start)(Rc::clone(monitor), args))
}

/// What `exec-oob` is answered: no command of ours needs to overtake others,
/// since none blocks the monitor.
pub(super) fn refuse_out_of_band(monitor: &Monitor, name: &str) -> QmpError {
    if name == NEGOTIATE || available(monitor).any(|command| command.name == name) {
        QmpError::generic(format!("The command {name} does not support OOB"))
    } else {
        QmpError::not_found(name)
    }
}

/// `query-version`: the QEMU whose interface this is, and who provides it.
pub(super) fn version() -> Value {
    json!({
        "qemu": {"major": 7, "minor": 2, "micro": 0},
        "package": concat!("diptych-", env!("CARGO_PKG_VERSION")),
    })
}

/// An empty success.
fn done() -> Outcome {
    Ok(json!({}))
}

/// Waits for `work`, but no longer than [`PATIENCE`].
///
/// Errors: it takes longer; `what` then says what is not done. Cancel: as
/// dropping `work`.
async fn bounded<T>(what: &str, work: impl Future<Output = T>) -> Result<T, QmpError> {
    bounded_by(PATIENCE, what, work).await
}

/// As [`bounded`], but with a `patience` of its own.
async fn bounded_by<T>(
    patience: Duration,
    what: &str,
    work: impl Future<Output = T>,
) -> Result<T, QmpError> {
    let deadline = sleep(patience);
    pin_mut!(work, deadline);
    match select(work, deadline).await {
        Either::Left((result, _)) => Ok(result),
        Either::Right(_) => Err(QmpError::generic(format!(
            "{what} took longer than {} seconds",
            patience.as_secs()
        ))),
    }
}
