//! `transaction`: several actions, all or none, at one instant.
//!
//! Every action is read before anything happens, and what backups need is found or
//! opened. Then requests to all nodes that the actions are about are held back, and the
//! actions are carried out in their order with nothing awaited. The first that fails ends
//! it: those before it are undone, the last one first. Otherwise all last, jobs run, and
//! requests go on.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{BitmapChange, Drained, Graph, GraphError, Node};
use futures_util::future::join_all;
use jobs::TxnKey;
use jobs::backup::PreparedBackup;

use super::backup::{BackupArgs, ReadyBackup};
use super::bitmaps::{BitmapAction, Prepared, kept_by};
use super::{Outcome, done};
use crate::monitor::Monitor;
use crate::monitor::args::Args;
use crate::monitor::error::QmpError;

/// Longest that guests are held because some of their requests do not end.
const DRAIN: Duration = Duration::from_secs(2);

/// Most actions in one transaction: each may hold a node.
const MAX_ACTIONS: usize = 1024;

/// How jobs that are started together end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum CompletionMode {
    /// Each for itself.
    #[default]
    Individual,
    /// All or none.
    Grouped,
}

const COMPLETION_MODES: &[(&str, CompletionMode)] = &[
    ("individual", CompletionMode::Individual),
    ("grouped", CompletionMode::Grouped),
];

/// An action, read.
enum Action {
    /// Fails.
    Abort,
    Bitmap(BitmapAction),
    Backup(Box<BackupArgs>),
}

/// Reads the `data` of an action.
type ReadAction = fn(Args) -> Result<Action, QmpError>;

const ACTIONS: &[(&str, ReadAction)] = &[
    ("abort", |args| args.finish().map(|()| Action::Abort)),
    ("block-dirty-bitmap-add", |args| {
        BitmapAction::add(args).map(Action::Bitmap)
    }),
    ("block-dirty-bitmap-remove", |args| {
        BitmapAction::remove(args).map(Action::Bitmap)
    }),
    ("block-dirty-bitmap-clear", |args| {
        BitmapAction::clear(args).map(Action::Bitmap)
    }),
    ("block-dirty-bitmap-enable", |args| {
        BitmapAction::enable(args).map(Action::Bitmap)
    }),
    ("block-dirty-bitmap-disable", |args| {
        BitmapAction::disable(args).map(Action::Bitmap)
    }),
    ("block-dirty-bitmap-merge", |args| {
        BitmapAction::merge(args).map(Action::Bitmap)
    }),
    ("blockdev-backup", |args| {
        BackupArgs::blockdev(args).map(|args| Action::Backup(Box::new(args)))
    }),
    ("drive-backup", |args| {
        BackupArgs::drive(args).map(|args| Action::Backup(Box::new(args)))
    }),
];

/// An action whose turn may come.
enum Ready {
    /// It fails.
    Never(QmpError),
    Bitmap(BitmapAction),
    Backup(Box<ReadyBackup>),
}

/// An action that has been carried out.
enum Applied {
    Bitmap(BitmapChange),
    /// With the section in which it was prepared, by its place.
    Backup(PreparedBackup, usize),
}

/// The nodes whose requests are held back, each with its section.
struct Held(Vec<(Arc<Node>, Drained)>);

impl Held {
    fn place(&self, node: &Node) -> Option<usize> {
        self.0.iter().position(|(held, _)| held.id() == node.id())
    }
}

/// Cancel: nothing has happened.
pub(super) async fn transaction(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let actions = args.required_object_list("actions")?;
    if actions.len() > MAX_ACTIONS {
        return Err(QmpError::generic(format!(
            "A transaction of {} actions is too long: {MAX_ACTIONS} are allowed",
            actions.len()
        )));
    }
    let actions = actions.into_iter().map(read_action);
    let actions = actions.collect::<Result<Vec<_>, _>>()?;
    let mut mode = None;
    if let Some(mut properties) = args.optional_object("properties")? {
        mode = properties.optional_enum("completion-mode", COMPLETION_MODES)?;
        properties.finish()?;
    }
    args.finish()?;
    if mode == Some(CompletionMode::Grouped) {
        check_grouped(&actions)?;
    }

    let (ready, prepared) = find(&monitor, actions).await;
    let outcome = carry_out_alone(&monitor, ready, mode).await;
    // Without bitmaps, what was made for them goes again.
    let made = prepared.iter().map(|made| Arc::clone(&made.node));
    let mut nodes: Vec<_> = made.collect();
    drop(prepared);
    if let Ok(kept) = &outcome {
        nodes.extend(kept.iter().cloned());
    }
    nodes.sort_by_key(|node| node.id());
    nodes.dedup_by_key(|node| node.id());
    let stored = monitor.graph.store_bitmaps(&nodes).await;
    outcome?;
    stored?;
    done()
}

