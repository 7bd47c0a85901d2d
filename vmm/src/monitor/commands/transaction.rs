//! `transaction`: several actions, all or none, at one instant.
//!
//! Every action is read before anything happens. Then requests to all nodes that the
//! actions are about are held back, and the actions are carried out in their order
//! with nothing awaited. The first that fails ends it: those before it are undone, the
//! last one first. Otherwise all last, jobs run, and requests go on.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use block::{BitmapChange, Drained, Graph, GraphError, Node};
use futures_util::future::join_all;

use super::bitmaps::BitmapAction;
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
];

/// An action that has been carried out. Dropped, it is undone.
enum Applied {
    Bitmap(BitmapChange),
}

impl Applied {
    fn commit(self) {
        match self {
            Self::Bitmap(change) => change.commit(),
        }
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

    // Nodes stay what they are until it has ended.
    let _alone = monitor.graph_commands.lock().await;
    let held = drain(&monitor.graph, &actions).await?;
    let mut applied = Vec::with_capacity(actions.len());
    for action in actions {
        match apply(&monitor, action, mode.unwrap_or_default()) {
            Ok(done) => applied.push(done),
            Err(error) => {
                while let Some(last) = applied.pop() {
                    drop(last);
                }
                return Err(error);
            }
        }
    }
    for done in applied {
        done.commit();
    }
    drop(held);
    done()
}

fn read_action(mut args: Args) -> Result<Action, QmpError> {
    let read = args.required_enum("type", ACTIONS)?;
    let action = read(args.required_object("data")?)?;
    args.finish()?;
    Ok(action)
}

/// Holds requests back to all nodes that the actions are about, all at the same time.
/// What is not there is found missing later, in its turn.
async fn drain(graph: &Graph, actions: &[Action]) -> Result<Vec<Drained>, GraphError> {
    let mut nodes: Vec<Arc<Node>> = Vec::new();
    for action in actions {
        let node = match action {
            Action::Abort => None,
            Action::Bitmap(action) => action.node(graph),
        };
        nodes.extend(node.filter(|node| !nodes.iter().any(|known| known.id() == node.id())));
    }
    let sections = nodes
        .iter()
        .map(|node| graph.drain_within(node, &[], DRAIN));
    join_all(sections).await.into_iter().collect()
}

fn apply(monitor: &Monitor, action: Action, mode: CompletionMode) -> Result<Applied, QmpError> {
    match action {
        Action::Abort => Err(QmpError::generic("Transaction aborted using Abort action")),
        Action::Bitmap(action) if mode == CompletionMode::Grouped => {
            Err(QmpError::generic(format!(
                "Action '{}' does not support Transaction property completion-mode = grouped",
                action.name()
            )))
        }
        Action::Bitmap(action) => action.apply(&monitor.graph).map(Applied::Bitmap),
    }
}
