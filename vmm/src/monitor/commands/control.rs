//! The monitor itself: its commands, its version, its end.

use std::rc::Rc;

use serde_json::{Value, json};

use super::{Outcome, done, names, version};
use crate::monitor::args::Args;
use crate::monitor::error::{ErrorClass, QmpError};
use crate::monitor::{Monitor, schema};

pub(super) async fn query_commands(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let names = names(&monitor).into_iter();
    Ok(names.map(|name| json!({"name": name})).collect())
}

/// What clients look features up in.
pub(super) async fn query_qmp_schema(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let has_machine = monitor.machine().is_some();
    schema::introspect(names(&monitor).into_iter(), has_machine)
        .map_err(|error| QmpError::with_causes(ErrorClass::Generic, &error))
}

pub(super) async fn query_version(_monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    Ok(version())
}

/// Answers first; the program ends afterwards.
pub(super) async fn quit(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    monitor.request_quit();
    done()
}

/// The human monitor: `info version` and nothing else.
pub(super) async fn human_monitor_command(_monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let line = args.required_str("command-line")?;
    args.optional_i64("cpu-index")?;
    args.finish()?;
    let words: Vec<&str> = line.split_whitespace().collect();
    Ok(Value::from(match words.as_slice() {
        ["info", "version"] => {
            let version = version();
            let number = |name: &str| version["qemu"][name].as_u64().unwrap_or_default();
            format!(
                "{}.{}.{} ({})\r\n",
                number("major"),
                number("minor"),
                number("micro"),
                version["package"].as_str().unwrap_or_default()
            )
        }
        [] => String::new(),
        [word, ..] => format!("unknown command: '{word}'\r\n"),
    }))
}