/// Carries the actions out while no other command changes the graph. Gives the nodes whose
/// persistent bitmaps have changed, which is not durable yet.
///
/// Cancel: nothing has happened.
async fn carry_out_alone(
    monitor: &Monitor,
    ready: Vec<Ready>,
    mode: Option<CompletionMode>,
) -> Result<Vec<Arc<Node>>, QmpError> {
    // Nodes stay what they are until it has ended.
    let _alone = monitor.graph_commands.lock().await;
    let held = drain(&monitor.graph, &ready).await?;
    let txn = match mode {
        Some(CompletionMode::Grouped) => Some(monitor.jobs().lock().new_txn()),
        _ => None,
    };
    let applied = carry_out(monitor, ready, txn, &held);
    if let Some(txn) = txn {
        monitor.jobs().lock().close_txn(txn);
    }
    let mut kept = Vec::new();
    for action in applied? {
        match action {
            Applied::Bitmap(change) => {
                kept.extend(kept_by(change.bitmap()));
                change.commit();
            }
            Applied::Backup(backup, _) => {
                backup.start();
            }
        }
    }
    drop(held);
    Ok(kept)
}

/// Refuses actions that do not end as jobs do, before anything is done: what comes after
/// one that fails in any case has no turn.
fn check_grouped(actions: &[Action]) -> Result<(), QmpError> {
    for action in actions {
        match action {
            Action::Abort => break,
            Action::Backup(_) => {}
            Action::Bitmap(action) => {
                return Err(QmpError::generic(format!(
                    "Action '{}' does not support Transaction property completion-mode = grouped",
                    action.name()
                )));
            }
        }
    }
    Ok(())
}

fn read_action(mut args: Args) -> Result<Action, QmpError> {
    let read = args.required_enum("type", ACTIONS)?;
    let action = read(args.required_object("data")?)?;
    args.finish()?;
    Ok(action)
}

/// Finds what backups need, up to the first action that is sure to fail: what comes
/// after that has no turn, and no target is made for it.
///
/// Also gives the room for the bitmaps that are to be kept, to be held until they are added.
///
/// Cancel: what was opened is closed.
async fn find(monitor: &Monitor, actions: Vec<Action>) -> (Vec<Ready>, Vec<Prepared>) {
    let mut ready = Vec::with_capacity(actions.len());
    let mut prepared = Vec::new();
    for action in actions {
        let next = match action {
            Action::Abort => {
                Ready::Never(QmpError::generic("Transaction aborted using Abort action"))
            }
            Action::Bitmap(action) => match action.prepare(&monitor.graph).await {
                Ok(made) => {
                    prepared.extend(made);
                    Ready::Bitmap(action)
                }
                Err(error) => Ready::Never(error),
            },
            Action::Backup(args) => match args.find(monitor).await {
                Ok(backup) => Ready::Backup(Box::new(backup)),
                Err(error) => Ready::Never(error),
            },
        };
        let ends = matches!(next, Ready::Never(_));
        ready.push(next);
        if ends {
            break;
        }
    }
    (ready, prepared)
}

/// Holds requests back to all nodes that the actions are about, all at the same time.
/// What is not there is found missing later, in its turn.
async fn drain(graph: &Graph, actions: &[Ready]) -> Result<Held, GraphError> {
    let mut nodes: Vec<Arc<Node>> = Vec::new();
    for action in actions {
        let node = match action {
            Ready::Never(_) => None,
            Ready::Bitmap(action) => action.node(graph),
            Ready::Backup(backup) => Some(Arc::clone(backup.source())),
        };
        nodes.extend(node.filter(|node| !nodes.iter().any(|known| known.id() == node.id())));
    }
    let sections = nodes
        .iter()
        .map(|node| graph.drain_within(node, &[], DRAIN));
    let sections: Result<Vec<_>, _> = join_all(sections).await.into_iter().collect();
    Ok(Held(nodes.into_iter().zip(sections?).collect()))
}

/// Carries all actions out, or none.
fn carry_out(
    monitor: &Monitor,
    actions: Vec<Ready>,
    txn: Option<TxnKey>,
    held: &Held,
) -> Result<Vec<Applied>, QmpError> {
    let mut applied = Vec::with_capacity(actions.len());
    for action in actions {
        match apply(monitor, action, txn, held) {
            Ok(done) => applied.push(done),
            Err(error) => {
                undo(applied, held);
                return Err(error);
            }
        }
    }
    Ok(applied)
}

fn undo(mut applied: Vec<Applied>, held: &Held) {
    while let Some(last) = applied.pop() {
        match last {
            Applied::Bitmap(change) => drop(change),
            Applied::Backup(backup, place) => backup.take_back(&held.0[place].1),
        }
    }
}

fn apply(
    monitor: &Monitor,
    action: Ready,
    txn: Option<TxnKey>,
    held: &Held,
) -> Result<Applied, QmpError> {
    match action {
        Ready::Never(error) => Err(error),
        Ready::Bitmap(action) => action.apply(&monitor.graph).map(Applied::Bitmap),
        Ready::Backup(backup) => {
            let source = backup.source();
            let place = held
                .place(source)
                .ok_or_else(|| QmpError::generic(format!("Node '{}' has gone", source.name())))?;
            let prepared = backup.prepare(monitor, txn, &held.0[place].1)?;
            Ok(Applied::Backup(prepared, place))
        }
    }
}
